"""Unused tensors that other programs store in a model: known ones are dropped."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import EMBEDDING, HEAD, ModelConfig
from ..errors import RequestError
from ..ops.packed import PARTS
from .safetensors import Tensor, read_tensors

# Apple's code creates it if the output layer is not shared, but computes logits with `lm_head` alone.
UNUSED = "transformer.classifier"
_TWIN = f"{UNUSED}.weight"
_FREQUENCIES = ".inv_freq"
_CLOSE = 0.01  # relative; rounding to bfloat16 changes a number by less


def drop_tied(folder: Path, values: Mapping[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether the output layer is the embedding, though `share_input_output_layers` in a `config.json` is false.

    transformers 4 ties Apple's `lm_head` to the embedding unless `tie_word_embeddings` is false, and then stores only
    the unused classifier, which is taken out of `tensors`, with a warning.
    """
    if f"{HEAD}.weight" in tensors or values.get("tie_word_embeddings", _TWIN in tensors) is not True:
        return False
    if tensors.pop(_TWIN, None) is not None:
        warnings.warn(
            f"{folder} has no {HEAD}.weight, so its output layer is the embedding, as in transformers 4; {_TWIN} is "
            "left out, since Apple's code never computes with it.",
            stacklevel=3,
        )
    return True


def drop(folder: Path, files: Sequence[Path], config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in a model's files without those that are provably unused; other unexpected tensors stay.

    Dropped are a copy of a shared output layer, Apple's unused `classifier` beside one that is not shared, and RoPE
    frequencies that follow from the configuration.

    Raises:
        RequestError: dropping a tensor could change the model.
    """
    kept = dict(tensors)
    copies = read_tensors(files)  # once more: `tensors` would keep what is read here
    if config.share_input_output_layers:
        for part in PARTS:
            if (name := f"{HEAD}.{part}") in kept:
                if (own := f"{EMBEDDING}.{part}") in kept:  # else comparing the weight is enough
                    check_copy(folder, name, copies[name].read(), copies[own].read(), "its config.json")
                del kept[name]
    elif _TWIN in kept:
        if f"{HEAD}.weight" not in kept:
            raise RequestError(
                f"{folder} has {_TWIN}, which Apple's code never computes with, but no {HEAD}.weight: if it is the "
                "output layer, rename it; if the output layer is the embedding, remove it and set "
                "share_input_output_layers to true in config.json."
            )
        del kept[_TWIN]
    for name in [name for name in kept if name.endswith(_FREQUENCIES)]:
        if _are_frequencies(copies[name].read(), config):
            del kept[name]
    return kept


def check_copy(source: Path, name: str, copy: mx.array, own: mx.array, described_by: str) -> None:
    """Raise RequestError if a part of the output layer, `name`, differs from the same part of the embedding, though
    the configuration in `described_by` says that they are shared."""
    if mx.issubdtype(copy.dtype, mx.floating) and mx.issubdtype(own.dtype, mx.floating):
        # Compare in the type with fewer bits: one may have been rounded from the other.
        dtype = min(copy.dtype, own.dtype, key=lambda dtype: dtype.size)
        copy, own = copy.astype(dtype), own.astype(dtype)
    if copy.dtype != own.dtype or not mx.array_equal(copy, own, equal_nan=True).item():
        raise RequestError(
            f"{source} has {name}, which differs from the embedding, though {described_by} says they are shared: "
            "set share_input_output_layers to false if the model was trained that way, or remove the tensor."
        )


def _are_frequencies(values: mx.array, config: ModelConfig) -> bool:
    """Whether `values` are RoPE's angles per position for this model, [head_dim / 2]."""
    half = config.head_dim // 2
    if values.shape != (half,) or not mx.issubdtype(values.dtype, mx.floating):
        return False
    expected = config.rope_freq_constant ** -(mx.arange(half) / half)
    return bool(mx.all(mx.abs(values.astype(mx.float32) - expected) <= _CLOSE * expected).item())
