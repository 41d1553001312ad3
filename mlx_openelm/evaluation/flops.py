"""The arithmetic of training: operations per token, and how many a device can do."""

from __future__ import annotations

import time

import mlx.core as mx

from .. import backend
from ..config import LAYERS, ModelConfig
from ..ops.layers import linear

# Sides of the square matrices that are multiplied to measure a device.
_GPU_SIDE, _CPU_SIDE = 8192, 1024
_TURNS = 4
# A forward pass multiplies and adds once for each weight; the backward pass does twice as much.
_OPERATIONS = 3 * 2


def training_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations per token of a training step, forward and backward, with rows of `length` tokens.

    Counted are the products with weights and, of attention, those of queries with keys and of weights with values, for
    the visible half of the positions. Recomputing in the backward pass does not count: these are model FLOPs
    (arXiv:2204.02311, appendix B).
    """
    # The embedding is a look-up on the input side, and a product on the output side.
    head = config.vocab_size * config.model_dim
    matrices = sum(
        rows * columns for name, (rows, columns) in config.matrix_shapes().items() if name.startswith(LAYERS)
    )
    attention = sum(config.num_query_heads) * config.head_dim * length  # two products, half of the positions
    return float(_OPERATIONS * (matrices + head + attention))


def measured_peak(dtype: mx.Dtype) -> float:
    """Floating-point operations per second that this device reaches in a product of two large square matrices.

    It is computed as in a model's layers: MLX's own products are a hundred times slower in half precision on a CPU.
    """
    side = _GPU_SIDE if backend.on_gpu() else _CPU_SIDE
    one, other = (mx.random.normal((side, side), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
    mx.eval(one, other)
    seconds = []
    for _ in range(_TURNS):
        started = time.perf_counter()
        mx.eval(linear(one, other))
        seconds.append(time.perf_counter() - started)
    mx.clear_cache()
    return 2 * side**3 / min(seconds)
