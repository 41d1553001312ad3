"""Every matrix quantized alike, in any mode MLX has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError

# Mode: the bits and group sizes MLX has for it, its default first.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed: `group_size` neighbours of a row share a scale (and, in affine mode, a bias)."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"--q-mode must be one of {', '.join(MODES)}, got {self.mode!r}.")
        bits, group_sizes = MODES[self.mode]
        if self.bits not in bits:
            raise RequestError(f"--q-bits must be {_any_of(bits)} in mode {self.mode}, got {self.bits}.")
        if self.group_size not in group_sizes:
            raise RequestError(
                f"--q-group-size must be {_any_of(group_sizes)} in mode {self.mode}, got {self.group_size}."
            )

    @classmethod
    def make(cls, mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Quantization:
        """The mode's defaults where bits or group size are not given.

        Raises:
            RequestError: a combination MLX does not have.
        """
        default_bits, default_sizes = MODES.get(mode, ((0,), (0,)))
        return cls(group_size or default_sizes[0], bits or default_bits[0], mode)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes that replace a matrix of `shape` [out, in], by name of the part."""
        out_dims, in_dims = shape
        scales = (out_dims, in_dims // self.group_size)
        parts: dict[str, tuple[int, ...]] = {"weight": (out_dims, in_dims * self.bits // 32), "scales": scales}
        return parts | {"biases": scales} if self.mode == "affine" else parts

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """weight [out, in] as its packed parts, by name."""
        parts = mx.quantize(weight, group_size=self.group_size, bits=self.bits, mode=self.mode)
        return dict(zip(("weight", "scales", "biases"), parts, strict=False))

    def unpack(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The matrix [out, in] that packed parts stand for, with the scales' own precision taken into account."""
        scales, biases = parts["scales"], parts.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(dtype), biases.astype(dtype) if biases is not None else None
        full = mx.dequantize(parts["weight"], scales, biases, self.group_size, self.bits, self.mode)
        return full.astype(dtype)


def _any_of(values: tuple[int, ...]) -> str:
    return " or ".join(str(v) for v in sorted(values))


def most_common(quantization: Mapping[str, Quantization]) -> Quantization:
    """What most matrices are packed with; `quantization` by module path, at least one."""
    choices = list(quantization.values())
    return max(choices, key=choices.count)


def plan(config: ModelConfig, wanted: Quantization) -> tuple[dict[str, Quantization], dict[str, str]]:
    """A quantization for each matrix by module path, and what was done differently for some, by path.

    A matrix whose rows the group size does not divide takes the largest that does; where no group size
    of the mode divides them it stays as it is.
    """
    choices: dict[str, Quantization] = {}
    exceptions: dict[str, str] = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) != 2:
            continue
        path = name.removesuffix(".weight")
        if shape[1] % wanted.group_size == 0:
            choices[path] = wanted
            continue
        sizes = [size for size in MODES[wanted.mode][1] if shape[1] % size == 0]
        if sizes:
            choices[path] = Quantization(max(sizes), wanted.bits, wanted.mode)
            exceptions[path] = f"group size {max(sizes)}, since {wanted.group_size} does not divide {shape[1]}"
        else:
            exceptions[path] = f"not quantized, since no group size divides {shape[1]}"
    return choices, exceptions


def quantize_weights(weights: Mapping[str, mx.array], choices: Mapping[str, Quantization]) -> dict[str, mx.array]:
    """Weights by name with the chosen matrices packed; everything stays lazy."""
    packed: dict[str, mx.array] = {}
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        if path in choices:
            packed.update({f"{path}.{part}": value for part, value in choices[path].pack(weight).items()})
        else:
            packed[name] = weight
    return packed


def dequantize_weights(
    weights: Mapping[str, mx.array], choices: Mapping[str, Quantization], dtype: mx.Dtype
) -> dict[str, mx.array]:
    """The reverse: packed matrices as full ones of `dtype`; everything stays lazy."""
    full: dict[str, mx.array] = {}
    for name, weight in weights.items():
        path, _, part = name.rpartition(".")
        if path not in choices:
            full[name] = weight
        elif part == "weight":
            parts = {p: weights[f"{path}.{p}"] for p in ("weight", "scales", "biases") if f"{path}.{p}" in weights}
            full[name] = choices[path].unpack(parts, dtype)
    return full


def bits_per_weight(config: ModelConfig, choices: Mapping[str, Quantization], dtype_bytes: int) -> float:
    """Stored bits over parameters, scales and biases included; what is not quantized has `dtype_bytes` a value."""
    total = 0
    for name, shape in config.tensor_shapes().items():
        choice = choices.get(name.removesuffix(".weight"))
        if choice is None:
            total += math.prod(shape) * dtype_bytes
        else:
            parts = choice.packed_shapes(shape)
            scale_bytes = dtype_bytes if choice.mode == "affine" else 1
            total += 4 * math.prod(parts.pop("weight")) + scale_bytes * sum(math.prod(s) for s in parts.values())
    return 8 * total / config.num_parameters
