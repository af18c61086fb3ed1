"""Measurement: one process a case, its time and memory, and the machine."""
