"""Weights of the base that an adapter's file repeats: dropped where the base has the same, else the file is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mlx.core as mx

from ..errors import RequestError
from ..formats.adapter import Adapter
from ..formats.packing import Quantization

_PIECE = 1 << 20  # values compared at a time
# How many times what rounding costs a row may be between two tensors that are taken to be the same: each was rounded,
# and not always to the nearest value.
_SLACK = 2

# The tensor of a name as the base has it, in the parts of a packed one or as `weight`; and what it was packed as, even
# where it is unpacked by now.
Stored = tuple[Mapping[str, mx.array], Quantization | None]


def check_base_copies(adapter: Adapter, find: Callable[[str], Stored]) -> None:
    """Compare what an adapter holds of the base with the base, and take it out of the adapter.

    PEFT saves weights in the type it trained in, and the base may be in another, or packed: so the two are compared in
    the coarser of both. What is nearer than that would not be kept apart by the base either.

    Raises:
        RequestError: a weight is not the base's.
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
        # Most are packed from weights in bfloat16, which costs more than eight bits do.
        rounded = packing.unpack(packing.pack(theirs.astype(mx.bfloat16)), mx.float32)
    ours = ours.astype(mx.float32)
    lost = mx.abs(theirs - rounded), mx.abs(ours - ours.astype(copy.dtype).astype(mx.float32))
    apart = mx.abs(theirs - ours)
    if copy.ndim > 1:
        lost, apart = (lost[0].max(axis=-1), lost[1].max(axis=-1)), apart.max(axis=-1)
    return bool(mx.all(apart <= _SLACK * (lost[0] + lost[1])).item())
