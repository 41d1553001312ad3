"""Products with packed weights: what each of MLX's backends multiplies as it is stored, and what is unpacked first.

Read from MLX 0.32. Metal has kernels of every mode, for any number of rows and for either orientation
(`backend/metal/quantized.cpp`), and so has the CPU. CUDA (`backend/cuda/quantized`) has

- a matrix-vector kernel of every mode, for x W^T with few rows;
- one on tensor cores, in 16 bits and with 4 or 8 bits a weight, for sizes that fill its tiles;
- one for the rest, which we never ask for: it is slower than unpacking and a product of plain matrices, is compiled
  for every type and tile at its first use, and needs more shared memory than there is for float32 in groups of 128.

All of CUDA's fail where the heads of a cache do not lie side by side, as in a buffer with room at its end. Products
without a kernel fail only when they are evaluated, so the choice is made here, by shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from . import backend
from .formats.packing import MODES

# CUDA: so many rows and more go to tensor cores, or are unpacked for.
_MATRIX_ROWS = 8
# CUDA: from here on unpacking and a plain product take less time than tensor cores do with packed weights.
_MANY_ROWS = 64
# CUDA: the tiles of the kernel on tensor cores.
_TILE_OUT, _TILE_IN = 128, 64


def multiplied_modes() -> frozenset[str]:
    """The modes whose weights are best left packed at load here: all on a GPU, affine with our kernels for CPUs."""
    if backend.on_gpu():
        return frozenset(MODES)
    return frozenset({"affine"} if backend.has_kernels() else ())


def stays_packed(modes: Iterable[str]) -> bool:
    """Whether a model packed in these modes is best left so at load."""
    return multiplied_modes().issuperset(modes)


def product(x: mx.array, layer: Any) -> mx.array:
    """x [..., in] times the packed weight [out, in] of a quantized layer transposed: [..., out], by MLX."""
    rows = x.size // x.shape[-1]
    if rows < _MATRIX_ROWS or _takes(rows, x, layer):
        return _multiply(x, layer, transpose=True)
    return _unpacked_product(x, layer)


def _unpacked_product(x: mx.array, layer: Any) -> mx.array:
    """The same, unpacking both times: kept for the backward pass, all weights would be as large as without packing."""
    function = mx.custom_function(lambda x: x @ unpacked(layer, x).T)

    @function.vjp
    def _(_, cotangent, __):
        return cotangent @ unpacked(layer, cotangent)

    return function(x)  # type: ignore[return-value]


def columns_product(x: mx.array, layer: Any) -> mx.array:
    """x [..., out] times the packed weight [out, in] of a quantized layer: [..., in]."""
    if backend.device() == "CUDA":
        return x @ unpacked(layer, x)
    return _multiply(x, layer, transpose=False)


def unpacked(layer: Any, x: mx.array) -> mx.array:
    """The weight [out, in] of a quantized layer for a product with x, once that is there.

    Its type is that of its scales; where these are no floating-point numbers, that of x.
    """
    # MLX would unpack many matrices ahead, and hold them all.
    weight = mx.depends(layer["weight"], x)
    scales, biases = layer["scales"], layer.get("biases")
    dtype = scales.dtype if layer.mode == "affine" else x.dtype
    return mx.dequantize(weight, scales, biases, layer.group_size, layer.bits, layer.mode, dtype=dtype)


def attends_packed(length: int) -> bool:
    """Whether attention of `length` new positions multiplies a quantized cache as it is stored.

    A GPU's fused attention takes it unpacked, and needs no scores [H, L, T].
    """
    device = backend.device()
    return device == "CPU" or (device == "Metal" and length == 1)


def unpacked_cache(cache: Any, length: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """The first `length` keys and values [B, K, length, D] of a quantized cache, ours or mlx-lm's."""
    # Whole buffers, of which a part would be copied first.
    keys, values = (mx.dequantize(*part, cache.group_size, cache.bits) for part in (cache.keys, cache.values))
    return keys[:, :, :length].astype(dtype), values[:, :, :length].astype(dtype)


def _takes(rows: int, x: mx.array, layer: Any) -> bool:
    """Whether a backend has a kernel for `_MATRIX_ROWS` rows and more of x that is faster than unpacking."""
    if backend.device() != "CUDA":
        return True
    out_dims, in_dims = layer["weight"].shape[0], x.shape[-1]
    return (
        rows < _MANY_ROWS
        and x.dtype != mx.float32
        and layer.bits in (4, 8)
        and out_dims % _TILE_OUT == 0
        and in_dims % max(_TILE_IN, layer.group_size) == 0
    )


def _multiply(x: mx.array, layer: Any, *, transpose: bool) -> mx.array:
    packing = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    parts = layer["weight"], layer["scales"], layer.get("biases")
    return mx.quantized_matmul(x, *parts, transpose=transpose, **packing)
