"""Matrix products, norms, activations and rotation, each in the form that is fastest on the device.

`mx.fast` has no CPU kernels: there its functions expand into many primitives. So on a CPU the kernels in `native` do
the work; without them, the same mathematics is written here in as few primitives as possible.

Shapes: B rows, L new positions, N = B * L, D head_dim. Activations between layers are [B, L, model_dim].

The CPU kernels have two kinds of arithmetic for a product, and L, the second-to-last dimension of x, decides: with few
positions at a time, as in a decoding step, they may round activations to 8 bits (`rounds_activations`); many, as in
a prompt, are multiplied as they are. So each row of a step [N, 1, model_dim] gets, bit for bit, what it gets alone.
MLX's own products, where there are no kernels, give that only to within rounding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from .. import backend, native
from . import distributions, exponentials, packed

# A weight as the CPU kernels take it: values, scales and biases, bits (0: not packed), group size, and whether
# few rows of activations may be rounded to 8 bits.
Stored = tuple[mx.array, mx.array | None, mx.array | None, int, int, bool]

# The first position: an int, or one for each of B rows: a list, or an array [B].
Offset = int | list[int] | mx.array

# On CUDA `addmm` of one row runs as a matrix product, `x @ W.T` as a matrix-vector kernel (H100, 3072 x 3072 in
# bfloat16: 27 against 14 µs). From two rows on `addmm` is faster (27 against 29 µs). Metal has both kernels.
_ADDS_SEPARATELY = mx.cuda.is_available()

# OpenBLAS multiplies matrices of at most a million elements without first copying them into packed panels. For a
# single row that copy is most of the work, so larger weights are multiplied in blocks of this size.
_UNPACKED_ELEMENTS = 1_000_000
# Below this, a product in blocks saves less time than its larger graph costs.
_WORTH_BLOCKS = 4_000_000
_SMALLEST_BLOCK = 32

# With this many rows half precision is multiplied faster in float32, copies included: a BLAS does that.
_MANY_HALF_ROWS = 8

# With this many rows our own exponential is worth its several primitives, which compile once per machine.
MANY_ROWS = 64

# Rotation matrices made at a time while decoding: 2 MB for the largest head.
_MATRICES = 32

# Positions in the smallest rotation table; when one is too short, a table of twice as many replaces it.
_SMALLEST_TABLE = 256


def linear(x: mx.array, weight: mx.array, residual: mx.array | None = None) -> mx.array:
    """x [..., in] times weight [out, in] transposed, plus residual [..., out] if given: [..., out]."""
    if backend.on_gpu():
        if residual is None:
            return x @ weight.T
        if _ADDS_SEPARATELY and x.size == x.shape[-1]:
            return residual + x @ weight.T
        return mx.addmm(residual, x, weight.T)
    if (kernels := native.kernels) is not None:
        output = kernels.linear(x, (weight, None, None, 0, 0, False))
        return output if residual is None else residual + output
    return _plain_linear(x, weight, residual)


def _plain_linear(x: mx.array, weight: mx.array, residual: mx.array | None) -> mx.array:
    """`linear` on a CPU without kernels."""
    if x.dtype != mx.float32 and x.size >= _MANY_HALF_ROWS * x.shape[-1]:
        exact = None if residual is None else residual.astype(mx.float32)
        return _plain_linear(x.astype(mx.float32), weight.astype(mx.float32), exact).astype(x.dtype)
    blocks = _blocks(*weight.shape)
    if blocks is None or x.size != blocks[2]:
        return x @ weight.T if residual is None else mx.addmm(residual, x, weight.T)
    # Three dimensions on both sides, since MLX would join the blocks again for a matrix of two.
    output = weight.reshape(blocks) @ x.reshape(1, -1, 1)  # [blocks, rows, 1]
    output = output.reshape((*x.shape[:-1], -1))  # [..., out]
    return output if residual is None else residual + output


@lru_cache
def _blocks(out_dims: int, in_dims: int) -> tuple[int, int, int] | None:
    """The shape [blocks, rows, in] with the most rows that divide `out_dims` and fit an unpacked product."""
    if out_dims * in_dims < _WORTH_BLOCKS:
        return None
    rows = _UNPACKED_ELEMENTS // in_dims
    while rows >= _SMALLEST_BLOCK and out_dims % rows:
        rows -= 1
    return (out_dims // rows, rows, in_dims) if rows >= _SMALLEST_BLOCK else None


def quantized_linear(x: mx.array, layer: Any, residual: mx.array | None = None) -> mx.array:
    """`linear` with the packed weight of a quantized layer.

    If `layer.rounds_activations`, the CPU kernels may round few rows x to 8 bits, in groups.
    """
    if layer.mode == "affine" and not backend.on_gpu() and (kernels := native.kernels) is not None:
        output = kernels.linear(x, stored(layer))
    else:
        output = packed.product(x, layer)
    return output if residual is None else residual + output


def stored(layer: Any) -> Stored:
    """The weight of a plain or affine layer, as the CPU kernels take it."""
    if "scales" not in layer:
        return layer["weight"], None, None, 0, 0, False
    return layer["weight"], layer["scales"], layer["biases"], layer.bits, layer.group_size, layer.rounds_activations


def quantized_rows(tokens: mx.array, layer: Any) -> mx.array:
    """The rows of a quantized embedding [vocab, dim] for tokens [...]: [..., dim], in affine mode float32."""
    bits, group_size, mode = layer.bits, layer.group_size, layer.mode
    if mode != "affine":
        return mx.dequantize(layer["weight"][tokens], layer["scales"][tokens], None, group_size, bits, mode)
    if not backend.on_gpu() and (kernels := native.kernels) is not None:
        return kernels.lookup(tokens, stored(layer))
    # Scales may have 16 bits; their products need more.
    scales, biases = (layer[part][tokens].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(layer["weight"][tokens], scales, biases, group_size, bits, mode)


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [..., dim] over its root mean square, times weight [dim] (paper, section 2.1)."""
    if backend.on_gpu():
        return mx.fast.rms_norm(x, weight, eps)
    if (kernels := native.kernels) is not None:
        return kernels.rms_norm(x, weight, eps)
    return normalized(x, eps) * weight


def normalized(x: mx.array, eps: float) -> mx.array:
    """x [..., dim] over its root mean square, in plain operations; mean and eps are one matrix product."""
    dims = x.shape[-1]
    eps_array, mean_column = _norm_constants(dims, eps)
    exact = x.astype(mx.float32)
    if x.size == dims:
        row = exact.reshape(1, dims)
        mean_square = mx.addmm(eps_array, row, row.T, 1 / dims)  # [1, 1]
    else:
        mean_square = mx.addmm(eps_array, mx.square(exact), mean_column)  # [..., 1]
    return (exact * mx.rsqrt(mean_square)).astype(x.dtype)


@lru_cache
def _norm_constants(dims: int, eps: float) -> tuple[mx.array, mx.array]:
    constants = mx.array([[eps]]), mx.full((dims, 1), 1 / dims)
    mx.eval(constants)
    return constants


def swiglu(gate_and_up: mx.array) -> mx.array:
    """silu(gate) * up for gate_and_up [..., 2 * inner], gate first: [..., inner]."""
    if backend.on_gpu():
        return _fused_swiglu(gate_and_up)
    if (kernels := native.kernels) is not None:
        return kernels.swiglu(gate_and_up)
    gate, up = mx.split(gate_and_up, 2, axis=-1)
    if gate.size < MANY_ROWS * gate.shape[-1]:
        return gate * mx.sigmoid(gate) * up
    return exponentials.swiglu(gate, up)


@mx.compile
def _fused_swiglu(gate_and_up: mx.array) -> mx.array:
    gate, up = mx.split(gate_and_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


def log_softmax(x: mx.array) -> mx.array:
    """Log-probabilities [..., n] of logits x in float32, by a kernel where there is one; it has no gradient there."""
    if not backend.on_gpu() and (kernels := native.kernels) is not None:
        return kernels.log_softmax(x)
    return distributions.log_softmax(x)


# Rotary position embeddings (RoPE, arXiv:2104.09864), in halves as in Llama: columns j and j + D / 2 of a head are
# rotated together, by the angle position / base ** (2j / D). A GPU has `mx.fast.rope`. On a CPU the angles are computed
# once for all layers.


def rotation_table(head_dim: int, base: float, offset: Offset, length: int) -> mx.array:
    """Cosines, then sines, of each position's angles [1 or B, L, D], as the CPU kernels take them.

    Args:
        offset: the first position: an int, or one for each row, as a list of B or an array [B]. A list gives each row
            exactly what it has alone; the numbers of an array are not known here.
    """
    if not isinstance(offset, mx.array):
        end = (max(offset) if isinstance(offset, list) else offset) + length
        count = _SMALLEST_TABLE
        while count < end:
            count *= 2
        table = _first_rotations(head_dim, base, count)
        if isinstance(offset, list):
            return table[0][mx.array(offset)[:, None] + mx.arange(length)]
        return table[:, offset : offset + length]
    frequencies = 1.0 / (base ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim))  # [D / 2]
    positions = mx.arange(length) + offset.reshape(-1, 1)  # [B, L]
    angles = positions[..., None].astype(mx.float32) * frequencies  # [B, L, D / 2]
    return mx.concatenate([mx.cos(angles), mx.sin(angles)], axis=-1)


@lru_cache(maxsize=4)
def _first_rotations(head_dim: int, base: float, count: int) -> mx.array:
    """The table [1, count, D] of the first positions, computed once for all tokens."""
    table = rotation_table(head_dim, base, mx.array([0]), count)
    mx.eval(table)
    return table


class Rotation:
    """RoPE for one forward pass, in plain operations.

    A single position is one matrix that rotates a row vector: one small product replaces six elementwise passes.
    Several positions take the passes, since that many matrices would need too much memory.
    """

    def __init__(self, head_dim: int, base: float, offset: Offset, length: int):
        self.matrix = None
        if length > 1:
            self.cos, self.sin = _by_column(rotation_table(head_dim, base, offset, length))
            self.swap = _identity_and_swap(head_dim)[1]
        elif not isinstance(offset, int):
            self.matrix = _rotation_matrices(rotation_table(head_dim, base, offset, 1))
        else:
            start = offset - offset % _MATRICES
            self.matrix = _cached_matrices(head_dim, base, start)[:, offset - start : offset - start + 1]

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x [B, L, heads, D]."""
        if self.matrix is not None:
            return (x @ self.matrix).astype(x.dtype)
        return (x * self.cos + (x @ self.swap) * self.sin).astype(x.dtype)


def _by_column(table: mx.array) -> tuple[mx.array, mx.array]:
    """The cosine and sine [1 or B, L, 1, D] of each output column, from a rotation table."""
    cos, sin = mx.split(table[:, :, None], 2, axis=-1)  # [1 or B, L, 1, D / 2]
    return mx.concatenate([cos, cos], axis=-1), mx.concatenate([sin, sin], axis=-1)


def _rotation_matrices(table: mx.array) -> mx.array:
    """For each position of a rotation table the matrix that rotates a row vector: [1 or B, L, D, D]."""
    identity, swap = _identity_and_swap(table.shape[-1])
    cos, sin = _by_column(table)
    return identity * cos + swap * sin


@lru_cache(maxsize=4)
def _cached_matrices(head_dim: int, base: float, start: int) -> mx.array:
    """The matrices of `_MATRICES` positions from `start` on, computed once for that many tokens."""
    matrices = _rotation_matrices(rotation_table(head_dim, base, start, _MATRICES))
    mx.eval(matrices)
    return matrices


@lru_cache
def _identity_and_swap(head_dim: int) -> tuple[mx.array, mx.array]:
    """Identity, and the signed swap of halves [D, D].

    The swap's output column j < D / 2 is minus input column j + D / 2; the others are plus input column j - D / 2.
    """
    half = head_dim // 2
    constants = mx.eye(head_dim), mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
    mx.eval(constants)
    return constants
