"""What a training step holds of activations: what `forward` keeps is counted, what is held for a moment measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...config import ModelConfig
from ..step.attention import BLOCK
from ..step.strategy import LAYERS, NOTHING, here

# On a CPU MLX allocates for some ten operations ahead of the one it does. Held for a moment, as measured there: arrays
# of a chunk's logits in the loss, at first, for each further chunk, and at most; of the output layer where it is
# trained;
_LOGITS_FIRST, _LOGITS_MORE, _LOGITS_MOST, _HEAD = 8.0, 4.0, 17.0, 6.0
# [rows, inner] arrays while the gradients of a feed-forward are made;
_INNER = 14.5
# a block's attention weights, and arrays as large as queries, keys and values, while theirs are made.
_WEIGHTS, _QKV = 10.0, 6.4

# For CUDA MLX makes graphs of up to a hundred operations, up to eleven ahead of the one that is done, and what they use
# is held until they are. Fitted to what runs took on an H100 (`test_recompute_plan.py` has them; none is further off
# than 11%): for each layer arrays as wide as the model and as the feed-forward's inner size, a part of what is computed
# again,
_AHEAD_DIM, _AHEAD_INNER, _AHEAD_AGAIN = 13.9, 3.35, 0.11
# all logits in float32, and for each chunk of them the output layer's gradient; and of all that at most so many bytes.
_AHEAD_LOGITS, _AHEAD_HEAD, _AHEAD_MOST = 1.67, 4.4, 14.7e9


@dataclass(frozen=True)
class Shape:
    """What a step is made of.

    Args:
        rows, length: of its largest batch.
        itemsize: the bytes of a number.
        recompute: what is computed again, as in `forward.hidden_states`.
        fused: whether attention's gradient is MLX's, as in `strategy.fuses_attention_gradient`.
        dropout: whether adapters drop inputs.
    """

    rows: int
    length: int
    itemsize: int
    recompute: str
    fused: bool = False
    dropout: bool = False

    @property
    def width(self) -> int:
        """Bytes of one number a position."""
        return self.rows * self.length * self.itemsize


@dataclass(frozen=True)
class _Layer:
    """Numbers a position: the model's width, queries, with keys and values, gate and up, the inner size; and heads."""

    dim: int
    queries: int
    qkv: int
    projected: int
    inner: int
    heads: int

    def kept(self, shape: Shape, recompute: str) -> float:
        """Numbers a position that are kept for the backward pass."""
        if recompute == LAYERS:
            return self.dim
        kept: float = 2 * self.dim + self.qkv + self.queries + self.projected
        if shape.fused:  # rotated queries and keys, and a float32 a head
            kept += self.queries + (self.qkv - self.queries) / 2 + 4 * self.heads / shape.itemsize
        if recompute == NOTHING:  # what both norms and SwiGLU give, and a byte for each input of an adapter
            kept += 2 * self.dim + self.inner
            kept += (2 * self.dim + self.queries + self.inner) / shape.itemsize if shape.dropout else 0
        return kept


def most(config: ModelConfig, shape: Shape, *, first: int, by_layer: list[int], outside: int) -> float:
    """Bytes of activations at the worst moment, with what is held for a moment and the gradients made by then.

    Args:
        first: the lowest layer with something to train, below which nothing is kept.
        by_layer: the bytes of the gradients of each layer.
        outside: those of other gradients.
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
    """Bytes that are held because a GPU works ahead."""
    again = sum(_again(layer, shape) for layer in layers)
    widths = sum(_AHEAD_DIM * layer.dim + _AHEAD_INNER * layer.inner for layer in layers)
    loss = chunks * (_AHEAD_LOGITS * chunk + _AHEAD_HEAD * outside)
    return min(shape.width * widths + _AHEAD_AGAIN * again + loss, _AHEAD_MOST)


def _chunks(config: ModelConfig, shape: Shape) -> tuple[int, int]:
    """How many chunks of positions the loss takes, and the bytes of one's logits."""
    positions, rows = shape.rows * shape.length, here().loss_rows
    return -(-positions // rows), min(rows, positions) * config.vocab_size * 4


def _moment(layer: _Layer, shape: Shape) -> float:
    """Bytes that are held while the gradients of a layer are made."""
    again = _again(layer, shape) + 3 * shape.width * layer.dim
    block = shape.rows * layer.heads * min(BLOCK, shape.length) * shape.length * 4
    attention = _WEIGHTS * block + _QKV * shape.width * layer.qkv
    return again + max(attention, _INNER * shape.width * layer.inner)


def _again(layer: _Layer, shape: Shape) -> float:
    """Bytes of what of a layer is computed again as a whole."""
    if shape.recompute != LAYERS:
        return 0
    return shape.width * (layer.kept(shape, here().within_layers) - layer.dim)


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    for layer, inner in enumerate(config.ffn_dims):
        heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        qkv = (heads + 2 * kv_heads) * config.head_dim
        projected = 2 * inner if config.ffn_with_glu else inner
        yield _Layer(config.model_dim, heads * config.head_dim, qkv, projected, inner, heads)
