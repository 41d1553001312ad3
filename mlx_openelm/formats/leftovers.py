"""Tensors that other programs leave beside a model's own and that nothing computes with: known ones are left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..config import EMBEDDING, HEAD, ModelConfig
from ..errors import RequestError
from .packing import PARTS
from .safetensors import TensorInfo, read_lazily

# Apple's code makes it where the output layer is not shared, and computes logits with `lm_head` alone.
_TWIN = "transformer.classifier.weight"
_FREQUENCIES = ".inv_freq"
_CLOSE = 0.01  # two numbers that differ by less may be one, rounded to bfloat16


def drop(folder: Path, config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a model without those that are provably unused; whatever else is too many stays.

    Left out are copies of a shared output layer, the unused twin of one that is not shared, and RoPE's frequencies
    where they are those of the configuration.

    Raises:
        RequestError: one that could be meant otherwise, so that leaving it out could change the model.
    """
    kept = dict(tensors)
    if config.share_input_output_layers:
        for part in PARTS:
            if (name := f"{HEAD}.{part}") in kept:
                if (own := f"{EMBEDDING}.{part}") in kept:  # else the weight decides
                    _check_copy(folder, name, _read(tensors, name), _read(tensors, own))
                del kept[name]
    elif _TWIN in kept:
        if f"{HEAD}.weight" not in kept:
            raise RequestError(
                f"{folder} holds {_TWIN}, which Apple's code never computes with, and no {HEAD}.weight: if it is the "
                "output layer, rename it so; if the embedding is, remove it and set share_input_output_layers to true "
                "in config.json."
            )
        del kept[_TWIN]
    for name in [name for name in kept if name.endswith(_FREQUENCIES)]:
        if _are_frequencies(_read(tensors, name), config):
            del kept[name]
    return kept


def _read(tensors: Mapping[str, TensorInfo], name: str) -> mx.array:
    return read_lazily([tensors[name].file])[name]


def _check_copy(folder: Path, name: str, copy: mx.array, own: mx.array) -> None:
    """Raises RequestError if a part of the output layer is not what the embedding's same part is."""
    if mx.issubdtype(copy.dtype, mx.floating) and mx.issubdtype(own.dtype, mx.floating):
        # In the type with fewer bits, where the one was rounded from the other.
        dtype = min(copy.dtype, own.dtype, key=lambda dtype: dtype.size)
        copy, own = copy.astype(dtype), own.astype(dtype)
    if copy.dtype != own.dtype or not mx.array_equal(copy, own, equal_nan=True).item():
        raise RequestError(
            f"{folder} holds {name}, which differs from the embedding, though its config.json says that both are one: "
            "set share_input_output_layers to false there if the model was trained so, or remove the tensor."
        )


def _are_frequencies(values: mx.array, config: ModelConfig) -> bool:
    """Whether `values` are the angles a position that RoPE takes for this model [head_dim / 2]."""
    half = config.head_dim // 2
    if values.shape != (half,) or not mx.issubdtype(values.dtype, mx.floating):
        return False
    expected = config.rope_freq_constant ** -(mx.arange(half) / half)
    return bool(mx.all(mx.abs(values.astype(mx.float32) - expected) <= _CLOSE * expected).item())
