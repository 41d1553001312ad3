"""AWQ's scales folded into the model: its function stays the same, the rounding error falls."""

from __future__ import annotations

from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.rounding import round_error
from mlx_openelm.quantization import awq
from mlx_openelm.quantization.calibration import Stream

import mlx.core as mx
import numpy as np
import numpy_model
import pytest
from mlx.utils import tree_flatten
from quantization_models import is_bfloat16, random_windows, tiny_model

CHOICE = Quantization(32, 3)
PATHS = ("attn.qkv_proj", "ffn.proj_2", "ffn.proj_1")


def parameters(model) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}


def with_outliers(model) -> None:
    """Norms that make some columns much larger than others, as in trained models."""
    for layer in model.layers:
        for norm in (layer.attn_norm, layer.ffn_norm):
            norm["weight"] = norm["weight"] * mx.where(mx.arange(64) % 16 == 3, 20.0, 1.0)


def fold(model, index: int, path: str, dtype: mx.Dtype = mx.bfloat16) -> tuple[mx.array, mx.array]:
    """Input moments before and after folding, on text that has passed the earlier layers."""
    stream = Stream(model, [mx.array(random_windows(4, 24))])
    for layer in model.layers[:index]:
        stream.advance(layer)
    before = stream.moments(model.layers[index])[path]
    return before, awq.fold(model.layers[index], path, before, CHOICE, dtype, mx.bfloat16)


@pytest.mark.covering(2)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index", [0, 1])
def test_folding_keeps_the_full_models_logits(index, path, gated):
    model = tiny_model(ffn_with_glu=gated)
    with_outliers(model)
    tokens = np.array(random_windows(2, 20, seed=1))
    expected = numpy_model.logits(model.config, parameters(model), tokens)
    before = parameters(model)
    fold(model, index, path)
    changed = {name for name, weight in parameters(model).items() if not np.array_equal(weight, before[name])}
    prefix = f"transformer.layers.{index}."
    feeding = {"attn.qkv_proj": "attn_norm", "ffn.proj_1": "ffn_norm", "ffn.proj_2": "ffn.proj_1"}[path]
    both = {f"{prefix}{path}.weight", f"{prefix}{feeding}.weight"}
    assert changed == (set() if path == "ffn.proj_2" and not gated else both)
    assert np.abs(np.array(model(mx.array(tokens))) - expected).max() < 2e-5 * np.abs(expected).max()


def test_the_gate_is_not_scaled():
    model = tiny_model()
    inner = model.config.ffn_dims[0]
    before = parameters(model)["transformer.layers.0.ffn.proj_1.weight"]
    fold(model, 0, "ffn.proj_2")
    after = parameters(model)["transformer.layers.0.ffn.proj_1.weight"]
    assert np.array_equal(before[:inner], after[:inner]) and not np.array_equal(before[inner:], after[inner:])


@pytest.mark.parametrize("path", PATHS)
def test_the_returned_moments_equal_those_of_the_folded_model(path):
    model = tiny_model()
    with_outliers(model)
    _, after = fold(model, 0, path)
    measured = Stream(model, [mx.array(random_windows(4, 24))]).moments(model.layers[0])[path]
    assert np.allclose(np.array(after), np.array(measured), rtol=1e-3, atol=1e-4 * float(measured.max().item()))


@pytest.mark.parametrize("path", PATHS)
def test_folding_reduces_the_rounding_error(path):
    model = tiny_model()
    with_outliers(model)
    weights = parameters(model)
    before, after = fold(model, 1, path)
    name = f"transformer.layers.1.{path}.weight"
    plain = round_error(mx.array(weights[name]), before, CHOICE, mx.bfloat16)
    folded = round_error(mx.array(parameters(model)[name]), after, CHOICE, mx.bfloat16)
    assert folded < (0.8 if path != "ffn.proj_2" else 1.001) * plain


@pytest.mark.parametrize("path,norm", [("attn.qkv_proj", "attn_norm"), ("ffn.proj_1", "ffn_norm")])
def test_norms_are_stored_exactly_and_keep_zeros_and_signs(path, norm):
    model = tiny_model()
    with_outliers(model)
    weight = getattr(model.layers[0], norm)["weight"]
    weight[5], weight[9] = 0.0, -weight[9]
    tokens = mx.array(random_windows(2, 20, seed=1))
    before, expected = np.array(weight), np.array(model(tokens))
    matrix = parameters(model)[f"transformer.layers.0.{path}.weight"]
    fold(model, 0, path)
    after = np.array(getattr(model.layers[0], norm)["weight"])
    assert is_bfloat16(mx.array(after)) and not np.array_equal(before, after)
    assert after[5] == 0 and after[9] < 0
    # A column whose input is always zero is left alone.
    assert np.array_equal(parameters(model)[f"transformer.layers.0.{path}.weight"][:, 5], matrix[:, 5])
    assert np.abs(np.array(model(tokens)) - expected).max() < 2e-5 * np.abs(expected).max()


def test_small_columns_are_scaled_up_if_all_inputs_have_the_same_size():
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weight[:, ::2] *= 0.1
    scales = np.array(awq.column_scales(mx.array(weight), mx.eye(64), CHOICE, mx.bfloat16))
    assert scales[::2].min() > 1.5 * scales[1::2].max()


def test_scales_are_one_if_nothing_is_gained():
    # An 8-bit grid holds a matrix of whole numbers up to 255 exactly.
    weight = np.random.default_rng(0).integers(0, 256, (16, 32)).astype(np.float32)
    weight[:, 0], weight[:, 1] = 0, 255
    scales = awq.column_scales(mx.array(weight), mx.eye(32), Quantization(32, 8), mx.float32)
    assert np.array_equal(np.array(scales), np.ones(32))
