"""Our own kernels for NVIDIA GPUs, compiled on first use and only where MLX runs on CUDA."""
