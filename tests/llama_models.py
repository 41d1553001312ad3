"""An OpenELM model that is a Llama: no norms over heads, equal layers; and the same weights in PyTorch."""

from __future__ import annotations

from typing import Any

from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np

LAYERS, DIM, HEAD_DIM, HEADS, KV_HEADS, VOCAB, LENGTH = 3, 64, 8, 8, 2, 2048, 64


def openelm() -> OpenELM:
    """Three layers, 64 wide, with random weights, trained on 64 positions, so to say."""
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": LAYERS,
            "model_dim": DIM,
            "head_dim": HEAD_DIM,
            "num_gqa_groups": HEADS // KV_HEADS,
            "num_query_heads": [HEADS] * LAYERS,
            "num_kv_heads": [KV_HEADS] * LAYERS,
            "ffn_multipliers": [1.5] * LAYERS,
            "qkv_multipliers": [1.0, 1.0],
            "ffn_dim_divisor": 16,
            "vocab_size": VOCAB,
            "max_context_length": LENGTH,
            "rope_max_length": 2 * LENGTH,
            "share_input_output_layers": False,
            "normalize_qk_projections": False,
        }
    )
    mx.random.seed(0)
    return OpenELM(config)


def llama(model: OpenELM) -> Any:
    """The model of transformers with the weights of `openelm()`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=model.config.ffn_dims[0],
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    weights = {
        "model.embed_tokens": model.transformer.token_embeddings.weight,
        "model.norm": model.transformer.norm.weight,
        "lm_head": model.lm_head.weight,
    }
    bounds = [HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM]
    for number, layer in enumerate(model.layers):
        place = f"model.layers.{number}"
        parts = np.split(np.array(layer.attn.qkv_proj.weight), bounds)
        weights |= {f"{place}.self_attn.{name}_proj": part for name, part in zip("qkv", parts, strict=True)}
        gate, up = np.split(np.array(layer.ffn.proj_1.weight), 2)
        weights |= {
            f"{place}.self_attn.o_proj": layer.attn.out_proj.weight,
            f"{place}.mlp.gate_proj": gate,
            f"{place}.mlp.up_proj": up,
            f"{place}.mlp.down_proj": layer.ffn.proj_2.weight,
            f"{place}.input_layernorm": layer.attn_norm.weight,
            f"{place}.post_attention_layernorm": layer.ffn_norm.weight,
        }
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict({f"{name}.weight": torch.tensor(np.array(value)) for name, value in weights.items()})
    return theirs
