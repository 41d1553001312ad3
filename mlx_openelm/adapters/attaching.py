"""Adapters in a model: attach one, start a new one for training, extract it, detach it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from ..config import EMBEDDING, LAYERS, ModelConfig
from ..errors import RequestError
from ..formats.adapter import PROJECTIONS, TARGET_MODULES, Adapter, LowRank
from ..formats.mlx import Quantization
from ..model import Embedding, Linear, OpenELM, RMSNorm
from ..modules import module_at, replace_at
from ..ops.packed import PARTS
from .base_copies import Stored, check_base_copies
from .layers import DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRALinear

Adapted = LoRALinear | LoRAEmbedding
# What whole weights replaced, by path: tensors, or packed modules.
Replaced = dict[str, nn.Module | mx.array]

_PARAMETERS = ("lora_a", "lora_b", "m")


def attach(model: OpenELM, adapter: Adapter, *, dtype: mx.Dtype | None = None) -> Replaced:
    """Put an adapter in a model, replacing any other, and freeze everything but the adapter.

    Whole weights, as full fine-tuning saves them, replace the model's own.

    Args:
        dtype: the type of whole weights; by default the one the model computes in. Low-rank parameters are float32.

    Returns:
        The modules and tensors that whole weights replaced, for `put` to restore; `detach` removes low-rank layers.

    Raises:
        RequestError: the adapter does not match the model, or belongs to another base; the model is unchanged.
    """
    layers = make_layers(model, adapter)
    detach(model)
    model.freeze()
    put(model, layers)
    return _replace_weights(model, adapter.weights, dtype or model.transformer.norm["weight"].dtype)


def make_layers(model: OpenELM, adapter: Adapter) -> dict[str, Adapted]:
    """An adapter's layers, wrapped around the model's own, by path; the model is unchanged.

    Raises:
        RequestError: the adapter does not match the model, or belongs to another base.
    """
    check_fits(adapter, model.config)
    check_base(adapter, model)
    layers = {}
    for path, change in adapter.modules.items():
        module = module_at(model, path)
        base = base_of(module) if isinstance(module, Adapted) else module
        layers[path] = adapted(base, change, adapter.dropout)
        mx.eval(layers[path].trainable_parameters())  # threads may share evaluated arrays
    return layers


def put(model: OpenELM, parts: Mapping[str, nn.Module | mx.array]) -> None:
    """Put modules or tensors at their paths in the model."""
    for path, part in parts.items():
        replace_at(model, path, part)


def attach_new(
    model: OpenELM,
    *,
    target_modules: Sequence[str] | None = None,
    num_layers: int = -1,
    rank: int = 8,
    scale: float = 1.0,
    dropout: float = 0.0,
    dora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Put a new adapter in a model, replacing any other, and freeze everything else.

    It has no effect yet: `a` [inputs, rank] is uniform within ±1 / sqrt(inputs), `b` [rank, outputs] is zero. The
    same seed gives the same adapter.

    Args:
        target_modules: some of `TARGET_MODULES`; by default the four projections.
        num_layers: how many of the last layers; -1 means all.
        scale: the factor of the change: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        dropout: the share of a projection's inputs that is dropped for its adapter in training, from 0 to below 1.
        dora: DoRA instead of LoRA: also train the length of each output's weight row.

    Returns:
        The module paths.

    Raises:
        RequestError: an unknown module, or a rank, dropout or number of layers out of range.
    """
    paths = target_paths(model.config, target_modules, num_layers)
    if rank < 1:
        raise RequestError(f"--rank must be 1 or more, got {rank}.")
    if not 0 <= dropout < 1:
        raise RequestError(f"--dropout must be from 0 to below 1, got {dropout}.")
    detach(model)
    model.freeze()
    shapes = model.config.matrix_shapes()
    for path, key in zip(paths, mx.random.split(mx.random.key(seed), len(paths)), strict=True):
        inputs, outputs = shapes[path] if path == EMBEDDING else shapes[path][::-1]
        bound = 1 / math.sqrt(inputs)
        a = mx.random.uniform(-bound, bound, (inputs, rank), key=key)
        change = LowRank(a, mx.zeros((rank, outputs)), scale)
        replace_at(model, path, adapted(module_at(model, path), change, dropout, dora=dora))
    mx.eval(model.trainable_parameters())
    return paths


def target_paths(config: ModelConfig, target_modules: Sequence[str] | None = None, num_layers: int = -1) -> list[str]:
    """The module paths that `target_modules` and `num_layers` select, as in `attach_new`.

    Raises:
        RequestError: an unknown module, no module, or a number of layers out of range.
    """
    names = PROJECTIONS if target_modules is None else target_modules
    unknown = [name for name in names if name not in TARGET_MODULES]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "none"
        raise RequestError(f"--target-modules must be among {', '.join(TARGET_MODULES)}; got {got}.")
    total = config.num_transformer_layers
    if num_layers != -1 and not 1 <= num_layers <= total:
        raise RequestError(f"--num-layers must be from 1 to {total}, or -1 for all, got {num_layers}.")
    first = 0 if num_layers == -1 else total - num_layers
    paths = []
    for path in config.matrix_shapes():
        in_range = not path.startswith(LAYERS) or int(path.removeprefix(LAYERS).partition(".")[0]) >= first
        if path.rpartition(".")[2] in names and in_range:
            paths.append(path)
    return paths


def extract(model: OpenELM, base_model: str | None = None) -> Adapter:
    """The adapter in a model, with its current parameters; without low-rank layers, the trainable weights.

    Args:
        base_model: the name to write into the adapter's files.
    """
    layers = dict(adapted_layers(model))
    adapter = Adapter({path: layer.change() for path, layer in layers.items()}, base_model=base_model)
    adapter.dropout = max((layer.dropout for layer in layers.values()), default=0.0)
    if not layers:
        adapter.weights = dict(_trainable(model))
    return adapter


def detach(model: OpenELM) -> None:
    """Remove the low-rank layers from a model, which leaves the base's own layers."""
    for path, layer in list(adapted_layers(model)):
        replace_at(model, path, base_of(layer))


def adapted_layers(model: OpenELM) -> Iterator[tuple[str, Adapted]]:
    """Path and layer of every matrix that has an adapter, in the order of the model."""
    for path in model.config.matrix_shapes():
        module = module_at(model, path)
        if isinstance(module, Adapted):
            yield path, module


def base_of(layer: Adapted) -> nn.Module:
    """The linear layer or embedding that an adapter's layer wraps."""
    return layer["embedding"] if isinstance(layer, LoRAEmbedding) else layer["linear"]


def dropout_layers(model: OpenELM) -> list[LoRALinear]:
    """The layers with dropout, in the order of the model; training sets their keys before each forward pass."""
    return [layer for _, layer in adapted_layers(model) if isinstance(layer, LoRALinear) and layer.dropout > 0]


def check_fits(adapter: Adapter, config: ModelConfig, name: str = "The adapter") -> None:
    """Compare the paths and shapes of an adapter with those of a model of this configuration.

    Raises:
        RequestError: for the first module or tensor that does not match.
    """
    shapes = config.matrix_shapes()
    for path, change in adapter.modules.items():
        if path not in shapes:
            raise RequestError(f"{name} changes {path}, which the model does not have.")
        inputs, outputs = shapes[path] if path == EMBEDDING else shapes[path][::-1]
        expected: dict[str, tuple[int, ...]] = {"a": (inputs, change.rank), "b": (change.rank, outputs)}
        if change.magnitude is not None:
            expected["magnitude"] = (inputs if change.output_side else outputs,)
        for part, shape in expected.items():
            got = getattr(change, part).shape
            if got != shape:
                raise RequestError(
                    f"{name} does not match the model: {part} of {path} has shape {list(got)} instead of "
                    f"{list(shape)}; was it made for another size?"
                )
    tensors = config.tensor_shapes()
    for tensor, weight in adapter.weights.items():
        if tensor not in tensors:
            raise RequestError(f"{name} has {tensor}, which the model does not have.")
        if weight.shape != tensors[tensor]:
            raise RequestError(
                f"{name} does not match the model: {tensor} has shape {list(weight.shape)} instead of "
                f"{list(tensors[tensor])}; was it made for another size?"
            )


def check_base(adapter: Adapter, model: OpenELM, replaced: Replaced | None = None) -> None:
    """Compare an adapter's copies of base weights with the base of the model, which may have another adapter.

    Args:
        replaced: what `attach` returned, if that adapter has whole weights.

    Raises:
        RequestError: a weight differs from the model's.
    """
    before = replaced or {}
    known = getattr(model, "quantization", {})  # loaded models have it

    def find(name: str) -> Stored:
        """The base's tensor of this name, as stored, and how it is or was packed."""
        path, _, leaf = name.rpartition(".")
        if isinstance(tensor := before.get(name), mx.array):
            return {leaf: tensor}, known.get(path)
        module = before.get(path, module_at(model, path))
        module = base_of(module) if isinstance(module, Adapted) else module
        packing = known.get(path)
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packing = Quantization(module.group_size, module.bits, module.mode)
        return {part: module[part] for part in PARTS if part in module}, packing

    check_base_copies(adapter, find)


def adapted(base: nn.Module, change: LowRank, dropout: float = 0.0, *, dora: bool = False) -> Adapted:
    """A layer with this change; only the change is trainable."""
    dora = dora or change.magnitude is not None
    layer: Adapted
    if isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        layer = DoRAEmbedding(base, change) if dora else LoRAEmbedding(base, change)
    else:
        layer = DoRALinear(base, change, dropout) if dora else LoRALinear(base, change, dropout)
    layer.train(base.training)
    layer.freeze()
    layer.unfreeze(recurse=False, keys=[name for name in _PARAMETERS if name in layer])
    return layer


def _replace_weights(model: OpenELM, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> Replaced:
    """Put whole tensors in the model; a plain matrix replaces a packed one. Returns what was replaced."""
    replaced: Replaced = {}
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        module = module_at(model, path)
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            replaced[path] = module
            module = with_weight(module, weight.astype(dtype))
            replace_at(model, path, module)
        else:
            replaced[name] = module[leaf]
            module[leaf] = weight.astype(dtype)
        module.unfreeze(recurse=False, keys=[leaf])
        mx.eval(module[leaf])
    return replaced


def with_weight(layer: nn.Module, weight: mx.array) -> nn.Module:
    """A plain layer with another weight [out, in], or a norm [dims], in place of a layer, which stays as it is."""
    if isinstance(layer, nn.RMSNorm):
        other: nn.Module = RMSNorm(weight.size, layer.eps)
    elif isinstance(layer, nn.Embedding | nn.QuantizedEmbedding):
        other = Embedding(*weight.shape)
    else:
        other = Linear(*weight.shape[::-1])
    other.weight = weight
    other.train(layer.training)
    return other


def _trainable(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    for path, module in model.named_modules():
        for name, value in module.trainable_parameters().items():
            if isinstance(value, mx.array):
                yield f"{path}.{name}".lstrip("."), value
