"""`python -m mlx_openelm.native` compiles the kernels for this machine."""

from .build import main

main()
