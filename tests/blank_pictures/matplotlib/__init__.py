"""A stand-in for matplotlib on the path of processes that tests start: it draws the picture of a run's losses blank.

Importing matplotlib and drawing take most of the time of a run of a few steps. See the marker `pictures`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLANK = b"\x89PNG"


class Anything:
    """Takes every call, and has every attribute and item."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> Anything:
        return self

    def __getattr__(self, _: str) -> Anything:
        return self

    def __getitem__(self, _: Any) -> Anything:
        return self


class Figure(Anything):
    def subplots(self, rows: int, *_: Any, **__: Any) -> list[Anything]:
        return [Anything()] * rows

    def savefig(self, file: Path, **_: Any) -> None:
        file.write_bytes(BLANK)
