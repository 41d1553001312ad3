"""Small streams from memory: to fill a window of rows, a text of a few words is taken a hundred thousand times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Protocol

from .reader import Chunk, Position, Stream

# Epochs that are read before one is held. Meanwhile a token cache that is missing or damaged is written.
_READ_EPOCHS = 16
# Tokens of an epoch that are held at most.
_MOST_TOKENS = 1 << 18
# Chunks likewise: one without text takes memory too.
_MOST_CHUNKS = 1 << 12


class Chunks(Protocol):
    """Where the chunks of a stream come from."""

    def take(self, stream: int) -> Chunk: ...


class RepeatedChunks:
    """The chunks of streams, those of small ones from memory once some epochs of theirs were taken."""

    def __init__(self, chunks: Chunks, streams: list[Stream]):
        self._chunks = chunks
        self._repeated = [_Repeated(stream) for stream in streams]

    def take(self, stream: int) -> Chunk:
        """The next chunk of a stream; raises what taking it from the stream itself does."""
        repeated = self._repeated[stream]
        if repeated.chunks is not None:
            return next(repeated.chunks)
        chunk = self._chunks.take(stream)
        repeated.note(chunk)
        return chunk


class _Repeated:
    """What is held of one stream; `chunks` are those after the last one that was noted, once all are known."""

    chunks: Iterator[Chunk] | None = None

    def __init__(self, stream: Stream):
        self._stream = stream
        self._by_file: dict[str, dict[int, Chunk]] = {}
        self._size = self._tokens = 0
        self._epoch: int | None = None  # the one that is noted, from its beginning on
        self._is_small = True

    def note(self, chunk: Chunk) -> None:
        """The next chunk that is taken from the stream itself."""
        position = chunk.position
        if not self._is_small:
            return
        if self._epoch is not None and position.epoch > self._epoch:
            self.chunks = (other for other in self._from(position.epoch) if other.position > position)
            return
        if position.epoch >= _READ_EPOCHS and position == Position(position.epoch, 0, 0):
            self._epoch = position.epoch
        if self._epoch is None:
            return
        self._by_file.setdefault(chunk.file.path, {})[position.chunk] = chunk
        self._size += 1
        self._tokens += sum(map(len, chunk.encoded.tokens))
        if self._tokens > _MOST_TOKENS or self._size > _MOST_CHUNKS:
            self._is_small = False
            self._by_file.clear()

    def _from(self, first: int) -> Iterator[Chunk]:
        for epoch in itertools.count(first):
            for place, file in enumerate(self._stream.order(epoch)):
                for number, chunk in self._by_file.get(file.path, {}).items():
                    yield chunk._replace(position=Position(epoch, place, number))
