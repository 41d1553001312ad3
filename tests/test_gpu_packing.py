"""Packed weights on a GPU: packing, unpacking, products in every mode, and the methods of `quantize`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_openelm import load
from mlx_openelm.cache import make_cache
from mlx_openelm.evaluation.perplexity import kl_divergence
from mlx_openelm.evaluation.windows import load_documents
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.jobs.quantize import QuantizeOptions, quantize
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM, QuantizedLinear
from mlx_openelm.ops import packed as packed_products
from mlx_openelm.ops.packed import MODES

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gpu_devices import (
    FIXTURES,
    GRADIENT_TOLERANCE,
    SHAKESPEARE,
    STAND_IN,
    TOLERANCE,
    assert_close,
    computed,
    needs_gpu,
    needs_real_gpu,
    on,
    slow_on_a_stand_in,
)
from quantization_models import random_windows, write_tiny

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

PACKINGS = [
    Quantization(size, bits, mode) for mode, (all_bits, sizes) in MODES.items() for bits in all_bits for size in sizes
]
# Kernels for several rows are compiled per dtype, packing, and power of two of rows, in seconds each.
COMPILED = [Quantization(32, 4), Quantization(32, 8), *(Quantization.make(mode) for mode in MODES if mode != "affine")]
OUT, IN = 256, 384


def first_quick(choices: list[Quantization]) -> list[Any]:
    """All choices, those after the first as slow tests: whole models take seconds each."""
    return [choices[0], *(pytest.param(choice, marks=pytest.mark.slow) for choice in choices[1:])]


def weight_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, IN**-0.5, (OUT, IN)).astype(np.float32)


def pack(device: str, choice: Quantization, dtype: str) -> list[mx.array]:
    """Levels, scales and in affine mode biases of a matrix in this type."""
    with on(device):
        weight = mx.array(weight_of()).astype(getattr(mx, dtype))
        parts = mx.quantize(weight, choice.group_size, choice.bits, choice.mode)
        mx.eval(parts)
        return list(parts)


def unpack(device: str, choice: Quantization, parts: list[mx.array]) -> np.ndarray:
    """Dequantize parts in float32, with scales in float32."""
    levels, *grid = (part if part.dtype in (mx.uint32, mx.uint8) else part.astype(mx.float32) for part in parts)
    scales, biases = (*grid, None)[:2]
    packing = choice.group_size, choice.bits, choice.mode
    return computed(device, lambda: mx.dequantize(levels, scales, biases, *packing, dtype=mx.float32))


def layer_of(choice: Quantization, parts: list[mx.array]) -> Any:
    layer = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(layer)
    layer.weight, layer.scales = parts[:2]
    layer.biases = parts[2] if len(parts) > 2 else None
    layer.mode, layer.bits, layer.group_size = choice.mode, choice.bits, choice.group_size
    return layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("choice", PACKINGS, ids=str)
def test_packing_is_as_accurate_as_on_a_cpu(choice, dtype):
    """Both devices unpack it to the same numbers."""
    parts, cpus = (pack(device, choice, dtype) for device in ("gpu", "cpu"))
    assert [(part.shape, part.dtype) for part in parts] == [(part.shape, part.dtype) for part in cpus]
    found = unpack("gpu", choice, parts)
    np.testing.assert_allclose(found, unpack("cpu", choice, parts), rtol=1e-5, atol=1e-6)
    lost, on_cpu = (np.linalg.norm(full - weight_of()) for full in (found, unpack("cpu", choice, cpus)))
    assert lost < 1.1 * on_cpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("choice", PACKINGS, ids=str)
def test_products_and_their_gradients(choice, dtype):
    """Few rows and many, activations times packed weights, and transposed products."""
    parts = pack("gpu", choice, dtype)
    layer, full = layer_of(choice, parts), unpack("cpu", choice, parts)
    rows = np.random.default_rng(1).normal(size=(100, IN)).astype(np.float32)
    for count in (1, 7, 100) if choice in COMPILED or dtype == "float32" else (1, 2, 100):
        x = mx.array(rows[:count]).astype(getattr(mx, dtype))
        found = computed("gpu", lambda x=x: layer(x))
        # MLX's kernels for few rows accumulate in the activations' dtype.
        assert_close(found, np.array(x.astype(mx.float32)) @ full.T, 2 * TOLERANCE[dtype])
    expected = mx.random.normal((100, OUT), key=mx.random.key(2))
    slope = computed("gpu", mx.grad(lambda x: (layer(x).astype(mx.float32) * expected).sum()), x)
    assert_close(slope, np.array(expected) @ full, TOLERANCE[dtype])
    columns = np.random.default_rng(3).normal(size=(4, OUT)).astype(np.float32)
    found = computed("gpu", lambda: packed_products.columns_product(mx.array(columns), layer))
    assert_close(found, columns @ full, TOLERANCE[dtype])


# Models.


def packed_model(choice: Quantization, dtype: str, *, expand: bool) -> OpenELM:
    """The trained checkpoint, packed on the CPU so that both devices have the same."""
    with on("cpu"):
        checkpoint = mlx_format.read(SHAKESPEARE)
        checkpoint.quantization = dict.fromkeys(checkpoint.config.matrix_shapes(), choice)
        checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
        for name in list(checkpoint.weights):
            mx.eval(checkpoint.weights[name])
    return build_model(checkpoint, dtype=dtype, expand=expand)


@pytest.mark.parametrize(
    "choice", first_quick(COMPILED) + first_quick([Quantization(32, bits) for bits in (3, 2, 5, 6)]), ids=str
)
def test_a_packed_model_equals_the_unpacked_one_on_a_cpu(choice, reference):
    start = 40 if STAND_IN else 100
    ids = mx.array([(2 * (reference["ids"][3] + reference["greedy"][3]))[: start + 26]])
    ends = [start + count for count in (0, 16, 21, 22, 24, 26)]

    def pieces(dtype: str) -> mx.array:
        model = packed_model(choice, dtype, expand=False)
        assert not model.expanded and isinstance(model.layers[0].attn.qkv_proj, QuantizedLinear)
        cache, parts = make_cache(len(model.layers)), []
        for begin, end in pairwise([0, *ends]):
            parts.append(model(ids[:, begin:end], cache))
        return mx.concatenate(parts, axis=1)

    expected = computed("cpu", lambda: packed_model(choice, "float32", expand=True)(ids))
    for dtype in ("float32", "bfloat16"):
        assert_close(computed("gpu", pieces, dtype), expected, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("choice", first_quick(COMPILED), ids=str)
def test_gradients_pass_through_a_packed_model(choice, reference):
    """As adapters need them, for a prompt and for a few tokens."""

    def gradients(dtype: str, length: int, expand: bool) -> mx.array:
        model = packed_model(choice, dtype, expand=expand)
        ids = mx.array([reference["ids"][3][:length]])

        def loss(scale: mx.array) -> mx.array:
            model.layers[0].attn_norm.weight = scale
            logits = model(ids).astype(mx.float32)
            return nn.losses.cross_entropy(logits[:, :-1], ids[:, 1:], reduction="mean")

        return mx.grad(loss)(model.layers[0].attn_norm.weight)

    for length in (15, 5):
        expected = computed("cpu", gradients, "float32", length, True)
        for dtype in ("float32", "bfloat16"):
            found = computed("gpu", gradients, dtype, length, False)
            assert np.linalg.norm(found - expected) < GRADIENT_TOLERANCE[dtype] * np.linalg.norm(expected)


# Methods.


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"q_bits": 3, "method": ("awq",)}, marks=slow_on_a_stand_in),
        {"q_bits": 3, "method": ("gptq",)},
        pytest.param({"q_bits": 3, "method": ("dwq",)}, marks=slow_on_a_stand_in),
        pytest.param({"target_bpw": 4.2}, marks=pytest.mark.slow),
        pytest.param({"target_bpw": 4.2, "method": ("awq", "gptq", "dwq")}, marks=needs_real_gpu),
        {"recipe": "mixed_3_6"},
        {"q_mode": "mxfp4"},
    ],
    ids=str,
)
def test_methods_give_models_as_good_as_on_a_cpu(options, tmp_path):
    source = write_tiny(tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(load_documents(FIXTURES / "valid.jsonl"))[:6000])
    learns = "method" in options or "target_bpw" in options
    small = {"calibration": str(text), "num_samples": 4, "sequence_length": 32} if learns else {}

    def make(device: str) -> Path:
        return quantize(source, tmp_path / device, QuantizeOptions(**small, **options)).path

    windows = random_windows(4, 32, 2048)
    for device in ("gpu", "cpu"):
        computed(device, make, device)
    full, theirs, ours = (load(path, dtype="float32")[0] for path in (source, tmp_path / "cpu", tmp_path / "gpu"))
    lost, expected = kl_divergence(full, ours, windows), kl_divergence(full, theirs, windows)
    assert 0 < lost < 1.15 * expected + 1e-3
