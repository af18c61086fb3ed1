"""Programs for those who work on the kernels: what a compiler makes of them, what a GPU makes of them."""
