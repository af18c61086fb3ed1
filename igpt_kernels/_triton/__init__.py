"""Triton kernels and their launchers, about one operation and direction a file. Importing a file of this room needs Triton."""
