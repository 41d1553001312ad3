"""`python convert.py --model ... -q`: the command `mlx-openelm convert`, for people who cloned the repository."""

import sys

try:
    from mlx_openelm.cli.main import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in this folder run: pip install '.[cpu]'")

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
