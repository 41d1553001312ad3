"""Attention as training needs it: queries in blocks, forward and backward, so that no [length x length] matrix exists.

Of a layer's attention its input and its output are kept; the weights are computed again, block by block, in the
backward pass (FlashAttention, arXiv:2205.14135, section 3.1, at the grain of whole rows). A block of queries looks only
at keys up to its end, which for causal attention halves the work. A CPU's own kernels do the same in finer blocks, and
CUDA has a fused gradient, which does the same in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from ...ops import exponentials as cpu_math
from ...ops.layers import Attend, HeadNorms
from .strategy import TILE, fuses_attention_gradient

# Queries in a block. Smaller ones save more of the hidden half, larger ones make better matrix products.
BLOCK = 128


def attention(
    qkv: mx.array, attend: Attend, shape: tuple[int, int], num_heads: tuple[int, int], norms: HeadNorms | None
) -> mx.array:
    """What `attend(qkv, shape, num_heads, norms, None)` gives; gradients reach qkv and the norms' weights.

    Where the gradient is fused, a mask is what `fused_mask` gives.
    """
    if fuses_attention_gradient(qkv.dtype, attend.head_dim):
        return _fused(qkv, attend, shape, num_heads, norms)
    if not attend.fused and qkv.dtype != mx.float32:  # a CPU is many times slower in half precision
        return attention(qkv.astype(mx.float32), attend, shape, num_heads, norms).astype(qkv.dtype)
    has_kernels = attend.kernels is not None and qkv.dtype == mx.float32
    weights = [] if norms is None else [norms.query_weight, norms.key_weight]

    def heads(qkv: mx.array, *weights: mx.array) -> list[mx.array]:
        used = None if norms is None else HeadNorms(norms.eps).use(*weights)
        return list(attend.heads(qkv, shape, num_heads, used))

    @mx.custom_function
    def mix(qkv, *weights):
        queries, keys, values = heads(qkv, *weights)
        if has_kernels:  # queries come scaled
            return attend.kernels.attention(queries.swapaxes(1, 2), [keys], [values], 1.0, *attend.hiding(), shape[1])
        if attend.fused:
            mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attend.scale, mask=attend.mask)
            return [mixed.swapaxes(1, 2).reshape(qkv.shape[0], -1)]
        mixed, sums = _mix(attend, queries, keys, values)
        return [mixed.swapaxes(1, 2).reshape(qkv.shape[0], -1), sums]

    @mix.vjp
    def _(primals, cotangents, outputs):
        primals = primals if isinstance(primals, tuple | list) else [primals]
        primals = mx.depends(list(primals), [cotangents[0]])
        if has_kernels:
            queries, keys, values = heads(*primals)
            whole = queries.swapaxes(1, 2), keys, values, *outputs, cotangents[0], 1.0
            by_queries, by_keys, by_values = attend.kernels.attention_gradient(*whole, *attend.hiding())
            return mx.vjp(heads, primals, [by_queries.swapaxes(1, 2), by_keys, by_values])[1]
        cotangent, mixed = (a.reshape(*shape, num_heads[0], -1).swapaxes(1, 2) for a in (cotangents[0], outputs[0]))
        queries, keys, values = heads(*primals)
        gradients = _gradients(attend, queries, keys, values, mixed, cotangent, *outputs[1:])
        return mx.vjp(heads, primals, gradients)[1]

    return mix(qkv, *weights)[0]  # type: ignore[index]


def fused_mask(segments: mx.array, dtype: mx.Dtype) -> mx.array:
    """The mask of packed rows for the fused gradient: `packed_mask` as numbers to add, of whole tiles.

    Not booleans, of which MLX would make numbers for each head anew in every layer, and of which it makes -inf. What
    is hidden gets half the lowest number, to which scores can be added. Padding sees itself.
    """
    padded = mx.pad(segments, [(0, 0), (0, -segments.shape[1] % TILE)], constant_values=-1)
    return mx.where(packed_mask(padded), 0.0, mx.finfo(dtype).min / 2).astype(dtype)


def packed_mask(segments: mx.array) -> mx.array:
    """What each position of packed rows [rows, length] may see [rows, 1, length, length]: its example, up to itself."""
    positions = mx.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (positions[:, None] >= positions))[:, None]


def _fused(
    qkv: mx.array, attend: Attend, shape: tuple[int, int], num_heads: tuple[int, int], norms: HeadNorms | None
) -> mx.array:
    """The same with MLX's own gradient, whose queries must fill whole tiles: rows are padded to that.

    Padding lies behind all positions, so that causal ones do not see it.
    """
    batch, length = shape
    whole = length + -length % TILE
    if whole > length:
        padding = [(0, 0), (0, whole - length), (0, 0)]
        qkv = mx.pad(qkv.reshape(batch, length, -1), padding).reshape(batch * whole, -1)
    queries, keys, values = attend.heads(qkv, (batch, whole), num_heads, norms)
    mask = attend.mask if isinstance(attend.mask, mx.array) else "causal"  # a single position has no mask
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attend.scale, mask=mask)
    return mixed.swapaxes(1, 2)[:, :length].reshape(batch * length, -1)


def _blocks(attend: Attend, length: int) -> Iterator[tuple[slice, mx.array]]:
    """Each block of queries, with what it may see of the keys up to its end [block, T] or [B, 1, block, T]."""
    for start in range(0, length, BLOCK):
        rows = slice(start, min(length, start + BLOCK))
        if isinstance(attend.mask, mx.array):
            visible = attend.mask[..., rows, : rows.stop]
        else:
            visible = mx.arange(rows.start, rows.stop)[:, None] >= mx.arange(rows.stop)
        yield rows, visible


def _grouped(queries: mx.array, rows: slice, kv_heads: int) -> mx.array:
    """A block of queries [B, H, L, D] as the rows of one product for each key-value head [B, K, H / K * block, D]."""
    batch, _, length, dim = queries.shape
    return queries.reshape(batch, kv_heads, -1, length, dim)[..., rows, :].reshape(batch, kv_heads, -1, dim)


def _scores(attend: Attend, queries: mx.array, keys: mx.array, visible: mx.array) -> mx.array:
    """Scores [B, K, H / K * block, T] of a block, hidden ones at the lowest number; float32 if `fused`."""
    scores = queries @ keys.swapaxes(-1, -2)
    if attend.fused:
        scores = scores.astype(mx.float32) * attend.scale  # elsewhere queries come scaled
    batch, heads, _, total = shape = scores.shape
    visible = visible if visible.ndim == 2 else visible[:, None]
    apart = scores.reshape(batch, heads, -1, visible.shape[-2], total)
    return mx.where(visible, apart, mx.finfo(scores.dtype).min).reshape(shape)


def _mix(attend: Attend, queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """The mixed values [B, H, L, D], and logsumexp of each query's scores [B, K, H / K, L, 1]."""
    batch, kv_heads, length, dim = keys.shape
    mixed: list[mx.array] = []
    sums: list[mx.array] = []
    for rows, visible in _blocks(attend, length):
        past = (slice(None), slice(None), slice(rows.stop))
        scores = _scores(attend, _grouped(queries, rows, kv_heads), keys[past], visible)
        top = mx.max(scores, axis=-1, keepdims=True)
        weights = cpu_math.exp_below(scores, top)
        total = mx.sum(weights, axis=-1, keepdims=True)
        block = ((weights @ values[past]) / total, top + mx.log(total))
        queries = mx.depends(queries, [*block])  # one block after the other
        for blocks, part in zip((mixed, sums), block, strict=True):
            blocks.append(part.reshape(batch, kv_heads, -1, rows.stop - rows.start, part.shape[-1]))
    return mx.concatenate(mixed, axis=3).reshape(batch, -1, length, dim), mx.concatenate(sums, axis=3)


def _gradients(
    attend: Attend,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mixed: mx.array,
    cotangent: mx.array,
    sums: mx.array | None = None,
) -> list[mx.array]:
    """The gradients of queries, keys and values, from the mixed values and their gradient, all [B, heads, L, D].

    `sums` as `_mix` gives them spare the maximum and the sum of each row.
    """
    batch, kv_heads, length, dim = keys.shape
    scale = attend.scale if attend.fused else 1.0
    # How a weight's gradient changes through the sum all weights are divided by: the same for a whole row.
    shift = mx.sum(mixed.astype(mx.float32) * cotangent, axis=-1, keepdims=True)
    # Summed in float32: there may be many blocks.
    by_queries, by_keys, by_values = [], mx.zeros(keys.shape), mx.zeros(values.shape)
    for rows, visible in _blocks(attend, length):
        past = (slice(None), slice(None), slice(rows.stop))
        block, wanted, moved = (_grouped(a, rows, kv_heads) for a in (queries, cotangent, shift))
        scores = _scores(attend, block, keys[past], visible)
        if sums is None:
            weights = mx.softmax(scores, axis=-1)
        else:
            weights = cpu_math.exp_below(scores, sums[..., rows, :].reshape(batch, kv_heads, -1, 1))
        slopes = weights * (wanted @ values[past].swapaxes(-1, -2) - moved) * scale
        slopes, weights = slopes.astype(queries.dtype), weights.astype(queries.dtype)
        # The heads of a group share keys and values, so their gradients add up: the sum is part of the product.
        by_keys[past] += slopes.swapaxes(-1, -2) @ block
        by_values[past] += weights.swapaxes(-1, -2) @ wanted
        by_block = slopes @ keys[past]
        queries = mx.depends(queries, [by_block, by_keys, by_values])
        by_queries.append(by_block.reshape(batch, kv_heads, -1, rows.stop - rows.start, dim))
    joined = mx.concatenate(by_queries, axis=3).reshape(queries.shape)
    return [joined, by_keys.astype(keys.dtype), by_values.astype(values.dtype)]
