"""Benchmarks, for pytest-benchmark: every case is checked against the reference before it is timed."""
