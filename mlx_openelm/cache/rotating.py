"""Sliding caches, which hold a limited number of positions: of one sequence, and of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Self

import mlx.core as mx

from ..errors import RequestError
from .base import Cache, causal_mask, grow
from .batches import BatchCache


class RotatingKVCache(Cache):
    """A sliding cache of one sequence: the first `keep` positions and the latest of the rest, `max_size` in total.

    A single new position overwrites the oldest in place: attention does not depend on the order, since RoPE has
    already rotated the keys by their positions. Longer updates first put the columns back in order.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        self.max_size, self.keep = max_size, keep
        self._idx = 0  # where the next single position is written

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those that are held now, at most max_size - 1 + L positions."""
        length = keys.shape[2]
        if length > 1:
            # Each new position still sees max_size positions, including itself.
            self.keys, self.values = (self._append(old, new) for old, new in ((self.keys, keys), (self.values, values)))
            self._idx = self.keys.shape[2]
        else:
            self._make_room(keys, values)
            self.keys[:, :, self._idx : self._idx + 1] = keys
            self.values[:, :, self._idx : self._idx + 1] = values
            self._idx += 1
        self.offset += length
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The columns held, in the order of the buffers; there must have been an update."""
        held = min(self.offset, self.keys.shape[2])
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _make_room(self, keys: mx.array, values: mx.array) -> None:
        """Set `_idx` to where a single new position goes: after the last column, or in place of the oldest."""
        columns = 0 if self.keys is None else self.keys.shape[2]
        if columns > self.max_size:  # a longer update left them, in order
            parts = (self._latest_parts(x, self.max_size) for x in (self.keys, self.values))
            self.keys, self.values = (mx.concatenate(x, axis=2) for x in parts)
            self._idx = self.max_size
        elif self.offset >= columns and columns < self.max_size:
            extra = min(self.step, self.max_size - columns)
            self.keys, self.values = (
                grow(old, (*new.shape[:2], extra, new.shape[3]), new.dtype, columns, step=1)
                for old, new in ((self.keys, keys), (self.values, values))
            )
        if self._idx >= self.max_size:
            self._idx = self.keep

    def _append(self, old: mx.array | None, new: mx.array) -> mx.array:
        if old is None:
            return new
        return mx.concatenate([*self._latest_parts(self.in_order(old), self.max_size - 1), new], axis=2)

    def _latest_parts(self, buffer: mx.array, size: int) -> list[mx.array]:
        """The parts of an ordered `buffer` that stay: the first `keep` and the latest columns, `size` in total."""
        excess = buffer.shape[2] - size
        return [buffer] if excess <= 0 else [buffer[:, :, : self.keep], buffer[:, :, self.keep + excess :]]

    def latest(self) -> tuple[mx.array, mx.array]:
        """Keys and values, oldest first, at most `max_size` of them; there must have been an update."""
        keys, values = (self.in_order(x)[:, :, -self.max_size :] for x in (self.keys, self.values))
        return keys, values

    def in_order(self, buffer: mx.array) -> mx.array:
        """The columns that `buffer` holds, oldest first."""
        if self._idx < min(self.offset, buffer.shape[2]):
            parts = [buffer[:, :, : self.keep], buffer[:, :, self._idx :], buffer[:, :, self.keep : self._idx]]
            return mx.concatenate(parts, axis=2)
        return buffer[:, :, : self._idx]

    def size(self) -> int:
        return min(self.offset, self.max_size)

    @property
    def state(self) -> tuple[Any, Any, int, int, int, int]:
        return self.keys, self.values, self.offset, self.keep, self.max_size, self._idx

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.keep, self.max_size, self._idx = state

    def is_trimmable(self) -> bool:
        return self.offset < self.max_size  # else the positions that the latest ones overwrote are gone

    def trim(self, count: int) -> int:
        count = super().trim(count)
        self._idx -= count
        return count

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> NoReturn:
        """Raises `RequestError`: a sliding cache cannot be quantized, in mlx-lm neither."""
        raise RequestError("--kv-bits cannot be combined with a sliding cache (--max-kv-size).")

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see of the columns that `update_and_fetch` will return."""
        window = window_size or self.max_size
        if length == 1:
            return self._latest(window) if window < self.max_size and self.offset >= window else None
        past = min(self.offset, self.max_size - 1)
        if past + length > window or return_array:
            return causal_mask(length, past, window, keep=self.keep)
        return "causal"

    def _latest(self, window: int) -> mx.array:
        """Booleans [columns] after one more position: True for the first `keep` and the latest, `window` in total."""
        columns = mx.arange(min(self.offset + 1, self.max_size))
        last = self.keep if self._idx >= self.max_size else self._idx
        age = (last - columns) % max(1, columns.size - self.keep)
        return (columns < self.keep) | (age < window - self.keep)

    @classmethod
    def merge(cls, caches: Sequence[RotatingKVCache]) -> BatchRotatingKVCache:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchRotatingKVCache.merge(caches)


class BatchRotatingKVCache(BatchCache):
    """A sliding cache of several sequences: the latest `max_size` positions; the first ones are not kept.

    Once `max_size` columns are held, a single new one overwrites the oldest in place. Then `rotated` is True, and the
    next column is written at `_idx`. Every other method first puts the columns back in order.
    """

    def __init__(self, max_size: int, left_padding: Sequence[int]) -> None:
        super().__init__(left_padding)
        self.max_size, self.rotated = max_size, False
        self._ends: mx.array | None = None  # [B], where rows with padding on the right end

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """As for `BatchKVCache`; `right_padding` needs the `lengths` of the rows to come."""
        super().prepare(left_padding=left_padding)
        if right_padding is not None and lengths is not None and max(right_padding) > 0:
            self._ends = self.offset + mx.array(list(lengths))

    def finalize(self) -> None:
        """After updates with padding on the right: move it to the left."""
        self._settle()
        self._ends = None

    def _settle(self) -> None:
        """Put the columns in order, and move the padding that has come on the right so far to the left."""
        self._put_in_order()
        if self._ends is not None and self.keys is not None:
            self._move_left(mx.maximum(0, self.offset - self._ends))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those that are held now, at most max_size - 1 + L columns."""
        if self._overwrites(keys.shape[2]):
            return self._overwrite(keys, values)
        # Padding in later pieces must not push out the columns of a row that has ended.
        self._settle()
        self._keep_latest(self.max_size - 1)
        return super().update_and_fetch(keys, values)

    def _overwrites(self, length: int) -> bool:
        """Whether an update of this length overwrites the oldest column."""
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
        """The columns held, including padding, in the order of the buffers; there must have been an update."""
        held = self._held()
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _held(self) -> int:
        """How many columns are held, including padding."""
        return self.max_size if self.rotated else self._idx

    def _next_column(self) -> int:
        return self._idx if self.rotated and self._idx < self.max_size else 0

    def _keep_latest(self, count: int) -> None:
        """Keep the latest `count` columns at most, and no unused part; the columns must be in order."""
        excess = self._idx - count
        if excess >= 0 and self.keys is not None:
            self.keys, self.values = (x[:, :, excess : self._idx] for x in (self.keys, self.values))
            self._idx = count
            self.left_padding = self.left_padding - excess

    def _put_in_order(self) -> None:
        """Put the oldest column first."""
        if self.rotated:
            self.keys, self.values = (mx.roll(x, -self._idx, 2) for x in (self.keys, self.values))
            self._idx, self.rotated = self.max_size, False

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Booleans [B, 1, length, columns that `update_and_fetch` will return]; padding is hidden."""
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
        """Add the rows of another cache; ValueError if its size differs."""
        if other.max_size != self.max_size:
            raise ValueError("Only caches of the same maximum size can be extended by each other.")
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
        # mlx-lm's buffers have no unused part when columns are dropped, ours may.
        keys, values = (None, None) if self.keys is None else self.keys_and_values()
        held = self._held()
        return keys, values, self.offset, self.left_padding, self.max_size, held, self._idx, self.rotated

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.left_padding, self.max_size, _, self._idx, self.rotated = state
        self._right_padding = self._ends = None

    def extract(self, row: int) -> RotatingKVCache:
        """One row [1, K, T, D] as a cache of its own, without padding; IndexError if the row does not exist."""
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
        """One cache with a row for each of `caches`; ValueError if their sizes differ."""
        if len({cache.max_size for cache in caches}) > 1:
            raise ValueError("Only caches of the same maximum size can be merged.")
        rows = [None if cache.empty() else cache.latest() for cache in caches]
        return cls(caches[0].max_size, [0] * len(caches))._filled(rows, [cache.offset for cache in caches])
