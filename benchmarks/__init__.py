"""Benchmarks: one registry of cases, each checked against the oracle before it is timed; ``python -m benchmarks``."""
