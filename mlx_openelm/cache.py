"""Key-value caches, one a layer: growing, sliding, quantized. And for batches of rows of different lengths.

Class names, methods and `state` are those of mlx-lm, so that its generators drive our caches, ours
drive its models, and saved prompt caches are read by both. Keys and values are [B, K, T, D]
(rows, key-value heads, positions, head_dim); buffers grow in steps and are longer than what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from .errors import RequestError

SMALLEST_WINDOW = 8  # of a sliding cache: the 4 it keeps, and room beside them


class Cache:
    """What every cache shares. `keys` and `values` are None until the first update."""

    step = 256  # by which buffers grow
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

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        """Forget the last `count` positions; returns how many there were to forget."""
        count = max(0, min(self.offset, count))
        self.offset -= count
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the unused part included."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class KVCache(Cache):
    """The past of one sequence (or of rows of equal length).

    A kernel may write new positions straight into the buffers, though arrays are values in MLX: only into buffers that
    it made room for itself (`own_buffers`) and that nobody was given since. Whoever takes `keys` or `values` gets them
    with all that was to be written, and the next such kernel makes new ones.
    """

    _keys: Any = None
    _values: Any = None
    _are_own = False
    _room = 0  # positions in buffers that are own
    _written: mx.array | None = None  # once this is there, so is what the last kernel wrote
    next_position: tuple[int, mx.array] | None = None  # of a kernel that counts positions on the device

    def __init__(self) -> None:
        self.keys, self.values, self.offset = None, None, 0

    @property
    def keys(self) -> Any:
        self._give_away()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        self._keys = keys

    @property
    def values(self) -> Any:
        self._give_away()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        self._values = values

    def _give_away(self) -> None:
        self._are_own = False
        if self._written is not None:
            mx.eval(self._written)
            self._written = None

    def empty(self) -> bool:
        return self._keys is None

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes + self._values.nbytes

    def __getstate__(self) -> dict[str, Any]:
        self._give_away()  # a copy of the cache shares the buffers
        return self.__dict__

    def own_buffers(self, heads: int, dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """Buffers [1, K, T, D] with what is held and room for one position more, into which a kernel may write."""
        if not self._are_own or self._room <= self.offset:
            shape = 1, heads, 1, dim
            keys, values = (grow(old, shape, dtype, self.offset, self.step) for old in (self.keys, self.values))
            # Evaluated, they are whole in memory, and stay where they are.
            mx.eval(keys, values)
            self._keys, self._values, self._are_own, self._room = keys, values, True, keys.shape[2]
        return self._keys, self._values

    def wrote(self, result: mx.array) -> None:
        """One more position is held once `result` is evaluated."""
        self.offset += 1
        self._written = result

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them."""
        rows, heads, length, dim = keys.shape
        start = self.reserve(rows, heads, length, dim, keys.dtype)
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What is held, without the unused part of the buffers; there must have been an update."""
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def holds(self, dtype: mx.Dtype) -> bool:
        """Whether keys and values are, or will be, of this type."""
        return self._keys is None or self._keys.dtype == self._values.dtype == dtype

    def reserve(self, rows: int, heads: int, length: int, dim: int, dtype: mx.Dtype) -> int:
        """Count `length` new positions and make room for them in the buffers; returns where they are to be written."""
        start, self.offset = self.offset, self.offset + length
        if self.keys is None or self.offset > self.keys.shape[2]:
            shape = rows, heads, length, dim
            self.keys, self.values = (grow(old, shape, dtype, start, self.step) for old in (self.keys, self.values))
        return start

    def size(self) -> int:
        return self.offset

    @property
    def state(self) -> tuple[Any, Any, int]:
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset = state

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see: None (all), "causal", or booleans [length, total]."""
        if window_size is not None or (return_array and length > 1):
            return causal_mask(length, self.offset, window_size)
        return "causal" if length > 1 else None

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """The same past in fewer bits."""
        cache = QuantizedKVCache(group_size, bits)
        if self.keys is not None:
            cache.update_and_fetch(*self.keys_and_values())
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchKVCache.merge(caches)


class QuantizedKVCache(Cache):
    """The past of one sequence in `bits` a value, with a scale and a bias for every `group_size` values."""

    def __init__(self, group_size: int = 64, bits: int = 8) -> None:
        self.keys, self.values, self.offset = None, None, 0
        self.group_size, self.bits = group_size, bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        """Append keys and values [B, K, L, D]; returns all of them as (packed, scales, biases)."""
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

    def size(self) -> int:
        return self.offset

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
    """The first `keep` positions and the latest of the rest, `max_size` in all.

    A single new position overwrites the oldest in place: order does not matter to attention, since
    keys are already rotated by their positions. Longer updates first put the past back in order.
    """

    def __init__(self, max_size: int, keep: int = 0) -> None:
        self.keys, self.values, self.offset = None, None, 0
        self.max_size, self.keep = max_size, keep
        self._idx = 0  # where the next single position is written

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns those still held, at most max_size - 1 + L."""
        length = keys.shape[2]
        if length > 1:
            # Each new position still sees max_size positions, itself included.
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
        """Let `_idx` be where a single new position goes: behind what is held, or in place of the oldest."""
        columns = 0 if self.keys is None else self.keys.shape[2]
        if columns > self.max_size:  # as a longer update left them: in order
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
        """Of `buffer`, which is in order, what is kept and the latest, `size` columns in all."""
        excess = buffer.shape[2] - size
        return [buffer] if excess <= 0 else [buffer[:, :, : self.keep], buffer[:, :, self.keep + excess :]]

    def in_order(self, buffer: mx.array) -> mx.array:
        """What `buffer` holds, oldest first."""
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
        return self.offset < self.max_size

    def trim(self, count: int) -> int:
        if not self.is_trimmable():  # what the last positions took the place of is gone
            return 0
        count = super().trim(count)
        self._idx -= count
        return count

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """Refused with a `RequestError`: mlx-lm has no quantized cache that slides, either."""
        raise RequestError("--kv-bits cannot be combined with a sliding cache (--max-kv-size).")

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see of what `update_and_fetch` will return."""
        window = window_size or self.max_size
        if length == 1:
            return self._latest(window) if window < self.max_size and self.offset >= window else None
        past = min(self.offset, self.max_size - 1)
        if past + length > window or return_array:
            return causal_mask(length, past, window, keep=self.keep)
        return "causal"

    def _latest(self, window: int) -> mx.array:
        """Booleans [columns] after one more position: True for the kept and the latest, `window` of them in all."""
        columns = mx.arange(min(self.offset + 1, self.max_size))
        last = self.keep if self._idx >= self.max_size else self._idx
        age = (last - columns) % max(1, columns.size - self.keep)
        return (columns < self.keep) | (age < window - self.keep)

    @classmethod
    def merge(cls, caches: Sequence[RotatingKVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchRotatingKVCache.merge(caches)


def make_cache(num_layers: int, max_kv_size: int | None = None) -> list[Any]:
    """Empty caches for one sequence: growing, or holding the first 4 and the latest up to `max_kv_size`.

    Raises:
        RequestError: `max_kv_size` does not leave room beside the 4 kept.
    """
    if max_kv_size is None:
        return [KVCache() for _ in range(num_layers)]
    if max_kv_size < SMALLEST_WINDOW:
        raise RequestError(f"--max-kv-size must be {SMALLEST_WINDOW} or more, got {max_kv_size}.")
    return [RotatingKVCache(max_kv_size, keep=4) for _ in range(num_layers)]


def causal_mask(length: int, past: int, window: int | None = None, keep: int = 0) -> mx.array:
    """Booleans [length, past + length], True where visible: itself and the past, or `window` of them in all.

    Those are the first `keep` columns and the latest of the rest.
    """
    rows = mx.arange(past, past + length)[:, None]
    columns = mx.arange(past + length)
    mask = rows >= columns
    if window is not None:
        mask = mask & ((rows < columns + (window - keep)) | (columns < keep))
    return mask


def grow(buffer: mx.array | None, new: Sequence[int], dtype: mx.Dtype, used: int, step: int) -> mx.array:
    """`buffer` with what it holds and room for a shape `new` [B, K, L, D] behind its `used` columns, in whole steps."""
    room = -(-new[2] // step) * step
    zeros = mx.zeros((*new[:2], room, new[3]), dtype)
    return zeros if buffer is None else mx.concatenate([buffer[:, :, :used], zeros], axis=2)


# Batches: rows of different lengths, each padded on the left.


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
