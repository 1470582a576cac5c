"""Benchmarks: every number of `docs/measurements.md`, each made by one module here.

`python -m bench` runs them all; see `--help`. Each figure that compares is the median of the ratios
of neighbouring slots of one run, never a quotient of numbers from different runs.
"""
