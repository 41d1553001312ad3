"""Attention of one forward pass: with our kernels on a CPU, fused by MLX on a GPU, else in plain products.

Shapes: B rows, L new positions, N = B * L, T positions with the past, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import mlx.core as mx

from .. import backend, native
from ..cache import KVCache, RowCaches
from ..cache.rows import append
from . import exponentials, layers, packed

Heads = tuple[mx.array, mx.array, mx.array]

# With this many positions a row, per-operation overhead no longer matters, so a layer need not be one kernel. And when
# a prompt only fills the cache, separate operations let MLX skip all of the last layer but its keys and values.
MANY_LAYER_ROWS = backend.MANY_POSITIONS


def choose(
    head_dim: int, base: float, offset: layers.Offset, length: int, mask: mx.array | str | None
) -> PlainAttention:
    """The attention for MLX's default device; positions and mask are prepared once and shared by all layers.

    Args:
        base: RoPE rotates by the angles position / base ** (2j / D).
        offset: the first position: an int, or one for each row, as a list of B or an array [B].
        length: L.
        mask: None, "causal", booleans (True: visible) or numbers to add, [L, T] or [B, 1, L, T].
    """
    if backend.on_gpu():
        return FusedAttention(head_dim, base, offset, length, mask)
    if native.kernels is not None:
        return KernelAttention(head_dim, base, offset, length, mask)
    return PlainAttention(head_dim, base, offset, length, mask)


class HeadNorms:
    """RMSNorm over head_dim of an attention's queries and keys: their weights [D], and eps."""

    def __init__(self, query_weight: mx.array, key_weight: mx.array, eps: float):
        self.query_weight, self.key_weight, self.eps = query_weight, key_weight, eps
        self._joined: mx.array | None = None

    def joined(self, num_heads: tuple[int, int], scale: float) -> mx.array:
        """The weight of every head [H + K, D], the queries' times `scale`, so that one product normalizes all."""
        if self._joined is None:
            weights = (self.query_weight * scale, self.key_weight)
            rows = [mx.broadcast_to(w, (n, w.size)) for w, n in zip(weights, num_heads, strict=True)]
            self._joined = mx.concatenate(rows)
        return self._joined


class PlainAttention:
    """Attention in plain products, for a CPU without kernels; arguments as for `choose`. The others build on it."""

    scales_queries = True  # whether `heads` gives queries already scaled

    def __init__(self, head_dim: int, base: float, offset: layers.Offset, length: int, mask: mx.array | str | None):
        self.head_dim, self.base, self.offset, self.length, self.mask = head_dim, base, offset, length, mask
        self.scale = head_dim**-0.5
        self._added: mx.array | None = None  # the mask as numbers to add, made by the first layer that needs it

    @cached_property
    def _rotate(self) -> layers.Rotation:
        return layers.Rotation(self.head_dim, self.base, self.offset, self.length)

    def __call__(
        self, qkv: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None, cache: Any = None
    ) -> mx.array:
        """Projected queries, keys and values [..., (H + 2K) * D] to the output of attention [..., H * D].

        Args:
            qkv: of N rows in all, [N, ...] or [B, L, ...].
            num_heads: H, K.
            norms: the norms of queries and keys before RoPE, if any.
            cache: extended in place, ours or mlx-lm's, for a step of several sequences `RowCaches`; or None.
        """
        queries, keys, values = self.heads(qkv, num_heads, norms)
        if isinstance(cache, RowCaches):
            output = self._step(queries, keys, values, cache)
        else:
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
            output = self._mix_any(queries, cache, keys, values)
        if self.length > 1:
            output = output.swapaxes(1, 2)  # [B, L, H, D]
        return output.reshape(*qkv.shape[:-1], -1)  # [..., H * D]

    def _step(self, queries: mx.array, keys: mx.array, values: mx.array, cache: RowCaches) -> mx.array:
        """Attention of a step of several sequences, position by position [N, H, 1, D]."""
        held = enumerate(cache.append(keys, values))
        return mx.concatenate([self._mix_any(queries[row : row + 1], *past) for row, past in held])

    def _mix_any(self, queries: mx.array, cache: Any, keys: Any, values: Any) -> mx.array:
        """softmax(queries keys^T) values [B, H, L, D] with keys and values as the cache returns them."""
        if not hasattr(cache, "bits"):
            return self._mix(queries, keys, values)
        if packed.attends_packed(self.length):
            return self._mix_packed(queries, keys, values, cache)
        return self._mix(queries, *packed.unpacked_cache(cache, keys[0].shape[2], queries.dtype))

    def heads(self, qkv: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None) -> Heads:
        """Normalized and rotated queries [B, H, L, D], keys and values [B, K, L, D]; queries are already scaled."""
        heads = qkv.reshape(-1, self.length, sum(num_heads) + num_heads[1], self.head_dim)  # [B, L, H + 2K, D]
        rotated, values = mx.split(heads, [sum(num_heads)], axis=2)
        if norms is not None:
            rotated = layers.normalized(rotated, norms.eps) * norms.joined(num_heads, self.scale)
        rotated = self._rotate(rotated).swapaxes(1, 2)  # [B, H + K, L, D]
        queries, keys = mx.split(rotated, [num_heads[0]], axis=1)
        return queries if norms is not None else queries * self.scale, keys, values.swapaxes(1, 2)

    def _mix(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """softmax(queries keys^T) values [B, H, L, D]."""
        batch, kv_heads = keys.shape[:2]
        # The query heads of a group are rows of one product: keys and values are not repeated.
        rows = queries.reshape(batch, kv_heads, -1, self.head_dim)  # [B, K, H / K * L, D]
        weights, total = self._softmax(rows @ keys.swapaxes(-1, -2))
        output = weights @ values
        return (output if total is None else output / total).reshape(queries.shape)

    def _mix_packed(self, queries: mx.array, keys: Any, values: Any, cache: Any) -> mx.array:
        """The same with keys and values as packed weights, scales and biases."""
        batch, kv_heads = keys[0].shape[:2]
        rows = queries.reshape(batch, kv_heads, -1, self.head_dim)
        weights, total = self._softmax(_packed_product(rows, keys, cache, transpose=True))
        output = _packed_product(weights, values, cache, transpose=False)
        return (output if total is None else output / total).reshape(queries.shape)

    def _softmax(self, scores: mx.array) -> tuple[mx.array, mx.array | None]:
        """Attention weights from scores [B, K, H / K * L, T]; with many rows unnormalized, and their sums."""
        shape = scores.shape
        if self.mask is not None:
            if self._added is None:
                self._added = _additive_mask(self.mask, self.length, shape[3], scores.dtype)
            by_head = scores.reshape(*shape[:2], -1, self.length, shape[3])  # [B, K, H / K, L, T]
            scores = (by_head + self._added).reshape(shape)
        if self.length < layers.MANY_ROWS:
            return mx.softmax(scores, axis=-1, precise=True), None
        weights = exponentials.exp_below(scores, mx.max(scores, axis=-1, keepdims=True))
        return weights, mx.sum(weights, axis=-1, keepdims=True)


class FusedAttention(PlainAttention):
    """Attention with MLX's fused kernels, for a GPU. Queries stay unscaled, since the kernel scales them."""

    scales_queries = False

    def heads(self, qkv: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None) -> Heads:
        """Normalized and rotated queries [B, H, L, D], keys and values [B, K, L, D]; queries are not scaled."""
        heads = qkv.reshape(-1, self.length, sum(num_heads) + num_heads[1], self.head_dim)  # [B, L, H + 2K, D]
        queries, keys, values = mx.split(heads, [num_heads[0], sum(num_heads)], axis=2)
        if norms is not None:
            queries = mx.fast.rms_norm(queries, norms.query_weight, norms.eps)
            keys = mx.fast.rms_norm(keys, norms.key_weight, norms.eps)
        queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))  # [B, heads, L, D]
        return self._rope(queries), self._rope(keys), values

    def _rope(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.base, scale=1.0, offset=self._positions)

    @cached_property
    def _positions(self) -> int | mx.array:
        """`offset` for MLX: made once for all layers."""
        return mx.array(self.offset) if isinstance(self.offset, list) else self.offset

    def _step(self, queries: mx.array, keys: mx.array, values: mx.array, cache: RowCaches) -> mx.array:
        """As in the base class, but the positions of a growing cache at once."""
        outputs = []
        for one, rows in cache.sequences():
            heads = [x[rows].swapaxes(0, 2) for x in (queries, keys, values)]  # [1, heads, L, D]
            if (length := rows.stop - rows.start) > 1 and hasattr(one, "max_size"):
                held = append(one, keys[rows], values[rows])
                outputs += [self._mix(heads[0][:, :, i : i + 1], *fetched[1:]) for i, fetched in enumerate(held)]
                continue
            inner = self if length == 1 else FusedAttention(self.head_dim, self.base, 0, length, "causal")
            output = inner._mix_any(heads[0], one, *one.update_and_fetch(*heads[1:]))
            outputs.append(output.swapaxes(0, 2))
        return mx.concatenate(outputs)

    def _mix(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        if isinstance(self.mask, mx.array):
            self.mask = _fused_mask(self.mask, queries.dtype)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=self.mask)

    def _mix_packed(self, queries: mx.array, keys: Any, values: Any, cache: Any) -> mx.array:
        return super()._mix_packed(queries * self.scale, keys, values, cache)


class KernelAttention(PlainAttention):
    """Attention with the kernels of `native`, which write in place into a `KVCache`."""

    def __init__(self, head_dim: int, base: float, offset: layers.Offset, length: int, mask: mx.array | str | None):
        super().__init__(head_dim, base, offset, length, mask)
        self.table = layers.rotation_table(head_dim, base, offset, length)

    def __call__(
        self, qkv: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None, cache: Any = None
    ) -> mx.array:
        weights = (None, None) if norms is None else (norms.query_weight, norms.key_weight)
        eps = 0.0 if norms is None else norms.eps
        if isinstance(cache, RowCaches) and qkv.dtype == mx.float32 and grows_in_kernels(cache):
            of_heads = [weight for weight in weights if weight is not None]
            return self._in_step(native.kernels.step_attention, qkv, cache, *num_heads, eps, self.scale, of_heads)
        keys: Any
        shape = (*qkv.shape[:-1], num_heads[0] * self.head_dim)
        qkv = qkv.reshape(-1, qkv.shape[-1])
        if type(cache) is KVCache and qkv.dtype == mx.float32 and cache.has_dtype(mx.float32):
            batch = qkv.shape[0] // self.length
            *buffers, start = cache.reserve(batch, num_heads[1], self.length, self.head_dim, qkv.dtype)
            queries, new_keys, new_values = native.kernels.split_heads(
                qkv, self.table, *weights, *buffers, *num_heads, eps, start
            )
            # Dropping the cache's references lets the kernel write in place.
            cache.state = new_keys, new_values, cache.offset
        else:
            queries, keys, values = native.kernels.split_heads(
                qkv, self.table, *weights, None, None, *num_heads, eps, 0
            )
            if isinstance(cache, RowCaches):
                held = cache.append(keys, values)
                outputs = [self._attend(queries[row : row + 1], *fetched) for row, fetched in enumerate(held)]
                return mx.concatenate(outputs).reshape(shape)
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
            return self._attend(queries, cache, keys, values).reshape(shape)
        return self._attend(queries, cache, new_keys, new_values, cache.offset).reshape(shape)

    def _attend(self, queries: mx.array, cache: Any, keys: Any, values: Any, total: int | None = None) -> mx.array:
        """Attention [N, H * D] of queries [B, L, H, D] to the first `total` keys and values, by default all."""
        keys, values = (list(x) if isinstance(x, tuple | list) else [x] for x in (keys, values))
        packing = (cache.bits, cache.group_size) if len(keys) > 1 else (0, 0)
        total = keys[0].shape[2] if total is None else total
        return native.kernels.attention(queries, keys, values, self.scale, *self.mask_args(), total, *packing)[0]

    def mask_args(self) -> tuple[bool, mx.array | None]:
        """The mask as the kernels take it: whether attention is causal, and numbers to add."""
        if not isinstance(self.mask, mx.array):
            return self.mask == "causal", None
        if self._added is None:
            self._added = _as_numbers(self.mask, mx.float32)
        return False, self._added

    def layer(
        self,
        x: mx.array,
        num_heads: tuple[int, int],
        eps: float,
        norms: list[mx.array],
        projections: list[layers.Stored],
        cache: KVCache | RowCaches,
    ) -> mx.array:
        """A whole layer in one kernel: x [..., model_dim] of float32 to its output. The mask must not be an array.

        Args:
            num_heads: H, K.
            norms: weights of the attention's and the feed-forward's norm, then of the queries' and the keys', if any.
            projections: `qkv_proj`, `out_proj`, `proj_1` (gate first) and `proj_2`.
            cache: of float32, extended in place; the caches of a step must be such that `grows_in_kernels`.
        """
        if isinstance(cache, RowCaches):
            rest = *num_heads, eps, self.scale, norms, projections
            return self._in_step(native.kernels.step_layer, x, cache, *rest)
        batch = x.size // (x.shape[-1] * self.length)
        buffers = cache.reserve(batch, num_heads[1], self.length, self.head_dim, mx.float32)
        y, keys, values = native.kernels.layer(x, self.table, *buffers, *num_heads, eps, self.scale, norms, projections)
        # Dropping the cache's references lets the kernel write in place.
        cache.state = keys, values, cache.offset
        return y

    def _in_step(self, kernel: Any, x: mx.array, rows: RowCaches, heads: int, kv_heads: int, *rest: Any) -> mx.array:
        """A kernel of a step of several sequences, which writes into the buffers of their caches."""
        size = kv_heads, self.head_dim, mx.float32
        pairs = list(zip(rows.caches, rows.lengths, strict=True))
        buffers = [cache.acquire_buffers(*size, length) for cache, length in pairs]
        keys, values = map(list, zip(*buffers, strict=True))
        # The caches of one step wait for the same array.
        after = {id(cache.pending): cache.pending for cache in rows.caches if cache.pending is not None}
        starts = [cache.offset for cache in rows.caches]
        y = kernel(x, self.table, keys, values, starts, rows.lengths, [*after.values()], heads, kv_heads, *rest)
        for cache, length in pairs:
            cache.advance(y, length)
        return y


def grows_in_kernels(rows: RowCaches) -> bool:
    """Whether the kernels of a step can write into the caches: all are different `KVCache`s of float32."""
    is_ours = all(type(cache) is KVCache and cache.has_dtype(mx.float32) for cache in rows.caches)
    return is_ours and len({id(cache) for cache in rows.caches}) == len(rows.caches)


def _packed_product(x: mx.array, packed_part: Any, cache: Any, *, transpose: bool) -> mx.array:
    weight, scales, biases = packed_part
    return mx.quantized_matmul(
        x, weight, scales, biases, transpose=transpose, group_size=cache.group_size, bits=cache.bits
    )


def _fused_mask(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask as fused attention takes it: booleans, or numbers of no wider type than queries.

    On CUDA booleans would become -inf, which makes a padded row that sees nothing NaN. So would the lowest finite
    number, since the kernel multiplies it by log2(e).
    """
    if mask.dtype == mx.bool_ and backend.on_cuda():
        return mx.where(mask, 0.0, mx.finfo(dtype).min / 2).astype(dtype)
    return mask if mask.dtype == mx.bool_ else mask.astype(dtype)


def _additive_mask(mask: mx.array | str, length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """A mask in any form as numbers to add to scores [B, K, H / K, L, T].

    Hidden positions get the lowest finite number: a padded row that sees nothing must not become NaN.
    """
    if isinstance(mask, str):
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)  # [L, T]
    mask = _as_numbers(mask, dtype)
    return mask[:, :, None] if mask.ndim == 4 else mask  # [L, T] or [B, 1, 1, L, T]


def _as_numbers(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, mx.finfo(dtype).min)
    return mask.astype(dtype)
