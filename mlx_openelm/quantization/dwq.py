"""Distilled scales (after mlx-lm's DWQ): train scales and biases until the quantized model predicts as the full one.

Levels stay as they are. Scales and biases move by fractions of a step, so one learning rate fits every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten

from ..model import OpenELM
from .calibration import EMBEDDING, replace_module
from .rounding import Grid
from .uniform import Quantization

# Positions whose logits exist at once, forward and backward.
_CHUNK = 256


class Distilled(nn.Module):
    """A matrix whose levels are packed and whose scales and biases are trained, in steps of their first values."""

    def __init__(self, packed: mx.array, grid: Grid, choice: Quantization):
        super().__init__()
        self._packed, self._grid, self._choice = packed, grid, choice
        self.slope = mx.zeros_like(grid.scales)
        self.shift = mx.zeros_like(grid.scales)

    def grid(self) -> Grid:
        """The scales and biases as trained so far, in float32."""
        middle = (2**self._choice.bits - 1) / 2
        scales = self._grid.scales * (1 + self.slope / middle)
        # A change of slope turns around the middle level, so that the two parameters hardly disturb each other.
        biases = self._grid.biases + self._grid.scales * (self.shift - self.slope)
        return Grid(scales, biases)

    def weight(self) -> mx.array:
        """The matrix [out, in] in float32."""
        grid = self.grid()
        return mx.dequantize(self._packed, grid.scales, grid.biases, self._choice.group_size, self._choice.bits)

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight().astype(x.dtype).T


class DistilledEmbedding(Distilled):
    """The same for the embedding that is also the output layer."""

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight()[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        """hidden states [..., model_dim] to logits [..., vocab]."""
        return super().__call__(x)


def divergence(student: mx.array, teacher: mx.array) -> mx.array:
    """The sum over rows of KL(teacher || student), both logits [rows, vocab], in nats."""
    expected = nn.log_softmax(teacher.astype(mx.float32), axis=-1)
    return (mx.exp(expected) * (expected - nn.log_softmax(student.astype(mx.float32), axis=-1))).sum()
