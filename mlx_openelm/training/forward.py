"""The forward pass of training: the same numbers as the model's, with less kept for the backward pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..model import OpenELM, TransformerLayer, project
from ..ops import Attend, HeadNorms
from .attention import attention
from .recompute import recomputed


def hidden_states(
    model: OpenELM, inputs: mx.array, segments: mx.array | None, *, grad_checkpoint: bool = False
) -> mx.array:
    """Hidden states [rows * length, model_dim] of inputs [rows, length], after the final norm.

    Of each layer only what goes from one matrix product to the next is kept: its input, queries, keys and values, the
    mixed values, the second residual, gate and up. Norms, RoPE, attention weights and SwiGLU are computed again in the
    backward pass: they take little time and most of the memory. With `grad_checkpoint` only each layer's input is kept.
    """
    run = _run_again if grad_checkpoint else _run
    return model.hidden_states(inputs, mask=packed_mask(segments), run_layer=run).reshape(inputs.size, -1)


def packed_mask(segments: mx.array | None) -> mx.array | None:
    """What each position of packed rows may see [rows, 1, length, length]: its own example, up to itself.

    None for rows that are one example each (`segments` is None): the model's causal mask is enough.
    """
    if segments is None:
        return None
    positions = mx.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (positions[:, None] >= positions))[:, None]


def _run(layer: TransformerLayer, x: mx.array, attend: Attend, shape: tuple[int, int], _: Any) -> mx.array:
    attn, ffn = layer.attn, layer.ffn
    qkv = recomputed([layer.attn_norm, attn.qkv_proj], layer.project, x)
    norms = attn.norms and HeadNorms(attn.norms.eps).use(attn.q_norm.weight, attn.k_norm.weight)
    mixed = attention(qkv, attend, shape, attn.num_heads, norms)
    x = recomputed([attn.out_proj], lambda mixed, x: project(attn.out_proj, mixed, x), mixed, x)
    inner = recomputed([layer.ffn_norm, ffn.proj_1], layer.expand, x)
    return recomputed([ffn.proj_2], ffn, inner, x)


def _run_again(layer: TransformerLayer, x: mx.array, attend: Attend, shape: tuple[int, int], _: Any) -> mx.array:
    return recomputed([layer], lambda x: _run(layer, x, attend, shape, None), x)
