"""Key-value caches for a batch: rows of different lengths, each padded on the left.

Names, methods and `state` are mlx-lm's, as in `cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from .cache import Cache, KVCache, RotatingKVCache, causal_mask, grow


class BatchKVCache(Cache):
    """The pasts of several sequences, each row padded on the left: `left_padding[b]` columns hold nothing.

    `offset` is an array [B]: the position of each row's next token, negative while it is still padding.
    """

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.keys, self.values = None, None
        self.left_padding = mx.array(list(left_padding), mx.int32)
        self.offset = -self.left_padding
        self._idx = 0  # columns in use
        self._right_padding: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them, padding included."""
        start, self._idx = self._idx, self._idx + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        if self.keys is None or self._idx > self.keys.shape[2]:
            self.keys, self.values = (
                grow(old, new.shape, new.dtype, start, self.step)
                for old, new in ((self.keys, keys), (self.values, values))
            )
        self.keys[:, :, start : self._idx] = keys
        self.values[:, :, start : self._idx] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is held, padding included, without the unused part of the buffers; there must have been an update."""
        return self.keys[:, :, : self._idx], self.values[:, :, : self._idx]

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Announce that the coming rows are padded; `right_padding` is moved to the left by `finalize`."""
        if left_padding is not None:
            if self.keys is not None:
                raise ValueError("Padding on the left can only be added to an empty cache.")
            padding = mx.array(list(left_padding))
            self.left_padding = self.left_padding + padding
            self.offset = self.offset - padding
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = mx.array(list(right_padding))

    def finalize(self) -> None:
        """After rows padded on the right: move their padding to the left."""
        if self._right_padding is not None:
            self._move_left(self._right_padding)
            self._right_padding = None

    def _move_left(self, padding: mx.array) -> None:
        """Move the last `padding[b]` columns of each row to its left, as columns that hold nothing."""
        columns = (mx.arange(self._idx) - padding[:, None]) % self._idx
        index = columns[:, None, :, None]
        self.keys = mx.take_along_axis(self.keys[:, :, : self._idx], index, axis=2)
        self.values = mx.take_along_axis(self.values[:, :, : self._idx], index, axis=2)
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    def size(self) -> int:
        return self._idx

    @property
    def state(self) -> tuple[Any, ...]:
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = state
        self._right_padding = None

    def trim(self, count: int) -> int:
        if not self.is_trimmable():  # what the last positions took the place of is gone
            return 0
        count = max(0, min(self._idx, count))
        self._idx -= count
        self.offset = self.offset - count
        return count

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Booleans [B, 1, length, total]: causal, and blind to each row's padding."""
        mask = causal_mask(length, self._idx, window_size)
        return mask & (mx.arange(self._idx + length) >= self.left_padding.reshape(-1, 1, 1, 1))

    def filter(self, rows: Any) -> None:
        """Keep the given rows, in their order, and drop the columns that are padding in all of them.

        Raises:
            IndexError: there is no such row.
        """
        rows = self._index(rows)
        self.left_padding, self.offset = self.left_padding[rows], self.offset[rows]
        if self._right_padding is not None:
            self._right_padding = self._right_padding[rows]
        padding: Any = self.left_padding.tolist()
        shared = max(0, min([self._idx, *padding]))  # columns that are yet to come cannot be dropped
        if self.keys is not None:
            self.keys, self.values = (x[:, :, shared : self._idx][rows] for x in (self.keys, self.values))
        self._idx -= shared
        self.left_padding = self.left_padding - shared

    def _index(self, rows: Any) -> mx.array:
        index = mx.array(rows) if len(rows) else mx.array([], mx.int32)
        self._check_rows(index.tolist())
        return index

    def _check_rows(self, rows: Any) -> None:
        # MLX does not look, and would give what lies behind an array.
        count = self.left_padding.size
        for row in rows:
            if not -count <= row < count:
                raise IndexError(f"The cache has {count} rows; there is no row {row}.")

    def extend(self, other: Self) -> None:
        """Add the rows of another cache."""
        length = max(self._idx, other._idx)
        self.left_padding = mx.concatenate([c.left_padding + (length - c._idx) for c in (self, other)])
        pairs = [c._padded_to(length, like) for c, like in ((self, other), (other, self))]
        self.offset = mx.concatenate([self.offset, other.offset])
        self._idx = length
        if pairs[0] is not None and pairs[1] is not None:
            self.keys, self.values = (mx.concatenate(parts) for parts in zip(*pairs, strict=True))

    def _padded_to(self, length: int, like: Self) -> tuple[mx.array, mx.array] | None:
        """Keys and values of `length` columns, padding added on the left; zeros shaped as `like`'s if empty."""
        if self.keys is None and like.keys is None:
            return None
        if self.keys is None:
            shapes = [(self.offset.shape[0], x.shape[1], length, x.shape[3]) for x in (like.keys, like.values)]
            return mx.zeros(shapes[0], like.keys.dtype), mx.zeros(shapes[1], like.values.dtype)
        left = [(0, 0), (0, 0), (length - self._idx, 0), (0, 0)]
        return mx.pad(self.keys[:, :, : self._idx], left), mx.pad(self.values[:, :, : self._idx], left)

    def _row(self, row: int) -> tuple[mx.array, ...]:
        row %= self.left_padding.size
        padding = max(0, int(self.left_padding[row]))
        return tuple(mx.contiguous(x[row : row + 1, :, padding : self._idx]) for x in (self.keys, self.values))

    def extract(self, row: int) -> Any:
        """One row as a cache of its own; IndexError if there is no such row."""
        self._check_rows([row])
        cache = KVCache()
        if self.keys is not None:
            cache.keys, cache.values = self._row(row)
            cache.offset = cache.keys.shape[2]
        return cache

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Self:
        """Rows from caches of single sequences, padded on the left to the longest."""
        return cls._merged(cls([0] * len(caches)), caches, lambda c, x: x[:, :, : c.offset])

    @staticmethod
    def _merged(merged: Any, caches: Sequence[Any], held: Any) -> Any:
        lengths = [c.size() for c in caches]
        longest = max(lengths)
        if longest == 0:
            return merged
        merged.left_padding = mx.array([longest - length for length in lengths])
        merged.offset = mx.array([c.offset for c in caches])
        merged._idx = longest
        filled = next(c for c in caches if c.keys is not None)

        def rows(name: str) -> mx.array:
            like = getattr(filled, name)
            empty = mx.zeros((1, like.shape[1], 0, like.shape[3]), like.dtype)
            parts = [empty if c.keys is None else held(c, getattr(c, name)) for c in caches]
            return mx.concatenate([mx.pad(x, [(0, 0), (0, 0), (longest - x.shape[2], 0), (0, 0)]) for x in parts])

        merged.keys, merged.values = rows("keys"), rows("values")
        return merged


class BatchRotatingKVCache(BatchKVCache):
    """Several sequences, of which only the latest `max_size` positions are held (none of the first are kept).

    Once `max_size` columns are held, a single new one overwrites the oldest in place: then `rotated` is True, and the
    next is written at `_idx`. Everything else first puts the columns back in order.
    """

    def __init__(self, max_size: int, left_padding: Sequence[int]) -> None:
        super().__init__(left_padding)
        self.max_size, self.rotated = max_size, False
        self._ends: mx.array | None = None  # where rows that are being padded on the right end

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """As of `BatchKVCache`; `right_padding` needs the `lengths` of the coming rows."""
        super().prepare(left_padding=left_padding)
        if right_padding is not None and lengths is not None and max(right_padding) > 0:
            self._ends = self.offset + mx.array(list(lengths))

    def finalize(self) -> None:
        """After rows padded on the right: move their padding to the left."""
        self._settle()
        self._ends = None

    def _settle(self) -> None:
        self._put_in_order()
        if self._ends is not None and self.keys is not None:
            self._move_left(mx.maximum(0, self.offset - self._ends))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those still held, at most max_size - 1 + L columns."""
        if self._overwrites(keys.shape[2]):
            return self._overwrite(keys, values)
        # A row that has ended must not lose what it holds to the padding of later pieces.
        self._settle()
        self._keep_latest(self.max_size - 1)
        return super().update_and_fetch(keys, values)

    def _overwrites(self, length: int) -> bool:
        """Whether an update of this length takes the place of the oldest column."""
        return length == 1 and self._ends is None and self._held() >= self.max_size

    def _overwrite(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self.rotated:
            self._keep_latest(self.max_size)
            self.rotated = True
        column = self._next_column()
        self.keys[:, :, column : column + 1] = keys
        self.values[:, :, column : column + 1] = values
        self._idx = column + 1
        self.offset, self.left_padding = self.offset + 1, self.left_padding - 1
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is held, in the order of the buffers, padding included; there must have been an update."""
        held = self._held()
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _held(self) -> int:
        """How many columns there are, padding included."""
        return self.max_size if self.rotated else self._idx

    def _next_column(self) -> int:
        return self._idx if self.rotated and self._idx < self.max_size else 0

    def _keep_latest(self, count: int) -> None:
        """Let the oldest columns beyond `count`, and the unused part of the buffers, go; columns must be in order."""
        excess = self._idx - count
        if excess >= 0 and self.keys is not None:
            self.keys, self.values = (x[:, :, excess : self._idx] for x in (self.keys, self.values))
            self._idx = count
            self.left_padding = self.left_padding - excess

    def _put_in_order(self) -> None:
        if self.rotated:
            self.keys, self.values = (mx.roll(x, -self._idx, 2) for x in (self.keys, self.values))
            self._idx, self.rotated = self.max_size, False

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        past = min(self._held(), self.max_size - 1)
        padding = self.left_padding - (self._held() - past)
        mask = causal_mask(length, past, window_size or self.max_size)
        mask = mask & (mx.arange(past + length) >= padding.reshape(-1, 1, 1, 1))
        return mx.roll(mask, self._next_column() + 1, -1) if self._overwrites(length) else mask

    def size(self) -> int:
        return min(self._held(), self.max_size)

    def is_trimmable(self) -> bool:
        return self._held() < self.max_size

    def extend(self, other: Self) -> None:
        if other.max_size != self.max_size:
            raise ValueError("Only caches of one maximum size can be put together.")
        for cache in (self, other):
            cache._put_in_order()
        super().extend(other)

    def filter(self, rows: Any) -> None:
        self._put_in_order()
        rows = self._index(rows)
        if self._ends is not None:
            self._ends = self._ends[rows]
        super().filter(rows)

    @property
    def state(self) -> tuple[Any, ...]:
        # Other than ours, mlx-lm's buffers have no unused part when there are columns to forget.
        keys, values = (None, None) if self.keys is None else self.keys_and_values()
        held = self._held()
        return keys, values, self.offset, self.left_padding, self.max_size, held, self._idx, self.rotated

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.left_padding, self.max_size, _, self._idx, self.rotated = state
        self._right_padding = self._ends = None

    def extract(self, row: int) -> RotatingKVCache:
        self._check_rows([row])
        cache = RotatingKVCache(self.max_size)
        if self.keys is not None:
            self._put_in_order()
            cache.keys, cache.values = self._row(row)
            cache.offset = max(0, int(self.offset[row]))
            cache._idx = cache.keys.shape[2]
        return cache

    @classmethod
    def merge(cls, caches: Sequence[RotatingKVCache]) -> Self:
        if len({c.max_size for c in caches}) > 1:
            raise ValueError("Only caches of one maximum size can be merged.")
        empty = cls(caches[0].max_size, [0] * len(caches))
        return cls._merged(empty, caches, lambda c, x: c.in_order(x)[:, :, -c.size() :])
