"""Packed matrices before they are computed: dtypes, shapes and sizes."""

from __future__ import annotations

from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import bits_per_weight, quantize_weights
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.ops.packed import MODES

import mlx.core as mx
import numpy as np
import pytest

PATH = "transformer.layers.0.ffn.proj_1"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_dtypes_and_shapes_are_known_before_a_matrix_is_packed(mode, dtype):
    weight = mx.array(np.random.default_rng(0).standard_normal((96, 128), np.float32)).astype(dtype)
    packed = quantize_weights(Weights.of_arrays({f"{PATH}.weight": weight}), {PATH: Quantization.make(mode)})
    named = {name: (tensor.dtype, tensor.shape) for name, tensor in packed.tensors.items()}
    assert named[f"{PATH}.weight"][0] == mx.uint32 and f"{PATH}.scales" in named
    assert named == {name: (packed[name].dtype, packed[name].shape) for name in named}


@pytest.mark.parametrize(
    ("mode", "bits"),
    [
        ("affine", 4 + 2 * 16 / 64),  # a scale and a bias of 16 bits for 64 weights
        ("mxfp4", 4 + 8 / 32),  # scales of 8 bits, and no biases
        ("nvfp4", 4 + 8 / 16),
        ("mxfp8", 8 + 8 / 32),
    ],
)
def test_bits_per_weight_count_scales_and_biases(mode, bits):
    config = ModelConfig.from_name("OpenELM-270M")
    choices = {path: Quantization.make(mode) for path in config.matrix_shapes()}
    # The norms are a few thousandths of a percent.
    assert bits_per_weight(config, choices, 2) == pytest.approx(bits, rel=1e-3)
