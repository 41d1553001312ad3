"""Rotary position embeddings (RoPE, arXiv:2104.09864) where no fused kernel computes them: in halves, as in Llama.

Column j and column j + D / 2 of a head are rotated together, by the angle position / base ** (2j / D).
A GPU has `mx.fast.rope`. On a CPU the angles are computed once for all layers, not anew in each.

Shapes: B rows, L new positions, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx

# Rotation matrices that are made at a time while decoding: 2 MB for the largest head.
_MATRICES = 32

# Positions in the smallest table; a table that is too short is replaced by one of twice as many.
_SMALLEST_TABLE = 256


def rotation_table(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    """Cosines, then sines, of each position's angles [1 or B, L, D], as the CPU kernels take them.

    Args:
        offset: the first position: an int, or an array [B] with one for each row.
    """
    if isinstance(offset, mx.array):
        return _make_table(head_dim, base, offset, length)
    positions = _SMALLEST_TABLE
    while positions < offset + length:
        positions *= 2
    return _cached_table(head_dim, base, positions)[:, offset : offset + length]


@lru_cache(maxsize=4)
def _cached_table(head_dim: int, base: float, positions: int) -> mx.array:
    """The table of the first positions, computed once for all tokens."""
    table = _make_table(head_dim, base, 0, positions)
    mx.eval(table)
    return table


def _make_table(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    cos, sin = _cos_and_sin(head_dim, base, offset, length)  # [1 or B, L, 1, D], whose halves are the same
    half = head_dim // 2
    return mx.concatenate([cos[:, :, 0, :half], sin[:, :, 0, :half]], axis=-1)


class Rotation:
    """RoPE for one forward pass, in plain operations.

    A single position is one matrix that rotates a row vector: one small product replaces six elementwise passes.
    Several positions take the passes, since that many matrices would cost memory.
    """

    def __init__(self, head_dim: int, base: float, offset: int | mx.array, length: int):
        self.matrix = None
        if length > 1:
            self.cos, self.sin = _cos_and_sin(head_dim, base, offset, length)
            self.swap = _constants(head_dim, base)[1]
        elif isinstance(offset, mx.array):
            self.matrix = _rotation_matrices(head_dim, base, offset, 1)
        else:
            start = offset - offset % _MATRICES
            self.matrix = _cached_matrices(head_dim, base, start)[:, offset - start : offset - start + 1]

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x [B, L, heads, D]."""
        if self.matrix is not None:
            return (x @ self.matrix).astype(x.dtype)
        return (x * self.cos + (x @ self.swap) * self.sin).astype(x.dtype)


def _cos_and_sin(head_dim: int, base: float, offset: int | mx.array, length: int) -> tuple[mx.array, mx.array]:
    """Cosine and sine [1 or B, L, 1, D] of each position's angle in each output column."""
    frequencies = _constants(head_dim, base)[2]
    if isinstance(offset, mx.array):
        offset = offset.reshape(-1, 1)
    positions = (mx.arange(length) + offset).reshape(-1, length, 1, 1)  # [1 or B, L, 1, 1]
    angles = positions.astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


def _rotation_matrices(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    """For each position the matrix that rotates a row vector: [1 or B, L, D, D]."""
    identity, swap, _ = _constants(head_dim, base)
    cos, sin = _cos_and_sin(head_dim, base, offset, length)
    return identity * cos + swap * sin


@lru_cache(maxsize=4)
def _cached_matrices(head_dim: int, base: float, start: int) -> mx.array:
    """The matrices of `_MATRICES` positions from `start` on, computed once for that many tokens."""
    matrices = _rotation_matrices(head_dim, base, start, _MATRICES)
    mx.eval(matrices)
    return matrices


@lru_cache
def _constants(head_dim: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    """Identity [D, D], the signed swap of halves [D, D], the frequency of each output column [D]."""
    half = head_dim // 2
    frequencies = 1.0 / (base ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim))
    # Output column j < half takes minus input row j + half; the others plus input row j - half.
    swap = mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
    constants = mx.eye(head_dim), swap, mx.concatenate([frequencies, frequencies])
    mx.eval(constants)
    return constants
