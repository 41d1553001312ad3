"""Copies of base weights in an adapter's file: dropped if they equal the base's, else the adapter is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from ..errors import RequestError
from ..formats.adapter import Adapter
from ..formats.mlx import Quantization

_PIECE = 1 << 20  # values compared at a time
# Two tensors count as equal up to this multiple of a row's rounding error: both were rounded, not always to nearest.
_SLACK = 2

# A tensor of the base, as the parts of a packed one or as `weight`; and how it was packed, even if it is unpacked now.
Stored = tuple[Mapping[str, mx.array], Quantization | None]


def check_base_copies(adapter: Adapter, find: Callable[[str], Stored]) -> None:
    """Compare an adapter's copies of base weights with the base, and remove them from the adapter.

    PEFT saves weights in the type it trained in, and the base may have another type, or be packed. So the two are
    compared at the coarser precision: the base could not store a smaller difference.

    Args:
        find: a function from a tensor's name to the base's tensor.

    Raises:
        RequestError: a weight differs from the base's.
    """
    while adapter.base_copies:
        copy = adapter.base_copies.pop()
        if not _agree(copy.value, *find(copy.name)):
            raise RequestError(copy.refusal)


def _agree(copy: mx.array, parts: Mapping[str, mx.array], packing: Quantization | None) -> bool:
    is_packed = "scales" in parts
    step = max(1, _PIECE // copy[:1].size)
    for start in range(0, copy.shape[0], step):
        piece = {name: part[start : start + step] for name, part in parts.items()}
        ours = packing.unpack(piece, mx.float32) if is_packed and packing is not None else piece["weight"]
        if not _rows_agree(copy[start : start + step], ours, packing):
            return False
    return True


def _rows_agree(copy: mx.array, ours: mx.array, packing: Quantization | None) -> bool:
    theirs = copy.astype(mx.float32)
    rounded = theirs.astype(ours.dtype).astype(mx.float32)
    if packing is not None:
        # Most models are packed from bfloat16, which loses more than 8 bits do.
        rounded = packing.unpack(packing.pack(theirs.astype(mx.bfloat16)), mx.float32)
    ours = ours.astype(mx.float32)
    error = mx.abs(theirs - rounded), mx.abs(ours - ours.astype(copy.dtype).astype(mx.float32))
    difference = mx.abs(theirs - ours)
    if copy.ndim > 1:
        error, difference = (error[0].max(axis=-1), error[1].max(axis=-1)), difference.max(axis=-1)
    return bool(mx.all(difference <= _SLACK * (error[0] + error[1])).item())
