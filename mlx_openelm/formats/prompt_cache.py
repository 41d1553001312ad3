"""mlx-lm's prompt cache files: safetensors with the `state` of each layer's key-value cache.

The tensor `LAYER.N` is item N of a layer's state; a quantized layer has `LAYER.0.0` to `LAYER.1.2`. Numbers and None
are stored as tensors too. In the metadata `0.NAME` is what the writer says of the cache, `1.LAYER` the class of a
layer's cache, and `2.I.0` with `2.I.1` a tensor that stands for a number or None, and for which of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..cache import KVCache, QuantizedKVCache, RotatingKVCache
from ..errors import OpenELMError, RequestError, quote
from ..finite import is_finite
from . import atomic, safetensors
from .safetensors import read_header

ENDING = ".safetensors"
_CLASSES: dict[str, type[KVCache | RotatingKVCache | QuantizedKVCache]] = {
    kind.__name__: kind for kind in (KVCache, RotatingKVCache, QuantizedKVCache)
}
_REMEDY = "write it again with `mlx-openelm cache-prompt`"


def read(path: Path) -> tuple[list[Any], dict[str, str]]:
    """The caches in a file, one per layer, and what its writer says of them.

    Raises:
        RequestError: the file does not exist, is damaged, or holds caches of other kinds or of several sequences.
    """
    try:
        read_header(path)
    except RequestError as error:
        raise RequestError(str(error).replace(safetensors.REMEDY, _REMEDY)) from None
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors, metadata = loaded
        mx.eval(tensors)
    except (RuntimeError, ValueError) as error:
        raise _damaged(path, f"MLX cannot read it ({error})") from None
    notes = {name[2:]: value for name, value in metadata.items() if name.startswith("0.")}
    classes = _numbered(metadata, "1.")
    kinds = {metadata[f"2.{n}.0"]: metadata.get(f"2.{n}.1") for n in range(len(metadata)) if f"2.{n}.0" in metadata}
    if not classes:
        raise RequestError(
            f"{path} is no prompt cache, or one of an older mlx-lm: it does not name its kinds of caches; {_REMEDY}."
        )
    return [_read_layer(path, n, name, tensors, kinds) for n, name in enumerate(classes)], notes


def _numbered(metadata: Mapping[str, str], start: str) -> list[str]:
    """The values of `1.0`, `1.1` … up to the first that is missing."""
    values: list[str] = []
    while (name := f"{start}{len(values)}") in metadata:
        values.append(metadata[name])
    return values


def _read_layer(path: Path, layer: int, name: str, tensors: Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    if name not in _CLASSES:
        raise RequestError(
            f"{path} holds a {quote(name)} in layer {layer}; of caches, {', '.join(_CLASSES)} can be read."
        )

    def item(key: str) -> Any:
        if key not in tensors:
            return tuple(item(f"{key}.{part}") if f"{key}.{part}" in tensors else None for part in range(3))
        if key not in kinds:
            return tensors[key]
        return tensors[key].item() if kinds[key] == "scalar" and tensors[key].size == 1 else None

    count = {KVCache: 3, RotatingKVCache: 6, QuantizedKVCache: 5}[_CLASSES[name]]
    state = [item(f"{layer}.{n}") for n in range(count)]
    if f"{layer}.{count}" in tensors or not _is_state(name, state):
        raise _damaged(path, f"the {name} of layer {layer} is incomplete or contradicts itself")
    return _CLASSES[name].from_state(state)


def _is_state(name: str, state: Sequence[Any]) -> bool:
    """Whether keys, values and numbers can be those of a cache of one sequence that was filled by a model."""
    keys, values, *numbers = state
    if not all(type(number) is int and number >= 0 for number in numbers):
        return False
    offset = numbers[0]
    parts = [part for side in (keys, values) for part in (side if isinstance(side, tuple) else (side,))]
    if all(part is None for part in parts):
        return offset == 0 and name != "QuantizedKVCache"
    if not all(isinstance(part, mx.array) and part.ndim == 4 and part.shape[0] == 1 for part in parts):
        return False
    if len({part.shape[1:3] for part in parts}) > 1:
        return False
    columns = parts[0].shape[2]
    if name == "QuantizedKVCache":
        _, group_size, bits = numbers
        return offset <= columns and len(parts) == 6 and all(_is_packed(side, group_size, bits) for side in state[:2])
    if len(parts) != 2 or not all(mx.issubdtype(part.dtype, mx.floating) for part in parts):
        return False
    if name == "KVCache":
        return offset <= columns
    _, keep, max_size, index = numbers
    if offset <= columns:  # nothing was dropped yet
        return keep < max_size and index == offset
    return keep < max_size <= columns and keep <= index <= columns


def _is_packed(side: Sequence[mx.array], group_size: int, bits: int) -> bool:
    packed, scales, biases = side
    dim = scales.shape[3] * group_size
    return (
        bits in (2, 3, 4, 5, 6, 8)
        and packed.dtype == mx.uint32
        and packed.shape[3] * 32 == dim * bits
        and scales.shape == biases.shape
        and mx.issubdtype(scales.dtype, mx.floating)
    )


def write(path: Path, caches: Sequence[Any], notes: Mapping[str, str]) -> None:
    """Write caches, ours or mlx-lm's, without the unused part of their buffers.

    The file appears complete or not at all, and replaces one that is there.

    Args:
        notes: what to say of the cache, strings by name.

    Raises:
        RequestError: they are of other kinds, or of several sequences.
        OpenELMError: writing failed, or a key or value is not finite.
    """
    tensors: dict[str, mx.array] = {}
    metadata = {f"0.{name}": text for name, text in notes.items()}
    kinds: list[tuple[str, str]] = []
    for layer, cache in enumerate(caches):
        name = type(cache).__name__
        if name not in _CLASSES:
            raise RequestError(
                f"The prompt cache has a {name}; a file can hold {', '.join(_CLASSES)}, each of one sequence."
            )
        metadata[f"1.{layer}"] = name
        for position, value in _flat(str(layer), compact_state(cache)):
            if not isinstance(value, mx.array):
                kinds.append((position, "none" if value is None else "scalar"))
                value = mx.array([] if value is None else value)
            tensors[position] = value
    if not all(map(is_finite, tensors.values())):
        raise OpenELMError(
            "The prompt cache holds NaN or infinity: its model is damaged, or float16 is too small for it; "
            "download the model again, or use bfloat16."
        )
    metadata["2.0"] = ""  # mlx-lm counts them from 1
    for n, (position, kind) in enumerate(kinds, 1):
        metadata |= {f"2.{n}.0": position, f"2.{n}.1": kind}
    with atomic.new_file(path) as partial:
        try:
            mx.save_safetensors(str(partial), tensors, metadata)
            read_header(partial)  # a full disk shows here
        except (RuntimeError, RequestError) as error:
            raise OpenELMError(f"Writing {path} failed ({error}); the disk may be full. Nothing was left.") from None


def compact_state(cache: Any) -> tuple[Any, ...]:
    """The state of a cache, ours or mlx-lm's, with buffers that have no unused part."""
    ours: Any = _CLASSES[type(cache).__name__].from_state(cache.state)
    if ours.empty():
        return ours.state
    keys, values = ours.keys_and_values()
    return (_contiguous(keys), _contiguous(values), *ours.state[2:])


def _contiguous(part: Any) -> Any:
    return tuple(map(_contiguous, part)) if isinstance(part, tuple | list) else mx.contiguous(part)


def _flat(prefix: str, state: Sequence[Any]) -> list[tuple[str, Any]]:
    """The items of a state with their positions, `LAYER.N` or `LAYER.N.M`."""
    items: list[tuple[str, Any]] = []
    for n, value in enumerate(state):
        name = f"{prefix}.{n}"
        items += _flat(name, value) if isinstance(value, tuple | list) else [(name, value)]
    return items


def with_ending(path: Path) -> Path:
    """The path with `.safetensors` at its end, as MLX writes and reads it."""
    return path if path.suffix == ENDING else path.with_name(path.name + ENDING)


def _damaged(path: Path, why: str) -> RequestError:
    return RequestError(f"{path} is damaged: {re.sub(r'[.;]$', '', why)}; {_REMEDY}.")
