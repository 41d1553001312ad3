"""What training does in another way on each backend, chosen here alone. What each costs was measured where it is used.

A CPU, and Metal until somebody has measured it, recompute the cheap parts of a layer and make attention's gradient in
blocks. CUDA has a fused gradient (cuDNN's), and fast enough products that recomputing is what costs.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ... import backend

# What the backward pass computes again: nothing; the norms, SwiGLU and what else takes little time; whole layers.
NOTHING, PARTS, LAYERS = "nothing", "parts", "layers"
# The same, and to choose by the free memory.
AUTO = "auto"
RECOMPUTE = (AUTO, NOTHING, PARTS, LAYERS)

# cuDNN's gradient takes queries in tiles of so many, and heads of such sizes, from this compute capability on.
TILE = 128
_HEAD_MULTIPLE, _LARGEST_HEAD, _OLDEST = 8, 128, 8

# The loss takes positions in multiples of this, a CPU one at a time: 128 rows of 32000 float32 are 16 MB, and products
# are as fast there as with more.
CHUNK = 128


@dataclass(frozen=True)
class Strategy:
    """How training goes about things here.

    Args:
        chooses: whether a plan may choose what is recomputed; else it is the cheap parts unless told.
        within_layers: what of a layer that is computed again as a whole is computed again once more.
        loss_rows: positions whose logits exist at once.
        settled_bytes: so much of large weights, and of what the optimizer keeps for them, is evaluated at a time.
    """

    chooses: bool
    within_layers: str
    loss_rows: int
    settled_bytes: int


_CAREFUL = Strategy(chooses=False, within_layers=PARTS, loss_rows=CHUNK, settled_bytes=200_000_000)
# A GPU's products want more rows, waiting for it costs more, and what is held for a moment is little of its memory.
_CUDA = Strategy(chooses=True, within_layers=NOTHING, loss_rows=8 * CHUNK, settled_bytes=2_000_000_000)


def here() -> Strategy:
    """The strategy for MLX's default device."""
    return _CUDA if backend.on_cuda() else _CAREFUL


def fuses_attention_gradient(dtype: mx.Dtype, head_dim: int) -> bool:
    """Whether MLX has a fused gradient of its fused attention for activations of this type.

    Without one `mx.fast.scaled_dot_product_attention` would hold [length x length] matrices: on a CPU, on Metal, for
    float32, and on GPUs before Ampere.
    """
    return (
        backend.on_cuda()
        and dtype in (mx.float16, mx.bfloat16)
        and head_dim % _HEAD_MULTIPLE == 0
        and head_dim <= _LARGEST_HEAD
        and int(mx.device_info()["compute_capability_major"]) >= _OLDEST
    )
