"""MLX's packed matrices: a few bits per weight, and a scale (in affine mode also a bias) for each group of a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError, quote
from ..ops.packed import MODES
from ..wording import one_of
from .weights import Tensor, Weights

PARTS = ("weight", "scales", "biases")
_PIECE = 1 << 20  # weights packed at a time


@dataclass(frozen=True)
class Quantization:
    """How one matrix is packed: `group_size` neighbours of a row share a scale (and, in affine mode, a bias)."""

    group_size: int
    bits: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RequestError(f"--q-mode must be one of {', '.join(MODES)}, got {quote(self.mode)}.")
        bits, group_sizes = MODES[self.mode]
        if self.bits not in bits:
            raise RequestError(f"--q-bits must be {one_of(sorted(bits))} in mode {self.mode}, got {self.bits}.")
        if self.group_size not in group_sizes:
            raise RequestError(
                f"--q-group-size must be {one_of(sorted(group_sizes))} in mode {self.mode}, got {self.group_size}."
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
        """The fields by name, as in `config.json`."""
        return asdict(self)

    def packed_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the packed parts of a matrix of `shape` [out, in], by name of the part."""
        out_dims, in_dims = shape
        scales = (out_dims, in_dims // self.group_size)
        parts: dict[str, tuple[int, ...]] = {"weight": (out_dims, in_dims * self.bits // 32), "scales": scales}
        return parts | {"biases": scales} if self.mode == "affine" else parts

    def pack(self, weight: mx.array) -> dict[str, mx.array]:
        """The packed parts of `weight` [out, in] by name; scales and biases have at most 16 bits."""
        if self.mode == "affine":
            packed, scales, biases = mx.quantize(weight, self.group_size, self.bits)
            stored = scale_dtype(weight.dtype)
            return {"weight": packed, "scales": scales.astype(stored), "biases": biases.astype(stored)}
        mx.eval(weight)  # once, not for every piece
        pieces = []
        for rows in _row_pieces(*weight.shape):
            pieces.append(mx.quantize(weight[rows], self.group_size, self.bits, self.mode))
            mx.eval(pieces[-1])
        packed, scales = (mx.concatenate(list(parts)) for parts in zip(*pieces, strict=True))
        return {"weight": packed, "scales": scales}

    def unpack(self, parts: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The matrix [out, in] of packed parts, in `dtype`; scales and biases are cast to it first."""
        scales, biases = parts["scales"], parts.get("biases")
        if self.mode == "affine":
            scales, biases = scales.astype(dtype), biases.astype(dtype) if biases is not None else None
        full = mx.dequantize(parts["weight"], scales, biases, self.group_size, self.bits, self.mode)
        return full.astype(dtype)


Plan = Callable[[ModelConfig], tuple[dict[str, Quantization], dict[str, str]]]


def _row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """Slices of a matrix's rows: without a kernel for the mode, as on a CPU, MLX makes many float32 copies."""
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def most_common(quantization: Mapping[str, Quantization]) -> Quantization:
    """The most frequent packing; `quantization` is by module path and not empty."""
    choices = list(quantization.values())
    return max(choices, key=choices.count)


def scale_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The type of the scales and biases for weights of `dtype`: 16 bits, as bits per weight are usually counted."""
    return mx.float16 if dtype == mx.float16 else mx.bfloat16


def cast_weights(weights: Weights, choices: Mapping[str, Quantization], dtype: mx.Dtype) -> Weights:
    """Weights cast to `dtype`, scales and biases of packed matrices to `scale_dtype`; nothing is read yet."""
    cast = weights.tensors()
    for name, tensor in cast.items():
        if mx.issubdtype(tensor.dtype, mx.floating):
            cast[name] = tensor.cast(scale_dtype(dtype) if name.rpartition(".")[0] in choices else dtype)
    return Weights(cast)


def quantize_weights(weights: Weights, choices: Mapping[str, Quantization]) -> Weights:
    """Weights with the matrices in `choices` (by module path) packed; nothing is read yet."""
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.tensors().items():
        path = name.removesuffix(".weight")
        packed |= _packed(path, tensor, choices[path]) if path in choices else {name: tensor}
    return Weights(packed)


def _packed(path: str, tensor: Tensor, choice: Quantization) -> dict[str, Tensor]:
    """The parts of a matrix: all are computed when the first is read, and each is kept until it is read."""
    made: dict[str, mx.array] = {}

    def read(part: str) -> mx.array:
        if part not in made:
            made.update(choice.pack(tensor.read()))
        return made.pop(part)

    scales = scale_dtype(tensor.dtype) if choice.mode == "affine" else mx.uint8
    return {
        f"{path}.{part}": Tensor(mx.uint32 if part == "weight" else scales, shape, functools.partial(read, part))
        for part, shape in choice.packed_shapes(tensor.shape).items()
    }


def dequantize_weights(weights: Weights, choices: Mapping[str, Quantization], dtype: mx.Dtype) -> Weights:
    """The reverse: packed matrices unpacked to `dtype`, other tensors unchanged; nothing is read yet."""
    tensors = weights.tensors()
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
