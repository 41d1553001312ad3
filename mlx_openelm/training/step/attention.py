"""Attention as training needs it: queries in blocks, forward and backward, so that no [L, L] matrix exists.

Only the input and the output of a layer's attention are kept; the weights are computed again, block by block, in the
backward pass (FlashAttention, arXiv:2205.14135, section 3.1, but with whole rows of scores). A block of queries looks
only at keys up to its end, which halves the work of causal attention. The CPU kernels do the same in finer blocks, and
CUDA has a fused gradient, which does the same in one kernel.

Shapes: B rows, L positions, N = B * L, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from ... import native
from ...ops import exponentials
from ...ops.attention import FusedAttention, HeadNorms, KernelAttention, PlainAttention
from .strategy import TILE, fuses_attention_gradient

# Queries per block. Smaller blocks skip more of the masked half, larger ones make more efficient matrix products.
BLOCK = 128


def attention(qkv: mx.array, attend: PlainAttention, num_heads: tuple[int, int], norms: HeadNorms | None) -> mx.array:
    """`attend(qkv, num_heads, norms)` [N, H * D]; gradients reach qkv and the norms' weights.

    If the gradient is fused, the mask of packed rows must be `fused_mask`'s.
    """
    if fuses_attention_gradient(qkv.dtype, attend.head_dim):
        return _fused(qkv, attend, num_heads, norms)
    if isinstance(attend, FusedAttention):
        return _FusedForward(attend, num_heads, norms)(qkv)
    exact = qkv.astype(mx.float32)  # a CPU is many times slower in half precision
    form = _Kernels if isinstance(attend, KernelAttention) else _Blocks
    return form(attend, num_heads, norms)(exact).astype(qkv.dtype)


class _Blocks:
    """Attention whose gradient is computed from its input and output alone, in blocks of queries."""

    def __init__(self, attend: PlainAttention, num_heads: tuple[int, int], norms: HeadNorms | None):
        self.attend, self.num_heads = attend, num_heads
        self.norms = norms

    def __call__(self, qkv: mx.array) -> mx.array:
        """qkv [N, (H + 2K) * D] to [N, H * D]."""

        @mx.custom_function
        def mix(*inputs):
            return self.forward(*self.heads(*inputs))

        @mix.vjp
        def _(primals, cotangents, outputs):
            primals = primals if isinstance(primals, tuple | list) else [primals]
            # Wait for the incoming gradient: otherwise MLX could compute every layer's heads at once.
            primals = mx.depends(list(primals), [cotangents[0]])
            gradients = self.backward(self.heads(*primals), outputs, cotangents[0])
            return mx.vjp(self.heads, primals, gradients)[1]

        weights = [] if self.norms is None else [self.norms.query_weight, self.norms.key_weight]
        return mix(qkv, *weights)[0]  # type: ignore[index]

    def heads(self, qkv: mx.array, *weights: mx.array) -> list[mx.array]:
        """Queries [B, H, L, D], keys and values [B, K, L, D]; `weights` are those of the norms."""
        norms = None if self.norms is None else HeadNorms(weights[0], weights[1], self.norms.eps)
        return list(self.attend.heads(qkv, self.num_heads, norms))

    def forward(self, queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        """The output [N, H * D], and further arrays for `backward`."""
        mixed, sums = _mix(self.attend, queries, keys, values)
        return [_as_rows(mixed), sums]

    def backward(self, heads: list[mx.array], outputs: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
        """The gradients of queries, keys and values, given `forward`'s outputs and the output's gradient."""
        shape = -1, self.attend.length, self.num_heads[0], self.attend.head_dim
        mixed, by_mixed = (x.reshape(shape).swapaxes(1, 2) for x in (outputs[0], cotangent))  # [B, H, L, D]
        queries, keys, values = heads
        return _gradients(self.attend, queries, keys, values, mixed, by_mixed, *outputs[1:])


class _FusedForward(_Blocks):
    """The same with MLX's fused attention forward, on a GPU whose MLX has no fused gradient."""

    def forward(self, queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        scale, mask = self.attend.scale, self.attend.mask
        return [_as_rows(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask))]


class _Kernels(_Blocks):
    """The same with the CPU kernels, forward and backward. Queries are scaled already."""

    attend: KernelAttention

    def forward(self, queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        by_position = queries.swapaxes(1, 2)  # [B, L, H, D]
        mask_args = self.attend.mask_args()
        return list(native.kernels.attention(by_position, [keys], [values], 1.0, *mask_args, self.attend.length))

    def backward(self, heads: list[mx.array], outputs: Sequence[mx.array], cotangent: mx.array) -> list[mx.array]:
        by_queries, by_keys, by_values = native.kernels.attention_gradient(
            heads[0].swapaxes(1, 2), *heads[1:], *outputs, cotangent, 1.0, *self.attend.mask_args()
        )
        return [by_queries.swapaxes(1, 2), by_keys, by_values]


def _as_rows(mixed: mx.array) -> mx.array:
    """[B, H, L, D] to [N, H * D]."""
    batch, _, length, _ = mixed.shape
    return mixed.swapaxes(1, 2).reshape(batch * length, -1)


def fused_mask(segments: mx.array, dtype: mx.Dtype) -> mx.array:
    """The mask of packed rows for the fused gradient: `packed_mask` as numbers to add, in whole tiles.

    It is not boolean: MLX would convert it for each head in every layer, and to -inf. Masked positions get half the
    lowest finite number, so that adding scores stays finite. Padding sees itself.
    """
    padded = mx.pad(segments, [(0, 0), (0, -segments.shape[1] % TILE)], constant_values=-1)
    return mx.where(packed_mask(padded), 0.0, mx.finfo(dtype).min / 2).astype(dtype)


def packed_mask(segments: mx.array) -> mx.array:
    """The mask [rows, 1, length, length] of packed rows [rows, length]: causal within each example."""
    positions = mx.arange(segments.shape[1])
    same = segments[:, :, None] == segments[:, None, :]
    return (same & (positions[:, None] >= positions))[:, None]


def _fused(qkv: mx.array, attend: PlainAttention, num_heads: tuple[int, int], norms: HeadNorms | None) -> mx.array:
    """The same with MLX's own gradient, whose queries must fill whole tiles: rows are padded to that.

    Padding comes after all positions, so that causal attention does not see it.
    """
    length = attend.length
    whole = length + -length % TILE
    padded = qkv.reshape(-1, length, qkv.shape[-1])  # [B, L, (H + 2K) * D]
    if whole > length:
        padded = mx.pad(padded, [(0, 0), (0, whole - length), (0, 0)])
    fused = FusedAttention(attend.head_dim, attend.base, attend.offset, whole, None)
    queries, keys, values = fused.heads(padded, num_heads, norms)
    mask = attend.mask if isinstance(attend.mask, mx.array) else "causal"  # a single position has no mask
    mixed = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=attend.scale, mask=mask)
    # Cut off here, so that the incoming gradient has the order of `mixed` in memory: on CUDA MLX's is wrong otherwise.
    by_position = mixed.swapaxes(1, 2).reshape(-1, whole, num_heads[0] * attend.head_dim)  # [B, L, H * D]
    return by_position[:, :length].reshape(-1, by_position.shape[-1])


def _blocks(attend: PlainAttention, length: int) -> Iterator[tuple[slice, mx.array]]:
    """Each block of queries, with its mask over the keys up to the block's end: [block, T] or [B, 1, block, T]."""
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


def _scores(attend: PlainAttention, queries: mx.array, keys: mx.array, visible: mx.array) -> mx.array:
    """Scores [B, K, H / K * block, T] of a block, masked ones at the lowest number; in float32 on a GPU."""
    scores = queries @ keys.swapaxes(-1, -2)
    if not attend.scales_queries:
        scores = scores.astype(mx.float32) * attend.scale
    batch, heads, _, total = shape = scores.shape
    visible = visible if visible.ndim == 2 else visible[:, None]
    by_head = scores.reshape(batch, heads, -1, visible.shape[-2], total)  # [B, K, H / K, block, T]
    return mx.where(visible, by_head, mx.finfo(scores.dtype).min).reshape(shape)


def _mix(attend: PlainAttention, queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
    """The mixed values [B, H, L, D], and logsumexp of each query's scores [B, K, H / K, L, 1]."""
    batch, kv_heads, length, dim = keys.shape
    mixed: list[mx.array] = []
    sums: list[mx.array] = []
    for rows, visible in _blocks(attend, length):
        past = (slice(None), slice(None), slice(rows.stop))
        scores = _scores(attend, _grouped(queries, rows, kv_heads), keys[past], visible)
        top = mx.max(scores, axis=-1, keepdims=True)
        weights = exponentials.exp_below(scores, top)
        total = mx.sum(weights, axis=-1, keepdims=True)
        block = ((weights @ values[past]) / total, top + mx.log(total))
        queries = mx.depends(queries, [*block])  # one block after the other
        for blocks, part in zip((mixed, sums), block, strict=True):
            blocks.append(part.reshape(batch, kv_heads, -1, rows.stop - rows.start, part.shape[-1]))
    return mx.concatenate(mixed, axis=3).reshape(batch, -1, length, dim), mx.concatenate(sums, axis=3)


def _gradients(
    attend: PlainAttention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mixed: mx.array,
    cotangent: mx.array,
    sums: mx.array | None = None,
) -> list[mx.array]:
    """The gradients of queries, keys and values, from the mixed values and their gradient, all [B, heads, L, D].

    `sums`, as `_mix` gives them, save computing the maximum and the sum of each row again.
    """
    batch, kv_heads, length, dim = keys.shape
    scale = 1.0 if attend.scales_queries else attend.scale
    # The softmax's gradient subtracts the same number from all weights' gradients in a row.
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
            weights = exponentials.exp_below(scores, sums[..., rows, :].reshape(batch, kv_heads, -1, 1))
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
