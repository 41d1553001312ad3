"""What all caches share: the base class, masks, and buffers with room to grow."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, Self

import mlx.core as mx


class Cache:
    """The base class of all caches. `keys` and `values` are None until the first update."""

    step = 256  # buffers grow by this many positions
    keys: Any = None
    values: Any = None
    offset: Any = 0
    state: Any

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """A cache with the `state` of another one of its class, ours or mlx-lm's."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def __copy__(self) -> Self:
        """A cache of the same positions, which updates of the other do not change.

        Shared arrays would be changed: MLX assigns to a part of an array in place. Copies of arrays share their memory
        until one of them is assigned to.
        """
        return deepcopy(self)

    def empty(self) -> bool:
        """Whether there was no update yet."""
        return self.keys is None

    def size(self) -> int:
        """The number of positions held."""
        return self.offset

    def is_trimmable(self) -> bool:
        """Whether `trim` can remove positions."""
        return True

    def trim(self, count: int) -> int:
        """Remove the last `count` positions; returns the number removed."""
        if not self.is_trimmable():
            return 0
        count = max(0, min(self.offset, count))
        self.offset -= count
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, including their unused part."""
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


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
    """The first `used` columns of `buffer`, then zeros for new columns of shape `new` [B, K, L, D].

    The number of zero columns is L rounded up to a multiple of `step`.
    """
    room = -(-new[2] // step) * step
    zeros = mx.zeros((*new[:2], room, new[3]), dtype)
    return zeros if buffer is None else mx.concatenate([buffer[:, :, :used], zeros], axis=2)


def pad_left(x: mx.array, length: int) -> mx.array:
    """Keys or values [B, K, T, D] -> [B, K, length, D], with zeros in front."""
    return mx.pad(x, [(0, 0), (0, 0), (length - x.shape[2], 0), (0, 0)])
