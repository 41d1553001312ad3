"""Packing a matrix again that was packed before and has changed a little."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from ..formats.packing import Quantization
from ..formats.rounding import Grid, extremes, groups, levels, pack, values


def pack_again(
    weight: mx.array, before: Mapping[str, mx.array], choice: Quantization, dtype: mx.Dtype
) -> dict[str, mx.array]:
    """weight [out, in], float32, as packed parts in affine mode: each group of a row on the steps it had, or on new
    ones, whichever are nearer to it.

    `mx.quantize` takes new steps from a group's extremes. On them most values that lie on the old ones are rounded a
    second time, which costs more than a small change is worth; where nothing changed, the parts stay as they are.

    Args:
        before: the scales and biases it had.
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
