"""The variables of processes that tests start."""

from __future__ import annotations

import os
from pathlib import Path

import mlx_openelm

# Where the package under test is. If it is installed, this is not the folder above the tests, whose copy of it may have
# no kernels.
PACKAGE = Path(mlx_openelm.__file__).parents[1]


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """The variables of a process without a network that imports the package under test; it searches `folders` first."""
    paths = [*map(str, folders), str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)} | variables
