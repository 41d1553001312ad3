"""Exponentials and their gradients against NumPy in double precision."""

from __future__ import annotations

from mlx_openelm.ops import exponentials

import mlx.core as mx
import numpy as np
import pytest

# Their precision is that of the compiled kernels too.
pytestmark = pytest.mark.compiled


def test_exp_is_accurate_to_rounding_over_its_whole_range():
    x = np.concatenate([np.linspace(-69, 0, 20001), [-0.0, -1e-30, -0.5, -1 / 3]]).astype(np.float32)
    got = np.array(exponentials.exp_below(mx.array(x)[None], mx.zeros((1, 1))))[0]
    error = np.abs(got / np.exp(x.astype(np.float64)) - 1)
    assert (error < 2e-7 + 1e-7 * np.abs(x)).all()


def test_exp_of_masked_positions_is_zero_and_nan_stays():
    x = mx.array([[0.0, mx.finfo(mx.float32).min, -mx.inf, mx.nan, -200.0]])
    got = np.array(exponentials.exp_below(x, mx.zeros((1, 1))))[0]
    assert got[0] == 1
    assert (got[[1, 2, 4]] < 1e-30).all()
    assert np.isnan(got[3])


def test_swiglu_is_accurate_to_rounding_even_far_from_zero():
    gate = np.concatenate([np.linspace(-120, 120, 9001), [0.0, 1e-20, -1e4, 3e37]]).astype(np.float32)[None]
    up = np.full_like(gate, 0.5)
    wide = gate.astype(np.float64)
    expected = wide * np.exp(-np.logaddexp(0, -wide)) * 0.5
    got = np.array(exponentials.swiglu(mx.array(gate), mx.array(up)))
    assert (np.abs(got - expected) <= (2e-7 + 1e-7 * np.minimum(np.abs(wide), 90)) * np.abs(expected) + 1e-27).all()


def test_gradients_equal_those_of_the_functions():
    gate, up = (mx.random.normal((4, 7), key=mx.random.key(i)) for i in (0, 1))
    scale = mx.random.normal((4, 7), key=mx.random.key(2))
    got = mx.grad(lambda g, u: (exponentials.swiglu(g, u) * scale).sum(), argnums=(0, 1))(gate, up)
    expected = mx.grad(lambda g, u: (g * mx.sigmoid(g) * u * scale).sum(), argnums=(0, 1))(gate, up)
    for a, b in zip(got, expected, strict=True):
        assert mx.abs(a - b).max().item() < 1e-6

    def softmax(x: mx.array) -> mx.array:
        weights = exponentials.exp_below(x, mx.max(x, axis=-1, keepdims=True))
        return (weights / weights.sum(axis=-1, keepdims=True) * scale).sum()

    got_softmax = mx.grad(softmax)(gate)
    expected_softmax = mx.grad(lambda x: (mx.softmax(x, axis=-1) * scale).sum())(gate)
    assert mx.abs(got_softmax - expected_softmax).max().item() < 1e-6


def test_half_precision_stays_half_precision():
    x = mx.array([[-1.0, -2.0]], dtype=mx.bfloat16)
    assert exponentials.exp_below(x, mx.zeros((1, 1), mx.bfloat16)).dtype == mx.bfloat16
    assert exponentials.swiglu(x, x).dtype == mx.bfloat16
