"""The rows of `packed` mode: sources mixed by weight, documents shuffled, rows filled to the last position.

Every stage is a function of the seed and of a position, which is that of the start of its current block or window and
what was taken from it since. To continue, the block is read and shuffled again.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from typing import Any, NamedTuple

from .documents import no_text
from .filling import Piece, fill
from .reader import Chunk, Position
from .repeating import Chunks

# Positions of a window of documents that are packed together: 512 rows of 2048.
WINDOW = 1 << 20
# A text of a few words would be read a hundred thousand times to fill one; after so many epochs a row is enough.
MOST_EPOCHS = 1024


class Document(NamedTuple):
    """The targets of a document, or of the rest of one, and where it is from: a path and its number in the file."""

    targets: array[int]
    path: str
    number: int


class Row(NamedTuple):
    """A full row: its pieces as (targets, path, number)."""

    pieces: list[Document]


class _Source:
    """The documents of a source, shuffled in blocks of at least `buffer`; a block ends with the epoch."""

    def __init__(self, chunks: Chunks, number: int, buffer: int, seed: int, state: dict[str, Any] | None):
        self._chunks, self._number, self._buffer, self._seed = chunks, number, buffer, seed
        state = state or {"start": [0, 0, 0], "taken": 0, "block": 0, "counts": {}}
        self._block, self._taken = state["block"], state["taken"]
        self._start = Position(*state["start"])
        self._counts = Counter(state["counts"])
        self._is_counted: bool = state.get("counted", False)  # whether they have the current block's
        self._next: Chunk | None = None
        self._documents: list[Document] | None = None

    def state(self) -> dict[str, Any]:
        counts = {name: count for name, count in self._counts.items() if count}
        place = {"start": list(self._start), "taken": self._taken, "block": self._block}
        return place | {"counts": counts, "counted": self._is_counted}

    @property
    def epoch(self) -> int:
        return self._start.epoch

    def counts(self) -> Counter[str]:
        """The documents read so far, with all of the current block, and those left out; each counts once."""
        return self._counts

    def take(self) -> Document:
        if self._documents is None:
            self._documents = self._read_block()
        searched_from: int | None = None
        while self._taken >= len(self._documents):
            assert self._next is not None
            # A source without text would be searched for ever.
            if not self._documents and searched_from is not None and self._next.position.epoch > searched_from + 1:
                raise no_text(self._next.file)
            searched_from = self._start.epoch if searched_from is None else searched_from
            self._start, self._taken, self._block = self._next.position, 0, self._block + 1
            self._is_counted = False
            self._documents = self._read_block()
        self._taken += 1
        return self._documents[self._taken - 1]

    def _read_block(self) -> list[Document]:
        documents: list[Document] = []
        chunk = self._next or self._chunks.take(self._number)
        first = chunk.position
        while chunk.position.epoch == first.epoch and (chunk.position == first or len(documents) < self._buffer):
            encoded = chunk.encoded
            documents += [
                Document(tokens, chunk.file.path, number)
                for tokens, number in zip(encoded.tokens, encoded.numbers, strict=True)
            ]
            if not self._is_counted and chunk.position.epoch == 0:
                self._counts.update(encoded.counts)
            chunk = self._chunks.take(self._number)
        self._next, self._is_counted = chunk, True
        if self._buffer > 1 and len(documents) > 1:
            random.Random(f"{self._seed} {self._number} block {self._block}").shuffle(documents)
        return documents


class PackedRows:
    """Full rows without end.

    Args:
        weights: the share of each source's tokens.
        length: the positions of a row.
        buffer: the documents of a source that are shuffled together; 0 keeps all in order.
        state: what `state` returned, to continue from there.
    """

    def __init__(
        self,
        chunks: Chunks,
        weights: list[float],
        *,
        length: int,
        buffer: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        self._weights, self._length, self._seed, self._shuffles = weights, length, seed, buffer > 1
        sources = state["sources"] if state else [None] * len(weights)
        self._sources = [_Source(chunks, i, buffer, seed, sources[i]) for i in range(len(weights))]
        self._tokens: list[int] = list(state["tokens"]) if state else [0] * len(weights)
        self._carried = [Document(array("i", ids), path, at) for ids, path, at in state["carried"]] if state else []
        self._window: int = state["window"] if state else 0
        self._taken: int = state["taken"] if state else 0
        self._split: int = state["split"] if state else 0
        self._start = self._snapshot()
        self._rows: list[Row] | None = None

    def state(self) -> dict[str, Any]:
        """The position after the last row, for JSON."""
        return self._start | {"taken": self._taken}

    @property
    def epoch(self) -> int:
        """The whole epochs of the source that is furthest behind, at the start of the window."""
        return min(source["start"][0] for source in self._start["sources"])

    def counts(self) -> Counter[str]:
        """Documents read up to this window, and those left out, each once; and how often one was cut to fill a row."""
        counts: Counter[str] = Counter()
        for source in self._sources:
            counts.update(source.counts())
        return counts + Counter({"documents split": self._split})

    def take(self) -> Row:
        if self._rows is None:
            self._rows = self._fill_window()
        while self._taken >= len(self._rows):
            self._window, self._taken = self._window + 1, 0
            self._start = self._snapshot()
            self._rows = self._fill_window()
        self._taken += 1
        return self._rows[self._taken - 1]

    def _snapshot(self) -> dict[str, Any]:
        return {
            "sources": [source.state() for source in self._sources],
            "tokens": list(self._tokens),
            "carried": [[list(rest.targets), rest.path, rest.number] for rest in self._carried],
            "window": self._window,
            "split": self._split,
        }

    def _fill_window(self) -> list[Row]:
        documents = list(self._carried)
        size = sum(len(document.targets) for document in documents)
        first = [source.epoch for source in self._sources]
        while size < self._length or (size < WINDOW and self._epochs_since(first) < MOST_EPOCHS):
            document = self._take_document()
            documents.append(document)
            size += len(document.targets)
        lengths = [len(document.targets) for document in documents]
        filled, left = fill(lengths, self._length, keeps_order=not self._shuffles)
        pieces = Counter(piece.document for row in (*filled, left) for piece in row)
        self._split += sum(number > (-(-lengths[document] // self._length)) for document, number in pieces.items())
        if self._shuffles:
            random.Random(f"{self._seed} window {self._window}").shuffle(filled)
        self._carried = [_cut(documents[piece.document], piece) for piece in left]
        return [Row([_cut(documents[piece.document], piece) for piece in row]) for row in filled]

    def _epochs_since(self, first: list[int]) -> int:
        """The epochs since those, of the source that has the fewest."""
        return min(source.epoch - epoch for source, epoch in zip(self._sources, first, strict=True))

    def _take_document(self) -> Document:
        """The next document of the source that is furthest behind its share."""
        number = min(range(len(self._weights)), key=lambda i: (self._tokens[i] / self._weights[i], i))
        document = self._sources[number].take()
        self._tokens[number] += len(document.targets)
        return document


def _cut(document: Document, piece: Piece) -> Document:
    return document._replace(targets=document.targets[piece.start : piece.end])
