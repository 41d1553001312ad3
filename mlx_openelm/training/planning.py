"""The memory a run will need, told before it starts, and what to turn on if that is too much.

Activations are counted as `forward` keeps and recomputes them; the factors of what one layer's backward pass holds for a
moment were measured on a CPU, as the tests do for several shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import ModelConfig
from .attention import BLOCK
from .loss import CHUNK
from .step import SETTLED_BYTES

# What is held for a moment, measured on a CPU, where MLX allocates for some ten operations ahead of the one it does:
# arrays of a chunk's logits in the loss, and of the output layer where it is trained;
_LOGITS, _HEAD = 17.0, 6.0
# [rows, inner] arrays while the gradients of a feed-forward are made;
_INNER = 14.5
# a block's attention weights, and arrays as large as queries, keys and values, while theirs are made;
_WEIGHTS, _QKV = 10.0, 6.4
# and of new weights with the optimizer's numbers for them, before the old ones go.
_RENEWED = int(1.25 * SETTLED_BYTES)


@dataclass(frozen=True)
class Memory:
    """Bytes: of the model with what is trained, of what the optimizer keeps, of gradients, of activations at their most,
    and the most at a time, which is less than their sum where gradients come as activations go."""

    model: int
    optimizer: int
    gradients: int
    activations: int
    peak: int


def estimate(
    config: ModelConfig,
    *,
    model_bytes: int,
    optimizer_bytes: int,
    trained: dict[str, int],
    rows: int,
    length: int,
    itemsize: int,
    grad_checkpoint: bool,
    accumulates: bool = False,
) -> Memory:
    """The memory of a run whose largest batch has `rows` of `length` positions.

    Args:
        model_bytes: the model's parameters, trained ones included.
        optimizer_bytes: what the optimizer keeps.
        trained: the bytes of each trained parameter, by name; gradients have as many.
        itemsize: the bytes of a number in activations.
        accumulates: whether gradients of several micro-batches are added up.
    """
    layers = list(_layers(config))
    gradients = sum(trained.values())
    by_layer = [sum(size for name, size in trained.items() if f".layers.{n}." in name) for n in range(len(layers))]
    outside = gradients - sum(by_layer)
    width = rows * length * itemsize  # bytes of one number a position
    dim = width * config.model_dim
    saved = [dim if grad_checkpoint else width * layer.kept for layer in layers]
    loss = sum(saved) + 5 * dim + _LOGITS * CHUNK * config.vocab_size * 4 + _HEAD * outside
    activations = loss
    for index, layer in enumerate(layers):
        again = width * layer.kept - dim if grad_checkpoint else 0
        block = rows * layer.heads * min(BLOCK, length) * length * 4
        momentary = max(_WEIGHTS * block + _QKV * width * layer.qkv, _INNER * width * layer.inner)
        made = outside + sum(by_layer[index:])
        activations = max(activations, sum(saved[: index + 1]) + 3 * dim + again + momentary + made)
    renewed = gradients + min(gradients + optimizer_bytes, _RENEWED)
    added = gradients if accumulates else 0
    peak = model_bytes + optimizer_bytes + added + max(activations, renewed)
    return Memory(model_bytes, optimizer_bytes, gradients, int(activations), int(peak))


@dataclass(frozen=True)
class _Layer:
    """Numbers a position: kept for the backward pass, queries with keys and values, the feed-forward's inner size."""

    kept: int
    qkv: int
    inner: int
    heads: int


def _layers(config: ModelConfig) -> Iterator[_Layer]:
    for layer, inner in enumerate(config.ffn_dims):
        heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
        qkv = (heads + 2 * kv_heads) * config.head_dim
        projected = 2 * inner if config.ffn_with_glu else inner
        yield _Layer(2 * config.model_dim + qkv + heads * config.head_dim + projected, qkv, inner, heads)
