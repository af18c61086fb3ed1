"""`use_kernels`: which kernels a model runs, ours and Hugging Face's."""
