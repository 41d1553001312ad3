"""Packing and unpacking a model's matrices (`formats.mlx.Quantization`), without reading a weight before it is used."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import mlx.core as mx

from ..config import ModelConfig
from ..finite import check_finite
from ..ops.packed import PARTS
from .mlx import Quantization, scale_dtype
from .safetensors import Tensor, Weights

# Gives each matrix of a model its quantization by module path, and describes the exceptions to the usual one.
Plan = Callable[[ModelConfig], tuple[dict[str, Quantization], dict[str, str]]]


def cast_weights(weights: Weights, choices: Mapping[str, Quantization], dtype: mx.Dtype) -> Weights:
    """Weights cast to `dtype`, scales and biases of packed matrices to `scale_dtype`; nothing is read yet."""
    cast = dict(weights.tensors)
    for name, tensor in cast.items():
        if mx.issubdtype(tensor.dtype, mx.floating):
            cast[name] = tensor.cast(scale_dtype(dtype) if name.rpartition(".")[0] in choices else dtype)
    return Weights(cast)


def quantize_weights(weights: Weights, choices: Mapping[str, Quantization]) -> Weights:
    """Weights with the matrices in `choices` (by module path) packed; nothing is read yet.

    Reading one that is not finite raises an `OpenELMError`.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        path = name.removesuffix(".weight")
        packed |= _packed(path, tensor, choices[path]) if path in choices else {name: tensor}
    return Weights(packed)


def _packed(path: str, tensor: Tensor, choice: Quantization) -> dict[str, Tensor]:
    """The parts of a matrix: all are computed when the first is read, and each is kept until it is read."""
    made: dict[str, mx.array] = {}

    def read(part: str) -> mx.array:
        if part not in made:
            weight = tensor.read()
            check_finite(weight, f"{path}.weight", "quantized")  # MLX drops NaN, and the copy would look healthy
            made.update(choice.pack(weight))
        return made.pop(part)

    scales = scale_dtype(tensor.dtype) if choice.mode == "affine" else mx.uint8
    return {
        f"{path}.{part}": Tensor(mx.uint32 if part == "weight" else scales, shape, functools.partial(read, part))
        for part, shape in choice.packed_shapes(tensor.shape).items()
    }


def dequantize_weights(weights: Weights, choices: Mapping[str, Quantization], dtype: mx.Dtype) -> Weights:
    """The reverse: packed matrices unpacked to `dtype`, other tensors unchanged; nothing is read yet."""
    tensors = weights.tensors
    full: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, part = name.rpartition(".")
        if path not in choices:
            full[name] = tensor
        elif part == "weight":
            parts = {p: tensors[f"{path}.{p}"] for p in PARTS if f"{path}.{p}" in tensors}
            full[name] = _unpacked(parts, choices[path], dtype)
    return Weights(full)


def _unpacked(parts: Mapping[str, Tensor], choice: Quantization, dtype: mx.Dtype) -> Tensor:
    rows, words = parts["weight"].shape
    return Tensor(
        dtype,
        (rows, words * 32 // choice.bits),
        lambda: choice.unpack({name: part.read() for name, part in parts.items()}, dtype),
    )


def bits_per_weight(
    config: ModelConfig, choices: Mapping[str, Quantization], dtype_bytes: int, scale_bytes: int = 2
) -> float:
    """Stored bits per parameter, including scales and biases.

    Args:
        dtype_bytes: bytes of a value that is not quantized.
        scale_bytes: bytes of a scale or bias in affine mode; in other modes a scale always has one byte.
    """
    total = 0
    for name, shape in config.tensor_shapes().items():
        choice = choices.get(name.removesuffix(".weight"))
        if choice is None:
            total += math.prod(shape) * dtype_bytes
        else:
            parts = choice.packed_shapes(shape)
            bytes_each = scale_bytes if choice.mode == "affine" else 1
            total += 4 * math.prod(parts.pop("weight")) + bytes_each * sum(math.prod(s) for s in parts.values())
    return 8 * total / config.num_parameters
