"""Batches of preferences: the answers of each in rows of their own, or packed, with what a loss needs beside them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import mlx.core as mx

from .answers import Answer, Answers
from .batches import Batch, Batches, Row, make_batch, to_mlx


@dataclass(frozen=True)
class PreferenceBatch:
    """The answers of a micro-batch in rows.

    Args:
        tokens: all of their tokens; `num_targets` in it counts those whose likelihood is needed.
        owners: the answer each position belongs to [rows, length], counted over the batch; -1 for padding. Of pairs,
            the chosen answers are the even ones and the rejected ones the odd.
        completed: whether each position predicts a token of a completion [rows, length].
        lengths: the tokens of each answer's completion, float32 [answers].
        reference: the log-probability of each answer's completion in the reference model, float32 [answers].
        labels: whether each answer is desirable, float32 [answers]; None for pairs.
        others: of labeled answers, the mismatched ones of the whole micro-batch, over all processes.
        num_targets: the pairs, or labeled answers.
    """

    tokens: Batch
    owners: mx.array
    completed: mx.array
    lengths: mx.array
    reference: mx.array
    labels: mx.array | None
    others: PreferenceBatch | None
    num_targets: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class PreferenceMaker:
    """Makes batches of preferences, as `batches.Make`.

    Args:
        reference: log-probabilities in the reference model, two for each preference: of its answers.
        max_seq_length: the most positions of a row.
    """

    examples: Sequence[Answers]
    reference: Sequence[tuple[float, float]]
    max_seq_length: int
    packed: bool = False
    _answers: list[Answer] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_answers", [answer for item in self.examples for answer in item.answers])

    def __call__(self, rows: Sequence[Row], rank: int, world_size: int) -> PreferenceBatch:
        part = rows[rank::world_size]
        if self.examples[part[0][0]].label is None:
            if self.packed:
                return self._batch([tuple(2 * index + side for index in row for side in (0, 1)) for row in part], part)
            return self._batch([(2 * index + side,) for row in part for index in row for side in (0, 1)], part)
        own = [index for row in part for index in row]
        everyone = [index for row in rows for index in row]
        others = self._batch([(2 * index + 1,) for index in everyone], rows)
        labels = mx.array([float(bool(self.examples[index].label)) for index in own])
        return self._batch([(2 * index,) for index in own], part, labels, others)

    def _batch(
        self,
        rows: Sequence[Row],
        part: Sequence[Row],
        labels: mx.array | None = None,
        others: PreferenceBatch | None = None,
    ) -> PreferenceBatch:
        """The batch of these rows of answers, numbered over all preferences."""
        tokens = make_batch(self._answers, rows, self.max_seq_length, packed=self.packed)
        order = [index for row in rows for index in row]
        width = tokens.inputs.shape[1]
        owners, completed = array("i", [-1]) * tokens.inputs.size, array("i", bytes(4 * tokens.inputs.size))
        number = 0
        for line, row in enumerate(rows):
            answers = [self._answers[index] for index in row]
            ends = accumulate((answer.num_positions for answer in answers), initial=line * width)
            for answer, at in zip(answers, ends, strict=False):
                length = answer.num_positions
                owners[at : at + length] = array("i", [number]) * length
                # A position predicts the token after it.
                completed[at + answer.start - 1 : at + length] = array("i", [1]) * answer.num_completed
                number += 1
        examples = tuple(index for row in part for index in row)
        return PreferenceBatch(
            tokens=tokens,
            owners=to_mlx(owners, tokens.inputs.shape),
            completed=to_mlx(completed, tokens.inputs.shape).astype(mx.bool_),
            lengths=mx.array([float(self._answers[index].num_completed) for index in order]),
            reference=mx.array([self.reference[index // 2][index % 2] for index in order]),
            labels=labels,
            others=others,
            num_targets=len(examples),
            examples=examples,
        )


class PreferenceBatches(Batches):
    """`Batches` of preferences, which take several rows each; packed, a row has room for the longest pair."""

    def __init__(self, examples: Sequence[Answers], *, max_seq_length: int, packing: bool = False, **options: Any):
        """The arguments are those of `Batches`."""
        room = max_seq_length * (2 if packing else 1)
        super().__init__(examples, max_seq_length=room, packing=packing, **options)

    def largest_shape(self) -> tuple[int, int]:
        """A shape [rows, length] that no batch of any epoch exceeds; memory must be enough for it."""
        rows, length = super().largest_shape()
        is_row = self.packing or self.examples[0].label is not None
        return rows if is_row else 2 * rows, length
