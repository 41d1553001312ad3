"""`python -m mlx_openelm ...` is the command `mlx-openelm ...`."""

from .cli.main import main

main()
