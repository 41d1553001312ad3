"""The caches of a decoding step of several sequences, and taking back positions of the last step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

_KEPT = "_kept"  # the attribute of a sliding cache that holds a `_Kept`


class RowCaches:
    """One layer's caches of the positions in a decoding step of several sequences.

    The step has N = sum(lengths) rows of one position each, in the order of the caches: a model takes tokens [N, 1].
    Each row sees what a step of its sequence alone would see; several rows of one sequence are what as many steps, one
    after the other, would process.

    Args:
        caches: one for each sequence, of any kind for one sequence, ours or mlx-lm's; extended in place.
        lengths: the number of new positions of each sequence, at least 1; by default 1. `rewind` can take them back
            from a sliding cache that is full only if there are several.
    """

    def __init__(self, caches: Sequence[Any], lengths: Sequence[int] | None = None):
        self.caches = list(caches)
        self.lengths = [1] * len(self.caches) if lengths is None else list(lengths)
        if not self.caches or len(self.lengths) != len(self.caches) or min(self.lengths) < 1:
            raise ValueError("A step needs one cache or more, and for each of them a length of 1 or more.")

    @property
    def positions(self) -> list[int]:
        """Each new position's number in its own sequence [N], before the step."""
        pairs = zip(self.caches, self.lengths, strict=True)
        return [cache.offset + i for cache, length in pairs for i in range(length)]

    @property
    def offset(self) -> mx.array:
        """`positions` as an array [N]: one offset of RoPE for each row."""
        return mx.array(self.positions)

    def sequences(self) -> Iterator[tuple[Any, slice]]:
        """Each sequence's cache and its rows of the step."""
        start = 0
        for cache, length in zip(self.caches, self.lengths, strict=True):
            yield cache, slice(start, start + length)
            start += length

    def append(self, keys: mx.array, values: mx.array) -> Iterator[tuple[Any, Any, Any]]:
        """Append keys and values [N, K, 1, D] row by row; yields each row's cache and what the cache holds by then."""
        for cache, rows in self.sequences():
            yield from append(cache, keys[rows], values[rows])


def append(cache: Any, keys: mx.array, values: mx.array) -> Iterator[tuple[Any, Any, Any]]:
    """Append several positions [L, K, 1, D] of one sequence one by one, as `RowCaches.append` does."""
    if hasattr(cache, "reserve") and len(keys) > 1:  # in one write: nothing is overwritten
        held = cache.offset + 1
        keys, values = cache.update_and_fetch(keys.swapaxes(0, 2), values.swapaxes(0, 2))
        for end in range(held, cache.offset + 1):
            yield cache, keys[:, :, :end], values[:, :, :end]
        return
    kept = _Kept([], 0) if hasattr(cache, "max_size") and len(keys) > 1 else None
    for row in range(len(keys)):
        if kept is not None:
            kept.columns.append(_next_column(cache))
        fetched = cache.update_and_fetch(keys[row : row + 1], values[row : row + 1])
        if kept is not None:
            setattr(cache, _KEPT, kept._replace(end=cache.offset))
        yield (cache, *fetched)


def step_caches(rows: Sequence[Sequence[Any]], lengths: Sequence[int] | None = None) -> list[RowCaches]:
    """The caches of a step, one `RowCaches` a layer, from each sequence's caches, one a layer.

    Args:
        lengths: as for `RowCaches`.
    """
    return [RowCaches(layer, lengths) for layer in zip(*rows, strict=True)]


class _Column(NamedTuple):
    """What the next position of a sliding cache overwrites, if it is full: a column [1, K, 1, D]."""

    write_index: int
    column: int
    keys: mx.array | None = None
    values: mx.array | None = None


class _Kept(NamedTuple):
    """What the positions of the last step overwrote, and the cache's offset after them."""

    columns: list[_Column]
    end: int


def _next_column(cache: Any) -> _Column:
    """The column of a sliding cache that the next single position overwrites."""
    if cache.offset < cache.max_size:
        return _Column(cache._idx, cache._idx)
    # After a longer update the cache holds more columns than `max_size`; the next position first drops the oldest.
    excess = max(0, cache.keys.shape[2] - cache.max_size)
    write_index = cache.max_size if excess else cache._idx
    column = cache.keep if write_index >= cache.max_size else write_index
    source = mx.array([column + excess])
    # A copy, since a view would keep the whole buffer from being written in place.
    return _Column(write_index, column, *(mx.take(x, source, axis=2) for x in (cache.keys, cache.values)))


def rewind(cache: Any, count: int) -> None:
    """Take back the last `count` positions of a sequence's cache, of any kind: exactly, as if they had not come.

    A growing cache takes back any number. So does a sliding one until it is full; then only positions of the last step,
    which must have had several of this sequence (`RowCaches`).

    Raises:
        ValueError: the cache does not hold that many positions, or what they overwrote is gone.
    """
    if not 0 <= count <= cache.offset:
        raise ValueError(f"The cache holds {cache.offset} positions; {count} cannot be taken back.")
    kept = getattr(cache, _KEPT, None)
    columns = kept.columns if kept is not None and kept.end == cache.offset else []
    while count and columns:
        write_index, column, keys, values = columns.pop()
        if keys is not None:
            cache.keys[:, :, column : column + 1] = keys
            cache.values[:, :, column : column + 1] = values
        cache.offset, cache._idx, count = cache.offset - 1, write_index, count - 1
        setattr(cache, _KEPT, _Kept(columns, cache.offset))
    if count and cache.trim(count) != count:
        raise ValueError(f"{count} positions cannot be taken back: what they overwrote in the sliding cache is gone.")
