"""The header of a GGUF file: its keys, and where each tensor lies. Nothing in it is believed before it is checked.

The gguf package's own reader takes over a second for 32,000 tokens, believes every count, and takes what lies beyond
the end of a file for empty. The layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RequestError, quote
from ..inputs import check_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # 3 differs from 2 in that it may be big-endian

# OpenELM's vocabulary takes 100,000 values and 1 MB; the largest anywhere about ten times that. Each token has three
# values: its text, its score and its type.
_MOST_VALUES = 4 * (1 << 20)
_MOST_BYTES = 1 << 26
_MOST_TENSORS = 1 << 14
_MOST_DIMENSIONS, _MOST_NAME = 4, 63  # of a tensor; ggml's own bounds, the second in bytes
_MOST_NESTED = 4  # arrays in arrays

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Placed:
    """A tensor in a file: its type (a name of `gguf.GGMLQuantizationType`), shape, place and size.

    Rows come as blocks, each of `block` weights in `block_bytes` bytes; plain numbers are blocks of one.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    block: int
    block_bytes: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.block * self.block_bytes

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        """The shape of the tensor's bytes, row by row."""
        return (*self.shape[:-1], self.shape[-1] // self.block * self.block_bytes)


@dataclass(frozen=True)
class Header:
    """The values of the keys (text that is not UTF-8 stays bytes), and the tensors by name in the file's order."""

    values: dict[str, Any]
    tensors: dict[str, Placed]


class _Damaged(ValueError):
    """What about a file cannot be, in words for people."""


class _Foreign(ValueError):
    """Why a sound file cannot be read, and what to do."""


def read(path: Path) -> Header:
    """The header of a file, in which every tensor has its place; the gguf package must be there.

    Raises:
        RequestError: damaged, of another version or byte order, or beyond the bounds of any real model.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, size).header()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _Damaged as error:
        raise RequestError(f"{path} is damaged or not a GGUF file ({error}); download it again.") from None
    except _Foreign as error:
        raise RequestError(f"{path} {error}.") from None


class _Reader:
    """Reads forward in a file of `size` bytes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._size = size
        self._position = 0
        self._values = 0

    def header(self) -> Header:
        if self._take(len(MAGIC)) != MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("I")
        if version and version % 65536 == 0:
            raise _Foreign("was written for machines of the other byte order; convert the original again")
        if version == 1:
            raise _Foreign("is GGUF of version 1, which llama.cpp gave up in 2023; convert the original again")
        if version not in _VERSIONS:
            raise _Damaged(f"its version is {version}, not {' or '.join(map(str, _VERSIONS))}")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS:
            raise _Damaged(f"it claims {tensors} tensors")
        values: dict[str, Any] = {}
        for _ in range(self._counted(keys)):
            name = self._name()
            if name in values:
                raise _Damaged(f"its key {quote(name)} is there twice")
            values[name] = self._value(self._number("I"), _MOST_NESTED)
        infos = [self._info() for _ in range(tensors)]
        return Header(values, _place(infos, self._position, _alignment(values), self._size))

    def _take(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise _Damaged("it is cut off")
        if self._position + count > _MOST_BYTES:
            raise _Damaged(f"its header has more than {_MOST_BYTES} bytes")
        data = self._file.read(count)
        if len(data) < count:
            raise _Damaged("it is cut off")
        self._position += count
        return data

    def _counted(self, count: int) -> int:
        """`count` values are about to be read."""
        self._values += count
        if self._values > _MOST_VALUES:
            raise _Damaged(f"its header has more than {_MOST_VALUES} values")
        return count

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        data = self._take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", data)

    def _text(self) -> str | bytes:
        data = self._take(self._number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return data

    def _name(self) -> str:
        name = self._text()
        if isinstance(name, bytes):
            raise _Damaged(f"the name {quote(name)} is not UTF-8")
        return name

    def _value(self, kind: int, nested: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise _Damaged(f"it has a value of type {kind}, which there is not")
        if not nested:
            raise _Damaged(f"it has arrays in arrays, over {_MOST_NESTED} deep")
        kind, count = self._number("I"), self._counted(self._number("Q"))
        if kind in _SCALARS:
            return list(self._numbers(_SCALARS[kind], count))
        return [self._value(kind, nested - 1) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, number of its type, and offset into the data."""
        name, dimensions = self._name(), self._number("I")
        if len(name.encode()) > _MOST_NAME:
            raise _Damaged(f"the name {quote(name)} is too long for a tensor")
        if dimensions > _MOST_DIMENSIONS:
            raise _Damaged(f"{quote(name)} has {dimensions} dimensions")
        shape = self._numbers("Q", dimensions)[::-1]  # stored from the innermost on
        return name, shape, self._number("I"), self._number("Q")


def _alignment(values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its general.alignment is {quote(alignment)}, not a power of two")
    return alignment


def _place(
    infos: list[tuple[str, tuple[int, ...], int, int]], header_end: int, alignment: int, size: int
) -> dict[str, Placed]:
    """Where each tensor lies: they follow each other without a gap, each padded to the alignment, as in llama.cpp."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    start = -(-header_end // alignment) * alignment
    placed: dict[str, Placed] = {}
    expected = 0
    for name, shape, number, offset in infos:
        if name in placed:
            raise _Damaged(f"its tensor {quote(name)} is there twice")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise _Foreign(
                f"stores {name} as ggml's type {number}, which the gguf package here does not know; update it, or "
                "convert a file of another type"
            ) from None
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise _Damaged(f"{quote(name)} of type {kind.name} has shape {list(shape)}")
        if offset != expected:
            raise _Damaged(f"{quote(name)} lies at byte {offset} of the data instead of {expected}")
        placed[name] = tensor = Placed(name, kind.name, shape, start + offset, block, block_bytes)
        if tensor.offset + tensor.nbytes > size:
            raise _Damaged(f"{quote(name)} is cut off")
        expected += -(-tensor.nbytes // alignment) * alignment
    return placed
