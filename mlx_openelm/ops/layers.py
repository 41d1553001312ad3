"""What a layer computes, in the form that is fastest on the device: MLX's fused kernels on a GPU, ours on a CPU.

`mx.fast` has no CPU kernels: there its functions expand into many primitives, and RoPE's angles are
computed anew in every layer. So on a CPU a layer's steps are kernels of `native`; where those are not to be
had, the same mathematics is spelled out here in as few primitives as it needs. The model reads the same everywhere.

Shapes: B rows, L new positions, N = B * L, T positions with the past, H query heads, K key-value
heads, D head_dim. Activations between layers are [N, model_dim].
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import mlx.core as mx

from .. import backend, native
from ..cache import KVCache
from . import distributions
from . import exponentials as cpu_math
from . import packed as packed_products

Heads = tuple[mx.array, mx.array, mx.array]
# A weight as the kernels take it: its values, scales and biases, bits (0: plain), group size, and whether few rows of
# activations may be rounded to 8 bits.
Stored = tuple[mx.array, mx.array | None, mx.array | None, int, int, bool]

_GPU = mx.DeviceType.gpu
# CUDA: `addmm` of one row is a matrix product, where `x @ W.T` is a matrix-vector kernel (an H100, 3072 x 3072 in
# bfloat16: 27 against 14 µs); from two rows on it is the faster of the two (27 against 29). Metal's has both kernels.
_ADDS_APART = mx.cuda.is_available()

# OpenBLAS multiplies matrices of at most a million elements without copying them into packed panels first.
# For a single row that copy is most of the work, so larger weights are multiplied in blocks of this size.
_UNPACKED_ELEMENTS = 1_000_000
# Below this, a product in blocks saves less time than its larger graph costs.
_WORTH_BLOCKS = 4_000_000
_SMALLEST_BLOCK = 32

# Rotation matrices made at a time while decoding: 2 MB of them for the largest head.
_MATRICES = 32

# Positions of the smallest table of RoPE's angles; others have twice as many, and so on.
_SMALLEST_TABLE = 256

# From here on a CPU multiplies half precision faster in float32, for which it has a BLAS, copies and all.
_MANY_HALF_ROWS = 8

# From here on a CPU's own exponential pays: it costs several primitives, and compiles once a machine.
_MANY_ROWS = 64

# From here on what an operation costs is nothing beside its work; and of the last layer, where a prompt only fills the
# cache, only what that needs is computed if its steps are operations of their own.
_MANY_LAYER_ROWS = 12


def _on_gpu() -> bool:
    # backend.on_gpu without its import: this is asked many times a token.
    return mx.default_device().type is _GPU


def _kernels() -> Any:
    """The kernels of `native`, on a CPU that has them; else None."""
    return None if _on_gpu() else native.kernels


def linear(x: mx.array, weight: mx.array, residual: mx.array | None = None) -> mx.array:
    """x [..., in] times weight [out, in] transposed, plus residual [..., out] if there is one: [..., out]."""
    if (kernels := _kernels()) is not None:
        output = kernels.linear(x, (weight, None, None, 0, 0, False))
        return output if residual is None else residual + output
    if x.dtype != mx.float32 and x.size >= _MANY_HALF_ROWS * x.shape[-1] and not _on_gpu():
        whole = None if residual is None else residual.astype(mx.float32)
        return linear(x.astype(mx.float32), weight.astype(mx.float32), whole).astype(x.dtype)
    blocks = _blocks(*weight.shape)
    if blocks is None or x.size != blocks[2] or _on_gpu():
        if residual is None:
            return x @ weight.T
        if _ADDS_APART and x.size == x.shape[-1] and _on_gpu():
            return residual + x @ weight.T
        return mx.addmm(residual, x, weight.T)
    # Three dimensions on both sides, since MLX would join the blocks again for a matrix of two.
    output = (weight.reshape(blocks) @ x.reshape(1, -1, 1)).reshape((*x.shape[:-1], -1))
    return output if residual is None else residual + output


def quantized_linear(x: mx.array, layer: Any, residual: mx.array | None = None) -> mx.array:
    """The same with the packed weight of a quantized layer.

    Its `rounds` says whether a CPU's kernels may round x to 8 bits, in groups, where it has few rows.
    """
    if layer.mode == "affine" and (kernels := _kernels()) is not None:
        output = kernels.linear(x, stored(layer))
    else:
        output = packed_products.product(x, layer)
    return output if residual is None else residual + output


def stored(layer: Any) -> Stored:
    """The weight of a plain or affine layer, as the kernels take it."""
    if "scales" not in layer:
        return layer["weight"], None, None, 0, 0, False
    return layer["weight"], layer["scales"], layer["biases"], layer.bits, layer.group_size, layer.rounds


def quantized_rows(tokens: mx.array, layer: Any) -> mx.array:
    """The rows of a quantized embedding [vocab, dim] for tokens [...]: [..., dim], in affine mode float32."""
    bits, group_size, mode = layer.bits, layer.group_size, layer.mode
    parts = [layer["weight"], layer["scales"], layer.get("biases")]
    if mode != "affine":
        return mx.dequantize(parts[0][tokens], parts[1][tokens], None, group_size, bits, mode)
    if (kernels := _kernels()) is not None:
        return kernels.lookup(tokens, stored(layer))
    # Scales may have 16 bits; what they scale needs more.
    scales, biases = (part[tokens].astype(mx.float32) for part in parts[1:])
    return mx.dequantize(parts[0][tokens], scales, biases, group_size, bits, mode)


def log_softmax(x: mx.array) -> mx.array:
    """x [..., n] minus logsumexp(x), in float32."""
    if (kernels := _kernels()) is not None:
        return kernels.log_softmax(x)
    return distributions.log_softmax(x)


@lru_cache
def _blocks(out_dims: int, in_dims: int) -> tuple[int, int, int] | None:
    """The shape [blocks, rows, in] with the most rows that divide `out_dims` and fit an unpacked product."""
    if out_dims * in_dims < _WORTH_BLOCKS:
        return None
    rows = _UNPACKED_ELEMENTS // in_dims
    while rows >= _SMALLEST_BLOCK and out_dims % rows:
        rows -= 1
    return (out_dims // rows, rows, in_dims) if rows >= _SMALLEST_BLOCK else None


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x [N, dim] over its root mean square, times weight [dim] (paper, section 2.1)."""
    if (kernels := _kernels()) is not None:
        return kernels.rms_norm(x, weight, eps)
    if _on_gpu():
        return mx.fast.rms_norm(x, weight, eps)
    return _normalized(x, eps) * weight


def _normalized(x: mx.array, eps: float) -> mx.array:
    """x [..., dim] over its root mean square; mean and eps in one matrix product."""
    dims = x.shape[-1]
    eps_array, mean_column = _norm_constants(dims, eps)
    exact = x.astype(mx.float32)
    if x.size == dims and x.ndim == 2:
        mean_square = mx.addmm(eps_array, exact, exact.T, 1 / dims)
    else:
        mean_square = mx.addmm(eps_array, mx.square(exact), mean_column)
    return (exact * mx.rsqrt(mean_square)).astype(x.dtype)


@lru_cache
def _norm_constants(dims: int, eps: float) -> tuple[mx.array, mx.array]:
    constants = mx.array([[eps]]), mx.full((dims, 1), 1 / dims)
    mx.eval(constants)
    return constants


def swiglu(gate_and_up: mx.array) -> mx.array:
    """silu(gate) * up for gate_and_up [N, 2 * inner], gate first."""
    if (kernels := _kernels()) is not None:
        return kernels.swiglu(gate_and_up)
    if _on_gpu():
        return _fused_swiglu(gate_and_up)
    gate, up = mx.split(gate_and_up, 2, axis=-1)
    if gate.shape[0] < _MANY_ROWS:
        return gate * mx.sigmoid(gate) * up
    return cpu_math.swiglu(gate, up)


@mx.compile
def _fused_swiglu(gate_and_up: mx.array) -> mx.array:
    gate, up = mx.split(gate_and_up, 2, axis=-1)
    return gate * mx.sigmoid(gate) * up


class HeadNorms:
    """The norms of an attention's queries and keys: their weights [D], and eps.

    Weights are told apart by identity: replace them to change them, do not write into them.
    """

    def __init__(self, eps: float):
        self.eps = eps
        self.query_weight = self.key_weight = mx.zeros(0)
        self._joined: mx.array | None = None

    def use(self, query_weight: mx.array, key_weight: mx.array) -> HeadNorms:
        """Itself, for these weights; what was derived from others is forgotten."""
        if query_weight is not self.query_weight or key_weight is not self.key_weight:
            self.query_weight, self.key_weight, self._joined = query_weight, key_weight, None
        return self

    def joined(self, num_heads: tuple[int, int], scale: float) -> mx.array:
        """[H + K, D]: the weight of every head, the queries' times `scale`, so that one product serves all."""
        if self._joined is None:
            weights = (self.query_weight * scale, self.key_weight)
            rows = [mx.broadcast_to(w, (n, w.size)) for w, n in zip(weights, num_heads, strict=True)]
            joined = mx.concatenate(rows)
            try:
                # Only an evaluated array may be shared: two threads that evaluate one graph wait for each other.
                mx.eval(joined)
            except (ValueError, RuntimeError):
                return joined  # the weights are being traced, so these belong to the trace
            self._joined = joined
        return self._joined


class Attend:
    """Attention as one forward pass needs it: positions and mask are made once and shared by all layers.

    Args:
        head_dim, base: RoPE in halves, with angles position / base ** (2i / D).
        offset: the first position, an int, or an array [B] with one for each row.
        mask: None, "causal", booleans (True: visible) or numbers to add, [L, T] or [B, 1, L, T].
    """

    def __init__(self, head_dim: int, base: float, offset: int | mx.array, length: int, mask: mx.array | str | None):
        self.head_dim, self.base, self.offset, self.mask = head_dim, base, offset, mask
        self._added: mx.array | None = None  # the mask as numbers to add, made by the first layer that needs it
        self.scale = head_dim**-0.5
        self.fused = _on_gpu()
        self.kernels = _kernels()
        self.length = length
        if self.kernels is not None:
            self.table = _rotation_table(head_dim, base, offset, length)

    @cached_property
    def rotate(self) -> _Rotation:
        return _Rotation(self.head_dim, self.base, self.offset, self.length)

    def __call__(
        self,
        qkv: mx.array,
        shape: tuple[int, int],
        num_heads: tuple[int, int],
        norms: HeadNorms | None,
        cache: Any,
    ) -> mx.array:
        """Projected queries, keys and values [N, (H + 2K) * D] to mixed values [N, H * D].

        Args:
            shape: B, L.
            num_heads: H, K.
            norms: how queries and keys are normalized before RoPE, if they are.
            cache: extended in place, ours or mlx-lm's; or None.
        """
        if self.kernels is not None:
            return self._with_kernels(qkv, shape, num_heads, norms, cache)
        queries, keys, values = self.heads(qkv, shape, num_heads, norms)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        quantized = hasattr(cache, "bits")
        if quantized and not packed_products.attends_packed(shape[1]):
            keys, values = packed_products.unpacked_cache(cache, keys[0].shape[2], queries.dtype)
            quantized = False
        if quantized:
            output = self._mix_quantized(queries, keys, values, cache)
        elif self.fused:
            if isinstance(self.mask, mx.array):
                self.mask = _fused_mask(self.mask, queries.dtype)
            output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=self.scale, mask=self.mask)
        else:
            output = self._mix(queries, keys, values)
        if shape[1] > 1:
            output = output.swapaxes(1, 2)
        return output.reshape(qkv.shape[0], -1)

    def takes_layers(self, x: mx.array, cache: Any) -> bool:
        """Whether `layer` can: for few rows of float32 whose past is a growing cache of ours, on a CPU with kernels."""
        return (
            self.kernels is not None
            and x.shape[0] < _MANY_LAYER_ROWS
            and not isinstance(self.mask, mx.array)
            and _extends_in_place(x, cache)
        )

    def layer(
        self,
        x: mx.array,
        shape: tuple[int, int],
        num_heads: tuple[int, int],
        eps: float,
        norms: list[mx.array],
        projections: list[Stored],
        cache: KVCache,
    ) -> mx.array:
        """A whole layer in one kernel: x [N, model_dim] to its output.

        Args:
            shape: B, L.
            num_heads: H, K.
            norms: weights of the attention's and the feed-forward's, then of the queries' and the keys', if there are.
            projections: `qkv_proj`, `out_proj`, `proj_1` (gate first) and `proj_2`.
            cache: extended in place.
        """
        start = cache.reserve(shape[0], num_heads[1], shape[1], self.head_dim, mx.float32)
        # The cache lets go of its buffers here, so that the kernel may write into them.
        y, cache.keys, cache.values = self.kernels.layer(
            x, self.table, cache.keys, cache.values, start, *num_heads, eps, self.scale, norms, projections
        )
        return y

    def _with_kernels(
        self, qkv: mx.array, shape: tuple[int, int], num_heads: tuple[int, int], norms: HeadNorms | None, cache: Any
    ) -> mx.array:
        """The same with the kernels of `native`, which write straight into a growing cache of ours."""
        weights = (norms.query_weight, norms.key_weight) if norms is not None else (None, None)
        eps = norms.eps if norms is not None else 0.0
        keys: Any
        if _extends_in_place(qkv, cache):
            start = cache.reserve(shape[0], num_heads[1], shape[1], self.head_dim, qkv.dtype)
            # The cache lets go of its buffers here, so that the kernel may write into them.
            queries, cache.keys, cache.values = self.kernels.split_heads(
                qkv, self.table, *weights, cache.keys, cache.values, *num_heads, eps, start
            )
            keys, values, total = [cache.keys], [cache.values], cache.offset
        else:
            queries, keys, values = self.kernels.split_heads(qkv, self.table, *weights, None, None, *num_heads, eps, 0)
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
            keys, values = (list(x) if isinstance(x, tuple | list) else [x] for x in (keys, values))
            total = keys[0].shape[2]
        packing = (cache.bits, cache.group_size) if len(keys) > 1 else (0, 0)
        return self.kernels.attention(queries, keys, values, self.scale, *self.hiding(), total, *packing)[0]

    def hiding(self) -> tuple[bool, mx.array | None]:
        """What is hidden, as a CPU's kernels take it: whether attention is causal, and the mask as numbers to add."""
        if not isinstance(self.mask, mx.array):
            return self.mask == "causal", None
        if self._added is None:
            self._added = _as_numbers(self.mask, mx.float32)
        return False, self._added

    def heads(
        self, qkv: mx.array, shape: tuple[int, int], num_heads: tuple[int, int], norms: HeadNorms | None
    ) -> Heads:
        """Normalized and rotated queries [B, H, L, D], keys and values [B, K, L, D]; queries scaled unless `fused`."""
        heads = qkv.reshape(*shape, -1, self.head_dim)
        return (self._fused_heads if self.fused else self._plain_heads)(heads, num_heads, norms)

    def _fused_heads(self, heads: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None) -> Heads:
        """Normalized and rotated queries [B, H, L, D], keys and values [B, K, L, D]."""
        queries, keys, values = mx.split(heads, [num_heads[0], sum(num_heads)], axis=2)
        if norms is not None:
            queries = mx.fast.rms_norm(queries, norms.query_weight, norms.eps)
            keys = mx.fast.rms_norm(keys, norms.key_weight, norms.eps)
        queries, keys, values = (x.swapaxes(1, 2) for x in (queries, keys, values))
        return self._rope(queries), self._rope(keys), values

    def _rope(self, x: mx.array) -> mx.array:
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.base, scale=1.0, offset=self.offset)

    def _plain_heads(self, heads: mx.array, num_heads: tuple[int, int], norms: HeadNorms | None) -> Heads:
        """The same with the queries already scaled; queries and keys are normalized and rotated together."""
        rotated, values = mx.split(heads, [sum(num_heads)], axis=2)
        if norms is not None:
            rotated = _normalized(rotated, norms.eps) * norms.joined(num_heads, self.scale)
        queries, keys = mx.split(self.rotate(rotated).swapaxes(1, 2), [num_heads[0]], axis=1)
        return queries if norms is not None else queries * self.scale, keys, values.swapaxes(1, 2)

    def _mix(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        batch, kv_heads = keys.shape[:2]
        # The query heads of a group are rows of one product: keys and values are not repeated.
        rows = queries.reshape(batch, kv_heads, -1, self.head_dim)
        weights, total = self._softmax(rows @ keys.swapaxes(-1, -2), queries.shape[2])
        output = weights @ values
        return (output if total is None else output / total).reshape(queries.shape)

    def _mix_quantized(self, queries: mx.array, keys: Any, values: Any, cache: Any) -> mx.array:
        """The same with keys and values as packed weights, scales and biases."""
        batch, kv_heads = keys[0].shape[:2]
        rows = (queries * self.scale if self.fused else queries).reshape(batch, kv_heads, -1, self.head_dim)
        weights, total = self._softmax(_packed_product(rows, keys, True, cache), queries.shape[2])
        output = _packed_product(weights, values, False, cache)
        return (output if total is None else output / total).reshape(queries.shape)

    def _softmax(self, scores: mx.array, length: int) -> tuple[mx.array, mx.array | None]:
        """Attention weights from scores [B, K, H / K * L, T]; with many rows unnormalized, and their sums."""
        shape = scores.shape
        if self.mask is not None:
            if self._added is None:
                self._added = _additive_mask(self.mask, length, shape[3], scores.dtype)
            scores = (scores.reshape(*shape[:2], -1, length, shape[3]) + self._added).reshape(shape)
        if self.fused or length < _MANY_ROWS:
            return mx.softmax(scores, axis=-1, precise=True), None
        weights = cpu_math.exp_below(scores, mx.max(scores, axis=-1, keepdims=True))
        return weights, mx.sum(weights, axis=-1, keepdims=True)


def _extends_in_place(x: mx.array, cache: Any) -> bool:
    """Whether the kernels can write what comes of x into this cache's buffers: a growing one of ours, in float32."""
    return type(cache) is KVCache and x.dtype == mx.float32 and cache.holds(mx.float32)


def _packed_product(x: mx.array, packed: Any, transpose: bool, cache: Any) -> mx.array:
    weight, scales, biases = packed
    return mx.quantized_matmul(
        x, weight, scales, biases, transpose=transpose, group_size=cache.group_size, bits=cache.bits
    )


def _fused_mask(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask as fused attention takes it: booleans, or numbers of no wider type than queries.

    On CUDA booleans would become -inf, and a padded row that sees nothing NaN; the lowest number would, too, since the
    kernel multiplies it by log2(e).
    """
    if mask.dtype == mx.bool_ and backend.device() == "CUDA":
        return mx.where(mask, 0.0, mx.finfo(dtype).min / 2).astype(dtype)
    return mask if mask.dtype == mx.bool_ else mask.astype(dtype)


def _additive_mask(mask: mx.array | str, length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """A mask in any form as numbers to add to scores [B, K, H / K, L, T].

    Hidden positions get the lowest finite number: a padded row that sees nothing must not become NaN.
    """
    if isinstance(mask, str):
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)
    mask = _as_numbers(mask, dtype)
    return mask[:, :, None] if mask.ndim == 4 else mask


def _as_numbers(mask: mx.array, dtype: mx.Dtype) -> mx.array:
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, mx.finfo(dtype).min)
    return mask.astype(dtype)


def _rotation_table(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    """[1 or B, L, D]: the cosines, then the sines, of each position's angles."""
    if isinstance(offset, mx.array):
        return _make_table(head_dim, base, offset, length)
    positions = _SMALLEST_TABLE
    while positions < offset + length:
        positions *= 2
    return _table_of(head_dim, base, positions)[:, offset : offset + length]


@lru_cache(maxsize=4)
def _table_of(head_dim: int, base: float, positions: int) -> mx.array:
    """The table of the first positions, computed once for all tokens."""
    table = _make_table(head_dim, base, 0, positions)
    mx.eval(table)
    return table


def _make_table(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    half = head_dim // 2
    return mx.concatenate([x[:, :, 0, :half] for x in _rotation_angles(head_dim, base, offset, length)], axis=-1)


class _Rotation:
    """RoPE in halves for one forward pass: angles position / base ** (2i / D).

    A single position is one matrix that rotates a row vector: one small product in place of six passes.
    More positions take the passes, since so many matrices would cost memory.
    """

    def __init__(self, head_dim: int, base: float, offset: int | mx.array, length: int):
        self.matrix = None
        if length > 1:
            self.cos, self.sin = _rotation_angles(head_dim, base, offset, length)
            self.swap = _rotation_constants(head_dim, base)[1]
        elif isinstance(offset, mx.array):
            self.matrix = _rotation_matrices(head_dim, base, offset, 1)
        else:
            start = offset - offset % _MATRICES
            self.matrix = _matrices_from(head_dim, base, start)[:, offset - start : offset - start + 1]

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x [B, L, heads, D]."""
        if self.matrix is not None:
            return (x @ self.matrix).astype(x.dtype)
        return (x * self.cos + (x @ self.swap) * self.sin).astype(x.dtype)


def _rotation_angles(head_dim: int, base: float, offset: int | mx.array, length: int) -> tuple[mx.array, mx.array]:
    """Cosine and sine [1 or B, L, 1, D] of each position's angle in each output column."""
    frequencies = _rotation_constants(head_dim, base)[2]
    if isinstance(offset, mx.array):
        offset = offset.reshape(-1, 1)
    angles = (mx.arange(length) + offset).reshape(-1, length, 1, 1).astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles)


def _rotation_matrices(head_dim: int, base: float, offset: int | mx.array, length: int) -> mx.array:
    """[1 or B, L, D, D]: for each position the matrix that rotates a row vector."""
    identity, swap, _ = _rotation_constants(head_dim, base)
    cos, sin = _rotation_angles(head_dim, base, offset, length)
    return identity * cos + swap * sin


@lru_cache(maxsize=4)
def _matrices_from(head_dim: int, base: float, start: int) -> mx.array:
    """The matrices of `_MATRICES` positions, computed once for as many tokens."""
    matrices = _rotation_matrices(head_dim, base, start, _MATRICES)
    mx.eval(matrices)
    return matrices


@lru_cache
def _rotation_constants(head_dim: int, base: float) -> tuple[mx.array, mx.array, mx.array]:
    """Identity [D, D], the signed swap of halves [D, D], the frequency of each output column [D]."""
    half = head_dim // 2
    frequencies = 1.0 / (base ** (mx.arange(0, head_dim, 2, dtype=mx.float32) / head_dim))
    # Output column j < half takes minus input row j + half; the others plus input row j - half.
    swap = mx.eye(head_dim, k=half) - mx.eye(head_dim, k=-half)
    constants = mx.eye(head_dim), swap, mx.concatenate([frequencies, frequencies])
    mx.eval(constants)
    return constants
