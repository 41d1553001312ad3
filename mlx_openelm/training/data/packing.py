"""Packing several examples into a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(
    order: Sequence[int], lengths: Sequence[int], capacity: int, *, largest_first: bool = True
) -> list[tuple[int, ...]]:
    """Rows of at most `capacity` positions that together hold every example of `order` once.

    Best fit: each example goes into the row with the least room that is enough. With `largest_first` the number of rows
    depends only on the lengths; examples of the same length keep the given order.
    """
    if largest_first:
        order = sorted(order, key=lambda index: -lengths[index])
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct numbers of positions left in rows, sorted
    with_room: dict[int, list[int]] = {}  # the rows with this many positions left
    for index in order:
        place = bisect_left(rooms, lengths[index])
        if place < len(rooms):
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        room -= lengths[index]
        if room not in with_room:
            with_room[room] = []
            insort(rooms, room)
        with_room[room].append(row)
    return [tuple(row) for row in rows]
