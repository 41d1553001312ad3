"""The header of a GGUF file: its keys, and the offset of each tensor. Everything is validated before use.

The gguf package's own reader takes over a second for 32,000 tokens, trusts every count, and reads past the end of a
file as if it were empty. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
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

# Each token has three values: its text, its score and its type. OpenELM's vocabulary takes 100,000 values and 1 MB;
# the largest published vocabularies take about ten times that.
_MAX_VALUES = 4 * (1 << 20)
_MAX_BYTES = 1 << 26
_MAX_TENSORS = 1 << 14
_MAX_DIMENSIONS, _MAX_NAME_BYTES = 4, 63  # ggml's limits for a tensor
_MAX_NESTED = 4  # arrays in arrays

# The types of values by number: `struct` codes of the scalars, then strings and arrays.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file.

    Rows are stored as blocks of `block` weights in `block_bytes` bytes; a float type has blocks of one.
    """

    name: str
    kind: str  # the type's name in `gguf.GGMLQuantizationType`
    shape: tuple[int, ...]
    offset: int  # in bytes from the start of the file
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
    tensors: dict[str, TensorInfo]


class _Damaged(ValueError):
    """The file is invalid; the message says why."""


class _Unsupported(ValueError):
    """A valid file that is not supported; the message follows the file's name."""


def read(path: Path) -> Header:
    """The header of a file; all tensors are within the file. Needs the gguf package.

    Raises:
        RequestError: the file cannot be read, is damaged, is of another version or byte order, or exceeds the limits
            above.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            return _Reader(file, size).header()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    except _Damaged as error:
        raise RequestError(f"{path} is damaged or not a GGUF file ({error}); download it again.") from None
    except _Unsupported as error:
        raise RequestError(f"{path} {error}.") from None


class _Reader:
    """Reads a file of `size` bytes sequentially, within the limits above."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self._size = size
        self._position = 0
        self._values = 0

    def header(self) -> Header:
        """The whole header; raises `_Damaged` or `_Unsupported`."""
        self._check_version()
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MAX_TENSORS:
            raise _Damaged(f"it claims {tensors} tensors")
        self._count(keys)
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._name()
            if name in values:
                raise _Damaged(f"the key {quote(name)} appears twice")
            values[name] = self._value(self._number("I"), _MAX_NESTED)
        infos = [self._info() for _ in range(tensors)]
        return Header(values, _locate(infos, self._position, _alignment(values), self._size))

    def _check_version(self) -> None:
        if self._take(len(MAGIC)) != MAGIC:
            raise _Damaged("it does not begin with GGUF")
        version = self._number("I")
        if version and version % 65536 == 0:  # a small number with its bytes reversed
            raise _Unsupported("is in the other byte order; convert the original again")
        if version == 1:
            raise _Unsupported("is GGUF version 1, which llama.cpp dropped in 2023; convert the original again")
        if version not in _VERSIONS:
            raise _Damaged(f"its version is {version}, not {' or '.join(map(str, _VERSIONS))}")

    def _take(self, count: int) -> bytes:
        if count > self._size - self._position:
            raise _Damaged("it is cut off")
        if self._position + count > _MAX_BYTES:
            raise _Damaged(f"its header has more than {_MAX_BYTES} bytes")
        data = self._file.read(count)
        if len(data) < count:
            raise _Damaged("it is cut off")
        self._position += count
        return data

    def _count(self, values: int) -> None:
        """Called before `values` more are read, so that a false count cannot exhaust memory."""
        self._values += values
        if self._values > _MAX_VALUES:
            raise _Damaged(f"its header has more than {_MAX_VALUES} values")

    def _number(self, code: str) -> Any:
        """A number by its `struct` code."""
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int) -> tuple[Any, ...]:
        data = self._take(count * struct.calcsize(f"<{code}"))
        return struct.unpack(f"<{count}{code}", data)

    def _text(self) -> str | bytes:
        """A string; one that is not UTF-8 stays bytes."""
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

    def _value(self, kind: int, depth_left: int) -> Any:
        """A key's value of the type with the number `kind`."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise _Damaged(f"it has a value of unknown type {kind}")
        if not depth_left:
            raise _Damaged(f"it has arrays nested more than {_MAX_NESTED} deep")
        kind, count = self._number("I"), self._number("Q")
        self._count(count)
        if kind in _SCALARS:
            return list(self._numbers(_SCALARS[kind], count))
        return [self._value(kind, depth_left - 1) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, shape, number of its type, and offset into the data."""
        name, dimensions = self._name(), self._number("I")
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise _Damaged(f"the name {quote(name)} is too long for a tensor")
        if dimensions > _MAX_DIMENSIONS:
            raise _Damaged(f"{quote(name)} has {dimensions} dimensions")
        shape = self._numbers("Q", dimensions)[::-1]  # stored innermost dimension first
        return name, shape, self._number("I"), self._number("Q")


def _alignment(values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise _Damaged(f"its general.alignment is {quote(alignment)}, not a power of two")
    return alignment


def _locate(
    infos: list[tuple[str, tuple[int, ...], int, int]], header_end: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """The tensors by name. As llama.cpp requires, they are contiguous, each padded to the alignment.

    Args:
        infos: the results of `_Reader._info`, in the file's order.
        size: of the file, in bytes.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    start = _align(header_end, alignment)
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, shape, number, offset in infos:
        if name in tensors:
            raise _Damaged(f"the tensor {quote(name)} appears twice")
        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise _Unsupported(
                f"stores {name} as ggml's type {number}, which the installed gguf package does not support; "
                "update it, or convert a file of another type"
            ) from None
        if not shape or min(shape) < 1 or shape[-1] % block:
            raise _Damaged(f"{quote(name)} of type {kind.name} has shape {list(shape)}")
        if offset != expected:
            raise _Damaged(f"{quote(name)} is at byte {offset} of the data instead of {expected}")
        tensors[name] = tensor = TensorInfo(name, kind.name, shape, start + offset, block, block_bytes)
        if tensor.offset + tensor.nbytes > size:
            raise _Damaged(f"{quote(name)} is cut off")
        expected += _align(tensor.nbytes, alignment)
    return tensors


def _align(position: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-position // alignment) * alignment
