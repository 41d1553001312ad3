"""Caches that grow with every position: of one sequence, quantized, and of rows of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx

from ..errors import RequestError, quote
from .base import Cache, causal_mask, grow
from .batches import BatchCache
from .rotating import RotatingKVCache

_SMALLEST_WINDOW = 8  # of a sliding cache: its first 4 positions, and room for the latest


def make_cache(num_layers: int, max_kv_size: int | None = None) -> list[Any]:
    """Empty caches for one sequence: growing, or sliding if `max_kv_size` is given.

    Sliding caches keep the first 4 positions and the latest, `max_kv_size` in total.

    Raises:
        RequestError: `max_kv_size` is below what a sliding cache needs.
    """
    if max_kv_size is None:
        return [KVCache() for _ in range(num_layers)]
    check_window(max_kv_size)
    return [RotatingKVCache(max_kv_size, keep=4) for _ in range(num_layers)]


def check_window(max_kv_size: object) -> None:
    """Raise a RequestError unless a sliding cache can have this size."""
    if type(max_kv_size) is not int or max_kv_size < _SMALLEST_WINDOW:
        raise RequestError(f"--max-kv-size must be {_SMALLEST_WINDOW} or more, got {quote(max_kv_size)}.")


class KVCache(Cache):
    """A growing cache of one sequence, or of rows of equal length.

    Kernels write new positions in place, although MLX treats arrays as values. The CPU kernels of one sequence let MLX
    decide whether that is safe: a buffer with other references is copied. CUDA's, and those of a step of several
    sequences, cannot check, so they write only into buffers from `acquire_buffers`, which this cache owns until `keys`
    or `values` is read: reading them waits for the pending write and releases the buffers; the kernel gets new ones.
    """

    _keys: Any = None
    _values: Any = None
    _owned = False  # whether the buffers come from `acquire_buffers` and have no other references
    _capacity = 0  # positions in owned buffers
    _pending: mx.array | None = None  # evaluating it completes the last write into owned buffers
    next_position: tuple[int, mx.array] | None = None  # for a kernel that counts positions on the device

    @property
    def keys(self) -> Any:
        if self._owned:
            self._release()
        return self._keys

    @keys.setter
    def keys(self, keys: Any) -> None:
        if self._owned:
            self._release()  # the values stay
        self._keys = keys

    @property
    def values(self) -> Any:
        if self._owned:
            self._release()
        return self._values

    @values.setter
    def values(self, values: Any) -> None:
        if self._owned:
            self._release()  # the keys stay
        self._values = values

    def _release(self) -> None:
        """Complete the pending write and give up ownership: others may refer to the buffers from now on."""
        if self._pending is not None:
            mx.eval(self._pending)
        self._owned, self._pending = False, None

    def __getstate__(self) -> dict[str, Any]:
        self._release()  # a copy of the cache shares the buffers
        return self.__dict__

    def empty(self) -> bool:
        return self._keys is None

    @property
    def nbytes(self) -> int:
        return 0 if self._keys is None else self._keys.nbytes + self._values.nbytes

    @property
    def state(self) -> tuple[Any, Any, int]:
        """Key buffer, value buffer and `offset`."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self._keys, self._values, self.offset = state
        self._owned, self._pending = False, None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, K, L, D]; returns all of them, [B, K, offset, D]."""
        rows, heads, length, dim = keys.shape
        all_keys, all_values, start = self.reserve(rows, heads, length, dim, keys.dtype)
        all_keys[:, :, start : self.offset] = keys
        all_values[:, :, start : self.offset] = values
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The positions held, without the spare capacity of the buffers; there must have been an update."""
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    def reserve(self, rows: int, heads: int, length: int, dim: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, int]:
        """Add `length` positions to the offset; returns key and value buffers with room for them, and the first one.

        A kernel takes the buffers [B, K, T, D] and returns new ones, to be assigned to `state`. Dropping the cache's
        references to the old ones lets it write in place.
        """
        if self._owned:
            self._release()
        start, self.offset = self.offset, self.offset + length
        if self._keys is None:
            shape = rows, heads, -(-length // self.step) * self.step, dim
            self._keys, self._values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)
        elif self.offset > self._keys.shape[2]:
            shape = rows, heads, length, dim
            self._keys, self._values = (grow(x, shape, dtype, start, self.step) for x in (self._keys, self._values))
        return self._keys, self._values, start

    def has_dtype(self, dtype: mx.Dtype) -> bool:
        """Whether keys and values have this type, or there are none yet."""
        return self._keys is None or self._keys.dtype == self._values.dtype == dtype

    def acquire_buffers(self, heads: int, dim: int, dtype: mx.Dtype, length: int = 1) -> tuple[mx.array, mx.array]:
        """Owned buffers [1, K, T, D] with room for `length` more positions, for a kernel that writes into them."""
        if not self._owned or self._capacity < self.offset + length:
            shape = 1, heads, length, dim
            keys, values = (grow(x, shape, dtype, self.offset, self.step) for x in (self.keys, self.values))
            # Once evaluated, they are complete and do not move in memory.
            mx.eval(keys, values)
            self._keys, self._values, self._owned, self._capacity = keys, values, True, keys.shape[2]
        return self._keys, self._values

    def advance(self, result: mx.array, length: int = 1) -> None:
        """Count the positions that a kernel writes into the owned buffers when `result` is evaluated."""
        self.offset += length
        self._pending = result

    @property
    def pending(self) -> mx.array | None:
        """What must be evaluated before the owned buffers may be written into again."""
        return self._pending

    def make_mask(
        self, length: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """What `length` new positions may see: None (everything), "causal", or booleans [length, total]."""
        if window_size is not None or (return_array and length > 1):
            return causal_mask(length, self.offset, window_size)
        return "causal" if length > 1 else None

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> QuantizedKVCache:
        """A quantized cache with the same positions."""
        cache = QuantizedKVCache(group_size, bits)
        if not self.empty():
            cache.update_and_fetch(*self.keys_and_values())
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> BatchKVCache:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        return BatchKVCache.merge(caches)


class QuantizedKVCache(Cache):
    """A growing cache quantized to `bits` per value, with a scale and a bias for every `group_size` values."""

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
        """Keys and values, each as (packed, scales, biases), without the spare capacity of the buffers."""
        return tuple(tuple(b[:, :, : self.offset] for b in part) for part in (self.keys, self.values))

    @property
    def state(self) -> tuple[Any, Any, int, int, int]:
        """Keys and values, each as (packed, scales, biases), `offset`, `group_size` and `bits`."""
        return self.keys, self.values, self.offset, self.group_size, self.bits

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, self.offset, self.group_size, self.bits = state

    make_mask = KVCache.make_mask

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else sum(part.nbytes for part in (*self.keys, *self.values))


class BatchKVCache(BatchCache):
    """A growing cache of several sequences: the first `left_padding[b]` columns of row b are padding."""

    def extract(self, row: int) -> KVCache:
        """One row [1, K, T, D] as a cache of its own, without padding; IndexError if the row does not exist."""
        self._check_rows([row])
        cache = KVCache()
        if self.keys is not None:
            keys, values = self._row(row)
            cache.state = keys, values, keys.shape[2]
        return cache

    @classmethod
    def merge(cls, caches: Sequence[KVCache]) -> Self:
        """One cache with a row for each of `caches`, padded on the left to the longest."""
        rows = [None if cache.empty() else cache.keys_and_values() for cache in caches]
        return cls([0] * len(caches))._filled(rows, [cache.offset for cache in caches])
