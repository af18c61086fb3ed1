"""Implementations in plain PyTorch operations: any device, no compiler."""
