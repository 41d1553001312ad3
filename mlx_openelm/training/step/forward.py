"""The forward pass of training: the same numbers as the model's, with less kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ... import backend
from ...model import FeedForward, OpenELM, TransformerLayer, project
from ...ops.layers import Attend, HeadNorms
from .attention import attention, fused_mask, packed_mask
from .recompute import recomputed
from .strategy import LAYERS, NOTHING, PARTS, fuses_attention_gradient, here
from .swiglu import swiglu


def hidden_states(model: OpenELM, inputs: mx.array, segments: mx.array | None, *, recompute: str = PARTS) -> mx.array:
    """Hidden states [rows * length, model_dim] of inputs [rows, length], after the final norm.

    With `PARTS` of each layer only what goes from one matrix product to the next is kept: its input, queries, keys and
    values, the mixed values, the second residual, gate and up. Norms, RoPE, attention weights and SwiGLU are computed
    again in the backward pass: they take little time and most of the memory. (A fused gradient of attention keeps its
    rotated queries and keys beside.) With `LAYERS` only each layer's input is kept, with `NOTHING` all that gradients
    need.

    Args:
        segments: of packed rows, as in `Batch`; None for rows that are one example each.
    """
    run = {NOTHING: _run, PARTS: _run_keeping_little, LAYERS: _run_again}[recompute]
    return model.hidden_states(inputs, mask=_mask(model, segments), run_layer=run).reshape(inputs.size, -1)


def _mask(model: OpenELM, segments: mx.array | None) -> mx.array | None:
    """What positions of packed rows see, as attention takes it here; None where the model's causal mask is enough."""
    if segments is None:
        return None
    dtype = model.transformer.norm["weight"].dtype
    fused = fuses_attention_gradient(dtype, model.config.head_dim)
    return fused_mask(segments, dtype) if fused else packed_mask(segments)


def _kept(modules: Sequence[nn.Module], function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """`recomputed` without recomputing."""
    return function(*inputs)


def _run(
    layer: TransformerLayer, x: mx.array, attend: Attend, shape: tuple[int, int], _: Any, stage: Any = _kept
) -> mx.array:
    attn, ffn = layer.attn, layer.ffn
    qkv = stage([layer.attn_norm, attn.qkv_proj], layer.project, x)
    norms = attn.norms and HeadNorms(attn.norms.eps).use(attn.q_norm.weight, attn.k_norm.weight)
    mixed = attention(qkv, attend, shape, attn.num_heads, norms)
    x = stage([attn.out_proj], lambda mixed, x: project(attn.out_proj, mixed, x), mixed, x)
    inner = stage([layer.ffn_norm, ffn.proj_1], layer.expand, x)
    return stage([ffn.proj_2], _finish(ffn), inner, x)


def _finish(ffn: FeedForward) -> Callable[..., mx.array]:
    """The second stage of a feed-forward; on a GPU with a gradient of SwiGLU that keeps nothing but its input."""
    if not (ffn.has_swiglu and backend.on_gpu()):
        return ffn
    return lambda inner, x: project(ffn.proj_2, swiglu(inner), x)


def _run_keeping_little(
    layer: TransformerLayer, x: mx.array, attend: Attend, shape: tuple[int, int], _: Any
) -> mx.array:
    return _run(layer, x, attend, shape, None, recomputed)


def _run_again(layer: TransformerLayer, x: mx.array, attend: Attend, shape: tuple[int, int], _: Any) -> mx.array:
    run = _run if here().within_layers == NOTHING else _run_keeping_little
    return recomputed([layer], lambda x: run(layer, x, attend, shape, None), x)
