"""Our own kernels for NVIDIA GPUs: compiled when first used, and only where MLX runs on CUDA."""
