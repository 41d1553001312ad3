"""From the documents of rows to the arrays of a batch, which become MLX's where they are used."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from ..batches import IGNORED, Batch, to_mlx
from .packed import Document


class Rows(NamedTuple):
    """A batch before it is in MLX: [rows, length] each.

    Args:
        examples: the numbers of its documents, or pieces, in the stream.
    """

    inputs: array[int]
    targets: array[int]
    segments: array[int] | None
    shape: tuple[int, int]
    examples: tuple[int, ...]
    num_targets: int


def pack(rows: Sequence[Sequence[Document]], length: int, bos: int, examples: tuple[int, ...]) -> Rows:
    """Full rows: the model reads BOS in place of what came before a piece of a document."""
    inputs, targets, segments = array("i"), array("i"), array("i")
    for row in rows:
        for segment, piece in enumerate(row):
            inputs.append(bos)
            inputs += piece.targets[:-1]
            targets += piece.targets
            segments += array("i", [segment]) * len(piece.targets)
    return Rows(inputs, targets, segments, (len(rows), length), examples, len(targets))


def pad(rows: Sequence[Sequence[Document]], length: int, examples: tuple[int, ...]) -> Rows:
    """Rows of one piece each, with padding after it."""
    inputs, targets = array("i"), array("i")
    number = 0
    for (row,) in rows:
        padding = length - (len(row.targets) - 1)
        inputs += row.targets[:-1] + array("i", bytes(4 * padding))
        targets += row.targets[1:] + array("i", [IGNORED]) * padding
        number += len(row.targets) - 1
    return Rows(inputs, targets, None, (len(rows), length), examples, number)


def to_batch(rows: Rows) -> Batch:
    """The batch of these rows."""
    segments = None if rows.segments is None else to_mlx(rows.segments, rows.shape)
    inputs, targets = to_mlx(rows.inputs, rows.shape), to_mlx(rows.targets, rows.shape)
    return Batch(inputs, targets, segments, rows.examples, rows.num_targets, rows.num_targets)


def padding_positions(batch: Batch) -> int:
    """The positions of a batch whose target is padding, which CoreNet's reported z-loss counts."""
    return batch.inputs.size - batch.num_tokens
