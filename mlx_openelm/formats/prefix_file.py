"""Files of the prefix tree's second tier: safetensors with `LAYER.N`, array N of a layer, and a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import OpenELMError, RequestError
from . import atomic
from .safetensors import read_header

_VERSION = "1"


def write(path: Path, layers: Sequence[Sequence[mx.array]], notes: Mapping[str, str]) -> None:
    """Write arrays of any shape, and strings by name; the file appears complete or not at all.

    Raises:
        OpenELMError: writing failed.
    """
    tensors = {f"{layer}.{n}": part for layer, parts in enumerate(layers) for n, part in enumerate(parts)}
    notes = {**notes, "version": _VERSION}
    with atomic.new_file(path) as partial:
        try:
            mx.save_safetensors(str(partial), tensors, notes | {"checksum": _checksum(tensors, notes)})
            read_header(partial)  # a full disk shows here
        except (RuntimeError, RequestError) as error:
            raise OpenELMError(f"Writing {path} failed ({error}).") from None


def read_notes(path: Path) -> dict[str, str]:
    """The strings in a file, without its arrays; RequestError if the header is damaged or of another version."""
    return _open(path)[1]


def read(path: Path) -> tuple[tuple[tuple[mx.array, ...], ...], dict[str, str]]:
    """The arrays of each layer, and the strings.

    Raises:
        RequestError: the file is missing or damaged.
    """
    tensors, notes = _open(path)
    try:
        mx.eval(tensors)
    except RuntimeError as error:
        raise RequestError(f"{path} cannot be read: {error}.") from None
    if _checksum(tensors, notes) != notes.get("checksum"):
        raise RequestError(f"{path} is damaged: its checksum is wrong.")
    layers: list[tuple[mx.array, ...]] = []
    while f"{len(layers)}.0" in tensors:
        names = (f"{len(layers)}.{n}" for n in range(len(tensors)))
        layers.append(tuple(tensors[name] for name in names if name in tensors))
    return tuple(layers), notes


def _open(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    read_header(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise RequestError(f"{path} cannot be read: {error}.") from None
    if loaded[1].get("version") != _VERSION:
        raise RequestError(f"{path} is not a file of this version.")
    tensors, notes = loaded
    return tensors, notes


def _checksum(tensors: Mapping[str, mx.array], notes: Mapping[str, str]) -> str:
    """Of the arrays, and of all strings but itself."""
    value = zlib.crc32(json.dumps(sorted(item for item in notes.items() if item[0] != "checksum")).encode())
    for name in sorted(tensors):
        values = mx.contiguous(tensors[name]).reshape(-1).view(mx.uint8)
        value = zlib.crc32(memoryview(values), zlib.crc32(name.encode(), value))  # type: ignore[arg-type]
    return f"{value:08x}"
