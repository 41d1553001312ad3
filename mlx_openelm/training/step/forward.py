"""The forward pass of training: the same numbers as the model's, with less kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ... import backend
from ...model import Attention, FeedForward, Linear, OpenELM, RMSNorm, TransformerLayer, add_to
from ...ops.attention import PlainAttention, choose
from ..options import LAYERS, NOTHING, PARTS
from . import gradients
from .attention import attention, fused_mask, packed_mask
from .recompute import recomputed
from .strategy import fuses_attention_gradient, here


def hidden_states(model: OpenELM, inputs: mx.array, segments: mx.array | None, *, recompute: str = PARTS) -> mx.array:
    """Hidden states [rows * length, model_dim] of inputs [rows, length], after the final norm.

    `PARTS` keeps only what goes from one matrix product of a layer to the next: its input, queries, keys and values,
    attention's output, the second residual, gate and up. Norms, RoPE, attention weights and SwiGLU are computed again
    in the backward pass: they take little time and most of the memory. (A fused gradient of attention also keeps its
    rotated queries and keys.) `LAYERS` keeps only each layer's input, `NOTHING` recomputes nothing.

    Args:
        segments: of packed rows, as in `Batch`; None for rows that are one example each.
    """
    run = {NOTHING: _run, PARTS: _run_keeping_little, LAYERS: _run_again}[recompute]
    return model.hidden_states(inputs, mask=_mask(model, segments), run_layer=run).reshape(inputs.size, -1)


def _mask(model: OpenELM, segments: mx.array | None) -> mx.array | None:
    """The attention mask of packed rows; None if the model's causal mask is enough."""
    if segments is None:
        return None
    # A module put in the norm's place may keep the weight elsewhere.
    dtype = dict(tree_flatten(model.transformer.norm.parameters())).popitem()[1].dtype
    fused = fuses_attention_gradient(dtype, model.config.head_dim)
    return fused_mask(segments, dtype) if fused else packed_mask(segments)


def _kept(modules: Sequence[nn.Module], function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """Like `recomputed`, but keeps everything instead."""
    return function(*inputs)


def _run(layer: nn.Module, x: mx.array, attend: PlainAttention, _: Any, stage: Any = _kept) -> mx.array:
    """`layer(x, attend)` [N, dim], in stages that each end with a matrix product."""
    if not _has_stages(layer):
        return stage([layer], lambda x: layer(x, _without_padding(attend)), x)
    attn, ffn = layer.attn, layer.ffn
    qkv = stage([layer.attn_norm, attn.qkv_proj], lambda x: _project(attn.qkv_proj, _normalize(layer.attn_norm, x)), x)
    qkv, norms = attn.head_norms(qkv)
    mixed = attention(qkv, attend, attn.num_heads, norms)
    h = stage([attn.out_proj], lambda mixed, x: _project(attn.out_proj, mixed, x), mixed, x)
    inner = stage([layer.ffn_norm, ffn.proj_1], lambda h: _project(ffn.proj_1, _normalize(layer.ffn_norm, h)), h)
    # On a GPU SwiGLU has a gradient that keeps nothing but its input.
    activate = gradients.swiglu if ffn.is_swiglu and backend.on_gpu() else ffn.activate
    return stage([ffn.proj_2], lambda inner, h: _project(ffn.proj_2, activate(inner), h), inner, h)


def _project(module: nn.Module, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """module(x), plus the residual if there is one."""
    if type(module) is Linear and backend.on_cuda():
        return gradients.linear(x, module["weight"], residual)
    return module(x) if residual is None else add_to(residual, module, x)


def _normalize(module: nn.Module, x: mx.array) -> mx.array:
    """module(x) for a norm."""
    if type(module) is RMSNorm and not module.trainable_parameters() and backend.on_cuda():
        return gradients.frozen_rms_norm(x, module["weight"], module.eps)
    return module(x)


def _has_stages(layer: nn.Module) -> bool:
    """Whether a layer is built as `OpenELM` builds it, whatever its norms and projections are."""
    return type(layer) is TransformerLayer and type(layer.attn) is Attention and type(layer.ffn) is FeedForward


def _without_padding(attend: PlainAttention) -> PlainAttention:
    """`attend` for a layer that is called as a whole: without the padding of a fused gradient's mask to whole tiles."""
    if isinstance(attend.mask, mx.array):
        mask = attend.mask[..., : attend.length, : attend.length]
        return choose(attend.head_dim, attend.base, attend.offset, attend.length, mask)
    return attend


def _run_keeping_little(layer: nn.Module, x: mx.array, attend: PlainAttention, _: Any) -> mx.array:
    return _run(layer, x, attend, None, recomputed)


def _run_again(layer: nn.Module, x: mx.array, attend: PlainAttention, _: Any) -> mx.array:
    run = _run if here().within_layers == NOTHING else _run_keeping_little
    return recomputed([layer], lambda x: run(layer, x, attend, None), x)
