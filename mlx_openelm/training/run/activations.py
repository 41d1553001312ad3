"""The memory of a step's activations: those kept for the backward pass are counted, temporary buffers measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ... import backend
from ...config import ModelConfig
from ..options import LAYERS, NOTHING
from ..step.attention import BLOCK
from ..step.strategy import here


@dataclass(frozen=True)
class _Buffers:
    """Temporary buffers of a step, counted as copies of the arrays that they are as large as.

    Args:
        logits_first, logits_more, logits_most: of a chunk's logits in the loss, for the first chunk, for each further
            one, and at most.
        head: of the output layer's gradient, if that is trained.
        inner: [rows, inner] arrays in the gradients of a feed-forward.
        weights, qkv: of a block's attention weights, and of queries, keys and values, in the gradients of attention.
        ahead: bytes of small arrays.
        outstanding: bytes of results at which kernels wait for those before them; 0 if there are none.
    """

    logits_first: float
    logits_more: float
    logits_most: float
    head: float
    inner: float
    weights: float
    qkv: float
    ahead: int = 0
    outstanding: int = 0


# As measured on a CPU, where MLX allocates for about ten operations ahead of the one it runs.
_BUFFERS = _Buffers(8.0, 4.0, 17.0, 6.0, 14.5, 10.0, 6.4)
# Our CPU kernels let MLX allocate only a few megabytes ahead.
_BUFFERS_OF_KERNELS = _Buffers(6.6, 0.0, 6.6, 2.8, 4.4, 0.0, 4.4, 6_000_000, 4 << 20)

# On CUDA, MLX submits graphs of up to a hundred operations, up to eleven ahead of the running one, and holds their
# arrays until they are done. So a step that follows others holds these bytes in addition: in small steps the first for
# each byte of all layers' inputs, in large ones the second and a constant. They were fitted to runs on an H200, with a
# largest error of 9% (`test_recompute_plan.py`). If memory is short, MLX waits instead.
_AHEAD_SMALL, _AHEAD, _AHEAD_BYTES = 50, 19, 5_250_000_000


@dataclass(frozen=True)
class Shape:
    """What the size of a step's activations depends on.

    Args:
        rows, length: the shape of the largest batch.
        itemsize: bytes per activation.
        recompute: what the backward pass recomputes, as in `forward.hidden_states`.
        fused: whether attention's gradient is MLX's, as in `strategy.fuses_attention_gradient`.
        dropout: whether adapters use dropout.
        packed: whether rows hold several examples, which takes a mask.
    """

    rows: int
    length: int
    itemsize: int
    recompute: str
    fused: bool = False
    dropout: bool = False
    packed: bool = False

    @property
    def width(self) -> int:
        """Bytes of an array with one activation per position."""
        return self.rows * self.length * self.itemsize

    @property
    def mask(self) -> int:
        """Bytes of the attention mask that all layers share: booleans, or numbers to add."""
        if not self.packed:
            return 0
        each = self.itemsize if self.fused else 4 if backend.has_kernels() else 1
        return self.rows * self.length**2 * each


@dataclass(frozen=True)
class _Layer:
    """The sizes of a layer's activations, in values per position."""

    dim: int  # the model's width
    queries: int
    qkv: int  # queries, keys and values
    projected: int  # gate and up
    inner: int
    heads: int

    def kept(self, shape: Shape, recompute: str) -> float:
        """Activations per position that are kept for the backward pass."""
        if recompute == LAYERS:
            return self.dim
        kept: float = 2 * self.dim + self.qkv + self.queries + self.projected
        if shape.fused:  # rotated queries and keys, and a float32 per head
            kept += self.queries + (self.qkv - self.queries) / 2 + 4 * self.heads / shape.itemsize
        if recompute == NOTHING:
            # The outputs of both norms and SwiGLU, and dropout masks: one byte per input of an adapter.
            kept += 2 * self.dim + self.inner
            kept += (2 * self.dim + self.queries + self.inner) / shape.itemsize if shape.dropout else 0
        return kept


def peak(config: ModelConfig, shape: Shape, *, first: int, by_layer: list[int], outside: int) -> float:
    """The peak bytes of activations, temporary buffers, the mask, and the gradients that exist at that moment.

    Args:
        first: the lowest layer with trained parameters; nothing is kept for those below it.
        by_layer: bytes of each layer's gradients.
        outside: bytes of the gradients of parameters that are not in a layer.
    """
    layers = list(_layers(config))
    saved = [shape.width * layer.kept(shape, shape.recompute) for layer in layers]
    saved[:first] = [0] * first
    if shape.fused:
        return shape.mask + sum(saved) + _ahead(layers[first:], shape) + outside + sum(by_layer)
    buffers = _BUFFERS_OF_KERNELS if backend.has_kernels() else _BUFFERS
    chunks, chunk = _chunks(config, shape)
    of_chunk = chunk * min(buffers.logits_most, buffers.logits_first + buffers.logits_more * (chunks - 1))
    of_chunk += buffers.head * outside
    most = sum(saved) + 5 * shape.width * config.model_dim + _chunks_at_once(config, shape, buffers) * of_chunk
    for index, layer in list(enumerate(layers))[first:]:
        gradients = outside + sum(by_layer[index:])
        most = max(most, sum(saved[: index + 1]) + _temporary(layer, shape, buffers) + gradients)
    return shape.mask + most


def _ahead(layers: list[_Layer], shape: Shape) -> float:
    """Bytes that MLX holds because it works ahead on a GPU."""
    width = shape.width * sum(layer.dim for layer in layers)
    return min(_AHEAD_SMALL * width, _AHEAD_BYTES + _AHEAD * width)


def _chunks(config: ModelConfig, shape: Shape) -> tuple[int, int]:
    """The number of chunks that the loss is computed in, and the bytes of the logits of one."""
    positions, rows = shape.rows * shape.length, here().loss_rows
    return -(-positions // rows), min(rows, positions) * config.vocab_size * 4


def _chunks_at_once(config: ModelConfig, shape: Shape, buffers: _Buffers) -> int:
    """The chunks whose buffers exist at the same time: kernels begin the next one if its logits are few."""
    chunks, chunk = _chunks(config, shape)
    by_hidden = chunk // config.vocab_size * config.model_dim  # the gradient of the chunk before
    if chunk + by_hidden > buffers.outstanding:
        return 1
    # Logits and their exponentials are results of kernels.
    return min(chunks, max(2, 1 + buffers.outstanding // (2 * chunk)))


def _temporary(layer: _Layer, shape: Shape, buffers: _Buffers) -> float:
    """Bytes of temporary buffers while the gradients of a layer are computed."""
    recomputed = _recomputed(layer, shape) + 3 * shape.width * layer.dim
    block = shape.rows * layer.heads * min(BLOCK, shape.length) * shape.length * 4
    attention = buffers.weights * block + buffers.qkv * shape.width * layer.qkv
    return recomputed + max(attention, buffers.inner * shape.width * layer.inner) + buffers.ahead


def _recomputed(layer: _Layer, shape: Shape) -> float:
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
