"""CoreNet's adapter format: LoRA and DoRA in `.pt` files that also contain the base, which is not read.

PEFT's inner names, with the adapter called `lora`. The scale is not in the file: CoreNet trains with alpha = rank.
The vocabulary is padded as in its checkpoints (see `corenet`).
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..config import EMBEDDING, ModelConfig
from ..errors import RequestError
from . import adapter_tensors, corenet, torch_file
from .adapter import Adapter, LowRank
from .adapter_tensors import Tensors
from .safetensors import Weights

_NAME = "lora"
_EMBEDDING_A, _EMBEDDING_B = f".lora_embedding_A.{_NAME}", f".lora_embedding_B.{_NAME}"
_A, _B = f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"
# PEFT 0.12 and later append `.weight`.
_MAGNITUDES = (f".lora_magnitude_vector.{_NAME}", f".lora_magnitude_vector.{_NAME}.weight")


def read(file: Path, config: ModelConfig, alpha: float | None = None) -> Adapter:
    """The adapter in a `.pt` file. Nothing in the file is run, and of its tensors only the adapter's are read.

    Args:
        alpha: the value it was trained with; by default the rank, as in CoreNet.

    Raises:
        RequestError: the file is damaged, contains code, no adapter, or tensors that the model does not have.
    """
    infos = corenet.read_tensors(file)
    names = {name: corenet.hub_name(name) for name in infos if ".lora_" in name}
    if not names:
        raise RequestError(f"{file} does not have a LoRA or DoRA adapter; give a whole checkpoint with --model.")
    weights = Weights(torch_file.tensors(file, {name: infos[name] for name in names}))
    tensors = Tensors(file, {names[name]: weights.take(name) for name in list(weights)})
    adapter = Adapter()
    for path in tensors.paths((_A, _B, _EMBEDDING_A, _EMBEDDING_B)):
        if path == EMBEDDING:
            adapter.modules[path] = _take_embedding(tensors, config, alpha)
        else:
            adapter.modules[path] = _take(tensors, path, config, alpha)
    tensors.check_empty("a CoreNet adapter")
    return adapter


def _take(tensors: Tensors, path: str, config: ModelConfig, alpha: float | None) -> LowRank:
    inputs, outputs = adapter_tensors.sides(tensors.file, path, config)
    a = tensors.take(path + _A, (None, inputs))  # [rank, in]
    b = tensors.take(path + _B, (outputs, a.shape[0]))  # [out, rank]
    return LowRank(a.T, b.T, _scale(a, alpha), _take_magnitude(tensors, path, outputs))


def _take_embedding(tensors: Tensors, config: ModelConfig, alpha: float | None) -> LowRank:
    """The embedding's update, without the padded rows."""
    rows, dim = adapter_tensors.sides(tensors.file, EMBEDDING, config)
    a = tensors.take(EMBEDDING + _EMBEDDING_A, (None, None))
    b = tensors.take(EMBEDDING + _EMBEDDING_B, (dim, a.shape[0]))
    scale, magnitude = _scale(a, alpha), _take_magnitude(tensors, EMBEDDING, dim)
    if a.shape[1] < rows:
        raise RequestError(
            f"{tensors.file} has an adapter for a vocabulary of {a.shape[1]} tokens, but the model has {rows}; it was "
            "made for another model."
        )
    if magnitude is not None and a.shape[1] > rows:
        magnitude = magnitude * _shortening(tensors.file, a, b, scale, rows)
    return LowRank(a.T[:rows], b.T, scale, magnitude)


def _shortening(file: Path, a: mx.array, b: mx.array, scale: float, rows: int) -> mx.array:
    """The ratio of column norms [dim] without and with the padded rows; DoRA divides by these norms."""
    name = f"{EMBEDDING.removeprefix('transformer.')}.base_layer.weight"
    info = corenet.read_tensors(file).get(name)
    if info is None or info.shape != (a.shape[1], b.shape[0]):
        raise RequestError(f"{file} has no {name} of shape {[a.shape[1], b.shape[0]]}; DoRA needs it.")
    base = torch_file.tensors(file, {name: info})[name].read().astype(mx.float32)
    squares = mx.square(base + scale * (b @ a).T)
    return mx.sqrt(mx.sum(squares[:rows], axis=0) / mx.sum(squares, axis=0))


def _take_magnitude(tensors: Tensors, path: str, size: int) -> mx.array | None:
    for name in _MAGNITUDES:
        magnitude = tensors.take_if_there(path + name, (size,))
        if magnitude is not None:
            return magnitude
    return None


def _scale(a: mx.array, alpha: float | None) -> float:
    return 1.0 if alpha is None else alpha / a.shape[0]
