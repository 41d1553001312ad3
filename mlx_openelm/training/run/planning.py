"""Estimating the memory of a run, choosing what it recomputes, and advice if memory is too small."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten

from ...adapters.attaching import dropout_layers
from ...backend import available_memory, total_memory
from ...config import EMBEDDING, ModelConfig
from ...errors import RequestError, name_options
from ...wording import flag, size
from ..options import AUTO, LAYERS, NOTHING, PARTS, TrainOptions
from ..step import compact
from ..step.strategy import fuses_attention_gradient, here
from ..step.updater import Updater
from . import activations
from .activations import Shape

# While weights are updated, new and old ones exist at the same time: this many times the bytes evaluated together.
_UPDATE_FACTOR = 1.25
# With a compact state, including temporary arrays of several weights.
_COMPACT_UPDATE_FACTOR = 1.5
# On CUDA a step's update begins before the last of its gradients is computed: this share of weights and optimizer state
# is held in addition to everything else (measured as in `activations`).
_UPDATE_SHARE = 0.5

# A run that needs more than this share of the free memory gets a warning; one that needs more than this multiple of all
# memory is refused.
_USABLE_SHARE, _REFUSED_FACTOR = 0.9, 1.5


@dataclass(frozen=True)
class Memory:
    """Bytes of the model, the optimizer's state, gradients and activations, and the peak of their sum.

    `activations` is their peak, including temporary buffers and the gradients that exist at that moment. `generation`
    is what sampling between updates takes, and `held` what is held beside the model, such as a reference model.
    """

    model: int
    optimizer: int
    gradients: int
    activations: int
    peak: int
    generation: int = 0
    held: int = 0

    def __str__(self) -> str:
        others = f", the reference model {size(self.held)}" if self.held else ""
        others += f", generation up to {size(self.generation)}" if self.generation else ""
        return (
            f"about {size(self.peak)}: the model {size(self.model)}, the optimizer {size(self.optimizer)}, "
            f"gradients {size(self.gradients)}, activations up to {size(self.activations)}{others}"
        )

    def beside(self, held: int, generation: int) -> Memory:
        """The memory of a run that needs these bytes too: all the time, and between updates."""
        peak = held + max(self.peak, self.model + self.optimizer + generation)
        return replace(self, peak=peak, generation=generation, held=held)


@dataclass(frozen=True)
class Plan:
    """What a run recomputes, the memory it needs, and alternatives that need less, as (flags, memory)."""

    recompute: str
    memory: Memory
    alternatives: tuple[tuple[str, Memory], ...]

    def __str__(self) -> str:
        note = {NOTHING: "nothing is recomputed", LAYERS: "whole layers are recomputed"}.get(self.recompute)
        return f"{self.memory}; {note}" if note else str(self.memory)

    def warning(self) -> str | None:
        """A line with advice if there may be too little free memory, else None.

        Raises:
            RequestError: the machine has far too little memory.
        """
        room = _room(self.memory)
        if self.memory.peak <= room:
            return None
        fitting = [option for option in self.alternatives if option[1].peak <= room] or list(self.alternatives[-1:])
        options = " or ".join(f"{flags}: {size(memory.peak)}" for flags, memory in fitting[:2])
        advice = f"; with {options}" if options else "; a smaller or quantized model needs less"
        line = f"The run needs about {size(self.memory.peak)}, and {size(room / _USABLE_SHARE)} is available{advice}."
        line = name_options(line)
        if self.memory.peak > _REFUSED_FACTOR * (total_memory() or math.inf):
            raise RequestError(line)
        return line


@dataclass(frozen=True)
class _Setting:
    """What the memory of a run depends on, beside its model and what it trains.

    Args:
        rows, length: the shape of the largest batch.
        recompute: as in `forward.hidden_states`, or AUTO.
        accumulates: whether the gradients of several micro-batches are added up.
        is_compact: whether the optimizer's state is as in `compact`.
        packed: whether rows hold several examples.
    """

    rows: int
    length: int
    recompute: str
    accumulates: bool
    is_compact: bool
    packed: bool


def _room(memory: Memory) -> float:
    """The bytes that a run may take, including its model, which is already loaded; infinity if unknown."""
    free = available_memory()
    if free is None:
        return math.inf
    # On CUDA the weights may still be in host memory.
    return _USABLE_SHARE * min(free + memory.model, total_memory() or math.inf)


def plan(updater: Updater, options: TrainOptions, shape: tuple[int, int], further: tuple[int, int] = (0, 0)) -> Plan:
    """Decide what a run recomputes, by its options or the free memory, and estimate the memory it needs.

    Args:
        updater: its model is loaded and made trainable.
        shape: [rows, length] of the largest batch, as `Batches.largest_shape` returns it.
        further: as `Method.further_memory` gives it.
    """

    def memory_of(setting: _Setting) -> Memory:
        return _estimate_run(updater, setting).beside(*further)

    rows, length = shape
    accumulates = options.grad_accumulation_steps > 1
    setting = _Setting(rows, length, options.recomputed, accumulates, updater.is_compact, options.packs_rows)
    if setting.recompute == AUTO:
        level = _choose_recomputed(lambda level: memory_of(replace(setting, recompute=level)))
        setting = replace(setting, recompute=level)
    memory = memory_of(setting)
    smaller = [(flags, memory_of(other)) for flags, other in _smaller_settings(options, updater, setting)]
    return Plan(setting.recompute, memory, tuple(found for found in smaller if found[1].peak < memory.peak))


def _choose_recomputed(memory_of: Callable[[str], Memory]) -> str:
    """The least recomputation with which a run fits into the free memory; elsewhere than on CUDA always the parts."""
    if not here().chooses:
        return PARTS
    # If neither fits by the estimate, LAYERS needs least, and may still work: the estimate includes what MLX holds
    # because it works ahead, which it does less when memory is short.
    levels = ((level, memory_of(level)) for level in (NOTHING, PARTS))
    return next((level for level, memory in levels if memory.peak <= _room(memory)), LAYERS)


def _smaller_settings(options: TrainOptions, updater: Updater, setting: _Setting) -> Iterator[tuple[str, _Setting]]:
    """Flags with which a run needs less memory than with `setting`, and what they mean."""
    flags = []
    compute_dtype = updater.compute_dtype if updater.casts else None
    if not setting.is_compact and compact.supports(updater.optimizer, compute_dtype):
        flags.append("--optimizer-dtype bfloat16")
        setting = replace(setting, is_compact=True)
        yield flags[0], setting
    if setting.recompute != LAYERS:
        flags.append("--grad-checkpoint")
        setting = replace(setting, recompute=LAYERS)
        yield " ".join(flags), setting
    rows, length = setting.rows, setting.length
    smaller = rows // 2
    while smaller * options.batch_size >= rows:  # at least one example, which may take several rows
        # Accumulated, so that an update still learns from as many examples.
        split = f"--batch-size {options.batch_size * smaller // rows} --grad-accumulation-steps "
        split += str(math.ceil(rows / smaller) * options.grad_accumulation_steps)
        yield " ".join([*flags, split]), replace(setting, rows=smaller, accumulates=True)
        smaller //= 2
    if length > 512:
        name = options.length_option
        short = f"{flag(name)} {min(length, getattr(options, name)) // 2}"
        yield " ".join([*flags, short]), replace(setting, length=length // 2)


def _estimate_run(updater: Updater, setting: _Setting) -> Memory:
    """`estimate` for an updater, with its own or a compact state."""
    model = updater.model
    sizes = {name: value.nbytes for name, value in updater.state().items()}
    trained = {name.removeprefix("weights."): size for name, size in sizes.items() if name.startswith("weights.")}
    moments = sum(sizes.values()) - sum(trained.values())
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    model_bytes = sum(value.nbytes for _, value in parameters)
    if updater.is_compact:  # the model has half of each trained weight
        model_bytes += sum(trained.values()) // 2
    dtype = updater.compute_dtype
    fused, dropout = fuses_attention_gradient(dtype, model.config.head_dim), bool(dropout_layers(model))
    return estimate(
        model.config,
        Shape(setting.rows, setting.length, dtype.size, setting.recompute, fused, dropout, setting.packed),
        model_bytes=model_bytes,
        optimizer_bytes=moments // 2 if setting.is_compact and not updater.is_compact else moments,
        trained=trained,
        casts=updater.casts,
        is_compact=setting.is_compact,
        accumulates=setting.accumulates,
    )


def estimate(
    config: ModelConfig,
    shape: Shape,
    *,
    model_bytes: int,
    optimizer_bytes: int,
    trained: dict[str, int],
    casts: bool = False,
    is_compact: bool = False,
    accumulates: bool = False,
) -> Memory:
    """The memory of a run whose batches are no larger than `shape`.

    Args:
        model_bytes: the model's parameters, including those that are trained.
        optimizer_bytes: the optimizer's state.
        trained: the bytes of each trained parameter in float32, by name.
        casts: whether trained parameters are cast to the activations' type; gradients then have that type.
        is_compact: whether the copies are a part of the weights, as in `compact`.
        accumulates: whether the gradients of several micro-batches are added up.
    """
    masters = sum(trained.values())
    share = shape.itemsize / 4 if casts else 1.0
    gradients = int(share * masters)
    by_layer = [
        int(share * sum(size for name, size in trained.items() if f".layers.{layer}." in name))
        for layer in range(config.num_transformer_layers)
    ]
    # Nothing is kept below the first layer with trained parameters; if the embedding is trained, all layers keep.
    trains_embedding = any(EMBEDDING in name for name in trained)
    first = 0 if trains_embedding else next((layer for layer, size in enumerate(by_layer) if size), 0)
    held = activations.peak(config, shape, first=first, by_layer=by_layer, outside=gradients - sum(by_layer))
    updated = min(masters + optimizer_bytes, _UPDATE_FACTOR * here().settled_bytes)
    if is_compact:
        largest = max(trained.values(), default=0) * 2  # with its moments
        groups = _UPDATE_FACTOR * compact.settled_bytes() + compact.TEMPORARY * largest
        updated = min(_COMPACT_UPDATE_FACTOR * (masters + optimizer_bytes), groups)
    step = held + _UPDATE_SHARE * updated if shape.fused else max(held, gradients + updated)
    added = masters if accumulates else 0
    copies = gradients if casts and not is_compact else 0
    if is_compact:
        step = max(step, masters)  # they are saved in float32
    peak = model_bytes + copies + optimizer_bytes + added + step
    return Memory(model_bytes, optimizer_bytes, gradients, int(held), int(peak))
