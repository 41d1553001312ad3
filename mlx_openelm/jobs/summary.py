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
from ..formats import corenet, gguf
from ..formats import mlx as mlx_format
from ..formats.mlx import Quantization, most_common
from ..formats.packing import bits_per_weight
from ..hub import catalog
from ..hub import corenet as corenet_cache
from ..hub.resolve import download, resolve, source_repo
from ..inputs import to_path
from ..quantization.recipes import plan
from ..sources import check_corenet_model, check_revision, find_file, find_tokenizer, is_port, refuse_yaml
from ..text.tokenizer import ENGINES

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


def summarize(name: str | Path, *, revision: str | None = None, config_yaml: str | Path | None = None) -> Summary:
    """The summary of a model by any name that `load` takes; at most a `config.json` is downloaded.

    A published model that is not in the download cache is summarized from its known sizes.

    Args:
        config_yaml: the training configuration of a CoreNet checkpoint; published sizes need none.

    Raises:
        RequestError: no such model, or files that contradict each other.
        OpenELMError: the download of a configuration failed.
    """
    text = str(name)
    if catalog.corenet_name(name) is not None:
        check_revision(name, revision)
        return _summarize_corenet_name(text.strip(), config_yaml)
    if (file := find_file(name, revision)) is not None:
        if file.suffix.lower() != ".gguf":
            return _summarize_corenet(file, text, config_yaml)
        refuse_yaml(name, config_yaml)
        return _summarize_gguf(file, text)
    refuse_yaml(name, config_yaml)
    repo = source_repo(name)
    if repo is None:
        folder = resolve(name, revision=revision)
        return _summarize_corenet(folder, text) if is_port(folder) else summarize_folder(folder, text)
    cached = _cached_folder(repo, revision)
    if cached is not None and any(cached.glob("*.safetensors")):
        return summarize_folder(cached, text)
    if (release := catalog.find(text)) is not None:
        return summarize_config(ModelConfig.from_name(release.name), name=release.name, source="published")
    return _summarize_config_file(download(repo, revision=revision, patterns=["config.json"]), text)


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


def _summarize_corenet_name(name: str, config_yaml: str | Path | None) -> Summary:
    """The summary of `corenet:SIZE/NAME`: of its files, if they were downloaded, else of the published model."""
    check_corenet_model(name)
    if (path := corenet_cache.cached(name)) is not None:
        return _summarize_corenet(path, name, config_yaml)
    size = (catalog.corenet_name(name) or "").partition("/")[0]
    if len(catalog.corenet_files(name)) > 1:  # the MLX port
        raise RequestError(
            f"{name} is not on this machine, and only its files say how it is stored: download it with "
            f"mlx-openelm convert --model {name}, or see mlx-openelm info {size.lower()}."
        )
    return summarize_config(ModelConfig.from_name(size), name=name, source="published")


def _summarize_corenet(path: Path, name: str, config_yaml: str | Path | None = None) -> Summary:
    """The summary of a CoreNet checkpoint, or of a folder of its MLX port, without the padding of its vocabulary."""
    yaml_file = None if config_yaml is None else to_path(config_yaml)
    checkpoint, pieces = corenet.read_port(path) if path.is_dir() else corenet.read(path, yaml_file)
    folder = path if path.is_dir() else path.parent
    beside = next((file for file in ENGINES if (folder / file).is_file()), None)
    if beside is not None:  # it decides, as in `load`
        unpadded = replace(checkpoint.config, vocab_size=pieces)
        pieces = find_tokenizer(name, path, unpadded, rows=checkpoint.config.vocab_size).vocab_size
    corenet.cut_vocabulary(checkpoint, pieces)
    return summarize_config(
        checkpoint.config,
        checkpoint.quantization,
        name=name,
        source="files",
        dtype=_dtype_name(checkpoint.dtype),
        bits=checkpoint.bits_per_weight,
        storage_bytes=(path / "weights.safetensors" if path.is_dir() else path).stat().st_size,
        tokenizer=beside,
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
    config: ModelConfig, quantization: Mapping[str, Quantization], stored: str, tokens: int | None = None
) -> Memory:
    """Bytes of weights and key-value cache while generating.

    Args:
        stored: the stored type of tensors that are not quantized.
        tokens: the number of tokens in the cache; by default the context length that the model was trained on.
    """
    tokens = config.max_context_length if tokens is None else tokens
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
