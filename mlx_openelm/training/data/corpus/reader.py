"""The chunks of a stream of documents, in order and without end: which files, in which order in each epoch."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .cache import CachedTokens, Encoded
from .documents import Damaged, Raw, damaged, read_chunks, text_of
from .encoding import Encoder
from .files import TextFile


class Position(NamedTuple):
    """A chunk of a stream: the epoch, the place of its file in the order of that epoch, its number in the file."""

    epoch: int = 0
    place: int = 0
    chunk: int = 0


class Chunk(NamedTuple):
    """A chunk of a stream, encoded. `cached` says that its tokens came from the cache."""

    position: Position
    file: TextFile
    is_last: bool
    encoded: Encoded
    cached: bool


@dataclass
class Stream:
    """Files that are read over and over.

    Args:
        shuffle: the seed of a new order in each epoch; None keeps the order. With `generator`, the state of a
            `random.Random` that shuffles the files, in place, before every epoch but the first, as in CoreNet.
    """

    files: list[TextFile]
    shuffle: str | None = None
    generator: tuple | None = None

    def order(self, epoch: int) -> list[TextFile]:
        """The files of an epoch, in order."""
        if self.generator is None:
            files = list(self.files)
            if self.shuffle is not None and len(files) > 1:
                random.Random(f"{self.shuffle} {epoch}").shuffle(files)
            return files
        draw = random.Random()
        draw.setstate(self.generator)
        files = list(self.files)
        for _ in range(epoch):
            draw.shuffle(files)
        return files


@dataclass(frozen=True)
class Job:
    """What workers need: the streams, how their documents are encoded, and where their tokens are cached."""

    streams: list[Stream]
    starts: list[Position]
    encoder: Encoder
    skip_damaged: bool = False
    token_cache: str | None = None


class StreamReader:
    """Every `stride`-th chunk of a stream from `offset` on, counted from the stream's start."""

    def __init__(self, job: Job, number: int, *, stride: int = 1, offset: int = 0, encoder_key: str = ""):
        self._job, self._key = job, encoder_key
        self._chunks = itertools.islice(self._all(job.streams[number], job.starts[number]), offset, None, stride)

    def read(self) -> Chunk:
        """The next chunk.

        Raises:
            RequestError: a file cannot be read, or a document is damaged.
        """
        position, file, is_last, content = next(self._chunks)
        if isinstance(content, list):
            return Chunk(position, file, is_last, self._encode(file, content), False)
        cached, number = content
        encoded = cached.read(number)
        if encoded is not None:
            return Chunk(position, file, is_last, encoded, True)
        raws = next(iter(read_chunks(file, number)))[0]
        return Chunk(position, file, is_last, self._encode(file, raws), False)

    def _all(
        self, stream: Stream, start: Position
    ) -> Iterator[tuple[Position, TextFile, bool, list[Raw] | tuple[CachedTokens, int]]]:
        for epoch in itertools.count(start.epoch):
            for place, file in enumerate(stream.order(epoch)):
                first = start.chunk if (epoch, place) == start[:2] else 0
                if (epoch, place) < start[:2]:
                    continue
                cached = self._cached(file)
                if cached is not None:
                    for number in range(first, cached.num_chunks):
                        yield Position(epoch, place, number), file, number == cached.num_chunks - 1, (cached, number)
                    continue
                for number, (raws, is_last) in enumerate(read_chunks(file, first), first):
                    yield Position(epoch, place, number), file, is_last, raws

    def _cached(self, file: TextFile) -> CachedTokens | None:
        folder = self._job.token_cache
        return None if folder is None else CachedTokens.open(folder, file, self._key)

    def _encode(self, file: TextFile, raws: list[Raw]) -> Encoded:
        encoded = Encoded([], [], Counter())
        for raw in raws:
            try:
                text = text_of(raw, file)
            except Damaged as error:
                if not self._job.skip_damaged:
                    raise damaged(file, raw, error) from None
                encoded.counts["damaged documents"] += 1
                continue
            if text:
                pieces = self._job.encoder(text, encoded.counts)
                encoded.tokens.extend(pieces)
                encoded.numbers.extend([raw.number] * len(pieces))
        return encoded
