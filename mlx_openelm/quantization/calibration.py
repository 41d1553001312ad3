"""What a model does on calibration text: what enters its matrices, and what it predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..model import OpenELM, TransformerLayer

# The matrices of a layer, by path within it, in the order a token meets them.
MATRICES = ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2")
EMBEDDING = "transformer.token_embeddings"

Batches = Sequence[mx.array]


class _Recorder(nn.Module):
    """A matrix that also sums up x xᵀ over the rows x that enter it."""

    def __init__(self, layer: nn.Module, in_dims: int):
        super().__init__()
        self.layer = layer
        self.moments = mx.zeros((in_dims, in_dims))

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        self.moments = self.moments + rows.T @ rows
        return self.layer(x)


def module_at(parent: nn.Module, path: str) -> nn.Module:
    """The module of `parent` that a dotted path names."""
    for name in path.split("."):
        parent = parent[int(name)] if isinstance(parent, list) else getattr(parent, name)
    return parent


def replace_module(parent: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` where a dotted path leads."""
    above, _, name = path.rpartition(".")
    setattr(module_at(parent, above) if above else parent, name, module)


@contextmanager
def recording(layer: TransformerLayer, shapes: dict[str, int]) -> Iterator[dict[str, _Recorder]]:
    """Recorders in the place of the matrices named in `shapes` (path to input size) while the block runs."""
    recorders = {path: _Recorder(module_at(layer, path), size) for path, size in shapes.items()}
    for path, recorder in recorders.items():
        replace_module(layer, path, recorder)
    try:
        yield recorders
    finally:
        for path, recorder in recorders.items():
            replace_module(layer, path, recorder.layer)


class Stream:
    """Calibration text on its way through a model, one layer at a time.

    `hidden` holds what enters the next layer, one array [batch * length, model_dim] a batch of tokens.
    """

    def __init__(self, model: OpenELM, batches: Batches):
        self._model = model
        self._shapes: list[tuple[int, int]] = [tuple(batch.shape) for batch in batches]  # type: ignore[misc]
        self.hidden = [model.transformer.token_embeddings(batch.reshape(-1)) for batch in batches]
        mx.eval(self.hidden)

    def moments(self, layer: TransformerLayer) -> dict[str, mx.array]:
        """The mean of x xᵀ [in, in] over the rows x that enter each matrix of `layer`, by path within it."""
        sizes = {path: module_at(layer, path)["weight"].shape[1] for path in MATRICES}
        with recording(layer, sizes) as recorders:
            for _ in self._outputs(layer):
                mx.eval([recorder.moments for recorder in recorders.values()])
        rows = sum(hidden.shape[0] for hidden in self.hidden)
        return {path: recorder.moments / rows for path, recorder in recorders.items()}

    def advance(self, layer: TransformerLayer) -> None:
        """Let the text pass `layer`."""
        for index, output in enumerate(self._outputs(layer)):
            mx.eval(output)
            self.hidden[index] = output

    def _outputs(self, layer: TransformerLayer) -> Iterator[mx.array]:
        config = self._model.config
        for hidden, shape in zip(self.hidden, self._shapes, strict=True):
            attend = ops.Attend(config.head_dim, config.rope_freq_constant, 0, shape[1], "causal")
            yield layer(hidden, attend, shape, None)

    def final_moments(self) -> mx.array:
        """The mean of x xᵀ [model_dim, model_dim] over the rows x that enter the output layer."""
        norm: Any = self._model.transformer.norm
        total, rows = mx.zeros((self._model.config.model_dim,) * 2), 0
        for hidden in self.hidden:
            x = norm(hidden).astype(mx.float32)
            total, rows = total + x.T @ x, rows + x.shape[0]
            mx.eval(total)
        return total / rows
