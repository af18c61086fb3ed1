"""Palettes: colours, k-means, file formats."""
