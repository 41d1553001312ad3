"""From tokenized examples to the batches of each step: which examples, in which rows, how padded or packed."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from ...errors import RequestError
from .examples import Example
from .packing import pack

# A target that is not learned: padding, prompts under --mask-prompt. PyTorch's number for it.
IGNORED = -100

# The indices of the examples in one row of a batch.
Row = tuple[int, ...]
# Makes the batch of a process from the rows of a micro-batch, its rank, and the number of processes.
Make = Callable[[Sequence[Row], int, int], Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the token to predict after each.

    Args:
        inputs: token ids [rows, length], padding on the right.
        targets: the id that follows each position [rows, length]; `IGNORED` if it is not learned.
        segments: for packed rows, the example that each position belongs to [rows, length], counted from 0 in each row,
            -1 for padding. None if each row is one example: the causal mask is enough for that.
        examples: the indices of its examples.
        num_targets: the number of targets that are not `IGNORED`.
        num_tokens: the number of positions that are not padding.
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
        index: the number of the update, counted from 0 over all epochs.
        epoch: the pass over the examples it belongs to, counted from 0.
        batches: this process's part of each micro-batch. Some or all are missing when micro-batches have fewer rows
            than there are processes; a process without any still takes part in the sum of gradients, with zeros.
        num_targets: the learned targets of this update, over all processes; it can be 0.
        num_tokens: the positions without padding, over all processes.
        examples: the indices of its examples, over all processes.
    """

    index: int
    epoch: int
    batches: list[Any]
    num_targets: int
    num_tokens: int
    examples: tuple[int, ...]


class Item(Protocol):
    """What batches are made of: an example, or several that belong together, such as a pair.

    `num_positions` is the length of a row that holds it, `num_read` the number of tokens that the model reads.
    """

    @property
    def num_positions(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_read(self) -> int: ...


class Batches:
    """Which examples each update learns from: a function of the examples, the options, the seed and its index.

    There is no state, so a run can continue at any step. Every epoch has every example once, in a new order; one of its
    micro-batches may have fewer rows, and its last update fewer micro-batches. The examples of a batch have similar
    lengths; with packing, its rows are filled with several examples.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        *,
        batch_size: int,
        grad_accumulation_steps: int = 1,
        world_size: int = 1,
        packing: bool = False,
        max_seq_length: int,
        seed: int = 0,
        shuffle: bool = True,
        make: Make | None = None,
    ):
        """
        Args:
            batch_size: the rows of a micro-batch over all processes; process r gets rows r, r + world_size, ...
            grad_accumulation_steps: the micro-batches of an update.
            max_seq_length: the most positions of a row; no example is longer (see `examples.tokenize`).
            shuffle: False keeps the examples in their order in every epoch, packed or not.
            make: makes a process's part of a micro-batch, by default with `make_batch`.

        Raises:
            RequestError: no examples, a size below 1, or a batch size that cannot be divided among the processes.
        """
        _check(examples, batch_size, world_size, max_seq_length)
        if grad_accumulation_steps < 1:
            raise RequestError(f"--grad-accumulation-steps must be 1 or more, got {grad_accumulation_steps}.")
        self.examples = examples
        self.batch_size, self.world_size, self.packing = batch_size, world_size, packing
        self.max_seq_length, self.seed, self.shuffle = max_seq_length, seed, shuffle
        self._accumulation = grad_accumulation_steps
        self._make = make or partial(make_part, examples, max_seq_length=max_seq_length, packed=packing)
        self._lengths = [example.num_positions for example in examples]
        self._planned: tuple[int, list[list[Row]]] = (0, self._plan(0))
        self.num_micro_batches = len(self._planned[1])
        # How rows can be filled depends on the lengths alone, so every epoch has the same number of steps.
        self.steps_per_epoch = math.ceil(self.num_micro_batches / grad_accumulation_steps)

    def step(self, index: int, rank: int = 0) -> Step:
        """The data of update `index` for process `rank`."""
        epoch, within = divmod(index, self.steps_per_epoch)
        start = within * self._accumulation
        micro_batches = self.plan(epoch)[start : start + self._accumulation]
        indices = tuple(i for rows in micro_batches for row in rows for i in row)
        return Step(
            index=index,
            epoch=epoch,
            batches=[self._make(rows, rank, self.world_size) for rows in micro_batches if len(rows) > rank],
            num_targets=sum(self.examples[i].num_targets for i in indices),
            num_tokens=sum(self.examples[i].num_read for i in indices),
            examples=indices,
        )

    def position(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint after `step` updates keeps of the data: nothing, where it derives from the step."""
        return None

    def restore(self, position: dict[str, Any] | None) -> None:
        """Continue from what `position` gave."""

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
        # Rows of the same padded length share batches, in random order. Sorting by exact length would not pad less, and
        # would put the same examples together in every epoch.
        draw.shuffle(rows)
        rows.sort(key=lambda row: padded(sum(self._lengths[index] for index in row)))
        # The batch that is not full is at a random position, which shifts the bounds of those after it.
        start = draw.randrange(len(rows) // self.batch_size + 1) * self.batch_size
        end = start + len(rows) % self.batch_size
        partial = [rows[start:end]] if start < end else []
        micro_batches = _chunks(rows[:start], self.batch_size) + partial + _chunks(rows[end:], self.batch_size)
        draw.shuffle(micro_batches)
        return micro_batches

    def shapes(self, epoch: int = 0) -> Counter[tuple[int, int]]:
        """How many batches of an epoch have each shape [rows, length], over all processes; each is traced once."""
        shapes: Counter[tuple[int, int]] = Counter()
        for rows in self.plan(epoch):
            for rank in range(min(self.world_size, len(rows))):
                part = rows[rank :: self.world_size]
                shapes[len(part), _row_length(part, self._lengths, self.max_seq_length)] += 1
        return shapes

    def largest_shape(self) -> tuple[int, int]:
        """A shape [rows, length] that no batch of any epoch exceeds; memory must be enough for it."""
        rows = min(math.ceil(self.batch_size / self.world_size), len(self._lengths))
        longest = self.max_seq_length if self.packing else max(self._lengths)
        return rows, min(padded(longest), self.max_seq_length)


def validation_batches(
    examples: Sequence[Any],
    batch_size: int,
    *,
    num_batches: int = -1,
    max_seq_length: int,
    world_size: int = 1,
    rank: int = 0,
    seed: int = 0,
    make: Make | None = None,
) -> list[Any]:
    """The batches that process `rank` evaluates: always the same ones, shortest examples first.

    Args:
        batch_size: rows over all processes, as in `Batches`.
        num_batches: at most this many, of randomly drawn examples; -1 takes every example.
        make: as for `Batches`.

    Raises:
        RequestError: as `Batches` raises.
    """
    _check(examples, batch_size, world_size, max_seq_length)
    if num_batches == 0 or num_batches < -1:
        raise RequestError(f"The number of batches must be 1 or more, or -1 for all, got {num_batches}.")
    drawn: Sequence[int] = range(len(examples))
    if 0 < num_batches * batch_size < len(examples):
        # Only examples with a loss to measure; truncation can leave some with none.
        measured = [index for index in drawn if examples[index].num_targets]
        drawn = sorted(random.Random(seed).sample(measured, min(num_batches * batch_size, len(measured))))
    rows: list[Row] = [(index,) for index in sorted(drawn, key=lambda index: examples[index].num_positions)]
    make = make or partial(make_part, examples, max_seq_length=max_seq_length)
    return [make(chunk, rank, world_size) for chunk in _chunks(rows, batch_size) if len(chunk) > rank]


def padded(length: int) -> int:
    """The length that rows of `length` positions are padded to: a multiple of 8 up to 256, of 16 up to 512, and so on.

    MLX traces the update again for each new shape, which takes 4 to 40 ms per layer. So the multiple grows with the
    length: there are at most 80 lengths up to 2048, and padding costs 2% on average.
    """
    multiple = max(8, 1 << max((length - 1).bit_length() - 5, 0))
    return -(-length // multiple) * multiple


def make_part(
    examples: Sequence[Example],
    rows: Sequence[Row],
    rank: int,
    world_size: int,
    *,
    max_seq_length: int,
    packed: bool = False,
) -> Batch:
    """The batch of those rows of a micro-batch that process `rank` takes."""
    return make_batch(examples, rows[rank::world_size], max_seq_length, packed=packed)


def make_batch(examples: Sequence[Example], rows: Sequence[Row], max_seq_length: int, *, packed: bool = False) -> Batch:
    """The batch of these rows, each given by the indices of its examples; `packed` adds the segments.

    An example takes one position fewer than it has tokens, so no position predicts a token of another example.
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
        inputs=to_mlx(inputs, shape),
        targets=to_mlx(targets, shape),
        segments=None if segments is None else to_mlx(segments, shape),
        examples=tuple(index for row in rows for index in row),
        num_targets=sum(examples[index].num_targets for index in lengths),
        num_tokens=sum(lengths.values()),
    )


def _row_length(rows: Sequence[Row], lengths: Sequence[int] | Mapping[int, int], max_seq_length: int) -> int:
    return min(padded(max(sum(lengths[index] for index in row) for row in rows)), max_seq_length)


def to_mlx(values: array[int], shape: tuple[int, ...]) -> mx.array:
    """An array of 32-bit integers of this shape."""
    # MLX copies a buffer at once, but converts a list number by number.
    return mx.array(memoryview(values).cast("B").cast("i", shape))  # type: ignore[arg-type]


def _chunks(items: list[T], size: int) -> list[list[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _check(examples: Sequence[Item], batch_size: int, world_size: int, max_seq_length: int) -> None:
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
