"""Registered operators: schemas, fake kernels, autograd and FLOP formulas."""
