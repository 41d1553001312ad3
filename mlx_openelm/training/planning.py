"""The memory a run will need, told before it starts, and what to turn on if that is too much.

Activations are counted as `forward` keeps and recomputes them. What is held for a moment was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from ..adapters.adapter import EMBEDDING
from ..backend import available_memory, total_memory
from ..config import ModelConfig
from ..errors import RequestError
from .attention import BLOCK
from .loss import CHUNK
from .options import TrainOptions
from .step import SETTLED_BYTES, Updater

# What is held for a moment, measured on a CPU, where MLX allocates for some ten operations ahead of the one it does:
# arrays of a chunk's logits in the loss, at first, for each further chunk, and at most; of the output layer where it
# is trained;
_LOGITS_FIRST, _LOGITS_MORE, _LOGITS_MOST, _HEAD = 8.0, 4.0, 17.0, 6.0
# [rows, inner] arrays while the gradients of a feed-forward are made;
_INNER = 14.5
# a block's attention weights, and arrays as large as queries, keys and values, while theirs are made;
_WEIGHTS, _QKV = 10.0, 6.4
# and of new weights with the optimizer's numbers for them, before the old ones go.
_RENEWED = int(1.25 * SETTLED_BYTES)

# A run that needs more of the free memory than this is warned about, one that needs more of all memory refused.
_USABLE_SHARE, _HOPELESS = 0.9, 1.5


@dataclass(frozen=True)
class Memory:
    """Bytes of the model, of what the optimizer keeps, of gradients, of activations, and of all at the worst moment.

    `activations` is their most with what is held beside them for a moment, the gradients made by then included.
    """

    model: int
    optimizer: int
    gradients: int
    activations: int
    peak: int

    def __str__(self) -> str:
        return (
            f"about {_size(self.peak)}: the model {_size(self.model)}, the optimizer {_size(self.optimizer)}, "
            f"gradients {_size(self.gradients)}, activations up to {_size(self.activations)}"
        )


@dataclass(frozen=True)
class Plan:
    """What a run needs, and what other settings would: (flags, memory), which need less."""

    memory: Memory
    alternatives: tuple[tuple[str, Memory], ...]

    def warning(self) -> str | None:
        """One line if the free memory will hardly do, with what to turn on.

        Raises:
            RequestError: the machine does not have nearly as much.
        """
        free = available_memory()
        if free is None or self.memory.peak <= _USABLE_SHARE * (free + self.memory.model):
            return None
        room = _USABLE_SHARE * (free + self.memory.model)
        fitting = [way for way in self.alternatives if way[1].peak <= room] or list(self.alternatives[-1:])
        ways = " or ".join(f"{flags}: {_size(memory.peak)}" for flags, memory in fitting[:2])
        advice = f"; with {ways}" if ways else "; a smaller or quantized model needs less"
        there = _size(free + self.memory.model)
        line = f"The run needs about {_size(self.memory.peak)}, and {there} are there{advice}."
        if self.memory.peak > _HOPELESS * (total_memory() or math.inf):
            raise RequestError(line)
        return line


def plan(updater: Updater, options: TrainOptions, shape: tuple[int, int]) -> Plan:
    """The memory of a run, and of ways to need less.

    Args:
        updater: of a model that is loaded and made trainable.
        shape: [rows, length] of the largest batch, as `Batches.largest_shape` gives it.
    """
    model, state = updater.model, updater.state()
    sizes = {name: value.nbytes for name, value in state.items()}
    trained = {name.removeprefix("weights."): size for name, size in sizes.items() if name.startswith("weights.")}
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]

    def needs(rows: int, length: int, grad_checkpoint: bool, accumulates: bool) -> Memory:
        return estimate(
            model.config,
            model_bytes=sum(value.nbytes for _, value in parameters),
            optimizer_bytes=sum(sizes.values()) - sum(trained.values()),
            trained=trained,
            rows=rows,
            length=length,
            itemsize=updater.compute_dtype.size,
            grad_checkpoint=grad_checkpoint,
            accumulates=accumulates,
        )

    rows, length = shape
    checkpoints, accumulates = options.grad_checkpoint, options.grad_accumulation_steps > 1
    memory = needs(rows, length, checkpoints, accumulates)
    ways, flags = [], []
    if not checkpoints:
        flags.append("--grad-checkpoint")
        ways.append((" ".join(flags), needs(rows, length, True, accumulates)))
    smaller = rows // 2
    while smaller >= 1:
        # Halved, so that an update learns from as many examples.
        split = f"--batch-size {options.batch_size * smaller // rows} --grad-accumulation-steps "
        split += str(math.ceil(rows / smaller) * options.grad_accumulation_steps)
        ways.append((" ".join([*flags, split]), needs(smaller, length, True, True)))
        smaller //= 2
    if length > 512:
        short = f"--max-seq-length {length // 2}"
        ways.append((" ".join([*flags, short]), needs(rows, length // 2, True, accumulates)))
    return Plan(memory, tuple(way for way in ways if way[1].peak < memory.peak))


def _size(count: float) -> str:
    """Bytes as people read them (1 GB is 1e9 bytes)."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


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
    # Below the first layer with something to train nothing is kept; the embedding lies below all.
    is_below = any(EMBEDDING in name for name in trained)
    first = 0 if is_below else next((n for n, size in enumerate(by_layer) if size), 0)
    saved = [dim if grad_checkpoint else width * layer.kept for layer in layers]
    saved[:first] = [0] * first
    chunks = -(-rows * length // CHUNK)
    chunk = min(CHUNK, rows * length) * config.vocab_size * 4
    logits = chunk * min(_LOGITS_MOST, _LOGITS_FIRST + _LOGITS_MORE * (chunks - 1))
    loss = sum(saved) + 5 * dim + logits + _HEAD * outside
    activations = loss
    for index, layer in list(enumerate(layers))[first:]:
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
