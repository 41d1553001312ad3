"""GPTQ against the textbook: column by column, with an explicit inverse that shrinks with each column."""

from __future__ import annotations

from mlx_openelm.formats import rounding
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.quantization import gptq

import mlx.core as mx
import numpy as np
import pytest

BITS = (2, 3, 4, 5, 6, 8)


def textbook(
    weight: np.ndarray, moments: np.ndarray, scales: np.ndarray, biases: np.ndarray, size: int, bits: int
) -> np.ndarray:
    """Levels [out, in], by optimal brain quantization (arXiv:2208.11580) in GPTQ's order."""
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    inverse = np.linalg.inv(damped)[order][:, order]
    rest = weight.astype(np.float64)[:, order]
    levels = np.zeros(weight.shape)
    for column in order:
        scale, bias = scales[:, column // size], biases[:, column // size]
        level = np.clip(np.round((rest[:, 0] - bias) / scale), 0, 2**bits - 1)
        error = rest[:, 0] - (level * scale + bias)
        rest = (rest - np.outer(error / inverse[0, 0], inverse[0]))[:, 1:]
        inverse = (inverse - np.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
        levels[:, column] = level
    return levels


def material(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and the moments of correlated inputs of very different sizes."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(columns, columns)) / columns**0.5 + 0.5 * np.eye(columns)
    inputs = generator.normal(size=(4 * columns, columns)) @ mix * generator.lognormal(0, 1, columns)
    return generator.normal(size=(rows, columns)).astype(np.float32), (inputs.T @ inputs / len(inputs)).astype("f4")


def output_error(change: np.ndarray, moments: np.ndarray) -> float:
    return float(np.trace(change @ moments.astype(np.float64) @ change.T))


@pytest.mark.covering
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns,size", [(32, 32), (96, 32), (128, 64), (256, 128)])
def test_levels_equal_the_textbooks(columns, size, bits):
    weight, moments = material(24, columns, seed=bits)
    choice = Quantization(size, bits)
    grid = rounding.search(mx.array(weight), mx.diag(mx.array(moments)), choice, mx.bfloat16)
    scales, biases = np.array(grid.scales, dtype=np.float64), np.array(grid.biases, dtype=np.float64)
    ours = np.array(gptq.round_matrix(mx.array(weight), mx.array(moments), grid, choice))
    assert ours.shape == (24, columns // size, size)
    ours = ours.reshape(24, columns)
    expected = textbook(weight, moments, scales, biases, size, bits)
    # In float32 a value near a half may round either way, which changes the rest of its row.
    assert (ours == expected).all(axis=1).mean() > 0.7
    assert (ours == expected).mean() > 0.97

    spread_scales, spread_biases = np.repeat(scales, size, axis=1), np.repeat(biases, size, axis=1)
    nearest = np.clip(np.round((weight - spread_biases) / spread_scales), 0, 2**bits - 1)
    plain, learned, reference = (
        output_error(level * spread_scales + spread_biases - weight, moments) for level in (nearest, ours, expected)
    )
    assert learned < 0.8 * plain
    assert learned == pytest.approx(reference, rel=0.03)


def test_columns_are_ordered_by_their_inputs():
    # With two columns of equal inputs, the second corrects the rounding of the first.
    weight = mx.array(np.tile(np.float32([0.3, 0.3] + [0.0] * 30), (1, 1)))
    moments = np.eye(32, dtype=np.float32) * 1e-3
    moments[:2, :2] = [[1.0, 1.0], [1.0, 1.0001]]
    grid = rounding.Grid(mx.array([[1.0]]), mx.array([[0.0]]))
    level = np.array(gptq.round_matrix(weight, mx.array(moments), grid, Quantization(32, 2)))[0, 0]
    assert level[:2].tolist() == [1, 0]  # 0.3 alone is rounded to 0, 0.3 + 0.3 to 1


def test_inputs_that_are_never_active_round_to_the_nearest():
    weight, moments = material(8, 96)
    moments[[5, 40], :] = 0
    moments[:, [5, 40]] = 0
    choice = Quantization(32, 3)
    grid = rounding.search(mx.array(weight), mx.diag(mx.array(moments)), choice, mx.bfloat16)
    ours = np.array(gptq.round_matrix(mx.array(weight), mx.array(moments), grid, choice)).reshape(8, 96)
    assert np.isfinite(ours).all() and ours.min() >= 0 and ours.max() <= 7
    for column in (5, 40):
        scale, bias = np.array(grid.scales)[:, column // 32], np.array(grid.biases)[:, column // 32]
        nearest = np.clip(np.round((weight[:, column] - bias) / scale), 0, 7)
        assert np.array_equal(ours[:, column], nearest)


def test_without_any_input_rounding_is_to_the_nearest():
    weight = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    choice = Quantization(64, 4)
    grid = rounding.extremes(mx.array(weight), choice, mx.float32)
    ours = gptq.round_matrix(mx.array(weight), mx.zeros((64, 64)), grid, choice)
    nearest = rounding.levels(rounding.groups(mx.array(weight), 64), grid, 4)
    assert np.array_equal(np.array(ours), np.array(nearest))


def test_a_group_of_equal_weights_stays_on_its_bias():
    weight, moments = material(2, 64)
    weight[:, :32] = 0.5
    choice = Quantization(32, 2)
    grid = rounding.search(mx.array(weight), mx.diag(mx.array(moments)), choice, mx.bfloat16)
    level = gptq.round_matrix(mx.array(weight), mx.array(moments), grid, choice)
    assert np.isfinite(np.array(rounding.values(level, grid))).all()
