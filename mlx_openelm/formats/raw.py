"""Tensors that lie uncompressed somewhere in a file of any format, read lazily by MLX's own reader.

MLX reads whatever it is given as a Python file at once, with one exception: the members of an `.npz` that it opens
by name, whose bytes it asks Python's `zipfile` for when they are used. So for the moment of opening it is shown a
`zipfile` that answers for one name more: an archive whose members are the tensors where they are, each with the
header of an `.npy` file in front.
"""

from __future__ import annotations

import atexit
import io
import math
import os
import sys
import threading
import time
import types
import weakref
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError

# What `.npy` headers call the types; it has no name for bfloat16, whose bits are read as whole numbers.
_NPY_TYPES = {
    mx.float32: "<f4",
    mx.float16: "<f2",
    mx.bfloat16: "<u2",
    mx.uint32: "<u4",
    mx.int32: "<i4",
    mx.uint16: "<u2",
    mx.uint8: "|u1",
    mx.int8: "|i1",
}
_opening = threading.Lock()
_EXIT_SECONDS = 0.5


@dataclass(frozen=True)
class Span:
    """A tensor in a file: `offset` bytes from its start lie the values, row by row, little-endian."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.size


def read_lazily(path: Path, spans: Mapping[str, Span]) -> dict[str, mx.array]:
    """The tensors in `path`, unevaluated: their bytes are read when they are first used.

    A file that is cut short meanwhile makes MLX raise a RuntimeError then.

    Raises:
        RequestError: the file cannot be read, ends before a tensor does, or holds a type MLX does not have.
    """
    try:
        file = _File(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    for name, span in spans.items():
        if span.dtype not in _NPY_TYPES:
            raise RequestError(f"{path} stores {name} in a type that cannot be read.")
        if span.offset < 0 or span.end > file.size:
            raise RequestError(f"{path} is damaged: {name} is cut off; download it again.")
    # MLX takes ".npy" off the names of members, so they are numbered.
    members = {f"{number}.npy": span for number, span in enumerate(spans.values())}
    arrays = _load_members(f"{path}!", members, lambda member: _Member(file, members[member]))
    weights = {name: arrays[str(number)] for number, name in enumerate(spans)}
    return {
        name: weight.view(mx.bfloat16) if spans[name].dtype == mx.bfloat16 else weight
        for name, weight in weights.items()
    }


def _load_members(name: str, members: Iterable[str], opener: Callable[[str], Any]) -> dict[str, mx.array]:
    """What MLX makes of an archive called `name` with these members."""
    stand_in = types.ModuleType("zipfile")
    stand_in.__dict__.update(vars(zipfile))
    archive = types.SimpleNamespace(
        namelist=lambda: list(members),
        open=lambda member, *_, **__: opener(member),
        read=None,
        close=lambda: None,
    )
    # For every other name it is the true module, in case another thread imports it just now.
    stand_in.__dict__["is_zipfile"] = lambda file: file == name or zipfile.is_zipfile(file)
    stand_in.__dict__["ZipFile"] = lambda file, *args, **options: (
        archive if file == name else zipfile.ZipFile(file, *args, **options)
    )
    with _opening:
        sys.modules["zipfile"] = stand_in
        try:
            return dict(mx.load(name, format="npz"))  # type: ignore[arg-type]
        finally:
            sys.modules["zipfile"] = zipfile


def _npy_header(span: Span) -> bytes:
    """The first bytes of an `.npy` file, version 1: magic, length, and a Python literal that ends in a newline."""
    shape = f"({', '.join(map(str, span.shape))}{',' if len(span.shape) == 1 else ''})"
    text = f"{{'descr': '{_NPY_TYPES[span.dtype]}', 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


class _File:
    """One open file for all its tensors: systems allow a process few of them."""

    def __init__(self, path: Path):
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` as far as the file goes; several threads may do so at once."""
        done = 0
        while done < len(buffer) and (count := os.preadv(self._descriptor, [buffer[done:]], offset + done)):
            done += count
        return done

    def __del__(self) -> None:
        # Open as long as one of its tensors was not read.
        if self._descriptor >= 0:
            os.close(self._descriptor)


@atexit.register
def _let_readers_finish() -> None:
    """Wait for MLX's threads to let go of what they have read: one that does so while Python ends would abort it."""
    deadline = time.monotonic() + _EXIT_SECONDS
    while len(_read) and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)  # the last of them is still on its way out when it leaves `_read`


class _Member(io.RawIOBase):
    """A tensor of a file, as an `.npy` file."""

    def __init__(self, file: _File, span: Span):
        self._file, self._span = file, span
        self._header, self._position = _npy_header(span), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        size = len(self._header) + self._span.end - self._span.offset
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the file goes; MLX takes what one call gives for all there is."""
        view = memoryview(buffer).cast("B")
        from_header = self._header[self._position : self._position + len(view)]
        done = len(from_header)
        view[:done] = from_header
        start = self._position + done - len(self._header)
        left = self._span.end - self._span.offset - start
        done += self._file.read_at(self._span.offset + start, view[done : done + left])
        self._position += done
        if done > len(from_header):
            _read.add(self)
        return done


_read: weakref.WeakSet[_Member] = weakref.WeakSet()  # those whose values MLX has asked for and still holds
