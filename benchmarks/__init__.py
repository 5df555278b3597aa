"""Benchmarks of exact GPs with ``gpytorch.settings.use_torch_tensors`` off and on.

Run ``python -m benchmarks`` for the main job (training on real data), ``python -m benchmarks --help`` for the rest.

The questions lie in :mod:`benchmarks.questions`, what they share in :mod:`benchmarks.shared`. A question is a module
with ``TITLE`` and

* ``cases(options)``: its cases, one for each kernel, data type and n that was asked for, unless it says otherwise;
* ``measure(case, options, advance)``: the rows of one of them, a row for each provider (:mod:`benchmarks.shared.rows`);
* ``tables(rows)``: a table for each kernel, data type, machine and, where there are several, mode;
* ``pictures(rows, folder)``, if it has any: what it drew, likewise; ``remarks(rows)``, if it has something to say.

:mod:`benchmarks.shared.run` does the rest.
"""

import os

# Read when torch is imported: its profiler, which counts memory here, would announce itself on stderr at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
