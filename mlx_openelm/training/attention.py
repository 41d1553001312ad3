"""Attention as training needs it: queries in blocks, forward and backward, so that no [length x length] matrix exists.

Of a layer's attention its input and its output are kept; the weights are computed again, block by block, in the
backward pass (FlashAttention, arXiv:2205.14135, section 3.1, at the grain of whole rows). A block of queries looks only
at keys up to its end, which for causal attention halves the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from .. import cpu_math
from ..ops import Attend, HeadNorms

# Queries in a block. Smaller ones save more of the hidden half, larger ones make better matrix products.
BLOCK = 128


def attention(
    qkv: mx.array, attend: Attend, shape: tuple[int, int], num_heads: tuple[int, int], norms: HeadNorms | None
) -> mx.array:
    """What `attend(qkv, shape, num_heads, norms, None)` gives; gradients reach qkv and the norms' weights."""
    weights = [] if norms is None else [norms.query_weight, norms.key_weight]

    def heads(qkv: mx.array, *weights: mx.array) -> list[mx.array]:
        used = None if norms is None else HeadNorms(norms.eps).use(*weights)
        return list(attend.heads(qkv, shape, num_heads, used))

    @mx.custom_function
    def mix(qkv, *weights):
        queries, keys, values = heads(qkv, *weights)
        if attend.fused:
            mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attend.scale, mask=attend.mask)
        else:
            mixed = mx.concatenate(list(_mixed(attend, queries, keys, values)), axis=2)
        return mixed.swapaxes(1, 2).reshape(qkv.shape[0], -1)

    @mix.vjp
    def _(primals, cotangent, mixed):
        primals = primals if isinstance(primals, tuple | list) else [primals]
        primals = mx.depends(list(primals), [cotangent])
        cotangent, mixed = (a.reshape(*shape, num_heads[0], -1).swapaxes(1, 2) for a in (cotangent, mixed))
        queries, keys, values = heads(*primals)
        gradients = _gradients(attend, queries, keys, values, mixed, cotangent)
        return mx.vjp(heads, primals, gradients)[1]

    return mix(qkv, *weights)  # type: ignore[return-value]


def _blocks(attend: Attend, length: int) -> Iterator[tuple[slice, mx.array]]:
    """Each block of queries, with what it may see of the keys up to its end [block, T] or [B, 1, block, T]."""
    for start in range(0, length, BLOCK):
        rows = slice(start, min(length, start + BLOCK))
        if isinstance(attend.mask, mx.array):
            visible = attend.mask[..., rows, : rows.stop]
        else:
            visible = mx.arange(rows.start, rows.stop)[:, None] >= mx.arange(rows.stop)
        yield rows, visible


def _weights(attend: Attend, queries: mx.array, keys: mx.array, visible: mx.array) -> tuple[mx.array, mx.array]:
    """Attention weights [B, K, H / K, block, T] before they are divided by their sums, and the sums."""
    scores = queries @ keys.swapaxes(-1, -2)
    if attend.fused:
        scores = scores.astype(mx.float32) * attend.scale  # elsewhere queries come scaled
    scores = mx.where(visible if visible.ndim == 2 else visible[:, None], scores, mx.finfo(scores.dtype).min)
    top = mx.max(scores, axis=-1, keepdims=True)
    weights = mx.exp(scores - top) if attend.fused else cpu_math.exp_below(scores, top)
    return weights, mx.sum(weights, axis=-1, keepdims=True)


def _grouped(queries: mx.array, kv_heads: int) -> mx.array:
    """[B, H, L, D] as [B, K, H / K, L, D]: the query heads of each key-value head."""
    batch, _, length, dim = queries.shape
    return queries.reshape(batch, kv_heads, -1, length, dim)


def _mixed(attend: Attend, queries: mx.array, keys: mx.array, values: mx.array) -> Iterator[mx.array]:
    """The mixed values [B, H, block, D] of each block."""
    grouped = _grouped(queries, keys.shape[1])
    for rows, visible in _blocks(attend, queries.shape[2]):
        past = (slice(None), slice(None), None, slice(rows.stop))
        weights, total = _weights(attend, grouped[..., rows, :], keys[past], visible)
        mixed = (weights @ values[past]) / total
        # One block after the other.
        grouped = mx.depends(grouped, [mixed])
        yield mixed.reshape(*queries.shape[:2], -1, queries.shape[3])


def _gradients(
    attend: Attend, queries: mx.array, keys: mx.array, values: mx.array, mixed: mx.array, cotangent: mx.array
) -> list[mx.array]:
    """The gradients of queries, keys and values, from the mixed values and their gradient, all [B, heads, L, D]."""
    kv_heads, length = keys.shape[1], queries.shape[2]
    scale = attend.scale if attend.fused else 1.0
    # How a weight's gradient changes through the sum all weights are divided by: the same for a whole row.
    shift = _grouped(mx.sum((mixed * cotangent).astype(mx.float32), axis=-1, keepdims=True), kv_heads)
    grouped, wanted = _grouped(queries, kv_heads), _grouped(cotangent, kv_heads)
    by_queries, by_keys, by_values = [], mx.zeros_like(keys), mx.zeros_like(values)
    for rows, visible in _blocks(attend, length):
        past = (slice(None), slice(None), None, slice(rows.stop))
        block, slope = grouped[..., rows, :], wanted[..., rows, :]
        weights, total = _weights(attend, block, keys[past], visible)
        slopes = weights * (slope @ values[past].swapaxes(-1, -2) - shift[..., rows, :]) * (scale / total)
        slopes = slopes.astype(queries.dtype)
        by_queries.append(slopes @ keys[past])
        # The heads of a group share keys and values, so their gradients add up: the sum is part of the product.
        normalized = (slope / total).astype(queries.dtype)
        by_keys[:, :, : rows.stop] += _rows(slopes).swapaxes(-1, -2) @ _rows(block)
        by_values[:, :, : rows.stop] += _rows(weights.astype(queries.dtype)).swapaxes(-1, -2) @ _rows(normalized)
        grouped = mx.depends(grouped, [by_queries[-1], by_keys, by_values])
    joined = mx.concatenate(by_queries, axis=3)
    return [joined.reshape(queries.shape), by_keys, by_values]


def _rows(grouped: mx.array) -> mx.array:
    """[B, K, H / K, L, n] as [B, K, H / K * L, n]."""
    batch, heads, _, _, size = grouped.shape
    return grouped.reshape(batch, heads, -1, size)
