"""Affine rounding on custom grids, against MLX's packed words and brute force in NumPy."""

from __future__ import annotations

from mlx_openelm.formats import rounding
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.rounding import Grid

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import is_bfloat16, unpack_levels

BITS = (2, 3, 4, 5, 6, 8)


def random_matrix(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)


def weighted_error(
    weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, importance: np.ndarray, size: int, bits: int
) -> np.ndarray:
    """The error of nearest rounding for each group [out, groups], by trying every level."""
    grouped = weight.astype(np.float64).reshape(len(weight), -1, size)
    values = scales[..., None] * np.arange(2**bits) + biases[..., None]
    distance = np.square(grouped[..., None] - values[:, :, None, :]).min(axis=-1)
    return (distance * importance.reshape(1, -1, size)).sum(axis=-1)


@pytest.mark.parametrize("bits", BITS)
def test_packed_levels_are_read_back_by_numpy_and_by_mlx(bits):
    level = np.random.default_rng(bits).integers(0, 2**bits, (5, 96))
    level[0, :32], level[1, :32] = 0, 2**bits - 1
    words = rounding.pack(mx.array(level.astype(np.float32)), bits)
    assert words.dtype == mx.uint32 and words.shape == (5, 96 * bits // 32)
    assert np.array_equal(unpack_levels(np.array(words), bits), level)
    ones, zeros = mx.ones((5, 3)), mx.zeros((5, 3))
    assert np.array_equal(np.array(mx.dequantize(words, ones, zeros, 32, bits)), level)


@pytest.mark.parametrize("bits", BITS)
def test_packing_gives_the_words_of_mlx_for_the_same_levels(bits):
    weight = mx.array(random_matrix(7, 128))
    words, scales, biases = mx.quantize(weight, 64, bits)
    level = rounding.levels(rounding.groups(weight, 64), Grid(scales, biases), bits)
    ours = unpack_levels(np.array(rounding.pack(level.reshape(7, 128), bits)), bits)
    theirs = unpack_levels(np.array(words), bits)
    # Both round to the nearest level; halves may round either way.
    assert (ours != theirs).mean() < 0.01 and np.abs(ours - theirs).max() <= 1
    again = rounding.pack(mx.array(theirs.astype(np.float32)), bits)
    assert np.array_equal(np.array(again), np.array(words))


@pytest.mark.parametrize("bits,size", [(2, 32), (3, 64), (4, 32), (5, 64), (6, 64), (8, 128)])
def test_the_grid_found_is_never_worse_than_that_of_mlx(bits, size):
    weight = random_matrix(12, 256)
    importance = np.random.default_rng(1).exponential(1, 256).astype(np.float32)
    choice = Quantization(size, bits)
    found = rounding.search(mx.array(weight), mx.array(importance), choice, mx.bfloat16)
    theirs = rounding.extremes(mx.array(weight), choice, mx.bfloat16)
    _, scales, biases = mx.quantize(mx.array(weight), size, bits)
    assert np.array_equal(np.array(theirs.scales), np.array(scales.astype(mx.bfloat16).astype(mx.float32)))
    assert np.array_equal(np.array(theirs.biases), np.array(biases.astype(mx.bfloat16).astype(mx.float32)))
    ours, plain = (
        weighted_error(weight, np.array(g.scales), np.array(g.biases), importance, size, bits) for g in (found, theirs)
    )
    assert (ours <= plain * (1 + 1e-5)).all()
    assert ours.sum() < 0.97 * plain.sum()
    assert is_bfloat16(found.scales) and is_bfloat16(found.biases)


def test_the_grid_found_is_close_to_optimal():
    weight = np.random.default_rng(3).normal(size=(24, 32)).astype(np.float32)
    importance = np.random.default_rng(4).uniform(0.5, 1.5, 32).astype(np.float32)
    found = rounding.search(mx.array(weight), mx.array(importance), Quantization(32, 2), mx.float32)
    ours = weighted_error(weight, np.array(found.scales), np.array(found.biases), importance, 32, 2)[:, 0]
    best = np.full(24, np.inf)
    for scale in np.linspace(0.3, 2, 50):
        for bias in np.linspace(-3, 0, 50):
            grid = np.full((24, 1), scale), np.full((24, 1), bias)
            best = np.minimum(best, weighted_error(weight, *grid, importance, 32, 2)[:, 0])
    assert (ours < 1.5 * best).all() and ours.sum() < 1.15 * best.sum()


def test_the_most_important_weights_are_rounded_best():
    weight = random_matrix(16, 64, seed=5)
    importance = np.ones(64, dtype=np.float32)
    importance[7] = 1000
    even, uneven = (
        np.abs(
            np.array(
                rounding.round_nearest(mx.array(weight), mx.diag(mx.array(counts)), Quantization(64, 3), mx.bfloat16)
            )
            - weight
        )
        for counts in (np.ones(64, dtype=np.float32), importance)
    )
    assert uneven[:, 7].mean() < 0.3 * even[:, 7].mean()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_stored_grid_is_rounded_to_its_dtype(dtype):
    values = mx.array(random_matrix(4, 8))
    stored = Grid(values, -values).stored(dtype)
    assert stored.scales.dtype == stored.biases.dtype == mx.float32
    # float16 has 11 significant bits, bfloat16 has 8, counting the implicit one.
    bits = 11 if dtype == mx.float16 else 8
    mantissa, exponent = np.frexp(np.array(values).astype(np.float64))
    expected = np.ldexp(np.round(mantissa * 2**bits) / 2**bits, exponent)
    assert np.array_equal(np.array(stored.scales), expected) and np.array_equal(np.array(stored.biases), -expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_a_group_of_equal_weights_is_exact(value, bits):
    weight = mx.array(random_matrix(2, 96))
    weight[0, 32:64] = value
    rounded = rounding.round_nearest(weight, mx.eye(96), Quantization(32, bits), mx.bfloat16)
    assert np.isfinite(np.array(rounded)).all()
    assert np.allclose(np.array(rounded)[0, 32:64], value, atol=abs(value) * 2**-8)


@pytest.mark.parametrize("low,high", [(-5.0, -4.0), (3.0, 3.5), (-1e-6, 1e-6), (-2e4, 2e4)])
def test_ranges_of_any_sign_and_size_are_rounded_within_a_step(low, high):
    weight = np.random.default_rng(6).uniform(low, high, (4, 64)).astype(np.float32)
    rounded = rounding.round_nearest(mx.array(weight), mx.eye(64), Quantization(64, 4), mx.float32)
    assert np.abs(np.array(rounded) - weight).max() < (high - low) / 15


def test_inputs_that_never_occur_are_harmless():
    weight = mx.array(random_matrix(3, 64))
    moments = mx.diag(mx.array([0.0] * 32 + [1.0] * 32))
    rounded = np.array(rounding.round_nearest(weight, moments, Quantization(32, 3), mx.bfloat16))
    assert np.isfinite(rounded).all() and np.abs(rounded - np.array(weight)).max() < 2


def test_a_group_with_one_important_weight_keeps_its_step_size():
    weight = mx.array(np.random.default_rng(3).normal(size=(4, 64)).astype(np.float32))
    importance = mx.array([1.0] + [0.0] * 63)
    grid = rounding.search(weight, importance, Quantization(64, 4), mx.float32)
    assert (np.array(grid.scales) > 0).all()


def test_rounding_equals_mlxs_dequantized_weights_and_predicts_the_error_of_products():
    weight = random_matrix(10, 96)
    inputs = np.random.default_rng(8).normal(size=(300, 96)).astype(np.float32) @ random_matrix(96, 96, seed=9)
    choice = Quantization(32, 3)
    moments = mx.array(inputs.T @ inputs / len(inputs))
    rounded = rounding.round_nearest(mx.array(weight), moments, choice, mx.bfloat16)
    grid = rounding.search(mx.array(weight), mx.diag(moments), choice, mx.bfloat16)
    level = rounding.levels(rounding.groups(mx.array(weight), 32), grid, 3).reshape(weight.shape)
    stored = [part.astype(mx.bfloat16).astype(mx.float32) for part in (grid.scales, grid.biases)]
    read_back = mx.dequantize(rounding.pack(level, 3), *stored, 32, 3)
    assert np.allclose(np.array(rounded), np.array(read_back), atol=1e-5)
    change = inputs.astype(np.float64) @ (np.array(rounded, dtype=np.float64) - weight).T
    expected = np.square(change).sum(axis=1).mean()
    assert rounding.round_error(mx.array(weight), moments, choice, mx.bfloat16) == pytest.approx(expected, rel=1e-4)
