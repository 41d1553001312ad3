"""Key-value caches that a caller gives: what they have seen, and whether they fit model and options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..finite import is_finite
from .options import CacheOptions


def cache_offset(cache: Sequence[Any], num_layers: int) -> int:
    """The number of tokens that the caches of one sequence have seen.

    Raises:
        RequestError: there is not one cache per layer, they are not key-value caches of one sequence, or their
            positions differ.
    """
    if not isinstance(cache, Sequence):
        raise RequestError(f"The prompt cache must be a list of caches, one for each layer, got {quote(cache)}.")
    if len(cache) != num_layers:
        raise RequestError(f"The prompt cache is for {len(cache)} layers, and the model has {num_layers}.")
    for layer in cache:
        if not hasattr(layer, "update_and_fetch") or not hasattr(layer, "offset"):
            raise RequestError(f"The prompt cache has a {type(layer).__name__}, which holds no keys and values.")
        if isinstance(layer.offset, mx.array) and layer.offset.size != 1:
            raise RequestError(f"The prompt cache holds {layer.offset.size} sequences; one can be continued at a time.")
    if len(set(map(id, cache))) < num_layers:
        raise RequestError("The prompt cache has the same object for several layers; make one with make_prompt_cache.")
    offsets = {int(layer.offset) for layer in cache}
    if len(offsets) > 1:
        raise RequestError(f"The layers of the prompt cache have seen {min(offsets)} to {max(offsets)} tokens.")
    return max(0, offsets.pop())  # negative while a row of a batch is still padding


def cache_is_finite(cache: Sequence[Any]) -> bool:
    """Whether no key, value or scale is NaN or infinite."""
    arrays: list[tuple[str, mx.array]] = tree_flatten([layer.state[:2] for layer in cache])  # type: ignore[assignment]
    return all(is_finite(array) for _, array in arrays)


def check_cache(options: CacheOptions, cache: Sequence[Any]) -> None:
    """Raise a `RequestError` if the given caches are not what the options ask for."""
    for layer in cache:
        kind = type(layer).__name__
        if options.max_kv_size is not None and getattr(layer, "max_size", None) != options.max_kv_size:
            raise RequestError(
                f"--max-kv-size {options.max_kv_size} is for new caches, and the prompt cache, a {kind}, was not made "
                "with it; leave it out."
            )
        if options.kv_bits is None:
            continue
        if hasattr(layer, "bits"):
            if (layer.bits, layer.group_size) != (options.kv_bits, options.kv_group_size or layer.group_size):
                raise RequestError(
                    f"The prompt cache has {layer.bits} bits in groups of {layer.group_size}, which is not what "
                    "--kv-bits and --kv-group-size ask for; leave them out."
                )
        elif hasattr(layer, "max_size") or not hasattr(layer, "to_quantized"):
            raise RequestError(f"--kv-bits cannot quantize the prompt cache, a {kind}; leave it out.")


def check_sizes(config: ModelConfig, cache: Sequence[Any]) -> None:
    """Refuse caches whose keys are not of the model's sizes; there is one cache per layer.

    Raises:
        RequestError: the number or the size of key-value heads differs.
    """
    for layer, (one, heads) in enumerate(zip(cache, config.num_kv_heads, strict=True)):
        if getattr(one, "keys", None) is None:
            continue
        packed = isinstance(one.keys, tuple | list)
        keys = one.keys[1] if packed else one.keys  # the scales, one for each group
        found = keys.shape[1], keys.shape[3] * (one.group_size if packed else 1)
        if found != (heads, config.head_dim):
            raise RequestError(
                f"The prompt cache is of another model: layer {layer} has {found[0]} key-value heads of {found[1]} "
                f"there, and {heads} of {config.head_dim} in this one."
            )
