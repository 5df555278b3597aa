"""Benchmarks of exact GPs with ``gpytorch.settings.use_torch_tensors`` off and on: one module a question.

Run ``python -m benchmarks`` for the main job (training on real data), ``python -m benchmarks --help`` for the rest.

A question is a module with ``TITLE``, ``cases(options)``, ``measure(case, options, advance)``, ``tables(rows)``,
``pictures(rows, folder)`` and, where it has something to say, ``remarks(rows)``; :mod:`benchmarks.run` does the rest.
"""

import os

# Read when torch is imported: its profiler, which counts memory here, would announce itself on stderr at every use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
