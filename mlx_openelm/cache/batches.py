"""The base class of caches of several sequences, whose rows have different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from .base import Cache, causal_mask, grow, pad_left


class BatchCache(Cache):
    """The base class of caches of several sequences: the first `left_padding[b]` columns of row b are padding.

    `offset` is an array [B]: the position of each row's next token, negative while that is still padding.
    """

    def __init__(self, left_padding: Sequence[int]) -> None:
        self.left_padding = mx.array(list(left_padding), mx.int32)
        self.offset = -self.left_padding
        self._idx = 0  # columns in use
        self._right_padding: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them, including padding."""
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
        """The columns in use [B, K, T, D], including padding; there must have been an update."""
        return self.keys[:, :, : self._idx], self.values[:, :, : self._idx]

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Declare the padding of the next updates; `finalize` moves `right_padding` to the left."""
        if left_padding is not None:
            if self.keys is not None:
                raise ValueError("Padding on the left can only be added to an empty cache.")
            padding = mx.array(list(left_padding))
            self.left_padding = self.left_padding + padding
            self.offset = self.offset - padding
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = mx.array(list(right_padding))

    def finalize(self) -> None:
        """After updates with padding on the right: move it to the left."""
        if self._right_padding is not None:
            self._move_left(self._right_padding)
            self._right_padding = None

    def _move_left(self, padding: mx.array) -> None:
        """Move the last `padding[b]` columns of row b to its left, as padding."""
        columns = (mx.arange(self._idx) - padding[:, None]) % self._idx  # [B, T]
        index = columns[:, None, :, None]  # [B, 1, T, 1]
        self.keys = mx.take_along_axis(self.keys[:, :, : self._idx], index, axis=2)
        self.values = mx.take_along_axis(self.values[:, :, : self._idx], index, axis=2)
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding

    def size(self) -> int:
        """The number of columns in use, including padding."""
        return self._idx

    @property
    def state(self) -> tuple[Any, ...]:
        return self.keys, self.values, self.offset, self.left_padding, self._idx

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.left_padding, self._idx = state
        self._right_padding = None

    def trim(self, count: int) -> int:
        if not self.is_trimmable():
            return 0
        count = max(0, min(self._idx, count))
        self._idx -= count
        self.offset = self.offset - count
        return count

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Booleans [B, 1, length, total]: causal, with each row's padding hidden."""
        mask = causal_mask(length, self._idx, window_size)
        return mask & (mx.arange(self._idx + length) >= self.left_padding.reshape(-1, 1, 1, 1))

    def filter(self, rows: Any) -> None:
        """Keep the given rows, in that order, and drop the columns that are padding in all of them.

        Raises:
            IndexError: a row does not exist.
        """
        rows = self._index(rows)
        self.left_padding, self.offset = self.left_padding[rows], self.offset[rows]
        if self._right_padding is not None:
            self._right_padding = self._right_padding[rows]
        padding: Any = self.left_padding.tolist()
        shared = max(0, min([self._idx, *padding]))  # padding that is still to come cannot be dropped
        if self.keys is not None:
            self.keys, self.values = (x[:, :, shared : self._idx][rows] for x in (self.keys, self.values))
        self._idx -= shared
        self.left_padding = self.left_padding - shared

    def _index(self, rows: Any) -> mx.array:
        """Row numbers as an array; IndexError if one does not exist."""
        index = mx.array(rows) if len(rows) else mx.array([], mx.int32)
        self._check_rows(index.tolist())
        return index

    def _check_rows(self, rows: Any) -> None:
        """Raise an IndexError if a row does not exist: MLX does not check indices and would read beyond the array."""
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
        """Keys and values [B, K, length, D], padded on the left; if there are none, zeros shaped as `like`'s."""
        if self.keys is None and like.keys is None:
            return None
        if self.keys is None:
            shapes = [(self.offset.shape[0], x.shape[1], length, x.shape[3]) for x in (like.keys, like.values)]
            return mx.zeros(shapes[0], like.keys.dtype), mx.zeros(shapes[1], like.values.dtype)
        return pad_left(self.keys[:, :, : self._idx], length), pad_left(self.values[:, :, : self._idx], length)

    def _row(self, row: int) -> tuple[mx.array, ...]:
        """Keys and values [1, K, T, D] of a row, without its padding."""
        row %= self.left_padding.size
        padding = max(0, int(self.left_padding[row]))
        return tuple(mx.contiguous(x[row : row + 1, :, padding : self._idx]) for x in (self.keys, self.values))

    def _filled(self, rows: Sequence[tuple[mx.array, mx.array] | None], offsets: list[int]) -> Self:
        """This new, empty batch, filled with rows of keys and values [1, K, T, D]; None is an empty row."""
        lengths = [0 if row is None else row[0].shape[2] for row in rows]
        longest = max(lengths)
        if longest > 0:
            self.left_padding = mx.array([longest - length for length in lengths])
            self.offset, self._idx = mx.array(offsets), longest
            like = next(row for row in rows if row is not None)
            empty = [mx.zeros((1, x.shape[1], 0, x.shape[3]), x.dtype) for x in like]
            self.keys, self.values = (
                mx.concatenate([pad_left((empty if row is None else row)[i], longest) for row in rows]) for i in (0, 1)
            )
        return self
