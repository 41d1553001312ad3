"""What the parts of `engine.py` share: the model, its folder, and rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx_openelm  # before MLX, for BLAS
from mlx_openelm.text.tokenizer import Tokenizer

import random_model

Row = dict[str, Any]


@dataclass
class Setup:
    """What to measure, and how long.

    Args:
        size: a published size, whose weights are random, or tiny. All computes in float32.
        tokenizer: the folder of the tokenizer; by default the packaged model's, with rows up to the vocabulary.
        steps: steps that are measured.
        repeats: turns of each program.
        quick: shorter prompts and texts, to see that everything runs.
    """

    size: str
    tokenizer: str | None
    steps: int
    repeats: int
    quick: bool
    temporary: Path

    @cached_property
    def folder(self) -> Path:
        """The model with its tokenizer, which both programs read."""
        tiny = self.temporary / "tiny"
        mlx_openelm.convert("tiny", tiny, dtype="float32", dequantize=True)
        folder = tiny if self.size == "tiny" else self.temporary / self.size
        if folder is not tiny:
            random_model.write(self.size, folder)
        if folder is not tiny or self.tokenizer is not None:
            Tokenizer.from_folder(tiny if self.tokenizer is None else Path(self.tokenizer)).save(folder)
        return folder

    def load(self) -> tuple[Any, Tokenizer]:
        """Our model and its tokenizer."""
        return mlx_openelm.load(self.folder)

    def load_mlx_lm(self) -> Any:
        """mlx-lm's model."""
        from mlx_lm.utils import load_model

        return load_model(self.folder)[0]


def make_setup(size: str, tokenizer: str | None, steps: int | None, quick: bool, temporary: str) -> Setup:
    """The setup for these flags."""
    return Setup(size, tokenizer, steps or (4 if quick else 32), 1 if quick else 5, quick, Path(temporary))


def at_least(name: str, ours: float, other: float, bar: float | None = None) -> Row:
    """A row in which more is better."""
    return _row(name, ours, other, bar, bar is None or ours >= bar * other)


def at_most(name: str, ours: float, other: float, bar: float | None = None) -> Row:
    """A row in which less is better."""
    return _row(name, ours, other, bar, bar is None or ours <= bar * other)


def _row(name: str, ours: float, other: float, bar: float | None, passed: bool) -> Row:
    return {"name": name, "ours": ours, "other": other, "ratio": ours / other, "bar": bar, "pass": passed}
