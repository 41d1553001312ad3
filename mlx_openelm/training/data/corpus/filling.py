"""Filling rows to the last position: best fit, then the rows that have room left are filled from the emptiest ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..packing import pack


class Piece(NamedTuple):
    """The targets [start, end) of a document of a window, given by its index."""

    document: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def fill(lengths: Sequence[int], capacity: int, *, keeps_order: bool = False) -> tuple[list[list[Piece]], list[Piece]]:
    """Full rows of `capacity` targets, and what is left over, which is less than a row.

    A document longer than a row is cut into whole rows and a rest. Rests and shorter documents are packed best fit, and
    only where that leaves room in a row is another document cut. Each target of each document is in one piece.

    Args:
        keeps_order: fill rows with the documents one after another instead.
    """
    if keeps_order:
        return _in_order(lengths, capacity)
    rows: list[list[Piece]] = []
    rests: list[Piece] = []
    for document, length in enumerate(lengths):
        cut = length - length % capacity
        rows += [[Piece(document, at, at + capacity)] for at in range(0, cut, capacity)]
        if cut < length:
            rests.append(Piece(document, cut, length))
    packed = pack(range(len(rests)), [rest.size for rest in rests], capacity)
    open_rows = [[rests[index] for index in row] for row in packed]
    open_rows.sort(key=lambda row: -sum(piece.size for piece in row))
    return rows + _close(open_rows, capacity), open_rows[0] if open_rows else []


def _close(rows: list[list[Piece]], capacity: int) -> list[list[Piece]]:
    """Take the rows that are, or can be made, full out of `rows`, fullest first, which keeps at most one."""
    full = []
    while rows:
        room = capacity - sum(piece.size for piece in rows[0])
        while room and len(rows) > 1:
            piece = rows[-1].pop()
            taken = min(room, piece.size)
            rows[0].append(Piece(piece.document, piece.start, piece.start + taken))
            if taken < piece.size:
                rows[-1].append(Piece(piece.document, piece.start + taken, piece.end))
            elif not rows[-1]:
                rows.pop()
            room -= taken
        if room:
            break
        full.append(rows.pop(0))
    return full


def _in_order(lengths: Sequence[int], capacity: int) -> tuple[list[list[Piece]], list[Piece]]:
    rows: list[list[Piece]] = [[]]
    room = capacity
    for document, length in enumerate(lengths):
        at = 0
        while at < length:
            size = min(room, length - at)
            rows[-1].append(Piece(document, at, at + size))
            at, room = at + size, room - size
            if not room:
                rows.append([])
                room = capacity
    return rows[:-1], rows[-1]
