"""Triton kernels and their launchers, about one operation and direction a file. Importing one of these modules needs Triton."""
