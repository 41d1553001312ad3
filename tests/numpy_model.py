"""OpenELM in float64 NumPy, one head at a time, from the architecture facts of the paper and the design."""

from __future__ import annotations

from collections.abc import Mapping
from math import erf

from mlx_openelm.config import ModelConfig

import numpy as np

ACTIVATIONS = {
    "swish": lambda x: x / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: np.array([0.5 * v * (1 + erf(v / 2**0.5)) for v in x.ravel()]).reshape(x.shape),
    "relu": lambda x: np.maximum(x, 0),
}


def logits(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    rows: np.ndarray,
    mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
) -> np.ndarray:
    """Logits [batch, length, vocabulary] of weights by Hugging Face name.

    rows: tokens [batch, length]; mask: numbers to add [batch, length, length]; positions [batch, length].
    """
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    batch, length = rows.shape
    if mask is None:
        mask = np.where(np.tril(np.ones((length, length))) > 0, 0, -np.inf)[None]
    mask = np.broadcast_to(mask, (batch, length, length))
    if positions is None:
        positions = np.broadcast_to(np.arange(length), (batch, length))
    act = ACTIVATIONS[config.activation_fn_name]
    half, dim = config.head_dim // 2, config.head_dim

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weight

    def rotate(x: np.ndarray, where: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for i in range(half):
            angle = where * config.rope_freq_constant ** (-2 * i / dim)
            out[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
            out[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
        return out

    result = []
    for row, row_mask, where in zip(rows, mask, positions, strict=True):
        x = w["transformer.token_embeddings.weight"][row]
        for layer in range(config.num_transformer_layers):
            p = f"transformer.layers.{layer}."
            query_heads, kv_heads = config.num_query_heads[layer], config.num_kv_heads[layer]
            qkv = norm(x, w[p + "attn_norm.weight"]) @ w[p + "attn.qkv_proj.weight"].T
            heads = [qkv[:, i * dim : (i + 1) * dim] for i in range(query_heads + 2 * kv_heads)]
            for i in range(query_heads + kv_heads):
                if config.normalize_qk_projections:
                    heads[i] = norm(heads[i], w[p + f"attn.{'q' if i < query_heads else 'k'}_norm.weight"])
                heads[i] = rotate(heads[i], where)
            mixed = []
            for i in range(query_heads):
                group = i // (query_heads // kv_heads)
                keys, values = heads[query_heads + group], heads[query_heads + kv_heads + group]
                scores = heads[i] @ keys.T / dim**0.5 + row_mask
                shares = np.exp(scores - scores.max(-1, keepdims=True))
                mixed.append(shares / shares.sum(-1, keepdims=True) @ values)
            x = x + np.concatenate(mixed, -1) @ w[p + "attn.out_proj.weight"].T
            inner = norm(x, w[p + "ffn_norm.weight"]) @ w[p + "ffn.proj_1.weight"].T
            if config.ffn_with_glu:
                size = inner.shape[-1] // 2
                inner = act(inner[:, :size]) * inner[:, size:]
            else:
                inner = act(inner)
            x = x + inner @ w[p + "ffn.proj_2.weight"].T
        x = norm(x, w["transformer.norm.weight"])
        head = "transformer.token_embeddings" if config.share_input_output_layers else "lm_head"
        result.append(x @ w[f"{head}.weight"].T)
    return np.stack(result)
