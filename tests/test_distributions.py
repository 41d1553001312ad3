"""Log-probabilities, losses and divergences of logits, against the formulas in NumPy's float64."""

from __future__ import annotations

from mlx_openelm.ops.distributions import cross_entropy, kl_divergence, log_softmax

import mlx.core as mx
import numpy as np
import pytest

LOGITS = np.random.default_rng(0).normal(size=(2, 3, 5, 9)).astype(np.float32)
CHANCES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(axis=-1, keepdims=True)


def test_log_softmax_is_float32_and_stable_for_large_logits():
    got = log_softmax(mx.array(LOGITS[0]))
    assert np.array(got) == pytest.approx(np.log(CHANCES[0]), abs=1e-5)
    large = log_softmax(mx.array([[1000.0, 0.0]], dtype=mx.bfloat16))
    assert large.dtype == mx.float32 and large.tolist() == [[0.0, -1000.0]]


def test_cross_entropy_is_minus_the_log_likelihood_of_each_target():
    targets = np.random.default_rng(1).integers(0, 9, size=(3, 5))
    expected = -np.take_along_axis(np.log(CHANCES[0]), targets[..., None], axis=-1)[..., 0]
    assert np.array(cross_entropy(mx.array(LOGITS[0]), mx.array(targets))) == pytest.approx(expected, abs=1e-5)


def test_the_divergence_is_kl_of_first_to_second():
    expected = (CHANCES[0] * np.log(CHANCES[0] / CHANCES[1])).sum(axis=-1)
    first, second = map(mx.array, LOGITS)
    assert np.array(kl_divergence(first, second)) == pytest.approx(expected, rel=1e-4)
    assert np.array(kl_divergence(first, first)) == pytest.approx(np.zeros((3, 5)), abs=1e-6)


def test_the_gradient_of_the_divergence_equals_the_difference_of_probabilities():
    first, second = map(mx.array, LOGITS)
    gradient = mx.grad(lambda logits: kl_divergence(first, logits).sum())(second)
    assert np.array(gradient) == pytest.approx(CHANCES[1] - CHANCES[0], abs=1e-5)
