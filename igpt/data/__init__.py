"""Data: sources of images or tokens by name, and batches that are pure functions of seed and step."""
