"""A model small enough for half precision, which is slow on a CPU, to be fast."""

from __future__ import annotations

from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM

import mlx.core as mx


def small(dtype: mx.Dtype) -> OpenELM:
    """Two layers, 32 wide, 200 tokens; always the same random weights."""
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": 2,
            "model_dim": 32,
            "head_dim": 8,
            "ffn_multipliers": [1.0, 2.0],
            "qkv_multipliers": [0.5, 1.0],
            "vocab_size": 200,
            "max_context_length": 128,
            "rope_max_length": 256,
            "ffn_dim_divisor": 16,
            "share_input_output_layers": True,
        }
    )
    mx.random.seed(3)
    model = OpenELM(config)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model
