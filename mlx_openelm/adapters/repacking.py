"""Packing a matrix again after a small change."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..formats.mlx import Quantization
from ..formats.rounding import Grid, extremes, groups, levels, pack, values


def pack_again(
    weight: mx.array, before: Mapping[str, mx.array], choice: Quantization, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """weight [out, in], float32, as packed parts in affine mode: each group on its old grid or a new one, whichever
    has the smaller error.

    `mx.quantize` takes a new grid from a group's extremes. That rounds most values of the old grid a second time, which
    costs more than a small change is worth. Unchanged groups keep every bit.

    Args:
        before: the old scales and biases [out, in / group_size].
        dtype: the type to store scales and biases in.
    """
    grouped = groups(weight, choice.group_size)
    grids = Grid(before["scales"], before["biases"]).stored(dtype), extremes(weight, choice, dtype)
    rounded = [levels(grouped, grid, choice.bits) for grid in grids]
    errors = [mx.square(values(level, grid) - grouped).sum(axis=-1) for level, grid in zip(rounded, grids, strict=True)]
    keeps = errors[0] <= errors[1]
    level = mx.where(keeps[..., None], *rounded)
    scales, biases = (
        mx.where(keeps, getattr(grids[0], part), getattr(grids[1], part)) for part in ("scales", "biases")
    )
    parts = {"weight": pack(level.reshape(weight.shape), choice.bits)}
    return parts | {"scales": scales.astype(dtype), "biases": biases.astype(dtype)}
