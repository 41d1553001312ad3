"""`python lora/fuse.py --adapter-path adapters`: the command `mlx-openelm fuse`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

try:
    from mlx_openelm.cli.main import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the repository's top folder run: pip install '.[cpu]'")

if __name__ == "__main__":
    main(["fuse", *sys.argv[1:]])
