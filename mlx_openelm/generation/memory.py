"""How much memory texts need, so that they wait for it instead of failing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import backend
from ..cache import KVCache
from ..config import ModelConfig
from ..errors import RequestError
from ..model import OpenELM
from ..wording import size
from .options import CacheOptions

if TYPE_CHECKING:
    from .row import Row

# The part of the free memory that rows may fill by default, and what they may where that is not known.
FREE_SHARE = 0.5
_UNKNOWN_FREE = 4 << 30


def cache_bytes(config: ModelConfig, options: CacheOptions, positions: int, itemsize: int) -> int:
    """The most bytes that the keys and values of one text take.

    Args:
        positions: tokens that the caches have seen at the end.
        itemsize: bytes of an activation.
    """
    if options.max_kv_size is not None:
        positions = min(positions, options.max_kv_size)
    step = KVCache.step
    values = 2 * sum(config.num_kv_heads) * config.head_dim * (-(-positions // step) * step)
    if options.kv_bits is None or options.quantized_kv_start >= positions:
        return values * itemsize
    packed = values * options.kv_bits // 8 + 2 * values // options.group_size(config.head_dim) * itemsize
    return packed if options.quantized_kv_start == 0 else packed + values * itemsize


class Budget:
    """Memory for keys and values, reserved for each row from its beginning to its end."""

    def __init__(self, model: OpenELM, max_bytes: int | None = None):
        """By default `max_bytes` is a share of what is free now (`FREE_SHARE`)."""
        if max_bytes is None:
            free = backend.available_memory()
            max_bytes = _UNKNOWN_FREE if free is None else int(FREE_SHARE * free)
        self.model, self.max_bytes, self.reserved = model, max_bytes, 0
        self._itemsize = model.transformer.norm.weight.dtype.size

    def needed(self, row: Row) -> int:
        """The most bytes that a row's keys and values will take."""
        positions = row.past + len(row.request.prompt) + row.request.count
        return cache_bytes(self.model.config, row.request.options, positions, self._itemsize)

    def check(self, row: Row) -> None:
        """Raise a `RequestError` if a row needs more than there is for all."""
        if self.needed(row) > self.max_bytes:
            raise RequestError(
                f"The text needs up to {size(self.needed(row))} for keys and values, where {size(self.max_bytes)} "
                "may be used; lower --max-tokens, shorten the prompt, or set --max-kv-size or --kv-bits."
            )

    def has_room(self, row: Row) -> bool:
        """Whether a row's bytes are free."""
        return self.reserved + self.needed(row) <= self.max_bytes

    def take(self, row: Row) -> None:
        """Reserve a row's bytes."""
        self.reserved += self.needed(row)

    def release(self, row: Row) -> None:
        self.reserved -= self.needed(row)
