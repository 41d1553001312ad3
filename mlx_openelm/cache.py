"""Key-value caches, one a layer: growing, sliding, quantized. Those for rows of different lengths: `batch_cache`.

Class names, methods and `state` are those of mlx-lm, so that its generators drive our caches, ours
drive its models, and saved prompt caches are read by both. Keys and values are [B, K, T, D]
(rows, key-value heads, positions, head_dim); buffers grow in steps and are longer than what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from .errors import RequestError

STEP = 256
SMALLEST_WINDOW = 8  # of a sliding cache: the 4 it keeps, and room beside them


class Cache:
    """What every cache shares. `keys` and `values` are None until the first update."""

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
        count = min(self.offset, count)
        self.offset -= count
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the unused part included."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


class KVCache(Cache):
    """The past of one sequence (or of rows of equal length)."""

    def __init__(self) -> None:
        self.keys, self.values, self.offset = None, None, 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them."""
        rows, heads, length, dim = keys.shape
        start = self.reserve(rows, heads, length, dim, keys.dtype)
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def holds(self, dtype: mx.Dtype) -> bool:
        """Whether keys and values are, or will be, of this type."""
        return self.keys is None or self.keys.dtype == self.values.dtype == dtype

    def reserve(self, rows: int, heads: int, length: int, dim: int, dtype: mx.Dtype) -> int:
        """Count `length` new positions and make room for them in the buffers; returns where they are to be written."""
        start, self.offset = self.offset, self.offset + length
        if self.keys is None or self.offset > self.keys.shape[2]:
            shape = rows, heads, length, dim
            self.keys, self.values = (grow(old, shape, dtype, start) for old in (self.keys, self.values))
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
            cache.update_and_fetch(self.keys[:, :, : self.offset], self.values[:, :, : self.offset])
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        from .batch_cache import BatchKVCache

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
                tuple(grow(old, new.shape, new.dtype, start) for old, new in zip(part, news, strict=True))
                for part, news in zip(olds, packed, strict=True)
            )
        for buffers, news in zip((self.keys, self.values), packed, strict=True):
            for buffer, new in zip(buffers, news, strict=True):
                buffer[:, :, start : self.offset] = new
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
        if length > 1 or self.keys is None or self.keys.shape[2] > self.max_size:
            # Each new position still sees max_size positions, itself included.
            self.keys, self.values = (self._append(old, new) for old, new in ((self.keys, keys), (self.values, values)))
            self._idx = self.keys.shape[2]
        else:
            held = self.size()
            if self._idx >= self.max_size:
                self._idx = self.keep
            elif self._idx >= self.keys.shape[2]:
                extra = min(STEP, self.max_size - held)
                self.keys, self.values = (_pad(x, extra) for x in (self.keys, self.values))
            self.keys[:, :, self._idx : self._idx + 1] = keys
            self.values[:, :, self._idx : self._idx + 1] = values
            self._idx += 1
        self.offset += length
        held = min(self.offset, self.keys.shape[2])
        return self.keys[:, :, :held], self.values[:, :, :held]

    def _append(self, old: mx.array | None, new: mx.array) -> mx.array:
        if old is None:
            return new
        old = self.in_order(old)
        excess = max(0, old.shape[2] - (self.max_size - 1))
        return mx.concatenate([old[:, :, : self.keep], old[:, :, self.keep + excess :], new], axis=2)

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
        count = super().trim(count)
        self._idx -= count
        return count

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see of what `update_and_fetch` will return."""
        if length == 1:
            return None
        window = window_size or self.max_size
        past = min(self.offset, self.max_size - 1)
        if past + length > window or return_array:
            return causal_mask(length, past, window, keep=self.keep)
        return "causal"

    @classmethod
    def merge(cls, caches: Sequence[RotatingKVCache]) -> Any:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        from .batch_cache import BatchRotatingKVCache

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


def grow(buffer: mx.array | None, new: Sequence[int], dtype: mx.Dtype, used: int) -> mx.array:
    """`buffer` with what it holds and room for a shape `new` [B, K, L, D] behind its `used` columns, in whole steps."""
    room = -(-new[2] // STEP) * STEP
    zeros = mx.zeros((*new[:2], room, new[3]), dtype)
    return zeros if buffer is None else mx.concatenate([buffer[:, :, :used], zeros], axis=2)


def _pad(buffer: mx.array, columns: int) -> mx.array:
    return mx.pad(buffer, [(0, 0), (0, 0), (0, columns), (0, 0)])
