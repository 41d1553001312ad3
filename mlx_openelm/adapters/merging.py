"""Adding an adapter to a checkpoint: one matrix at a time, in float32, packed as requested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ..config import EMBEDDING, HEAD, ModelConfig
from ..formats.adapter import Adapter, LowRank
from ..formats.mlx import Checkpoint, Quantization
from ..formats.packing import Plan, cast_weights, dequantize_weights, quantize_weights
from ..formats.safetensors import Tensor, Weights
from ..ops.packed import PARTS
from .attaching import check_fits
from .base_copies import Stored, check_base_copies
from .merged_tensors import Base, Change, Deviation, merged_tensors


@dataclass
class Merged:
    """A merged checkpoint.

    Attributes:
        checkpoint: with unread weights.
        deviations: by module path, filled as the weights are read.
        exceptions: descriptions of matrices packed differently from the rest, by module path.
        untied: whether the output layer, shared with the embedding before, became a tensor of its own.
    """

    checkpoint: Checkpoint
    deviations: dict[str, Deviation] = field(default_factory=dict)
    exceptions: dict[str, str] = field(default_factory=dict)
    untied: bool = False


def merge(
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    dtype: mx.Dtype | None = None,
    plan: Plan | None = None,
    dequantize: bool = False,
) -> Merged:
    """The checkpoint with an adapter's changes; nothing is read yet, and both arguments are emptied.

    LoRA turns W into W + ΔW, where ΔW is scale * (a b)ᵀ. DoRA turns it into m / ||W + ΔW|| * (W + ΔW), with norms of
    rows, or of columns for an embedding that is changed on the input side only. By default packed matrices are packed
    again in the same way, and tensors that the adapter does not change keep every bit. If an embedding that is shared
    with the output layer changes on the input side only, the output layer becomes a tensor of its own.

    Args:
        dtype: the type of what is not packed; the stored type by default.
        plan: packs all matrices, also those that were packed in another way.
        dequantize: unpack all matrices.

    Raises:
        RequestError: an adapter that does not match the model, or that has copies of another base's weights.
    """
    config, packed = checkpoint.config, checkpoint.quantization
    check_fits(adapter, config)
    tensors = checkpoint.weights.tensors

    def stored_parts(name: str) -> Stored:
        path = name.rpartition(".")[0]
        parts = {part: tensors[f"{path}.{part}"].read() for part in PARTS if f"{path}.{part}" in tensors}
        return parts, packed.get(path)

    check_base_copies(adapter, stored_parts)
    changes = _collect(adapter, config)
    stored = dtype or checkpoint.dtype
    untied = _changes_input_only(changes, config)
    if untied:
        tensors, packed = _with_head(tensors, packed)
        config = replace(config, share_input_output_layers=False)

    merged = Merged(replace(checkpoint, config=config), untied=untied)
    choices = {} if dequantize else packed
    if plan is not None:
        choices, merged.exceptions = plan(config)

    rest = Weights({name: tensor for name, tensor in tensors.items() if _weight_name(name) not in changes})
    if dequantize or plan is not None:
        rest = dequantize_weights(rest, packed, stored if dequantize else mx.float32)
    if dtype is not None:
        rest = cast_weights(rest, choices if plan is None else {}, dtype)
    if plan is not None:
        rest = quantize_weights(rest, choices)

    result = rest.tensors
    for name, change in changes.items():
        path, _, _ = name.rpartition(".")
        parts = {part: tensors[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in tensors}
        base = Base(parts, packed.get(path), config.tensor_shapes()[name])
        merged.deviations[path] = Deviation()
        full_dtype = dtype or (stored if path in packed else parts["weight"].dtype)
        result |= merged_tensors(path, base, change, choices.get(path), full_dtype, dtype, merged.deviations[path])
    order = {name.rpartition(".")[0]: index for index, name in enumerate(tensors)}
    ordered = sorted(result.items(), key=lambda item: order[item[0].rpartition(".")[0]])
    merged.checkpoint.weights, merged.checkpoint.quantization = Weights(dict(ordered)), dict(choices)
    if dequantize:
        merged.checkpoint.rounded_to = checkpoint.rounding
    checkpoint.weights = Weights({})  # so that it keeps no weights that were read
    return merged


def _weight_name(name: str) -> str:
    """The name of the tensor that a packed part belongs to."""
    return f"{name.rpartition('.')[0]}.weight"


def _collect(adapter: Adapter, config: ModelConfig) -> dict[str, Change]:
    """The change of each tensor by name, in the model's order; takes whole tensors out of the adapter."""
    found = {f"{path}.weight": Change(change, path == EMBEDDING) for path, change in adapter.modules.items()}
    found |= {name: Change(adapter.weights.pop(name), False) for name in list(adapter.weights)}
    return {name: found[name] for name in config.tensor_shapes() if name in found}


def _changes_input_only(changes: Mapping[str, Change], config: ModelConfig) -> bool:
    """Whether the adapter changes a shared embedding on the input side only."""
    change = changes.get(f"{EMBEDDING}.weight")
    is_input = change is not None and isinstance(change.value, LowRank) and not change.value.output_side
    return is_input and config.share_input_output_layers


def _with_head(
    tensors: Mapping[str, Tensor], packed: Mapping[str, Quantization]
) -> tuple[dict[str, Tensor], dict[str, Quantization]]:
    """Add a copy of the embedding as the output layer, next to it, so that both are read one after the other."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{EMBEDDING}.")}
    head = {name.replace(EMBEDDING, HEAD, 1): tensor for name, tensor in own.items()}
    return own | head | dict(tensors), dict(packed) | ({HEAD: packed[EMBEDDING]} if EMBEDDING in packed else {})
