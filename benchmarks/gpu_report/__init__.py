"""The sections of `python benchmarks/gpu.py`: checks, measurements, and the report of both."""
