"""Affine quantization with given scales and biases, in MLX's layout.

A weight becomes `scale * level + bias` with a whole level from 0 to 2**bits - 1; a group of neighbors in a row shares
scale and bias. `mx.quantize` takes both from the group's extremes.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .mlx import Quantization

# Fractions of the group's range that `search` tries: clipping a few extremes makes the steps between levels smaller.
_SHRINKS = tuple(1.0 - 0.04 * step for step in range(14))
# How often `search` then fits scale and bias to the levels and rounds again.
_REFITS = 4


@dataclass(frozen=True)
class Grid:
    """The scales and biases of a matrix [out, in], both [out, in / group_size]."""

    scales: mx.array
    biases: mx.array

    def stored(self, dtype: mx.Dtype) -> Grid:
        """The grid rounded to `dtype`, in float32: levels must be chosen for the values that will be read back."""
        return Grid(*(part.astype(dtype).astype(mx.float32) for part in (self.scales, self.biases)))


def groups(weight: mx.array, group_size: int) -> mx.array:
    """[out, in] as [out, in / group_size, group_size]."""
    return weight.reshape(weight.shape[0], -1, group_size)


def levels(grouped: mx.array, grid: Grid, bits: int) -> mx.array:
    """The nearest levels, in float32, of weights [out, groups, group_size]."""
    scales = grid.scales[..., None]
    # A group of equal weights has a scale of 0; its bias alone gives the value.
    safe = mx.where(scales == 0, 1.0, scales)
    return mx.clip(mx.round((grouped - grid.biases[..., None]) / safe), 0, 2**bits - 1)


def values(level: mx.array, grid: Grid) -> mx.array:
    """The dequantized levels [out, groups, group_size], in the same shape."""
    return level * grid.scales[..., None] + grid.biases[..., None]


def extremes(weight: mx.array, choice: Quantization, dtype: mx.Dtype) -> Grid:
    """MLX's own grid for weight [out, in], its scales and biases as `dtype` holds them."""
    _, scales, biases = mx.quantize(weight.astype(mx.float32), choice.group_size, choice.bits)
    return Grid(scales, biases).stored(dtype)


def search(weight: mx.array, importance: mx.array, choice: Quantization, dtype: mx.Dtype) -> Grid:
    """The grid with the least squared error, weighted by `importance` [in].

    For each group, the best of several clipped ranges is improved by turns: a least-squares fit of the grid to the
    weights, then rounding to it again.
    """
    grouped = groups(weight.astype(mx.float32), choice.group_size)
    counts = importance.astype(mx.float32).reshape(1, -1, choice.group_size)
    best = extremes(weight, choice, dtype)
    least = _error(grouped, best, choice.bits, counts)
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    for shrink in _SHRINKS:
        grid = Grid((high - low) * (shrink / (2**choice.bits - 1)), low * shrink).stored(dtype)
        best, least = _better(best, least, grid, _error(grouped, grid, choice.bits, counts))
        mx.eval(best.scales, best.biases, least)
    for _ in range(_REFITS):
        grid = _fit(grouped, levels(grouped, best, choice.bits), counts, best).stored(dtype)
        best, least = _better(best, least, grid, _error(grouped, grid, choice.bits, counts))
        mx.eval(best.scales, best.biases, least)
    return best


def _error(grouped: mx.array, grid: Grid, bits: int, counts: mx.array) -> mx.array:
    difference = values(levels(grouped, grid, bits), grid) - grouped
    return (mx.square(difference) * counts).sum(axis=-1)


def _better(best: Grid, least: mx.array, grid: Grid, error: mx.array) -> tuple[Grid, mx.array]:
    wins = error < least
    scales, biases = mx.where(wins, grid.scales, best.scales), mx.where(wins, grid.biases, best.biases)
    return Grid(scales, biases), mx.minimum(error, least)


def _fit(grouped: mx.array, level: mx.array, counts: mx.array, fallback: Grid) -> Grid:
    """Weighted least squares of weights on levels, group by group; groups on one level keep `fallback`."""
    total = counts.sum(axis=-1)
    mean_level, mean = (level * counts).sum(axis=-1) / total, (grouped * counts).sum(axis=-1) / total
    centered = level - mean_level[..., None]
    spread = (counts * mx.square(centered)).sum(axis=-1)
    scales = (counts * centered * grouped).sum(axis=-1) / mx.where(spread == 0, 1.0, spread)
    scales = mx.where(spread == 0, fallback.scales, scales)
    return Grid(scales, mean - scales * mean_level)


def pack(level: mx.array, bits: int) -> mx.array:
    """Levels [out, in] as MLX stores them, uint32 [out, in * bits / 32]: a stream of bits, lowest first."""
    rows, columns = level.shape
    # 32 levels fill `bits` words exactly, for any number of bits.
    level = level.astype(mx.uint32).reshape(rows, columns // 32, 32)
    words = []
    for word in range(bits):
        parts = mx.zeros((rows, columns // 32), dtype=mx.uint32)
        for index in range(32):
            shift = index * bits - 32 * word
            if 0 <= shift < 32:
                parts = parts | (level[..., index] << shift)
            elif -bits < shift < 0:
                parts = parts | (level[..., index] >> -shift)
        words.append(parts)
    return mx.stack(words, axis=-1).reshape(rows, columns * bits // 32)


def round_nearest(weight: mx.array, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> mx.array:
    """The weight [out, in], in float32, after rounding to the nearest levels of its best grid.

    Args:
        moments: the mean of x xᵀ [in, in] over the inputs x.
    """
    grid = search(weight, mx.diag(moments), choice, dtype)
    level = levels(groups(weight.astype(mx.float32), choice.group_size), grid, choice.bits)
    return values(level, grid).reshape(weight.shape)


def round_error(weight: mx.array, moments: mx.array, choice: Quantization, dtype: mx.Dtype) -> float:
    """The mean squared error that `round_nearest` causes in the products of weight [out, in], summed over out."""
    difference = round_nearest(weight, moments, choice, dtype) - weight.astype(mx.float32)
    return float(((difference @ moments) * difference).sum().item())  # type: ignore[arg-type]
