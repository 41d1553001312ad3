"""The operations of MLX's graphs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx


def operations(outputs: Sequence[mx.array], folder: Path) -> list[str]:
    """The names of the operations that the outputs need and that are not evaluated; `folder` gets a file."""
    mx.export_to_dot(str(folder / "graph.dot"), list(outputs))
    return re.findall(r'label ?="([A-Z][A-Za-z]+)", shape=rect', (folder / "graph.dot").read_text())
