"""The operations that are measured, each with its inputs, oracle, cost and methods."""
