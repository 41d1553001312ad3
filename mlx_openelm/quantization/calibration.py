"""Running a model on calibration text: second moments of its matrices' inputs, and its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from ..config import HEAD, LAYER_MATRICES
from ..finite import not_finite
from ..model import OpenELM, TransformerLayer
from ..modules import module_at, output_layer, replace_at
from ..ops import attention
from ..ops import layers as ops
from ..ops.distributions import LOGIT_ROWS, cross_entropy, kl_divergence

Batches = Sequence[mx.array]
# Called with the amount done and the total.
Progress = Callable[[int, int], None]


class _Recorder(nn.Module):
    """A matrix that also sums x xᵀ over its input rows x."""

    def __init__(self, layer: nn.Module, in_dims: int):
        super().__init__()
        self.layer = layer
        self.moments = mx.zeros((in_dims, in_dims))

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)  # [rows, in]
        self.moments = self.moments + rows.T @ rows
        return self.layer(x)


@contextmanager
def recording(layer: TransformerLayer, shapes: dict[str, int]) -> Iterator[dict[str, _Recorder]]:
    """Replace the matrices named in `shapes` (path to input size) by recorders while the block runs."""
    recorders = {path: _Recorder(module_at(layer, path), size) for path, size in shapes.items()}
    for path, recorder in recorders.items():
        replace_at(layer, path, recorder)
    try:
        yield recorders
    finally:
        for path, recorder in recorders.items():
            replace_at(layer, path, recorder.layer)


class Stream:
    """The hidden states of calibration text, advanced through a model one layer at a time.

    `hidden` holds the input of the next layer: for each batch of tokens, an array [batch * length, model_dim].
    """

    def __init__(self, model: OpenELM, batches: Batches):
        self._model = model
        self._shapes: list[tuple[int, int]] = [tuple(batch.shape) for batch in batches]  # type: ignore[misc]
        self.hidden = [model.transformer.token_embeddings(batch.reshape(-1)) for batch in batches]
        mx.eval(self.hidden)

    def moments(self, layer: TransformerLayer) -> dict[str, mx.array]:
        """The mean of x xᵀ [in, in] over the input rows x of each matrix of `layer`, by path within it."""
        sizes = {path: module_at(layer, path)["weight"].shape[1] for path in LAYER_MATRICES}
        with recording(layer, sizes) as recorders:
            for _ in self.through([layer]):
                mx.eval([recorder.moments for recorder in recorders.values()])
        rows = sum(hidden.shape[0] for hidden in self.hidden)
        return {path: recorder.moments / rows for path, recorder in recorders.items()}

    def advance(self, layer: TransformerLayer) -> None:
        """Replace `hidden` by the outputs of `layer`."""
        for index, output in enumerate(self.through([layer])):
            mx.eval(output)
            self.hidden[index] = output

    def through(self, layers: Sequence[TransformerLayer]) -> Iterator[mx.array]:
        """The outputs of `layers`, batch by batch; `hidden` stays unchanged."""
        config = self._model.config
        for hidden, shape in zip(self.hidden, self._shapes, strict=True):
            attend = attention.choose(config.head_dim, config.rope_freq_constant, 0, shape[1], "causal")
            for layer in layers:
                hidden = layer(hidden, attend)
            yield hidden


class Teacher:
    """The full model's predictions for each token, to compare other models with.

    Kept as hidden states [rows, model_dim] after the final norm, and a reference to the head's weight: the logits of
    all rows would fill memory. The model may change afterwards.

    Raises:
        OpenELMError: the full model's numbers are not finite.
    """

    def __init__(self, model: OpenELM, batches: Batches, progress: Progress | None = None):
        self._head = output_layer(model)["weight"]
        self.hidden: list[mx.array] = []
        total = mx.zeros((model.config.model_dim,) * 2)
        for output in Stream(model, batches).through(model.layers):
            hidden = model.transformer.norm(output)
            x = hidden.astype(mx.float32)
            total = total + x.T @ x
            mx.eval(hidden, total)
            self.hidden.append(hidden)
            if progress is not None:
                progress(len(self.hidden), len(batches))
        if not (mx.all(mx.isfinite(total)) & mx.all(mx.isfinite(self._head))).item():
            raise not_finite("What the full model computes is", model)
        self.tokens = sum(hidden.shape[0] for hidden in self.hidden)
        self.moments = total / self.tokens

    def logits(self, hidden: mx.array) -> mx.array:
        """The full model's logits [rows, vocab] of its hidden states [rows, model_dim]."""
        return ops.linear(hidden, self._head)

    def compare(
        self, model: OpenELM, outputs: Iterator[mx.array], targets: Sequence[mx.array] | None = None
    ) -> tuple[float, float]:
        """The mean over tokens of KL(full model || model) and of the model's loss, in nats.

        Args:
            outputs: the outputs of the model's last layer, batch by batch.
            targets: the next token of each row [rows], batch by batch; without them the loss is 0.

        Raises:
            OpenELMError: the model's logits are not finite.
        """
        distance = loss = 0.0
        for index, (output, expected) in enumerate(zip(outputs, self.hidden, strict=True)):
            hidden = model.transformer.norm(output)
            for start in range(0, hidden.shape[0], LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                logits = model.logits(hidden[rows])
                parts = [kl_divergence(self.logits(expected[rows]), logits).sum()]
                if targets is not None:
                    parts.append(cross_entropy(logits, targets[index][rows]).sum())
                mx.eval(parts)
                numbers = [float(part.item()) for part in parts]  # type: ignore[arg-type]
                distance, loss = distance + numbers[0], loss + sum(numbers[1:])
                if not math.isfinite(distance + loss):
                    raise not_finite("The quantized model's logits are", model)
        return max(distance / self.tokens, 0.0), loss / self.tokens


def output_moments(model: OpenELM, teacher: Teacher, path: str) -> mx.array:
    """The moments x xᵀ [model_dim, model_dim] to use when the embedding or the head is rounded.

    The inputs of a head are the teacher's hidden states. An embedding's rows are read directly, so every error counts
    the same. A shared matrix is both, in equal parts.
    """
    embedding = mx.diag(teacher.moments).mean() * mx.eye(model.config.model_dim)
    if path == HEAD:
        return teacher.moments
    return teacher.moments + embedding if model.config.share_input_output_layers else embedding
