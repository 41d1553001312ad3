"""Differences in training between backends. The numbers were measured on them.

A CPU (and Metal, until it is measured) recomputes the cheap parts of a layer and computes attention's gradient in
blocks. CUDA has a fused gradient (cuDNN's), and products so fast that recomputing is comparatively expensive.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ... import backend
from ..options import NOTHING, PARTS

# cuDNN's gradient takes queries in tiles of this many, heads of these sizes, and needs this compute capability.
TILE = 128
_HEAD_MULTIPLE, _LARGEST_HEAD, _OLDEST = 8, 128, 8

# The loss takes positions in multiples of this; a CPU takes one such chunk at a time: 128 rows of 32000 float32 are
# 16 MB, and products of more rows are no faster there.
CHUNK = 128


@dataclass(frozen=True)
class Strategy:
    """How training works on a backend.

    Args:
        chooses: whether AUTO chooses by the free memory; otherwise it means the cheap parts.
        within_layers: what is recomputed inside a layer that is itself recomputed as a whole.
        loss_rows: positions whose logits exist at the same time.
        settled_bytes: after an update, large weights and their optimizer state are evaluated in groups of this size.
        starts_early: whether a step's gradients begin to be computed before its update is set up.
    """

    chooses: bool
    within_layers: str
    loss_rows: int
    settled_bytes: int
    starts_early: bool


_CAREFUL = Strategy(chooses=False, within_layers=PARTS, loss_rows=CHUNK, settled_bytes=200_000_000, starts_early=False)
# A GPU needs more rows per product, and temporary buffers are small beside its memory. While MLX sets up a graph of
# thousands of operations, or waits between two of them, a fast GPU idles for milliseconds: with groups of 2 GB, and
# without an early start, a step of full fine-tuning (270M, 8 x 1024, on an H200) took 48 and 57 ms instead of 44.
_CUDA = Strategy(
    chooses=True, within_layers=NOTHING, loss_rows=8 * CHUNK, settled_bytes=16_000_000_000, starts_early=True
)


def here() -> Strategy:
    """The strategy for MLX's default device."""
    return _CUDA if backend.on_cuda() else _CAREFUL


def fuses_attention_gradient(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX has a fused gradient for its fused attention with activations of this type.

    It has none on a CPU, on Metal, for float32 and on GPUs before Ampere: there `mx.fast.scaled_dot_product_attention`
    would hold [length, length] matrices for its gradient.
    """
    return (
        backend.on_cuda()
        and dtype in (mx.float16, mx.bfloat16)
        and head_dim % _HEAD_MULTIPLE == 0
        and head_dim <= _LARGEST_HEAD
        and int(mx.device_info()["compute_capability_major"]) >= _OLDEST
    )
