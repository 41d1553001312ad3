"""Exponentials for large arrays on a CPU, where MLX computes them one element at a time.

Measured on 2.6 million elements: mx.exp 45 ms, this 12 ms in plain primitives and 3 when mx.compile finds a
C++ compiler. Relative error 2e-7 near zero, 7e-6 at e ** -69, the smallest result. Gradients are defined here,
since operations on the bits of a float have none.
"""

from __future__ import annotations

import math

import mlx.core as mx

# 2 ** f for f in [-0.5, 0.5], lowest power first: interpolation at Chebyshev nodes, relative error 3e-9.
_POWERS_OF_TWO = (
    0.9999999999595482,
    0.6931471067106198,
    0.24022651213596563,
    0.05550327214209915,
    0.009618025602807178,
    0.0013400432165100828,
    0.0001546973202032385,
)
_LOG2_E = math.log2(math.e)
# Adding 1.5 * 2 ** 23 rounds a float to a whole number and leaves that number in its lowest bits.
_ROUNDER = 1.5 * 2**23


def _exp(x: mx.array) -> mx.array:
    """e ** x in float32: 2 ** n as bits of the exponent, times a polynomial. NaN stays NaN; never below 8e-31.

    That is negligible beside a 1, and with smaller results products would become subnormal numbers, which are slow.
    """
    power = mx.clip(x * _LOG2_E, -100.0, 127.0)
    rounded = power + _ROUNDER
    fraction = power - (rounded - _ROUNDER)
    polynomial = mx.array(_POWERS_OF_TWO[-1])
    for coefficient in reversed(_POWERS_OF_TWO[:-1]):
        polynomial = polynomial * fraction + coefficient
    return (polynomial.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)


@mx.compile
def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    return _exp(x.astype(mx.float32) - top).astype(x.dtype)


def exp_below(x: mx.array, top: mx.array) -> mx.array:
    """e ** (x - top), for a softmax: x [..., n] and its largest value, top [..., 1]."""
    return _differentiable_exp_below(x, top)  # type: ignore[return-value]


@mx.custom_function
def _differentiable_exp_below(x, top):
    return _exp_below(x, top)


@_differentiable_exp_below.vjp
def _exp_below_vjp(primals, cotangent, output):
    # A softmax divides by the sum, so its result does not depend on `top`.
    return cotangent * output, mx.zeros_like(primals[1])


@mx.compile
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    exact = gate.astype(mx.float32)
    return (exact / (1.0 + _exp(-exact)) * up).astype(gate.dtype)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, for arrays of one shape."""
    return _differentiable_swiglu(gate, up)  # type: ignore[return-value]


@mx.custom_function
def _differentiable_swiglu(gate, up):
    return _swiglu(gate, up)


@_differentiable_swiglu.vjp
def _swiglu_vjp(primals, cotangent, _):
    gate, up = primals
    return _swiglu_gradients(gate, up, cotangent)


@mx.compile
def _swiglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    exact = gate.astype(mx.float32)
    sigmoid = 1.0 / (1.0 + _exp(-exact))
    silu = exact * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    return (cotangent * up * slope).astype(gate.dtype), (cotangent * silu).astype(up.dtype)
