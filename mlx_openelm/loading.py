"""From a name to a model that is ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from . import backend, threads
from .config import ModelConfig
from .errors import RequestError, quote
from .formats.mlx import Checkpoint
from .formats.packing import dequantize_weights
from .formats.safetensors import WEIGHT_DTYPES, Weights, streaming
from .hub import catalog
from .messages import warn
from .model import OpenELM, QuantizedEmbedding, QuantizedLinear
from .sources import find_release, open_source
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:  # most models are loaded without adapters
    from .adapters.switching import AdapterPaths


AUTO = "auto"  # in place of the name of a draft model

_NO_FLOAT16 = "--dtype float16 cannot hold the 3B model's activations, which overflow it; use bfloat16 or float32."

_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Activations are rounded to 8 bits for weights of at most this many bits. Measured on the test model in groups of 64:
# the rounding costs a KL divergence of 0.0006; 4-bit weights cost 0.06, 6-bit weights 0.004, 8-bit weights 0.0004.
ROUNDED_BITS = 6

# Expanding quantized weights must leave at least this share of the free memory.
_FREE_SHARE = 0.2


def load(
    model: str | Path = "tiny",
    adapter_path: AdapterPaths | None = None,
    dtype: str | mx.Dtype | None = None,
    *,
    tokenizer: str | Path | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    config_yaml: str | Path | None = None,
    revision: str | None = None,
    expand: bool | None = None,
    exact_activations: bool = False,
) -> tuple[OpenELM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        model: `tiny`, an alias (`270m`, `1.1b-instruct`), a hub name, a folder, a CoreNet checkpoint (`.pt`),
            a `.gguf` file, or `corenet:SIZE/NAME`.
        adapter_path: an adapter: a folder or file in the format of mlx-lm, PEFT or CoreNet, or a hub repository.
            Several LoRA adapters can be mixed, with weights: `["a", "b"]`, `"a=0.7"`, `{"a": 0.7, "b": 0.3}`.
        dtype: the type to compute in, one of MLX's or a name: float32, float16, bfloat16, or fp32, fp16, bf16. By
            default float32 on a CPU, on a GPU bfloat16 or the stored half precision. By default our CPU kernels compute
            in float32 with matrices in their stored type; to train weights that are stored in half precision, give
            float32.
        tokenizer: a tokenizer file or folder, or `tiny`, in place of the model's own.
        tokenizer_config: special tokens and a chat template to use in place of the tokenizer's own, as in mlx-lm:
            `{"eos_token": "<|endoftext|>"}`; see `Tokenizer.with_config`.
        config_yaml: the training configuration of a CoreNet checkpoint; not needed for published sizes.
        revision: a branch, tag or commit on the hub.
        expand: whether to unpack quantized weights at load. By default only on a CPU without our kernels, where
            products with packed weights are slower, and only if there is enough free memory.
        exact_activations: do not round few rows of activations to 8 bits before multiplying by quantized weights. By
            default our CPU kernels do where that costs less than the rounding of the weights.

    Raises:
        RequestError: an unknown name, damaged files, or files or a tokenizer that are missing or do not match.
        OpenELMError: a download that failed.
    """
    if (warning := backend.slow_cpu_warning()) is not None:
        warn(warning)
    if dtype is not None:
        check_dtype(model, dtype)
    source = open_source(model, tokenizer=tokenizer, config_yaml=config_yaml, revision=revision)
    text = source.tokenizer if tokenizer_config is None else source.tokenizer.with_config(tokenizer_config)
    build = partial(build_model, dtype=dtype, expand=expand, exact_activations=exact_activations)
    if adapter_path is None:
        with source.reading():
            return build(source.checkpoint), text
    from .adapters.attaching import attach
    from .adapters.switching import read_mixture

    adapter = read_mixture(adapter_path, source.checkpoint.config)
    with source.reading():
        loaded = build(source.checkpoint)
    attach(loaded, adapter)
    return loaded, text


def build_model(
    checkpoint: Checkpoint,
    *,
    dtype: str | mx.Dtype | None = None,
    expand: bool | None = None,
    exact_activations: bool = True,
) -> OpenELM:
    """The model of a checkpoint. Weights are taken out of `checkpoint`, read and cast one at a time.

    The model's `quantization` says how its matrices were stored, `expanded` whether they were unpacked.
    """
    if threads.forked:
        raise RequestError(threads.FORKED)
    config, choices = checkpoint.config, checkpoint.quantization
    compute = None if dtype is None else dtype_for(dtype, config)
    if compute is None:
        compute = backend.compute_dtype(checkpoint.dtype)
        if compute == mx.float16 and not config.fits_float16:
            compute = mx.bfloat16
    if expand is None:
        expand = _expansion_pays(checkpoint, compute)
    expand = expand and bool(choices)
    keeps_matrices = dtype is None and backend.has_kernels()
    weights = dequantize_weights(checkpoint.weights, choices, compute) if expand else checkpoint.weights
    checkpoint.weights = Weights({})

    model = OpenELM(config, initialize=False)
    if choices and not expand:
        nn.quantize(model, class_predicate=lambda path, _: asdict(choices[path]) if path in choices else False)
    tensors = weights.tensors
    loaded = []
    with streaming():
        # One by one, so that the source of a cast or of unpacking is freed before the next weight is read; the
        # largest first, while the least memory is in use.
        for name in sorted(tensors, key=lambda name: tensors[name].nbytes, reverse=True):
            weight = tensors.pop(name).read()
            if mx.issubdtype(weight.dtype, mx.floating) and (weight.ndim == 1 or not keeps_matrices):
                weight = weight.astype(compute)
            mx.eval(weight)
            loaded.append((name, weight))
    model.load_weights(loaded)
    model.eval()
    model.quantization, model.expanded = choices, expand
    if not exact_activations:
        for module in model.modules():
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                module.rounds_activations = module.bits <= ROUNDED_BITS
    return model


def _parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("mlx.core.") if isinstance(dtype, mx.Dtype) else dtype
    if not isinstance(name, str) or (name := _SHORT_DTYPES.get(name, name)) not in WEIGHT_DTYPES:
        names = ", ".join([*WEIGHT_DTYPES, *_SHORT_DTYPES])
        raise RequestError(f"--dtype must be one of {names}, got {quote(dtype)}.")
    return WEIGHT_DTYPES[name]


def dtype_name(dtype: str | mx.Dtype | None) -> str | None:
    """The full name of a type, `bfloat16` for `bf16` and for `mx.bfloat16`; RequestError for an unknown type."""
    parsed = _parse_dtype(dtype)
    return None if parsed is None else str(parsed).removeprefix("mlx.core.")


def dtype_for(dtype: str | mx.Dtype | None, config: ModelConfig) -> mx.Dtype | None:
    """The type that a name stands for, None for None; RequestError for float16 with the 3B model."""
    parsed = _parse_dtype(dtype)
    if parsed is not None and parsed == mx.float16 and not config.fits_float16:
        raise RequestError(_NO_FLOAT16)
    return parsed


def check_dtype(model: str | Path, dtype: str | mx.Dtype | None) -> str | None:
    """The full name of a type, unless the model's name alone shows that it is wrong; nothing is downloaded.

    Raises:
        RequestError: an unknown type, or float16 for the 3B model.
    """
    name, release = dtype_name(dtype), catalog.find(str(model))
    if name == "float16" and release is not None and not release.float16:
        raise RequestError(_NO_FLOAT16)
    return name


def draft_name(draft: str, model: str | Path, config: ModelConfig) -> str:
    """The name of a draft model for `model`: `draft`, unless that is `auto`.

    Raises:
        RequestError: `auto`, and none was made for this model.
    """
    if draft != AUTO:
        return draft
    if str(model) in catalog.PACKAGED_DRAFTS:
        return catalog.PACKAGED_DRAFTS[str(model)]
    release = find_release(model, Path(model), config)
    found = None if release is None or release.draft is None else catalog.find(release.draft)
    if found is None:
        raise RequestError(
            f"--draft-model auto knows no smaller model for {quote(str(model))}, only for tiny, 1.1b and 3b; name one."
        )
    return found.aliases[0]


def _expansion_pays(checkpoint: Checkpoint, dtype: mx.Dtype) -> bool:
    """Whether unpacked weights would be faster here and fit in memory."""
    if all(backend.multiplies_packed(mode) for mode in {choice.mode for choice in checkpoint.quantization.values()}):
        return False
    available = backend.available_memory()
    return available is None or checkpoint.config.num_parameters * dtype.size < (1 - _FREE_SHARE) * available
