"""Parts of key-value caches that outlive their request: cut out of caches, and joined to caches again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..cache import KVCache, QuantizedKVCache, RotatingKVCache
from ..config import ModelConfig
from ..errors import RequestError

# "growing"; "quantized", group_size, bits; "sliding", max_size, keep.
Kind = tuple[str | int, ...]


@dataclass(frozen=True)
class Content:
    """For each layer its arrays [1, K, T, *]: keys and values, or packed keys, scales, biases and the same of values.

    A segment has T consecutive positions. With `numbers` (`offset`, `keep`, `max_size`, index) it is a whole sliding
    cache that has dropped positions.
    """

    layers: tuple[tuple[mx.array, ...], ...]
    numbers: tuple[int, ...] | None = None

    @property
    def is_whole(self) -> bool:
        return self.numbers is not None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.layers for part in layer)

    def fits(self, kind: Kind, config: ModelConfig, length: int) -> bool:
        """Whether these are `length` positions, or a whole cache that has seen as many, of a model with this config."""
        name, *sizes = kind
        dim, heads = config.head_dim, config.num_kv_heads
        widths = [dim, dim]
        if name == "quantized":
            group_size, bits = map(int, sizes)
            widths = [dim * bits // 32, dim // group_size, dim // group_size] * 2
        if self.numbers is not None:
            offset, keep, max_size, index = self.numbers
            held = self.layers[0][0].shape[2]
            if [max_size, keep] != sizes or not (max_size <= held < offset == length and keep <= index <= held):
                return False
            length = held
        shapes = [[(1, count, length, width) for width in widths] for count in heads]
        return [[part.shape for part in layer] for layer in self.layers] == shapes

    def part(self, start: int, end: int) -> Content:
        """Positions `start` to `end` of a segment, in memory of their own."""
        return _owned([[part[:, :, start:end] for part in layer] for layer in self.layers])


def kind_of(cache: Any) -> Kind:
    """The kind of a layer's cache; RequestError for those of batches and of other programs."""
    if isinstance(cache, KVCache):
        return ("growing",)
    if isinstance(cache, QuantizedKVCache):
        return ("quantized", cache.group_size, cache.bits)
    if isinstance(cache, RotatingKVCache):
        return ("sliding", cache.max_size, cache.keep)
    raise RequestError(f"A {type(cache).__name__} cannot be shared between requests.")


def segment(cache: Sequence[Any], start: int, end: int) -> Content:
    """Positions `start` to `end` of caches that have dropped none, in memory of their own."""
    return _owned([[part[:, :, start:end] for part in _arrays(layer)] for layer in cache])


def snapshot(cache: Sequence[Any]) -> Content:
    """Whole sliding caches, in memory of their own."""
    return _owned([_arrays(layer) for layer in cache], tuple(cache[0].state[2:]))


def _arrays(cache: Any) -> list[mx.array]:
    """The arrays of a layer's cache without the unused part of its buffers."""
    sides = cache.keys_and_values()
    return [part for side in sides for part in (side if isinstance(side, tuple) else (side,))]


def _owned(layers: Sequence[Sequence[mx.array]], numbers: tuple[int, ...] | None = None) -> Content:
    """Evaluated copies: a slice would keep the whole buffer that it was cut from in memory."""
    copies = tuple(tuple(mx.concatenate([part, part[:, :, :0]], axis=2) for part in layer) for layer in layers)
    mx.eval(copies)
    return Content(copies, numbers)


def join(kind: Kind, contents: Sequence[Content], length: int, room_for: int = 0) -> list[Any]:
    """Caches of `length` positions made of consecutive segments, or of one snapshot; lazy, nothing is copied yet.

    Without contents, one empty cache.

    Args:
        room_for: positions that the buffers will have room for, so that they are not copied again soon.
    """
    if not contents:
        return [_cache(kind, (), 0)]
    if contents[0].numbers is not None:  # the arrays are written to, so they are handed out as new ones
        return [
            RotatingKVCache.from_state([*(part[...] for part in layer), *contents[0].numbers])
            for layer in contents[0].layers
        ]
    room = 0 if kind[0] == "sliding" else max(0, -(-room_for // KVCache.step) * KVCache.step - length)
    held = sum(content.layers[0][0].shape[2] for content in contents)
    caches = []
    for layer in zip(*(content.layers for content in contents), strict=True):
        parts = []
        for pieces in zip(*layer, strict=True):
            last = pieces[-1][:, :, : pieces[-1].shape[2] - (held - length)]
            zeros = mx.zeros((*last.shape[:2], room, last.shape[3]), last.dtype)
            parts.append(mx.concatenate([*pieces[:-1], last, zeros], axis=2))
        caches.append(_cache(kind, parts, length))
    return caches


def _cache(kind: Kind, parts: Sequence[mx.array], length: int) -> Any:
    """One layer's cache of this kind; empty without parts."""
    name, *numbers = kind
    cache: Any
    if name == "growing":
        cache = KVCache()
        state: tuple[Any, ...] = (*parts, length)
    elif name == "quantized":
        cache = QuantizedKVCache(*numbers)  # type: ignore[arg-type]
        state = (tuple(parts[:3]), tuple(parts[3:]), length, *numbers)
    else:
        max_size, keep = numbers
        cache = RotatingKVCache(max_size, keep)  # type: ignore[arg-type]
        state = (*parts, length, keep, max_size, length)
    if parts:
        cache.state = state
    return cache
