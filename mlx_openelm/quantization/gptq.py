"""GPTQ (arXiv:2210.17323): round a matrix column by column, and correct each error in the remaining columns."""

from __future__ import annotations

import mlx.core as mx

from ..errors import OpenELMError
from ..formats.mlx import Quantization
from ..formats.rounding import Grid

# Columns rounded at a time; their corrections are then applied to the rest of the matrix.
_BLOCK = 64
# Added to the diagonal of the moments, as a share of its mean, to make them invertible; the first that works is used.
_DAMPING = (0.01, 0.1, 1.0)


def round_matrix(weight: mx.array, moments: mx.array, grid: Grid, choice: Quantization) -> mx.array:
    """Levels [out, groups, group_size] for weight [out, in] that keep its products with inputs x.

    Args:
        moments: the mean of x xᵀ [in, in] over the inputs x.
        grid: scales and biases, which stay fixed. Columns are rounded in order of the size of their inputs, the
            largest first (GPTQ's activation order), and keep the grid of their group (static groups).

    Raises:
        OpenELMError: the moments are not finite.
    """
    out_dims, in_dims = weight.shape
    order = mx.argsort(-mx.diag(moments))
    factor = _inverse_factor(moments[order][:, order])
    rest = weight.astype(mx.float32)[:, order]
    group = order // choice.group_size
    highest = 2**choice.bits - 1
    columns = []
    for start in range(0, in_dims, _BLOCK):
        end = min(start + _BLOCK, in_dims)
        block, errors = rest[:, : end - start], []
        scales, biases = grid.scales[:, group[start:end]], grid.biases[:, group[start:end]]
        safe = mx.where(scales == 0, 1.0, scales)
        for column in range(end - start):
            value = block[:, column]  # [out]
            level = mx.clip(mx.round((value - biases[:, column]) / safe[:, column]), 0, highest)
            columns.append(level)
            position = start + column
            error = (value - (level * scales[:, column] + biases[:, column])) / factor[position, position]
            errors.append(error)
            block = block - error[:, None] * factor[position, start:end]
        mx.eval(columns[start:], errors)
        if end < in_dims:
            rest = rest[:, end - start :] - mx.stack(errors, axis=1) @ factor[start:end, end:]
            mx.eval(rest)
    levels = mx.stack(columns, axis=1)[:, mx.argsort(order)]  # [out, in], in the matrix's own order
    return levels.reshape(out_dims, -1, choice.group_size)


def _inverse_factor(moments: mx.array) -> mx.array:
    """The upper Cholesky factor [in, in] of the inverse of the damped moments; MLX computes it only on the CPU.

    Raises:
        OpenELMError: the moments are not finite, or cannot be made positive.
    """
    diagonal = mx.diag(moments)
    indices = mx.arange(moments.shape[0])
    with mx.stream(mx.cpu):
        for damping in _DAMPING:
            added = damping * mx.mean(diagonal) + 1e-12
            damped = moments.at[indices, indices].add(added)
            lower = mx.linalg.cholesky(damped)
            # If LAPACK fails, MLX returns its partial result without an error, so the factor is checked.
            again = mx.square(lower).sum(axis=1)
            if mx.all(mx.abs(again - diagonal - added) <= 1e-2 * (diagonal + added)).item():
                factor = mx.linalg.cholesky(mx.linalg.cholesky_inv(lower), upper=True)
                if mx.all(mx.isfinite(factor)).item():
                    return factor
    raise OpenELMError("GPTQ does not work with the activations of this text; try another --calibration.")
