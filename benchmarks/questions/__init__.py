"""The questions, one module each: see :mod:`benchmarks` for what a question is."""
