"""The batches of `corenet` mode: those of a run of Apple's CoreNet (GeneralLMDataset and PyTorch's DataLoader).

CoreNet's processes have four workers each, so there are 4 x processes streams of files. The list of all files is
shuffled once and repeated at random to a multiple of that; stream i has files i, i + streams, and so on, and shuffles
them again before each later epoch. A process takes its batches from its workers in turn, so the rows of a batch are
from one stream, one after another.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from ....errors import RequestError
from .documents import no_text
from .files import TextFile
from .packed import Chunks, Document
from .reader import Chunk, Position, Stream

WORKERS = 4  # `dataset.workers` of CoreNet's configurations


def make_streams(files: list[TextFile], processes: int, seed: int) -> list[Stream]:
    """The streams of all processes; the four of process p are 4 p to 4 p + 3."""
    draw = random.Random(seed)
    files = list(files)
    draw.shuffle(files)
    # Workers are copies of the process, so each goes on from this state of the generator.
    number = processes * WORKERS
    if missing := -len(files) % number:
        files += draw.choices(files, k=missing)
    return [Stream(files[stream::number], generator=draw.getstate()) for stream in range(number)]


class _Rows:
    """The rows of one stream."""

    def __init__(self, chunks: Chunks, number: int, state: dict[str, Any] | None):
        self._chunks, self._number = chunks, number
        state = state or {"start": [0, 0, 0], "taken": 0, "counts": {}}
        self._position, self._taken = Position(*state["start"]), state["taken"]
        self._counts = Counter(state["counts"])
        self._is_counted: bool = state.get("counted", False)  # whether they have the current chunk's
        self._chunk: Chunk | None = None

    def state(self) -> dict[str, Any]:
        place = {"start": list(self._position), "taken": self._taken}
        return place | {"counts": dict(self._counts), "counted": self._is_counted}

    def take(self) -> Document:
        searched_from: int | None = None
        while True:
            if self._chunk is None:
                self._chunk = self._chunks.take(self._number)
                self._position = self._chunk.position
            if not self._is_counted:
                self._counts.update(self._chunk.encoded.counts)
                self._is_counted = True
            encoded = self._chunk.encoded
            if self._taken < len(encoded.tokens):
                self._taken += 1
                at = self._taken - 1
                return Document(encoded.tokens[at], self._chunk.file.path, encoded.numbers[at])
            # A stream without rows would be searched for ever.
            searched_from = self._position.epoch if searched_from is None else searched_from
            self._chunk = self._chunks.take(self._number)
            self._position, self._taken, self._is_counted = self._chunk.position, 0, False
            if self._position.epoch > searched_from + 1:
                if not self._counts["documents"]:
                    raise no_text(self._chunk.file)
                raise RequestError(
                    f"No text in {self._chunk.file.path} passes the filters of --mode corenet; lower --min-tokens and "
                    "--min-characters, or give longer documents."
                )


class CorenetBatches:
    """The batches of each of CoreNet's processes, without end.

    Args:
        rows: the rows of a process's batch.
        state: what `state` returned, to continue from there.
    """

    def __init__(self, chunks: Chunks, processes: int, rows: int, state: dict[str, Any] | None = None):
        self._processes, self._rows = processes, rows
        states = state["streams"] if state else [None] * (processes * WORKERS)
        self._streams = [_Rows(chunks, number, each) for number, each in enumerate(states)]
        self._batch: int = state["batch"] if state else 0

    def state(self) -> dict[str, Any]:
        """The position after the last batch, for JSON."""
        return {"streams": [stream.state() for stream in self._streams], "batch": self._batch}

    @property
    def epoch(self) -> int:
        """The whole epochs of the stream that is furthest behind."""
        return min(stream.state()["start"][0] for stream in self._streams)

    def counts(self) -> Counter[str]:
        """What was read, skipped and cut off so far, with all of the current chunks."""
        counts: Counter[str] = Counter()
        for stream in self._streams:
            counts.update(stream.state()["counts"])
        return counts

    def take(self) -> list[list[Document]]:
        """The next batch of every process: rows of BOS, ids, EOS."""
        worker = self._batch % WORKERS
        self._batch += 1
        return [
            [self._streams[process * WORKERS + worker].take() for _ in range(self._rows)]
            for process in range(self._processes)
        ]
