"""Key-value caches, one per layer: growing, sliding, quantized, and for batches of rows of different lengths.

Class names, methods and `state` are those of mlx-lm: its generators can drive our caches, ours its models, and saved
prompt caches are read by both. Keys and values are [B, K, T, D] (rows, key-value heads, positions, head_dim); buffers
grow in steps, so they are longer than what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from .errors import RequestError

SMALLEST_WINDOW = 8  # of a sliding cache: its first 4 positions, and room for the latest


def make_cache(num_layers: int, max_kv_size: int | None = None) -> list[Any]:
    """Empty caches for one sequence: growing, or keeping the first 4 positions and the latest, `max_kv_size` in all.

    Raises:
        RequestError: `max_kv_size` leaves too little room for the latest.
    """
    if max_kv_size is None:
        return [KVCache() for _ in range(num_layers)]
    if max_kv_size < SMALLEST_WINDOW:
        raise RequestError(f"--max-kv-size must be {SMALLEST_WINDOW} or more, got {max_kv_size}.")
    return [RotatingKVCache(max_kv_size, keep=4) for _ in range(num_layers)]


class Cache:
    """The base class of all caches. `keys` and `values` are None until the first update."""

    step = 256  # buffers grow by this many positions
    keys: Any = None
    values: Any = None
    offset: Any = 0
    state: Any

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def empty(self) -> bool:
        return self.keys is None

    def size(self) -> int:
        """How many positions are held."""
        return self.offset

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last `count` positions; returns how many could be forgotten."""
        if not self.is_trimmable():
            return 0
        count = max(0, min(self.offset, count))
        self.offset -= count
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, including their unused part."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class KVCache(Cache):
    """A growing cache of one sequence, or of rows of equal length.

    A kernel may write new positions straight into the buffers, although MLX treats arrays as values: only into buffers
    that `own_buffers` made and that nobody else has a reference to. Reading `keys` or `values` hands the buffers out:
    it waits for pending writes, and the next such kernel gets new buffers.
    """

    _keys: Any = None
    _values: Any = None
    _are_own = False
    _capacity = 0  # positions in our own buffers
    _pending: mx.array | None = None  # evaluating it completes the last kernel's write
    next_position: tuple[int, mx.array] | None = None  # for a kernel that counts positions on the device

    @property
    def keys(self) -> Any:
        self._hand_out()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys, self._are_own = keys, False

    @property
    def values(self) -> Any:
        self._hand_out()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values, self._are_own = values, False

    def _hand_out(self) -> None:
        self._are_own = False
        if self._pending is not None:
            mx.eval(self._pending)
            self._pending = None

    def __getstate__(self) -> dict[str, Any]:
        self._hand_out()  # a copy of the cache shares the buffers
        return self.__dict__

    def empty(self) -> bool:
        return self._keys is None

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes + self._values.nbytes

    @property
    def state(self) -> tuple[Any, Any, int]:
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset = state

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them, [B, K, offset, D]."""
        rows, heads, length, dim = keys.shape
        start = self.reserve(rows, heads, length, dim, keys.dtype)
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is held, without the unused part of the buffers; there must have been an update."""
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def reserve(self, rows: int, heads: int, length: int, dim: int, dtype: mx.Dtype) -> int:
        """Count `length` new positions and make room for them in the buffers; returns the position of the first."""
        start, self.offset = self.offset, self.offset + length
        if self._keys is None or self.offset > self._keys.shape[2]:
            shape = rows, heads, length, dim
            self.keys, self.values = (grow(old, shape, dtype, start, self.step) for old in (self.keys, self.values))
        return start

    def holds(self, dtype: mx.Dtype) -> bool:
        """Whether keys and values are, or can become, of this type."""
        return self._keys is None or self._keys.dtype == self._values.dtype == dtype

    def own_buffers(self, heads: int, dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Buffers [1, K, T, D] with what is held and room for one more position, into which a kernel may write."""
        if not self._are_own or self._capacity <= self.offset:
            shape = 1, heads, 1, dim
            keys, values = (grow(old, shape, dtype, self.offset, self.step) for old in (self.keys, self.values))
            # Once evaluated, they are complete and do not move in memory.
            mx.eval(keys, values)
            self._keys, self._values, self._are_own, self._capacity = keys, values, True, keys.shape[2]
        return self._keys, self._values

    def wrote(self, result: mx.array) -> None:
        """Count the position that a kernel writes into `own_buffers` when `result` is evaluated."""
        self.offset += 1
        self._pending = result

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see: None (everything), "causal", or booleans [length, total]."""
        if window_size is not None or (return_array and length > 1):
            return causal_mask(length, self.offset, window_size)
        return "causal" if length > 1 else None

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """The same positions in fewer bits."""
        cache = QuantizedKVCache(group_size, bits)
        if self.keys is not None:
            cache.update_and_fetch(*self.keys_and_values())
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchKVCache.merge(caches)


class QuantizedKVCache(Cache):
    """A growing cache with `bits` per value, and a scale and a bias for every `group_size` values."""

    def __init__(self, group_size: int = 64, bits: int = 8) -> None:
        self.group_size, self.bits = group_size, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append keys and values [B, K, L, D]; returns all of them, each as (packed, scales, biases)."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        packed = [mx.quantize(x, group_size=self.group_size, bits=self.bits) for x in (keys, values)]
        if self.keys is None or self.offset > self.keys[0].shape[2]:
            olds = (self.keys or (None,) * 3, self.values or (None,) * 3)
            self.keys, self.values = (
                tuple(grow(old, new.shape, new.dtype, start, self.step) for old, new in zip(part, news, strict=True))
                for part, news in zip(olds, packed, strict=True)
            )
        for buffers, news in zip((self.keys, self.values), packed, strict=True):
            for buffer, new in zip(buffers, news, strict=True):
                buffer[:, :, start : self.offset] = new
        return self.keys_and_values()

    def keys_and_values(self) -> Any:
        """What is held, each as (packed, scales, biases), without the unused part of the buffers."""
        return tuple(tuple(b[:, :, : self.offset] for b in part) for part in (self.keys, self.values))

    @property
    def state(self) -> tuple[Any, Any, int, int, int]:
        return self.keys, self.values, self.offset, self.group_size, self.bits

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.group_size, self.bits = state

    make_mask = KVCache.make_mask

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else sum(part.nbytes for part in (*self.keys, *self.values))


class RotatingKVCache(Cache):
    """A sliding cache of one sequence: the first `keep` positions and the latest of the rest, `max_size` in all.

    A single new position overwrites the oldest in place: attention does not depend on the order, since RoPE has
    already rotated the keys by their positions. Longer updates first put the columns back in order.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        self.max_size, self.keep = max_size, keep
        self._idx = 0  # where the next single position is written

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those still held, at most max_size - 1 + L."""
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
        """What is held, in the order of the buffers, without their unused part; there must have been an update."""
        held = min(self.offset, self.keys.shape[2])
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _make_room(self, keys: mx.array, values: mx.array) -> None:
        """Set `_idx` to where a single new position goes: behind what is held, or in place of the oldest."""
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
        """The parts of an ordered `buffer` that stay: the first `keep` and the latest columns, `size` in all."""
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

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """Raises `RequestError`: a sliding cache cannot be quantized, which mlx-lm does not support either."""
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
        """Booleans [columns] after one more position: True for the first `keep` and the latest, `window` in all."""
        columns = mx.arange(min(self.offset + 1, self.max_size))
        last = self.keep if self._idx >= self.max_size else self._idx
        age = (last - columns) % max(1, columns.size - self.keep)
        return (columns < self.keep) | (age < window - self.keep)

    @classmethod
    def merge(cls, caches: Sequence[RotatingKVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchRotatingKVCache.merge(caches)


class BatchKVCache(Cache):
    """A growing cache of several sequences: the first `left_padding[b]` columns of row b are padding.

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
        """What is held, including padding, without the unused part of the buffers; there must have been an update."""
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
        """Move the last `padding[b]` columns of each row to its left, where they count as padding."""
        columns = (mx.arange(self._idx) - padding[:, None]) % self._idx  # [B, T]
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
        shared = max(0, min([self._idx, *padding]))  # columns still to come cannot be dropped
        if self.keys is not None:
            self.keys, self.values = (x[:, :, shared : self._idx][rows] for x in (self.keys, self.values))
        self._idx -= shared
        self.left_padding = self.left_padding - shared

    def _index(self, rows: Any) -> mx.array:
        index = mx.array(rows) if len(rows) else mx.array([], mx.int32)
        self._check_rows(index.tolist())
        return index

    def _check_rows(self, rows: Any) -> None:
        # MLX does not check indices, and would read beyond the array.
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
        return pad_left(self.keys[:, :, : self._idx], length), pad_left(self.values[:, :, : self._idx], length)

    def _row(self, row: int) -> tuple[mx.array, ...]:
        """Keys and values [1, K, T, D] of a row, without its padding."""
        row %= self.left_padding.size
        padding = max(0, int(self.left_padding[row]))
        return tuple(mx.contiguous(x[row : row + 1, :, padding : self._idx]) for x in (self.keys, self.values))

    def extract(self, row: int) -> Any:
        """One row as a cache of its own; IndexError if the row does not exist."""
        self._check_rows([row])
        cache = KVCache()
        if self.keys is not None:
            cache.keys, cache.values = self._row(row)
            cache.offset = cache.keys.shape[2]
        return cache

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Self:
        """A batch with a row for each of these caches of single sequences, padded on the left to the longest."""
        parts = [None if cache.empty() else cache.keys_and_values() for cache in caches]
        return cls([0] * len(caches))._filled(parts, [cache.offset for cache in caches])

    def _filled(self, rows: Sequence[tuple[mx.array, mx.array] | None], offsets: list[int]) -> Self:
        """This batch, new and empty, with the given keys and values [1, K, T, D] as rows; None is an empty row."""
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


class BatchRotatingKVCache(BatchKVCache):
    """A sliding cache of several sequences: the latest `max_size` positions, without keeping the first ones.

    Once `max_size` columns are held, a single new one overwrites the oldest in place: then `rotated` is True, and the
    next is written at `_idx`. Every other method first puts the columns back in order.
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
        """As for `BatchKVCache`; `right_padding` needs the `lengths` of the coming rows."""
        super().prepare(left_padding=left_padding)
        if right_padding is not None and lengths is not None and max(right_padding) > 0:
            self._ends = self.offset + mx.array(list(lengths))

    def finalize(self) -> None:
        """After updates with padding on the right: move it to the left."""
        self._settle()
        self._ends = None

    def _settle(self) -> None:
        """Put the columns in order, and padding that came on the right so far to the left."""
        self._put_in_order()
        if self._ends is not None and self.keys is not None:
            self._move_left(mx.maximum(0, self.offset - self._ends))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those still held, at most max_size - 1 + L columns."""
        if self._overwrites(keys.shape[2]):
            return self._overwrite(keys, values)
        # The padding of later pieces must not push out what a finished row holds.
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
        """What is held, in the order of the buffers, including padding; there must have been an update."""
        held = self._held()
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _held(self) -> int:
        """How many columns are held, including padding."""
        return self.max_size if self.rotated else self._idx

    def _next_column(self) -> int:
        return self._idx if self.rotated and self._idx < self.max_size else 0

    def _keep_latest(self, count: int) -> None:
        """Drop the oldest columns beyond `count` and the unused part of the buffers; columns must be in order."""
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
        # Unlike ours, mlx-lm's buffers have no unused part once there are columns to forget.
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
        if len({cache.max_size for cache in caches}) > 1:
            raise ValueError("Only caches of the same maximum size can be merged.")
        rows = [None if cache.empty() else cache.latest() for cache in caches]
        return cls(caches[0].max_size, [0] * len(caches))._filled(rows, [cache.offset for cache in caches])


def causal_mask(length: int, past: int, window: int | None = None, keep: int = 0) -> mx.array:
    """Booleans [length, past + length], True where visible: a position itself and those before it.

    With `window`, only that many: the first `keep` columns and the latest of the rest.
    """
    rows = mx.arange(past, past + length)[:, None]
    columns = mx.arange(past + length)
    mask = rows >= columns
    if window is not None:
        mask = mask & ((rows < columns + (window - keep)) | (columns < keep))
    return mask


def grow(buffer: mx.array | None, new: Sequence[int], dtype: mx.Dtype, used: int, step: int) -> mx.array:
    """The first `used` columns of `buffer`, and room behind them for the shape `new` [B, K, L, D], in whole steps."""
    room = -(-new[2] // step) * step
    zeros = mx.zeros((*new[:2], room, new[3]), dtype)
    return zeros if buffer is None else mx.concatenate([buffer[:, :, :used], zeros], axis=2)


def pad_left(x: mx.array, length: int) -> mx.array:
    """Keys or values [B, K, T, D] -> [B, K, length, D], with zeros in front."""
    return mx.pad(x, [(0, 0), (0, 0), (length - x.shape[2], 0), (0, 0)])
