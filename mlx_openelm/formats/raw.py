"""Tensors stored uncompressed at known offsets in a file of any format; each is read when it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import RequestError
from .safetensors import Tensor

_DTYPES = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.int32, mx.uint16, mx.uint8, mx.int8)


@dataclass(frozen=True)
class Span:
    """A tensor in a file: row-major, little-endian values at byte `offset`."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


def tensors(path: Path, spans: Mapping[str, Span]) -> dict[str, Tensor]:
    """The tensors in `path`, unread. Reading one raises RuntimeError, as in MLX, if the file has been truncated since.

    Raises:
        RequestError: the file cannot be read, is truncated, or has an unsupported type.
    """
    try:
        with path.open("rb"):
            size = path.stat().st_size
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    for name, span in spans.items():
        if span.dtype not in _DTYPES:
            raise RequestError(f"{path} stores {name} in an unsupported type.")
        if span.offset < 0 or span.offset + span.nbytes > size:
            raise RequestError(f"{path} is damaged: {name} is cut off; download it again.")
    return {name: _tensor(path, span) for name, span in spans.items()}


def _tensor(path: Path, span: Span) -> Tensor:
    return Tensor(span.dtype, span.shape, lambda: _read(path, span))


def _read(path: Path, span: Span) -> mx.array:
    # Read into the array's own memory: a large tensor is held once, and NumPy is not needed.
    values = mx.zeros(span.nbytes, mx.uint8)
    mx.eval(values)
    try:
        with path.open("rb") as file:
            file.seek(span.offset)
            done = file.readinto(memoryview(values)) if span.nbytes else 0  # type: ignore[arg-type]
    except OSError as error:
        raise RuntimeError(f"{path}: {error.strerror}") from None
    if done < span.nbytes:
        raise RuntimeError(f"{path} ends before its last tensor")
    return values.view(span.dtype).reshape(span.shape)
