"""Operations per token, counted by hand, and the measured peak of the device."""

from __future__ import annotations

from mlx_openelm.config import ModelConfig
from mlx_openelm.evaluation import flops

import mlx.core as mx
import pytest
from quantization_models import tiny_config


def test_operations_per_token_are_those_of_the_products():
    # Layer 0: 2 query heads and 1 of keys, 96 inner; layer 1: 4 and 2, 128 inner; head_dim 16, 64 wide, 256 tokens.
    matrices = 64 * 64 + 32 * 64 + 192 * 64 + 64 * 96
    matrices += 128 * 64 + 64 * 64 + 256 * 64 + 64 * 128
    forward = 2 * (matrices + 256 * 64)
    # Each of 10 positions sees half of the 10 on average, in two products over the queries' width.
    forward += 2 * 2 * (2 + 4) * 16 * 10 / 2
    assert flops.training_flops(tiny_config(), 10) == 3 * forward
    untied = tiny_config(share_input_output_layers=False)
    assert flops.training_flops(untied, 10) == 3 * forward


def test_it_is_about_six_times_the_parameters():
    config = ModelConfig.from_name("270m")
    assert flops.training_flops(config, 1) == pytest.approx(6 * config.num_parameters, rel=1e-3)


def test_a_peak_is_measured(monkeypatch):
    monkeypatch.setattr(flops, "_CPU_SIDE", 128)
    assert 1e7 < flops.measured_peak(mx.float32) < 1e14


def test_half_precision_is_measured_as_it_is_computed(either_way):
    """On a CPU, MLX's own product is a hundred times slower than in float32: a run would reach 1000% of the peak."""
    assert flops.measured_peak(mx.bfloat16) > flops.measured_peak(mx.float32) / 10
