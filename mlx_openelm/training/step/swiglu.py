"""SwiGLU with a gradient that needs only its input; autodiff would keep the sigmoid as well."""

from __future__ import annotations

import mlx.core as mx

from ...ops import layers as ops


def swiglu(gate_and_up: mx.array) -> mx.array:
    """`ops.swiglu`: silu(gate) * up for gate_and_up [N, 2 * inner], gate first."""
    return _swiglu(gate_and_up)  # type: ignore[return-value]


@mx.custom_function
def _swiglu(gate_and_up):
    return ops.swiglu(gate_and_up)


@_swiglu.vjp
def _swiglu_vjp(gate_and_up, cotangent, _):
    return _gradient(gate_and_up, cotangent)


@mx.compile
def _gradient(gate_and_up: mx.array, cotangent: mx.array) -> mx.array:
    gate, up = (x.astype(mx.float32) for x in mx.split(gate_and_up, 2, axis=-1))
    sigmoid = mx.sigmoid(gate)
    silu = gate * sigmoid
    by_gate = cotangent * up * (sigmoid + silu * (1 - sigmoid))
    return mx.concatenate([by_gate.astype(cotangent.dtype), (cotangent * silu).astype(cotangent.dtype)], axis=-1)
