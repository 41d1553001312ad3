"""Load and convert: from a name to a model, from a folder to a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from . import atomic, backend, catalog, model_card, packed_products
from .chat_template import CORENET_TEMPLATE
from .config import SIZES, ModelConfig
from .errors import RequestError, quote
from .formats import mlx as mlx_format
from .formats.mlx import Checkpoint
from .formats.packing import (
    cast_weights,
    dequantize_weights,
    quantize_weights,
)
from .formats.weights import Weights, streaming
from .model import OpenELM, QuantizedEmbedding, QuantizedLinear
from .model_card import Origin
from .quantization.recipes import Plan, planner
from .sources import CORENET_PREFIX, Source, open_source
from .tokenizer import Tokenizer

if TYPE_CHECKING:  # most models are loaded without
    from .adapters.switching import AdapterPaths

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

_NO_FLOAT16 = "--dtype float16 cannot hold the 3B model's activations, which leave its range; use bfloat16 or float32."

# The most bits of weights for which activations are rounded to 8 bits. Measured on the test model, in groups of 64,
# that costs a KL divergence of 0.0006 where 6-bit weights cost 0.004, 4-bit weights 0.06, and 8-bit weights 0.0004.
ROUNDED_BITS = 6

# Expanding quantized weights leaves at least this share of the free memory to everything else.
_FREE_SHARE = 0.2


def load(
    model: str | Path = "tiny",
    adapter_path: AdapterPaths | None = None,
    dtype: str | mx.Dtype | None = None,
    *,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    expand: bool | None = None,
    exact_activations: bool = False,
) -> tuple[OpenELM, Tokenizer]:
    """A model, ready to run, and its tokenizer.

    Args:
        model: `tiny`, an alias (`270m`, `1.1b-instruct`), a hub name, a folder, a CoreNet checkpoint (`.pt`),
            a `.gguf` file, or `corenet:SIZE/NAME`.
        adapter_path: an adapter: a folder or file in the format of mlx-lm, PEFT or CoreNet, or a hub repository;
            LoRA adapters may be several, or have weights: `["a", "b"]`, `"a=0.7"`, `{"a": 0.7, "b": 0.3}`.
        dtype: the type to compute in; by default float32 on a CPU, on a GPU bfloat16 or the stored half precision.
            A CPU's own kernels compute in float32 with matrices as they are stored, unless a type is named: to train
            weights that are stored in half precision, name float32.
        tokenizer: a tokenizer file or folder, in place of the model's own.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        revision: a branch, tag or commit on the hub.
        expand: whether to unpack quantized weights at load. By default only on a CPU without our own kernels for
            them, where products with packed weights are slower, and only while free memory allows.
        exact_activations: whether products of few rows with packed weights take activations as they are. By default
            a CPU's own kernels round them to 8 bits where that costs less than the weights' own rounding did.

    Raises:
        RequestError: unknown names, damaged or unfitting files, a tokenizer that is missing or does not fit.
        OpenELMError: a download that failed.
    """
    if (warning := backend.slow_cpu_warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    check_dtype(model, dtype)
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    build = partial(build_model, dtype=dtype, expand=expand, exact_activations=exact_activations)
    if adapter_path is None:
        with source.reading():
            return build(source.checkpoint), source.tokenizer
    from .adapters.attaching import attach
    from .adapters.switching import read_mixture

    adapter = read_mixture(adapter_path, source.checkpoint.config)
    with source.reading():
        loaded = build(source.checkpoint)
    attach(loaded, adapter)
    return loaded, source.tokenizer


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | mx.Dtype | None = None,
    expand: bool | None = None,
    exact_activations: bool = True,
) -> OpenELM:
    """The model of a checkpoint, its weights read and cast one at a time; takes the weights out of `checkpoint`.

    The result's `quantization` tells how its matrices were stored, `expanded` whether they were unpacked.
    """
    compute = dtype_for(dtype, checkpoint.config) or _default_dtype(checkpoint)
    keeps_matrices = dtype is None and backend.has_kernels()
    packed = checkpoint.quantization
    expanded = bool(packed) and (_expansion_pays(checkpoint, compute) if expand is None else expand)
    weights = dequantize_weights(checkpoint.weights, packed, compute) if expanded else checkpoint.weights
    checkpoint.weights = Weights({})

    model = OpenELM(checkpoint.config, initialize=False)
    if packed and not expanded:
        nn.quantize(model, class_predicate=lambda path, _: packed[path].to_dict() if path in packed else False)
    loaded = []
    with streaming():
        # One by one, so that what a cast or an unpacking starts from is freed before the next is read; the largest
        # first, while least is held.
        for name in sorted(weights, key=lambda name: -weights.tensor(name).nbytes):
            weight = weights.take(name)
            if weight.ndim == 1 or not keeps_matrices:
                weight = _cast(weight, compute)
            mx.eval(weight)
            loaded.append((name, weight))
    model.load_weights(loaded)
    model.eval()
    model.quantization, model.expanded = packed, expanded
    if not exact_activations:
        round_activations(model)
    return model


def round_activations(model: OpenELM) -> None:
    """Let a CPU's kernels round what is multiplied with packed weights of at most `ROUNDED_BITS` bits."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            module.rounds = module.bits <= ROUNDED_BITS


def _cast(weight: mx.array, dtype: mx.Dtype) -> mx.array:
    return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight


def _default_dtype(checkpoint: Checkpoint) -> mx.Dtype:
    dtype = backend.compute_dtype(checkpoint.dtype)
    return mx.bfloat16 if dtype == mx.float16 and _needs_range(checkpoint.config) else dtype


def _parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}, got {quote(dtype)}.")
        return DTYPES[dtype]
    return dtype


def dtype_for(dtype: str | mx.Dtype | None, config: ModelConfig) -> mx.Dtype | None:
    """The type asked for; float16 is refused for the 3B model."""
    parsed = _parse_dtype(dtype)
    if parsed is not None and parsed == mx.float16 and _needs_range(config):
        raise RequestError(_NO_FLOAT16)
    return parsed


def check_dtype(model: str | Path, dtype: str | mx.Dtype | None) -> None:
    """Refuse what is known to be wrong from the model's name alone, before anything is downloaded."""
    parsed, release = _parse_dtype(dtype), catalog.find(str(model))
    if parsed is not None and parsed == mx.float16 and release is not None and not release.float16:
        raise RequestError(_NO_FLOAT16)


def _needs_range(config: ModelConfig) -> bool:
    """Whether this is the 3B model, or one of its shape."""
    return (config.num_transformer_layers, config.model_dim, config.head_dim) == SIZES["3B"]


def _expansion_pays(checkpoint: Checkpoint, dtype: mx.Dtype) -> bool:
    if packed_products.stays_packed(choice.mode for choice in checkpoint.quantization.values()):
        return False
    available = backend.available_memory()
    return available is None or checkpoint.config.num_parameters * dtype.size < (1 - _FREE_SHARE) * available


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote: where, how many bits a parameter takes, and matrices packed unlike the others."""

    path: Path
    bits_per_weight: float
    exceptions: dict[str, str]


def convert(
    model: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    recipe: str | None = None,
    dequantize: bool = False,
    tokenizer: str | Path | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a model as an MLX folder, which appears complete or not at all.

    Args:
        model: an alias, a hub name, a folder, a CoreNet checkpoint (`.pt`), a `.gguf` file, or `corenet:SIZE/NAME`.
        dtype: the type of what is not quantized; bfloat16 unless told. Scales and biases have 16 bits in any case.
        quantize: pack every matrix; q_bits and q_group_size default to the mode's (affine: 4 and 64).
        recipe: more bits for some matrices than for others, in place of q_bits: mixed_2_6, mixed_3_4, mixed_3_6
            or mixed_4_6.
        dequantize: unpack a quantized model.
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.
        overwrite: replace `mlx_path` if it exists.
        progress: called with the bytes written so far and in all.

    Raises:
        RequestError: a request that cannot be right; nothing was written.
        OpenELMError: a download or writing failed; nothing was left behind.
    """
    if quantize and dequantize:
        raise RequestError("Choose either -q or --dequantize.")
    if not quantize and (q_bits, q_group_size, q_mode, recipe) != (None, None, "affine", None):
        raise RequestError("--q-bits, --q-group-size, --q-mode and --recipe need -q.")
    wanted = planner(q_mode, q_bits, q_group_size, recipe) if quantize else None
    check_dtype(model, dtype)
    target = atomic.check_target(Path(mlx_path), overwrite=overwrite)
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    if source.path.resolve().is_relative_to(target):
        raise RequestError(f"{target} is the model to convert, or holds it; choose another --mlx-path.")
    checkpoint = source.checkpoint
    exceptions = requantize(checkpoint, dtype_for(dtype, checkpoint.config) or mx.bfloat16, wanted, dequantize)
    bits = checkpoint.bits_per_weight
    command = model_card.command_line(
        "convert",
        {
            "model": str(model),
            "mlx_path": Path(mlx_path),
            "dtype": dtype,
            "quantize": quantize,
            "q_bits": q_bits,
            "q_group_size": q_group_size,
            "q_mode": q_mode if quantize and recipe is None else None,
            "recipe": recipe,
            "dequantize": dequantize,
            **model_card.source_flags(tokenizer, config_yaml, revision),
        },
    )
    write_source(source, target, command=command, overwrite=overwrite, progress=progress, card={"recipe": recipe})
    return Conversion(target, bits, exceptions)


def write_source(
    source: Source,
    mlx_path: Path,
    *,
    command: str | None = None,
    origin: Origin | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    card: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write a source as an MLX folder, which appears once its files turn out unchanged; empties its weights.

    Args:
        command: how the folder was made, for the model card.
        origin: what is known of the model, where that is not what the source's own files tell.
        progress: called with the bytes written so far and in all.
        card: what else the card tells (see `model_card.write`).
        extra: writes further files into the folder it is given.

    Raises:
        RequestError: `mlx_path` exists and `overwrite` is not asked for, or it cannot be made.
        OpenELMError: reading or writing failed, or a file of the source changed; nothing was left behind.
    """
    text = source.tokenizer
    instruct = source.release is not None and source.release.instruct
    origin = origin or find_origin(source)
    with atomic.new_folder(mlx_path, overwrite=overwrite) as partial, source.reading():
        text.save(partial, chat_template=text.chat_template or (CORENET_TEMPLATE if instruct else None))
        mlx_format.write(partial, source.checkpoint, progress=progress)
        making = {"command": command, "rounded_to": source.checkpoint.rounded_to, **(card or {})}
        model_card.write(partial, name=mlx_path.resolve().name, origin=origin, **making)
        if extra is not None:
            extra(partial)


def find_origin(source: Source) -> Origin:
    """What a model card tells of a source: where it comes from, and its licence."""
    is_published = source.name.strip().lower().startswith(CORENET_PREFIX) and source.release is not None
    base_model = source.release.hub_repo if is_published and source.release is not None else None
    return model_card.find_origin(source.path, repo=source.repo, base_model=base_model)


def requantize(checkpoint: Checkpoint, dtype: mx.Dtype, wanted: Plan | None, dequantize: bool) -> dict[str, str]:
    """Cast, pack or unpack the checkpoint's unread weights in place; returns what was packed unlike the rest."""
    if wanted is not None and checkpoint.rounding is not None:
        raise RequestError(
            f"The model is already quantized to {checkpoint.rounding}; convert the original, or unpack it into a "
            f"folder first{', with --dequantize' if checkpoint.quantization else ', without -q'}."
        )
    if dequantize:
        if not checkpoint.quantization:
            raise RequestError("The model is not quantized, so there is nothing to --dequantize.")
        checkpoint.weights = dequantize_weights(checkpoint.weights, checkpoint.quantization, dtype)
        checkpoint.rounded_to, checkpoint.quantization = checkpoint.rounding, {}
    checkpoint.weights = cast_weights(checkpoint.weights, checkpoint.quantization, dtype)
    if wanted is None:
        return {}
    checkpoint.quantization, exceptions = wanted(checkpoint.config)
    checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return exceptions
