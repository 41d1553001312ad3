"""DWQ (after mlx-lm's): train scales and biases so that the quantized model predicts what the full model does.

Levels stay fixed. Scales and biases move by fractions of a step, so one learning rate fits every matrix.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from ..config import EMBEDDING
from ..errors import OpenELMError
from ..formats.mlx import Quantization
from ..formats.rounding import Grid
from ..model import OpenELM
from ..modules import output_layer, replace_at
from ..ops import attention
from ..ops.distributions import LOGIT_ROWS, kl_divergence
from .calibration import Batches, Progress, Teacher

# In steps of a matrix's grid. A larger rate overfits the calibration text.
LEARNING_RATE = 0.002
_WARMUP_SHARE = 0.05
_EPOCHS = 2
# Every N-th batch is held out to choose the best of the states checked during training.
_HELD_OUT = 8
_CHECKS = 4


@dataclass
class Packed:
    """A packed matrix: levels in MLX's layout, uint32 [out, in * bits / 32], and their scales and biases."""

    levels: mx.array
    grid: Grid
    choice: Quantization

    def full(self, grid: Grid | None = None) -> mx.array:
        """The matrix [out, in] in float32, on its own grid or another."""
        grid = grid or self.grid
        return mx.dequantize(self.levels, grid.scales, grid.biases, self.choice.group_size, self.choice.bits)


class Distilled(nn.Module):
    """A packed matrix whose scales and biases are trained, in units of their first values."""

    def __init__(self, packed: Packed):
        super().__init__()
        self._packed = packed
        self.slope = mx.zeros_like(packed.grid.scales)
        self.shift = mx.zeros_like(packed.grid.scales)

    def grid(self) -> Grid:
        """The scales and biases as trained so far, in float32."""
        first, middle = self._packed.grid, (2**self._packed.choice.bits - 1) / 2
        # The slope pivots around the middle level, so that the two parameters hardly affect each other.
        scales = first.scales * (1 + self.slope / middle)
        return Grid(scales, first.biases + first.scales * (self.shift - self.slope))

    def full(self) -> mx.array:
        """The matrix [out, in] as trained so far, in float32."""
        return self._packed.full(self.grid())

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.full().astype(x.dtype).T


class DistilledEmbedding(Distilled):
    """The same for the embedding; only the rows of the given tokens are unpacked."""

    def __call__(self, tokens: mx.array) -> mx.array:
        grid, packed = self.grid(), self._packed
        rows = Packed(packed.levels[tokens], Grid(grid.scales[tokens], grid.biases[tokens]), packed.choice)
        return rows.full()


def distill(
    model: OpenELM,
    packed: Mapping[str, Packed],
    teacher: Teacher,
    batches: Batches,
    dtype: mx.Dtype,
    *,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Grid]:
    """Train the scales and biases of a packed model; returns them by module path, rounded to `dtype`.

    Args:
        model: the quantized model; its packed matrices are replaced by trained ones.
        batches: tokens [batch, length], those of the teacher.
        learning_rate: the peak of the schedule, in steps of a matrix's grid.

    Raises:
        OpenELMError: the divergence is not finite.
    """
    model.freeze()
    trained = {path: (DistilledEmbedding if path == EMBEDDING else Distilled)(part) for path, part in packed.items()}
    for path, module in trained.items():
        replace_at(model, path, module)
    held_out, training = _split(len(batches), seed)

    def loss(index: int) -> mx.array:
        return divergence(model, teacher, batches, index)

    def check() -> float:
        total = 0.0
        for index in held_out:
            total += float(loss(index).item())  # type: ignore[arg-type]
        return total

    gradient = nn.value_and_grad(model, loss)
    optimizer = optimizers.Adam(learning_rate=_schedule(len(training), learning_rate))
    # Without held-out text every check gives 0, so the last state is taken.
    best, least = _state(trained), check()
    for step, index in enumerate(training, 1):
        value, gradients = gradient(index)
        optimizer.update(model, gradients)
        mx.eval(model.trainable_parameters(), optimizer.state, value)
        if not mx.isfinite(value).item():
            raise OpenELMError("Distilling diverged: the loss is not finite; leave dwq out for this model.")
        checked = step == len(training) or step % max(1, len(training) // _CHECKS) == 0
        if checked and (error := check()) <= least:
            best, least = _state(trained), error
        if progress is not None:
            progress(step, len(training))
    for path, module in trained.items():
        module.slope, module.shift = best[path]
    return {path: module.grid().stored(dtype) for path, module in trained.items()}


def _split(count: int, seed: int) -> tuple[range, list[int]]:
    """The indices of the held-out batches, and of the others in the order of training; few batches are all trained."""
    held_out = range(0, count, _HELD_OUT) if count >= _HELD_OUT else range(0)
    training = [index for index in range(count) if index not in held_out] * _EPOCHS
    random.Random(seed).shuffle(training)
    return held_out, training


def _state(trained: Mapping[str, Distilled]) -> dict[str, tuple[mx.array, mx.array]]:
    return {path: (module.slope, module.shift) for path, module in trained.items()}


def _schedule(steps: int, learning_rate: float) -> Callable[[mx.array], mx.array]:
    warmup = max(1, int(steps * _WARMUP_SHARE))
    rise = optimizers.linear_schedule(0.0, learning_rate, warmup)
    fall = optimizers.cosine_decay(learning_rate, max(1, steps - warmup), 0.05 * learning_rate)
    return optimizers.join_schedules([rise, fall], [warmup])


def divergence(model: OpenELM, teacher: Teacher, batches: Batches, index: int) -> mx.array:
    """KL(teacher || model) in nats, the mean over the tokens of one batch.

    Layers and logits are recomputed in the backward pass, to save memory.

    Args:
        batches: tokens [batch, length], those of the teacher.
        index: the batch.
    """
    tokens, config = batches[index], model.config
    shape: tuple[int, int] = tuple(tokens.shape)  # type: ignore[assignment]
    attend = attention.choose(config.head_dim, config.rope_freq_constant, 0, shape[1], "causal")
    # [batch * length, model_dim], as layers take it.
    x = model.transformer.token_embeddings(tokens.reshape(-1)).astype(teacher.hidden[index].dtype)
    for layer in model.layers:
        x = nn.utils.checkpoint(layer, lambda h, layer=layer: layer(h, attend))(x)  # type: ignore[misc]
    hidden, expected = model.transformer.norm(x), teacher.hidden[index]
    head = output_layer(model)
    # Unpacked once for all rows: [vocab, model_dim].
    weight = (head.full() if isinstance(head, Distilled) else head["weight"]).astype(hidden.dtype)
    part = mx.checkpoint(lambda rows, target, matrix: kl_divergence(teacher.logits(target), rows @ matrix.T).sum())
    starts = range(0, hidden.shape[0], LOGIT_ROWS)
    total = sum((part(hidden[s : s + LOGIT_ROWS], expected[s : s + LOGIT_ROWS], weight) for s in starts), mx.array(0.0))
    return total / hidden.shape[0]
