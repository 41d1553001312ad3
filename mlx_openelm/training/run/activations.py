"""The memory of a step's activations: those kept for the backward pass are counted, temporary buffers measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...config import ModelConfig
from ..step.attention import BLOCK
from ..step.strategy import LAYERS, NOTHING, here

# On a CPU MLX allocates for about ten operations ahead of the one it runs. Temporary buffers, as measured there: copies
# of a chunk's logits in the loss, for the first chunk, for each further one, and at most; of the output layer, if it is
# trained;
_LOGITS_FIRST, _LOGITS_MORE, _LOGITS_MOST, _HEAD = 8.0, 4.0, 17.0, 6.0
# [rows, inner] arrays while the gradients of a feed-forward are computed;
_INNER = 14.5
# copies of a block's attention weights, and of queries, keys and values, while their gradients are computed.
_WEIGHTS, _QKV = 10.0, 6.4

# For CUDA MLX submits graphs of up to a hundred operations, up to eleven ahead of the one that runs, and holds their
# arrays until they are done. Fitted to runs on an H100 (in `test_recompute_plan.py`; the largest error is 11%): arrays
# as wide as the model in each layer, arrays as wide as the feed-forward's inner size, and a share of what is
# recomputed;
_AHEAD_DIM, _AHEAD_INNER, _AHEAD_AGAIN = 13.9, 3.35, 0.11
# all logits in float32, and the output layer's gradient for each chunk of them; the most bytes of all this.
_AHEAD_LOGITS, _AHEAD_HEAD, _AHEAD_MOST = 1.67, 4.4, 14.7e9


@dataclass(frozen=True)
class Shape:
    """What the size of a step's activations depends on.

    Args:
        rows, length: of its largest batch.
        itemsize: the bytes of an activation.
        recompute: what the backward pass computes again, as in `forward.hidden_states`.
        fused: whether attention's gradient is MLX's, as in `strategy.fuses_attention_gradient`.
        dropout: whether adapters use dropout.
    """

    rows: int
    length: int
    itemsize: int
    recompute: str
    fused: bool = False
    dropout: bool = False

    @property
    def width(self) -> int:
        """Bytes of one activation per position."""
        return self.rows * self.length * self.itemsize


@dataclass(frozen=True)
class _Layer:
    """Sizes per position: the model's width, queries, queries with keys and values, gate and up, inner; heads."""

    dim: int
    queries: int
    qkv: int
    projected: int
    inner: int
    heads: int

    def kept(self, shape: Shape, recompute: str) -> float:
        """Activations per position that are kept for the backward pass."""
        if recompute == LAYERS:
            return self.dim
        kept: float = 2 * self.dim + self.qkv + self.queries + self.projected
        if shape.fused:  # rotated queries and keys, and a float32 per head
            kept += self.queries + (self.qkv - self.queries) / 2 + 4 * self.heads / shape.itemsize
        if (
            recompute == NOTHING
        ):  # the outputs of both norms and SwiGLU, and a dropout mask of a byte per input of an adapter
            kept += 2 * self.dim + self.inner
            kept += (2 * self.dim + self.queries + self.inner) / shape.itemsize if shape.dropout else 0
        return kept


def most(config: ModelConfig, shape: Shape, *, first: int, by_layer: list[int], outside: int) -> float:
    """The peak bytes of activations, temporary buffers and the gradients that exist at the same time.

    Args:
        first: the lowest layer with trained parameters; below it nothing is kept.
        by_layer: the bytes of each layer's gradients.
        outside: the bytes of gradients outside of layers.
    """
    layers = list(_layers(config))
    saved = [shape.width * layer.kept(shape, shape.recompute) for layer in layers]
    saved[:first] = [0] * first
    chunks, chunk = _chunks(config, shape)
    if shape.fused:
        return sum(saved) + _ahead(layers[first:], shape, chunks, chunk, outside) + outside + sum(by_layer)
    loss = sum(saved) + 5 * shape.width * config.model_dim + _HEAD * outside
    most = loss + chunk * min(_LOGITS_MOST, _LOGITS_FIRST + _LOGITS_MORE * (chunks - 1))
    for index, layer in list(enumerate(layers))[first:]:
        made = outside + sum(by_layer[index:])
        most = max(most, sum(saved[: index + 1]) + _moment(layer, shape) + made)
    return most


def _ahead(layers: list[_Layer], shape: Shape, chunks: int, chunk: int, outside: int) -> float:
    """Bytes that are held because MLX works ahead on a GPU."""
    again = sum(_again(layer, shape) for layer in layers)
    widths = sum(_AHEAD_DIM * layer.dim + _AHEAD_INNER * layer.inner for layer in layers)
    loss = chunks * (_AHEAD_LOGITS * chunk + _AHEAD_HEAD * outside)
    return min(shape.width * widths + _AHEAD_AGAIN * again + loss, _AHEAD_MOST)


def _chunks(config: ModelConfig, shape: Shape) -> tuple[int, int]:
    """The number of chunks that the loss is computed in, and the bytes of the logits of one."""
    positions, rows = shape.rows * shape.length, here().loss_rows
    return -(-positions // rows), min(rows, positions) * config.vocab_size * 4


def _moment(layer: _Layer, shape: Shape) -> float:
    """Bytes of temporary buffers while the gradients of a layer are computed."""
    again = _again(layer, shape) + 3 * shape.width * layer.dim
    block = shape.rows * layer.heads * min(BLOCK, shape.length) * shape.length * 4
    attention = _WEIGHTS * block + _QKV * shape.width * layer.qkv
    return again + max(attention, _INNER * shape.width * layer.inner)


def _again(layer: _Layer, shape: Shape) -> float:
    """Bytes of a layer's activations when the whole layer is recomputed."""
    if shape.recompute != LAYERS:
        return 0
    return shape.width * (layer.kept(shape, here().within_layers) - layer.dim)


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    for layer, inner in enumerate(config.ffn_dims):
        heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        qkv = (heads + 2 * kv_heads) * config.head_dim
        projected = 2 * inner if config.ffn_with_glu else inner
        yield _Layer(config.model_dim, heads * config.head_dim, qkv, projected, inner, heads)
