"""Load: from a name to a model, ready to run."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from . import backend
from .config import ModelConfig
from .errors import RequestError, quote
from .formats.mlx import Checkpoint
from .formats.packing import dequantize_weights
from .formats.weights import DTYPES, Weights, streaming
from .hub import catalog
from .model import OpenELM, QuantizedEmbedding, QuantizedLinear
from .ops import packed as packed_products
from .sources import open_source
from .text.tokenizer import Tokenizer

if TYPE_CHECKING:  # most models are loaded without
    from .adapters.switching import AdapterPaths


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
    return mx.bfloat16 if dtype == mx.float16 and not checkpoint.config.fits_float16 else dtype


def _parse_dtype(dtype: str | mx.Dtype | None) -> mx.Dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"--dtype must be one of {', '.join(DTYPES)}, got {quote(dtype)}.")
        return DTYPES[dtype]
    return dtype


def dtype_for(dtype: str | mx.Dtype | None, config: ModelConfig) -> mx.Dtype | None:
    """The type asked for; float16 is refused for the 3B model."""
    parsed = _parse_dtype(dtype)
    if parsed is not None and parsed == mx.float16 and not config.fits_float16:
        raise RequestError(_NO_FLOAT16)
    return parsed


def check_dtype(model: str | Path, dtype: str | mx.Dtype | None) -> None:
    """Refuse what is known to be wrong from the model's name alone, before anything is downloaded."""
    parsed, release = _parse_dtype(dtype), catalog.find(str(model))
    if parsed is not None and parsed == mx.float16 and release is not None and not release.float16:
        raise RequestError(_NO_FLOAT16)


def _expansion_pays(checkpoint: Checkpoint, dtype: mx.Dtype) -> bool:
    if packed_products.stays_packed(choice.mode for choice in checkpoint.quantization.values()):
        return False
    available = backend.available_memory()
    return available is None or checkpoint.config.num_parameters * dtype.size < (1 - _FREE_SHARE) * available
