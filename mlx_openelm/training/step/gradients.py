"""Operations of a layer with gradients that keep less, or take fewer or faster kernels on a GPU, than MLX's."""

from __future__ import annotations

import mlx.core as mx

from ...ops import layers as ops


def linear(x: mx.array, weight: mx.array, residual: mx.array | None = None) -> mx.array:
    """`ops.linear` for x [N, in]; the weight's gradient has the weight's own order in memory.

    MLX's gradient is a transposed view. The optimizer's kernels, which read it beside the weight, then take twice as
    long or more.
    """
    if residual is None:
        return _product(x, weight)  # type: ignore[return-value]
    return _sum_with_product(residual, x, weight)  # type: ignore[return-value]


@mx.custom_function
def _product(x, weight):
    return ops.linear(x, weight)


@_product.vjp
def _product_vjp(primals, cotangent, _):
    x, weight = primals
    return _by_factors(x, weight, cotangent)


@mx.custom_function
def _sum_with_product(residual, x, weight):
    return ops.linear(x, weight, residual)


@_sum_with_product.vjp
def _sum_with_product_vjp(primals, cotangent, _):
    _, x, weight = primals
    return cotangent, *_by_factors(x, weight, cotangent)


def _by_factors(x: mx.array, weight: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    return cotangent @ weight, cotangent.T @ x


def frozen_rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """`mx.fast.rms_norm` with a weight that is not trained, as in LoRA.

    MLX's gradient computes the weight's as well, and adds it up over all rows: half of its time.
    """

    @mx.custom_function
    def norm(x):
        return mx.fast.rms_norm(x, weight, eps)

    @norm.vjp
    def _(x, cotangent, _):
        return mx.vjp(lambda x: [mx.fast.rms_norm(x, None, eps)], [x], [cotangent * weight])[1][0]

    return norm(x)  # type: ignore[return-value]


def swiglu(gate_and_up: mx.array) -> mx.array:
    """`ops.swiglu`: silu(gate) * up for gate_and_up [N, 2 * inner], gate first; its gradient needs nothing else."""
    return _swiglu(gate_and_up)  # type: ignore[return-value]


@mx.custom_function
def _swiglu(gate_and_up):
    return ops.swiglu(gate_and_up)


@_swiglu.vjp
def _swiglu_vjp(gate_and_up, cotangent, _):
    return _swiglu_gradient(gate_and_up, cotangent)


@mx.compile
def _swiglu_gradient(gate_and_up: mx.array, cotangent: mx.array) -> mx.array:
    """Both halves as one expression, so that MLX makes one kernel of it: two results would share values, which MLX
    then writes to memory.
    """
    pairs = gate_and_up.reshape(len(gate_and_up), 2, -1)  # [N, 2, inner]
    given = (pairs[:, :1], pairs[:, 1:], cotangent[:, None])  # [N, 1, inner]
    gate, up, by_output = (mx.broadcast_to(x, pairs.shape).astype(mx.float32) for x in given)
    sigmoid = mx.sigmoid(gate)
    silu = gate * sigmoid
    by_gate = up * (sigmoid + silu * (1 - sigmoid))
    is_gate = mx.array([True, False]).reshape(1, 2, 1)
    by_both = by_output * mx.where(mx.broadcast_to(is_gate, pairs.shape), by_gate, silu)
    return by_both.astype(cotangent.dtype).reshape(gate_and_up.shape)
