"""From tokenized examples to the batches of each step: which examples, in which rows, how padded or packed."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx

from ...errors import RequestError
from .examples import Example
from .packing import pack

# A target that is not learned: padding, prompts under --mask-prompt. PyTorch's number for it.
IGNORED = -100

# The indices of the examples in one row of a batch.
Row = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what is to be predicted after each.

    Args:
        inputs: token ids [rows, length], padding on the right.
        targets: the id that follows each position [rows, length], `IGNORED` where it is not learned.
        segments: of packed rows, which example each position belongs to [rows, length], counted from 0 in each row,
            -1 for padding; None where each row is one example, for which the causal mask is enough.
        examples: the indices of the examples in it.
        num_targets: how many targets are not `IGNORED`.
        num_tokens: how many positions are not padding.
    """

    inputs: mx.array
    targets: mx.array
    segments: mx.array | None
    examples: tuple[int, ...]
    num_targets: int
    num_tokens: int


@dataclass(frozen=True)
class Step:
    """One update of the weights.

    Args:
        index: which update it is, counted from 0 over all epochs.
        epoch: the pass over the examples it belongs to, counted from 0.
        batches: this process's part of each micro-batch; fewer than there are, or none, where a micro-batch has fewer
            rows than there are processes. A process without any still adds its zero gradients to the sum.
        num_targets: how many targets all processes learn from in this update; it can be 0.
        num_tokens: how many positions of examples all processes read.
        examples: the indices of the examples in it, those of all processes.
    """

    index: int
    epoch: int
    batches: list[Batch]
    num_targets: int
    num_tokens: int
    examples: tuple[int, ...]


class Batches:
    """Which examples each update learns from: a function of the examples, the options, the seed and its index.

    There is no state, so a run goes on at any step. Every epoch holds every example once, in an order of its own; one
    of its micro-batches may have fewer rows, and its last update fewer micro-batches. A batch holds examples of about
    the same length, or, packed, rows that are filled with several examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        grad_accumulation_steps: int = 1,
        world_size: int = 1,
        packing: bool = False,
        max_seq_length: int,
        seed: int = 0,
        shuffle: bool = True,
    ):
        """
        Args:
            batch_size: the rows of a micro-batch over all processes, of which process r has r, r + world_size, ...
            grad_accumulation_steps: the micro-batches of an update.
            max_seq_length: the most positions a row has; no example has more (see `examples.tokenize`).
            shuffle: without it the examples come in their order, packed or not, in every epoch.

        Raises:
            RequestError: no examples, a size below 1, or a batch size that the processes cannot share.
        """
        _check(examples, batch_size, world_size, max_seq_length)
        if grad_accumulation_steps < 1:
            raise RequestError(f"--grad-accumulation-steps must be 1 or more, got {grad_accumulation_steps}.")
        self.examples = examples
        self.batch_size, self.world_size, self.packing = batch_size, world_size, packing
        self.max_seq_length, self.seed, self.shuffle = max_seq_length, seed, shuffle
        self._accumulation = grad_accumulation_steps
        self._lengths = [example.num_positions for example in examples]
        self._planned: tuple[int, list[list[Row]]] = (0, self._plan(0))
        self.num_micro_batches = len(self._planned[1])
        # How well rows can be filled depends on the lengths alone, so every epoch has as many steps.
        self.steps_per_epoch = math.ceil(self.num_micro_batches / grad_accumulation_steps)

    def step(self, index: int, rank: int = 0) -> Step:
        """The update `index`, as the process `rank` takes part in it."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self._accumulation
        micro_batches = self.plan(epoch)[start : start + self._accumulation]
        parts = [rows[rank :: self.world_size] for rows in micro_batches]
        indices = tuple(i for rows in micro_batches for row in rows for i in row)
        return Step(
            index=index,
            epoch=epoch,
            batches=[
                make_batch(self.examples, rows, self.max_seq_length, packed=self.packing) for rows in parts if rows
            ],
            num_targets=sum(self.examples[i].num_targets for i in indices),
            num_tokens=sum(self._lengths[i] for i in indices),
            examples=indices,
        )

    def plan(self, epoch: int) -> list[list[Row]]:
        """The micro-batches of an epoch, each a list of rows, each row the indices of its examples."""
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return self._planned[1]

    def _plan(self, epoch: int) -> list[list[Row]]:
        draw = random.Random(f"{self.seed} {epoch}")
        order = list(range(len(self._lengths)))
        if self.shuffle:
            draw.shuffle(order)
        rows: list[Row] = [(index,) for index in order]
        if self.packing:
            rows = pack(order, self._lengths, self.max_seq_length, largest_first=self.shuffle)
        if not self.shuffle:
            return _chunks(rows, self.batch_size)
        # Rows that are padded to the same length share batches, and among those chance decides: sorting by the length
        # itself would pad no less, and put the same examples together in every epoch.
        draw.shuffle(rows)
        rows.sort(key=lambda row: padded(sum(self._lengths[index] for index in row)))
        # The batch that is not full comes anywhere, which moves the bounds of those after it.
        start = draw.randrange(len(rows) // self.batch_size + 1) * self.batch_size
        end = start + len(rows) % self.batch_size
        partial = [rows[start:end]] if start < end else []
        micro_batches = _chunks(rows[:start], self.batch_size) + partial + _chunks(rows[end:], self.batch_size)
        draw.shuffle(micro_batches)
        return micro_batches

    def shapes(self, epoch: int = 0) -> Counter[tuple[int, int]]:
        """How often each shape [rows, length] occurs in an epoch, over all processes; each is traced once."""
        shapes: Counter[tuple[int, int]] = Counter()
        for rows in self.plan(epoch):
            for rank in range(min(self.world_size, len(rows))):
                part = rows[rank :: self.world_size]
                shapes[len(part), _row_length(part, self._lengths, self.max_seq_length)] += 1
        return shapes

    def largest_shape(self) -> tuple[int, int]:
        """A shape [rows, length] that no batch of any epoch exceeds: what memory has to suffice for."""
        rows = min(math.ceil(self.batch_size / self.world_size), len(self._lengths))
        longest = self.max_seq_length if self.packing else max(self._lengths)
        return rows, min(padded(longest), self.max_seq_length)

    def padding_overhead(self, epoch: int = 0) -> float:
        """Positions of padding over positions of examples, in an epoch: 0.05 is 5 positions in vain for 100."""
        positions = sum(rows * length * number for (rows, length), number in self.shapes(epoch).items())
        return positions / sum(self._lengths) - 1


def validation_batches(
    examples: Sequence[Example],
    batch_size: int,
    *,
    num_batches: int = -1,
    max_seq_length: int,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
) -> list[Batch]:
    """The batches that the process `rank` evaluates, the same ones each time, shortest examples first.

    Args:
        batch_size: rows over all processes, as in `Batches`.
        num_batches: at most so many, of examples drawn from all of them; -1 takes every example.

    Raises:
        RequestError: as `Batches` raises.
    """
    _check(examples, batch_size, world_size, max_seq_length)
    if num_batches == 0 or num_batches < -1:
        raise RequestError(f"The number of batches must be 1 or more, or -1 for all, got {num_batches}.")
    drawn: Sequence[int] = range(len(examples))
    if 0 < num_batches * batch_size < len(examples):
        # Of those that have a loss to measure, which some lose when they are cut.
        measured = [index for index in drawn if examples[index].num_targets]
        drawn = sorted(random.Random(seed).sample(measured, min(num_batches * batch_size, len(measured))))
    rows: list[Row] = [(index,) for index in sorted(drawn, key=lambda index: examples[index].num_positions)]
    parts = (chunk[rank::world_size] for chunk in _chunks(rows, batch_size))
    return [make_batch(examples, part, max_seq_length) for part in parts if part]


def padded(length: int) -> int:
    """The length that rows of `length` positions are padded to: a multiple of 8 up to 256, of 16 up to 512, and so on.

    Each shape makes MLX trace the update anew, for 4 to 40 ms a layer. So the multiple grows with the length, and
    there are at most 80 lengths up to 2048, while padding costs 2% on average.
    """
    multiple = max(8, 1 << max((length - 1).bit_length() - 5, 0))
    return -(-length // multiple) * multiple


def make_batch(examples: Sequence[Example], rows: Sequence[Row], max_seq_length: int, *, packed: bool = False) -> Batch:
    """The batch with these rows, each the indices of its examples; `packed` adds the segments.

    An example takes one position less than it has tokens, so no position predicts a token of another example.
    """
    lengths = {index: examples[index].num_positions for row in rows for index in row}
    width = _row_length(rows, lengths, max_seq_length)
    size = len(rows) * width
    inputs = array("i", bytes(4 * size))
    targets = array("i", [IGNORED]) * size
    segments = array("i", [-1]) * size if packed else None
    for number, row in enumerate(rows):
        at = number * width
        for segment, index in enumerate(row):
            tokens, length = examples[index].tokens, lengths[index]
            inputs[at : at + length] = tokens[:-1]
            for start, end in examples[index].learned:
                targets[at + start - 1 : at + end - 1] = tokens[start:end]
            if segments is not None:
                segments[at : at + length] = array("i", [segment]) * length
            at += length
    shape = (len(rows), width)
    return Batch(
        inputs=_to_mlx(inputs, shape),
        targets=_to_mlx(targets, shape),
        segments=None if segments is None else _to_mlx(segments, shape),
        examples=tuple(index for row in rows for index in row),
        num_targets=sum(examples[index].num_targets for index in lengths),
        num_tokens=sum(lengths.values()),
    )


def _row_length(rows: Sequence[Row], lengths: Sequence[int] | Mapping[int, int], max_seq_length: int) -> int:
    return min(padded(max(sum(lengths[index] for index in row) for row in rows)), max_seq_length)


def _to_mlx(values: array[int], shape: tuple[int, int]) -> mx.array:
    # MLX copies from a buffer in one go; from a list it would look at every number.
    return mx.array(memoryview(values).cast("B").cast("i", shape))  # type: ignore[arg-type]


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _check(examples: Sequence[Example], batch_size: int, world_size: int, max_seq_length: int) -> None:
    if not examples:
        raise RequestError("There are no examples to make batches of.")
    if batch_size < 1:
        raise RequestError(f"--batch-size must be 1 or more, got {batch_size}.")
    if batch_size % world_size:
        raise RequestError(
            f"--batch-size is shared by the {world_size} processes, so it must be a multiple of {world_size}, "
            f"got {batch_size}."
        )
    longest = max(example.num_positions for example in examples)
    if longest > max_seq_length:
        raise RequestError(f"An example has {longest} positions, more than --max-seq-length {max_seq_length}.")
