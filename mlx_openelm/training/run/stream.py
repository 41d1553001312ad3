"""A stream of training data as the training loop takes it: steps by their number, and positions to continue from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ..data.batches import Step
from ..data.corpus.rows import padding_positions
from ..step.corenet_loss import DeviceBatch


class Data(Protocol):
    """Data that is read in one direction, such as `corpus.loader.PretrainingData`."""

    def step(self) -> Step: ...
    def state(self) -> dict[str, Any]: ...


class Stream:
    """The steps of a stream from `first` on, which are asked for in order, each once."""

    def __init__(self, data: Data, first: int = 0):
        self._data, self._next = data, first
        # Where the last steps begin. The loop builds a step while the one before is still computed.
        self._positions: dict[int, dict[str, Any]] = {}

    def step(self, index: int, rank: int) -> Any:
        """The data of update `index` for this process."""
        if index != self._next:
            raise ValueError(f"step {index} of a stream whose next step is {self._next}")
        before = {number: position for number, position in self._positions.items() if number == index - 1}
        self._positions = before | {index: self._data.state()}
        self._next = index + 1
        return self._data.step()

    def position(self, step: int) -> dict[str, Any]:
        """Where the stream continues after `step` updates."""
        return self._data.state() if step == self._next else self._positions[step]


@dataclass(frozen=True)
class DeviceStep:
    """A `Step` whose batches are `DeviceBatch`es."""

    batches: list[DeviceBatch]
    num_targets: int
    num_tokens: int
    examples: tuple[int, ...]
    epoch: float


class DeviceStream(Stream):
    """A stream for `CoreNetCrossEntropy`: each batch of a step is that of one of CoreNet's devices."""

    def __init__(self, data: Data, first: int, num_processes: int):
        super().__init__(data, first)
        self._num_processes = num_processes

    def step(self, index: int, rank: int) -> DeviceStep:
        """The data of update `index` for this process."""
        step: Step = super().step(index, rank)
        devices = len(step.batches) * self._num_processes
        batches = [
            DeviceBatch(batch, step.num_targets / (devices * batch.num_targets), padding_positions(batch))
            for batch in step.batches
        ]
        return DeviceStep(batches, step.num_targets, step.num_tokens, step.examples, step.epoch)
