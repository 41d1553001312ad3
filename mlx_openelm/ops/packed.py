"""Products with packed weights: which of them MLX has a kernel for, and which need unpacking.

Read from MLX 0.32. Metal has kernels of every mode, for any number of rows and for either orientation
(`backend/metal/quantized.cpp`), and so has the CPU. CUDA (`backend/cuda/quantized`) has

- a matrix-vector kernel of every mode, for x W^T with few rows;
- one on tensor cores, in 16 bits and with 4 or 8 bits a weight, for sizes that fill its tiles;
- one for the rest, used only for gradients of one or two rows: it is slower than unpacking and a product of plain
  matrices, compiled for every type and tile at its first use, and lacks shared memory for float32 in groups of 128.

CUDA's kernels need contiguous heads, so they fail on a cache buffer with spare capacity. Products without a kernel fail
only when they are evaluated, so the choice is made here, by shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .. import backend

# The bits and group sizes that MLX supports in each mode, the default first.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
# The parts of a packed matrix: levels, a scale for each group, and in affine mode a bias.
PARTS = ("weight", "scales", "biases")

# CUDA: with this many rows MLX uses tensor cores, which take no longer for 16 rows.
_MATRIX_ROWS = 8
# CUDA: from this many rows, padding them to that is faster, since the other kernel's time grows with the rows
# (an H100, 12288 x 3072 in 4 bits: 35, 55 and 99 µs for 1, 2 and 4 rows; 41, 44 and 46 µs padded).
_FILLED_ROWS = 2
# CUDA: from this many rows, unpacking and a plain product are faster than tensor cores on packed weights (there:
# 134 against 86 µs for 128 rows, 141 against 151 for 256).
_MANY_ROWS = 256
# CUDA: the tiles of the kernel on tensor cores.
_TILE_OUT, _TILE_IN = 128, 64


def product(x: mx.array, layer: Any) -> mx.array:
    """x [..., in] times the packed weight [out, in] of a quantized layer transposed: [..., out], by MLX."""
    if _rows(x) < _FILLED_ROWS or backend.device() != "CUDA":
        return _multiply(x, *_parts(layer), transpose=True, **_packing(layer))
    return _matrix_product(layer.group_size, layer.bits, layer.mode)(x, *_parts(layer))


@lru_cache
def _matrix_product(group_size: int, bits: int, mode: str) -> Callable[..., mx.array]:
    """CUDA's product of several rows x with weights packed this way; these are constants without a gradient.

    They are unpacked again in the backward pass: keeping them would take as much memory as a model without packing.
    """
    packing: Any = {"group_size": group_size, "bits": bits, "mode": mode}

    @mx.custom_function
    def product(x: mx.array, *parts: Any) -> mx.array:
        def multiply(x: mx.array) -> mx.array:
            return _multiply(x, *parts, transpose=True, **packing)

        if _has_tensor_cores(x, parts[0].shape[0], group_size, bits):
            return _filled(x, multiply)
        return multiply(x) if _rows(x) < _MATRIX_ROWS else x @ _unpack(x, *parts, **packing).T

    @product.vjp
    def _(primals, cotangent, _):
        x, *parts = primals
        slope = cotangent @ _unpack(cotangent, *parts, **packing)
        return [slope.astype(x.dtype), *map(mx.zeros_like, parts)]

    return product  # type: ignore[return-value]


def _filled(x: mx.array, multiply: Callable[[mx.array], mx.array]) -> mx.array:
    """multiply(x) with rows of zeros added where x has too few for tensor cores."""
    rows = x.reshape(-1, x.shape[-1])  # flattened to one matrix, or each would be multiplied separately
    missing = _MATRIX_ROWS - len(rows)
    y = multiply(rows) if missing <= 0 else multiply(mx.pad(rows, [(0, missing), (0, 0)]))[:-missing]
    return y.reshape(*x.shape[:-1], -1)


def _has_tensor_cores(x: mx.array, out_dims: int, group_size: int, bits: int) -> bool:
    """Whether CUDA has a kernel on tensor cores for x and these weights that is faster than unpacking."""
    return (
        _rows(x) < _MANY_ROWS
        and x.dtype != mx.float32
        and bits in (4, 8)
        and out_dims % _TILE_OUT == 0
        and x.shape[-1] % max(_TILE_IN, group_size) == 0
    )


def columns_product(x: mx.array, layer: Any) -> mx.array:
    """x [..., out] times the packed weight [out, in] of a quantized layer: [..., in]."""
    if backend.device() == "CUDA":
        return x @ _unpack(x, *_parts(layer), **_packing(layer))
    return _multiply(x, *_parts(layer), transpose=False, **_packing(layer))


def attends_packed(length: int) -> bool:
    """Whether attention of `length` new positions multiplies a quantized cache without unpacking it.

    A GPU's fused attention needs it unpacked, but saves the scores [H, L, T].
    """
    device = backend.device()
    return device == "CPU" or (device == "Metal" and length == 1)


def unpacked_cache(cache: Any, length: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The first `length` keys and values [B, K, length, D] of a quantized cache, ours or mlx-lm's."""
    # Dequantize whole buffers; slicing first would copy.
    packing: Any = {"group_size": cache.group_size, "bits": cache.bits}
    keys, values = (mx.dequantize(*part, **packing) for part in (cache.keys, cache.values))
    return keys[:, :, :length].astype(dtype), values[:, :, :length].astype(dtype)


def _multiply(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    transpose: bool,
    **packing: Any,
) -> mx.array:
    return mx.quantized_matmul(x, weight, scales, biases, transpose=transpose, **packing)


def _rows(x: mx.array) -> int:
    return x.size // x.shape[-1]


def _parts(layer: Any) -> Any:
    """Levels, scales, and in affine mode biases."""
    return [layer["weight"], layer["scales"], *([layer["biases"]] if layer.mode == "affine" else [])]


def _packing(layer: Any) -> Any:
    return {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}


def _unpack(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None = None, **packing: Any
) -> mx.array:
    """The weight [out, in] for a product with x, in the type of its scales, or of x if these are not floats."""
    # Depend on x, or MLX would unpack many matrices ahead.
    weight = mx.depends(weight, x)
    return mx.dequantize(weight, scales, biases, dtype=x.dtype if biases is None else scales.dtype, **packing)
