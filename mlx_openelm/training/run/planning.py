"""The memory that a run will need, what it recomputes accordingly, and what to do if memory is too small."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from ...adapters.attaching import dropout_layers
from ...backend import available_memory, total_memory
from ...config import EMBEDDING, ModelConfig
from ...errors import RequestError
from ...wording import size
from ..options import TrainOptions
from ..step.strategy import AUTO, LAYERS, NOTHING, PARTS, fuses_attention_gradient, here
from ..step.updater import Updater
from . import activations
from .activations import Shape

# While weights are updated, the new and the old ones exist at once: this times the bytes that are evaluated together.
_RENEWED = 1.25

# A run that needs more than this share of the free memory causes a warning; more than this multiple of all memory is
# refused.
_USABLE_SHARE, _HOPELESS = 0.9, 1.5


@dataclass(frozen=True)
class Memory:
    """Bytes of the model, the optimizer's state, gradients and activations, and the peak of their sum.

    `activations` is the most they take, including temporary buffers and the gradients that exist at that moment.
    """

    model: int
    optimizer: int
    gradients: int
    activations: int
    peak: int

    def __str__(self) -> str:
        return (
            f"about {size(self.peak)}: the model {size(self.model)}, the optimizer {size(self.optimizer)}, "
            f"gradients {size(self.gradients)}, activations up to {size(self.activations)}"
        )


@dataclass(frozen=True)
class Plan:
    """What a run recomputes, the memory it needs, and settings that need less, as (flags, memory)."""

    recompute: str
    memory: Memory
    alternatives: tuple[tuple[str, Memory], ...]

    def __str__(self) -> str:
        again = {NOTHING: "nothing is recomputed", LAYERS: "whole layers are recomputed"}.get(self.recompute)
        return f"{self.memory}; {again}" if again else str(self.memory)

    def warning(self) -> str | None:
        """A line with advice if the free memory may not suffice, else None.

        Raises:
            RequestError: the machine has far too little memory.
        """
        room = _room(self.memory)
        if self.memory.peak <= room:
            return None
        fitting = [way for way in self.alternatives if way[1].peak <= room] or list(self.alternatives[-1:])
        ways = " or ".join(f"{flags}: {size(memory.peak)}" for flags, memory in fitting[:2])
        advice = f"; with {ways}" if ways else "; a smaller or quantized model needs less"
        line = f"The run needs about {size(self.memory.peak)}, and {size(room / _USABLE_SHARE)} is available{advice}."
        if self.memory.peak > _HOPELESS * (total_memory() or math.inf):
            raise RequestError(line)
        return line


def _room(memory: Memory) -> float:
    """The bytes that a run may take, including its model, which is loaded already; infinity if unknown."""
    free = available_memory()
    if free is None:
        return math.inf
    # With CUDA the weights may still be in host memory.
    return _USABLE_SHARE * min(free + memory.model, total_memory() or math.inf)


def plan(updater: Updater, options: TrainOptions, shape: tuple[int, int]) -> Plan:
    """Decide what a run recomputes (the options, or the free memory, say it), and estimate its memory.

    Args:
        updater: of a model that is loaded and made trainable.
        shape: [rows, length] of the largest batch, as `Batches.largest_shape` returns it.
    """
    model, state = updater.model, updater.state()
    sizes = {name: value.nbytes for name, value in state.items()}
    trained = {name.removeprefix("weights."): size for name, size in sizes.items() if name.startswith("weights.")}
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    fused = fuses_attention_gradient(updater.compute_dtype, model.config.head_dim)

    def needs(rows: int, length: int, recompute: str, accumulates: bool) -> Memory:
        return estimate(
            model.config,
            Shape(rows, length, updater.compute_dtype.size, recompute, fused, bool(dropout_layers(model))),
            model_bytes=sum(value.nbytes for _, value in parameters),
            optimizer_bytes=sum(sizes.values()) - sum(trained.values()),
            trained=trained,
            casts=updater.casts,
            accumulates=accumulates,
        )

    rows, length = shape
    accumulates = options.grad_accumulation_steps > 1
    recompute = options.recomputed
    if recompute == AUTO:
        recompute = PARTS
        if here().chooses:
            # If neither fits, keep the least. The estimate includes MLX working ahead, which it does less when memory
            # is short.
            levels = ((level, needs(rows, length, level, accumulates)) for level in (NOTHING, PARTS))
            recompute = next((level for level, memory in levels if memory.peak <= _room(memory)), LAYERS)
    memory = needs(rows, length, recompute, accumulates)
    ways, flags = [], []
    if recompute != LAYERS:
        flags.append("--grad-checkpoint")
        ways.append((" ".join(flags), needs(rows, length, LAYERS, accumulates)))
    smaller = rows // 2
    while smaller >= 1:
        # Accumulated, so that an update still learns from as many examples.
        split = f"--batch-size {options.batch_size * smaller // rows} --grad-accumulation-steps "
        split += str(math.ceil(rows / smaller) * options.grad_accumulation_steps)
        ways.append((" ".join([*flags, split]), needs(smaller, length, LAYERS, True)))
        smaller //= 2
    if length > 512:
        short = f"--max-seq-length {length // 2}"
        ways.append((" ".join([*flags, short]), needs(rows, length // 2, LAYERS, accumulates)))
    return Plan(recompute, memory, tuple(way for way in ways if way[1].peak < memory.peak))


def estimate(
    config: ModelConfig,
    shape: Shape,
    *,
    model_bytes: int,
    optimizer_bytes: int,
    trained: dict[str, int],
    casts: bool = False,
    accumulates: bool = False,
) -> Memory:
    """The memory of a run whose batches are no larger than `shape`.

    Args:
        model_bytes: the model's parameters, including those that are trained.
        optimizer_bytes: the optimizer's state.
        trained: the bytes of each trained parameter in float32, by name; its gradient takes as many.
        casts: whether trained parameters are cast to the activations' type; the copies exist while they are used.
        accumulates: whether gradients of several micro-batches are added up.
    """
    count = len(config.ffn_dims)
    gradients = sum(trained.values())
    by_layer = [sum(size for name, size in trained.items() if f".layers.{n}." in name) for n in range(count)]
    # Nothing is kept below the first layer with trained parameters. The embedding is below all layers.
    is_below = any(EMBEDDING in name for name in trained)
    first = 0 if is_below else next((n for n, size in enumerate(by_layer) if size), 0)
    held = activations.most(config, shape, first=first, by_layer=by_layer, outside=gradients - sum(by_layer))
    if casts:
        held += gradients * shape.itemsize / 4
    renewed = gradients + min(gradients + optimizer_bytes, _RENEWED * here().settled_bytes)
    added = gradients if accumulates else 0
    peak = model_bytes + optimizer_bytes + added + max(held, renewed)
    return Memory(model_bytes, optimizer_bytes, gradients, int(held), int(peak))
