"""CPU kernels of the compiled extension (csrc/cpu), one file an operation."""
