"""Draws the pictures in docs/images again.

    python benchmarks/pictures.py

`losses.png` is what the README's first training command draws. It takes about a minute, and needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def training_command() -> list[str]:
    """The words of the README's first training command, without the program's name."""
    lines = (ROOT / "README.md").read_text().splitlines()
    return shlex.split(next(line for line in lines if line.startswith("mlx-openelm lora --train")))[1:]


def draw_losses(command: list[str], target: Path) -> None:
    """Run a training command in a temporary folder, and copy the picture of its losses to `target`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lora").symlink_to(ROOT / "lora")
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "mlx_openelm", *command], cwd=folder, env=environment, check=True)
        shutil.copy(Path(folder, command[command.index("--adapter-path") + 1], "losses.png"), target)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    draw_losses(training_command(), IMAGES / "losses.png")


if __name__ == "__main__":
    main()
