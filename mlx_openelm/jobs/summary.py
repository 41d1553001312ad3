"""The numbers of a model: parameters by layer, bits as stored, memory needed. No weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..config import EMBEDDING, HEAD, ModelConfig
from ..errors import RequestError
from ..formats import gguf
from ..formats import mlx as mlx_format
from ..formats.mlx import Quantization, most_common
from ..formats.packing import bits_per_weight
from ..hub import catalog
from ..hub.resolve import download, resolve, source_repo
from ..inputs import to_path
from ..quantization.recipes import plan
from ..text.tokenizer import ENGINES

# Tokens that memory is reported for: the training length of the published models.
CONTEXT = 2048

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Layer:
    """One layer: its sizes, its parameters, and their share of all parameters, from 0 to 1."""

    layer: int
    query_heads: int
    kv_heads: int
    inner_size: int
    parameters: int
    share: float


@dataclass(frozen=True)
class Memory:
    """Bytes needed to generate on this machine, in the type it computes in.

    `expanded` is the size of a quantized model's weights if they are unpacked at load; None if they stay packed.
    """

    tokens: int
    dtype: str
    weights: int
    kv_cache: int
    expanded: int | None = None

    @property
    def total(self) -> int:
        """Bytes of weights and cache; without `expanded`."""
        return self.weights + self.kv_cache


@dataclass(frozen=True)
class Summary:
    """A model's layers and totals, as stored and as it runs.

    Attributes:
        source: "files" (headers read), "config" (a `config.json` alone), or "published" (known sizes, no file read).
        parameters, embedding, head, norms: counts of parameters; `head` is 0 if the embedding is shared.
        dtype: the stored type of tensors that are not quantized.
        quantization: the settings that most matrices share; None if the model is not quantized.
        bits_per_weight: bits per parameter as stored.
        storage_bytes: bytes of the weights on disk.
        tokenizer: the name of the tokenizer's file; None if there is none, or if no files were read.
        rounded_to: the low-bit types in a GGUF file, whose tensors are unpacked when they are read.
    """

    name: str
    source: str
    config: ModelConfig = field(repr=False)
    layers: tuple[Layer, ...] = field(repr=False)
    parameters: int
    embedding: int
    head: int
    norms: int
    dtype: str
    quantization: dict[str, Any] | None
    bits_per_weight: float
    storage_bytes: int
    memory: Memory
    tokenizer: str | None = None
    folder: Path | None = None
    rounded_to: str | None = None


def summarize(name: str, *, revision: str | None = None) -> Summary:
    """The summary of a model by any of its names; at most a `config.json` is downloaded.

    A published model that is not in the download cache is summarized from its known sizes.

    Raises:
        RequestError: no such model, or files that contradict each other.
        OpenELMError: the download of a configuration failed.
    """
    if (file := to_path(name)).suffix.lower() == ".gguf" and not file.is_dir():
        return _summarize_gguf(file, name)
    repo = source_repo(name)
    folder = resolve(name) if repo is None else _cached_folder(repo, revision)
    if folder is not None and any(folder.glob("*.safetensors")):
        return summarize_folder(folder, name)
    if repo is None:
        raise RequestError(f"{folder} has no *.safetensors file, so it is not a model.")
    if (release := catalog.find(name)) is not None:
        return summarize_config(ModelConfig.from_name(release.name), name=release.name, source="published")
    return _summarize_config_file(download(repo, revision=revision, patterns=["config.json"]), name)


def summarize_folder(folder: Path, name: str | None = None) -> Summary:
    """The summary of a model folder, from the headers of its files."""
    checkpoint = mlx_format.read(folder)
    return summarize_config(
        checkpoint.config,
        checkpoint.quantization,
        name=name or folder.name,
        source="files",
        dtype=_dtype_name(checkpoint.dtype),
        bits=checkpoint.bits_per_weight,
        storage_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        tokenizer=next((name for name in ENGINES if (folder / name).is_file()), None),
        folder=folder,
    )


def _summarize_gguf(path: Path, name: str) -> Summary:
    checkpoint, _ = gguf.read(path)
    size = gguf.stored_bytes(path)
    summary = summarize_config(
        checkpoint.config,
        name=name,
        source="files",
        dtype=_dtype_name(checkpoint.weights.tensors[f"{EMBEDDING}.weight"].dtype),  # norms are float32
        bits=8 * size / checkpoint.config.num_parameters,
        storage_bytes=size,
        tokenizer=path.name,
        folder=path.parent,
    )
    return replace(summary, rounded_to=checkpoint.rounded_to)


def summarize_config(
    config: ModelConfig,
    quantization: Mapping[str, Quantization] | None = None,
    *,
    name: str,
    source: str,
    dtype: str = "float32",
    bits: float | None = None,
    storage_bytes: int | None = None,
    tokenizer: str | None = None,
    folder: Path | None = None,
) -> Summary:
    """The summary of a configuration.

    Args:
        quantization: how matrices are packed, by module path.
        dtype: the stored type of the rest.
        bits: bits per parameter as stored, if the files state it.
    """
    choices = dict(quantization or {})
    shapes = config.tensor_shapes()
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    bits = bits_per_weight(config, choices, _DTYPE_BYTES[dtype]) if bits is None else bits
    return Summary(
        name=name,
        source=source,
        config=config,
        layers=layer_table(config),
        parameters=config.num_parameters,
        embedding=counts[f"{EMBEDDING}.weight"],
        head=counts.get(f"{HEAD}.weight", 0),
        norms=sum(count for key, count in counts.items() if len(shapes[key]) == 1),
        dtype=dtype,
        quantization=most_common(choices).to_dict() if choices else None,
        bits_per_weight=bits,
        storage_bytes=round(bits * config.num_parameters / 8) if storage_bytes is None else storage_bytes,
        memory=memory_needed(config, choices, dtype),
        tokenizer=tokenizer,
        folder=folder,
    )


def layer_table(config: ModelConfig) -> tuple[Layer, ...]:
    """Each layer's sizes and parameters, norms included; the embedding belongs to no layer."""
    per_layer = [0] * config.num_transformer_layers
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        if parts[1] == "layers":
            per_layer[int(parts[2])] += math.prod(shape)
    total = config.num_parameters
    sizes = zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, per_layer, strict=True)
    return tuple(
        Layer(index, query, kv, inner, count, count / total) for index, (query, kv, inner, count) in enumerate(sizes)
    )


def memory_needed(
    config: ModelConfig, quantization: Mapping[str, Quantization], stored: str, tokens: int = CONTEXT
) -> Memory:
    """Bytes of weights and key-value cache while generating, after `tokens` tokens.

    Args:
        stored: the stored type of tensors that are not quantized.
    """
    compute = backend.compute_dtype(getattr(mx, stored))
    # Our CPU kernels read matrices in their stored type.
    kept = getattr(mx, stored) if backend.has_kernels() else compute
    weights = bits_per_weight(config, quantization, kept.size, scale_bytes=kept.size) * config.num_parameters / 8
    expands = not all(backend.multiplies_packed(choice.mode) for choice in quantization.values())
    return Memory(
        tokens=tokens,
        dtype=_dtype_name(compute),
        weights=round(weights),
        kv_cache=2 * sum(config.num_kv_heads) * config.head_dim * tokens * compute.size,
        expanded=config.num_parameters * compute.size if expands else None,
    )


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    """The folder of a model in the download cache, or None. Makes no network request."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def _summarize_config_file(folder: Path, name: str) -> Summary:
    """The summary of a `config.json` without weights, from the type and quantization that it declares."""
    config, values = mlx_format.read_config(folder)
    stored = str(values.get("torch_dtype") or values.get("dtype"))
    dtype = stored if stored in _DTYPE_BYTES else "float32"
    return summarize_config(config, _declared_quantization(config, values), name=name, source="config", dtype=dtype)


def _declared_quantization(config: ModelConfig, values: Mapping[str, Any]) -> dict[str, Quantization]:
    """The quantization that a `config.json` declares, by module path; empty if there is none, or an unknown one."""
    settings = values.get("quantization")
    if not isinstance(settings, dict):
        return {}
    try:
        common = _quantization(settings)
        choices, _ = plan(config, common)
        own = {path: _quantization(settings | entry) for path, entry in settings.items() if isinstance(entry, dict)}
    except (KeyError, TypeError, ValueError):  # a RequestError is a ValueError
        return {}
    unpacked = {path for path, entry in settings.items() if entry is False}
    return {path: own.get(path, choice) for path, choice in choices.items() if path not in unpacked}


def _quantization(settings: Mapping[str, Any]) -> Quantization:
    return Quantization(int(settings["group_size"]), int(settings["bits"]), settings.get("mode", "affine"))


def _dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
