"""Products of few rows as kernels of our own for Metal. Nothing here runs on a CPU or with CUDA."""
