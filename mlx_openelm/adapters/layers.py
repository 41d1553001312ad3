"""Linear layers and embeddings with a low-rank update; their own weights stay unchanged.

LoRA: arXiv:2106.09685; DoRA: arXiv:2402.09353. Parameters have mlx-lm's names, `lora_a`, `lora_b` and `m`; they are
float32, and cast to the activations' type where they are used. OpenELM's matrices have no biases.

With `lora_b` at zero, and DoRA's `m` as it starts, outputs are the base's bit for bit.

Outside of training a layer is its base, then `adapt` or `adapt_logits`, which turn the base's output into the
adapter's: so rows with different adapters share a product with the base (see `rows`). On the CPU kernels a row of a
decoding step has the same bits whatever its neighbors.
"""

from __future__ import annotations

from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn

from .. import backend
from ..formats.adapter import MIN_NORM, LowRank
from ..formats.mlx import Quantization
from ..model import add_to
from ..ops import layers, packed
from ..ops.derived import Derived
from ..ops.packed import PARTS

Factors = tuple[mx.array, ...]


class _Adapted(nn.Module):
    """The factors, their scale, and dropout.

    Dropout must drop the same values when the backward pass recomputes activations, so its random key is set from
    outside, before each forward pass.
    """

    def __init__(self, change: LowRank, dropout: float = 0.0):
        super().__init__()
        self.lora_a = change.a.astype(mx.float32)
        self.lora_b = change.b.astype(mx.float32)
        self.scale = change.scale
        self.dropout = dropout
        self._dropout_key: mx.array | None = None
        self._derived: Derived[Factors] = Derived()

    def set_dropout_key(self, key: mx.array | None) -> None:
        """Apply dropout with this random key; None turns it off."""
        self._dropout_key = key

    def change(self) -> LowRank:
        """The change with the current parameters."""
        return LowRank(self.lora_a, self.lora_b, self.scale)

    def applied(self, dtype: mx.Dtype) -> Factors:
        """The factors that apply the change outside of training, cached until a parameter is replaced."""
        return self._derived.get((dtype, self.scale), lambda *_: self._make_applied(dtype), *self._sources())

    def nbytes(self, dtype: mx.Dtype) -> int:
        """The bytes of the adapter in memory, without the base: its parameters, and what `applied` makes of them."""
        return sum({id(array): array.nbytes for array in (*self._sources(), *self.applied(dtype))}.values())

    def _sources(self) -> Factors:
        return self["lora_a"], self["lora_b"]

    def _make_applied(self, dtype: mx.Dtype) -> Factors:
        return self._make_factors(dtype, self.scale)

    def _make_factors(self, dtype: mx.Dtype, scale: float | None = None) -> Factors:
        """The matrices that compute an output, in the activations' type: `lora_a`, `lora_b`, then a subclass's own.

        Args:
            scale: a factor for `lora_b`.
        """
        b = self["lora_b"]
        return self["lora_a"].astype(dtype), (b if scale is None else scale * b).astype(dtype)

    def _low_rank(self, x: mx.array, a: mx.array) -> tuple[mx.array, float]:
        """x @ a [..., rank] after dropout, and the factor to scale it by."""
        if self._dropout_key is None or not self.dropout:
            return x @ a, self.scale
        kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._dropout_key)
        return mx.where(kept, x, mx.zeros((), x.dtype)) @ a, self.scale / (1 - self.dropout)


class LoRALinear(_Adapted):
    """x W^T + scale * (x a) b, for a linear layer of any kind, packed or not.

    Args:
        linear: the base; it is used as it is, and not trained.
        change: a [in, rank], b [rank, out].
        dropout: the share of inputs of `a` that are dropped in training.
    """

    def __init__(self, linear: nn.Module, change: LowRank, dropout: float = 0.0):
        super().__init__(change, dropout)
        self.linear = linear

    fuses_residual = True

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [..., in] to [..., out], plus the residual if there is one: the base may add it in its own product."""
        y = self["linear"](x) if residual is None else add_to(residual, self["linear"], x)
        if not self.training:
            return self.adapt(y, x)
        a, b = self._make_factors(x.dtype)
        z, scale = self._low_rank(x, a)
        return mx.addmm(y, z, b, scale)

    def adapt(self, y: mx.array, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """The output for x [..., in], plus the residual, from the base's output y [..., out]."""
        a, b = self.applied(x.dtype)
        return _add_product(y if residual is None else residual + y, layers.linear(x, a), b)

    def _make_applied(self, dtype: mx.Dtype) -> Factors:
        """`lora_a` transposed, as `layers.linear` takes it."""
        a, *others = super()._make_applied(dtype)
        return mx.contiguous(a.T), *others


class DoRALinear(LoRALinear):
    """(x W^T + scale * (x a) b) * m / |W + scale * (a b)^T|, where |.| is the length of each row.

    The length has no gradient (arXiv:2402.09353, section 4.3). The adapted matrix is never computed: for a row w with
    the change d, |w + d|^2 = |w|^2 + 2 w.d + |d|^2. The first term is constant, the others are small products.
    """

    def __init__(self, linear: nn.Module, change: LowRank, dropout: float = 0.0):
        super().__init__(linear, change, dropout)
        self._squares = _row_squares(matrix_of(linear))
        self.m = _lengths(self._squares) if change.magnitude is None else change.magnitude.astype(mx.float32)

    def change(self) -> LowRank:
        return LowRank(self.lora_a, self.lora_b, self.scale, self.m)

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        y = self["linear"](x)
        if not self.training:
            return self.adapt(y, x, residual)
        a, b, excess = self._make_factors(x.dtype)
        z, scale = self._low_rank(x, a)
        y = mx.addmm(y + excess * y, z, b, scale)  # m / length times the adapted output
        return y if residual is None else residual + y

    def adapt(self, y: mx.array, x: mx.array, residual: mx.array | None = None) -> mx.array:
        a, b, excess = self.applied(x.dtype)
        y = _add_product(y + excess * y, layers.linear(x, a), b)
        return y if residual is None else residual + y

    def _sources(self) -> Factors:
        return self["lora_a"], self["lora_b"], self["m"], self._squares

    def _make_factors(self, dtype: mx.Dtype, scale: float | None = None) -> Factors:
        a, b = (mx.stop_gradient(self[name].astype(mx.float32)) for name in ("lora_a", "lora_b"))
        products = mx.stop_gradient(self["linear"](a.T.astype(dtype)))
        ratio = self["m"] / _changed_lengths(self._squares, products, a, b, self.scale)
        scaled = self["lora_b"] * (ratio if scale is None else scale * ratio)
        return self["lora_a"].astype(dtype), scaled.astype(dtype), (ratio - 1).astype(dtype)


class LoRAEmbedding(_Adapted):
    """W[tokens] + scale * a[tokens] b, in float32; there is no dropout, as in PEFT and CoreNet.

    Args:
        embedding: the base; it is used as it is, and not trained.
        change: a [vocab, rank], b [rank, dim]; with `output_side`, `as_linear` is changed too.
    """

    def __init__(self, embedding: nn.Module, change: LowRank):
        super().__init__(change)
        self.embedding = embedding
        self.output_side = change.output_side

    def change(self) -> LowRank:
        return LowRank(self.lora_a, self.lora_b, self.scale, output_side=self.output_side)

    def __call__(self, tokens: mx.array) -> mx.array:
        y = self["embedding"](tokens).astype(mx.float32)
        a = self["lora_a"][tokens].astype(mx.float32)
        if not self.training:
            return _add_product(y, a, self.applied(mx.float32)[1])
        return mx.addmm(y, a, self["lora_b"].astype(mx.float32), self.scale)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of hidden states x [..., dim]."""
        y = self["embedding"].as_linear(x)
        if not self.training:
            return self.adapt_logits(y, x)
        if not self.output_side:
            return y
        a, b, *ratio = self._make_factors(x.dtype)
        y = mx.addmm(y, x @ b.T, a.T, self.scale)
        return y * ratio[0] if ratio else y

    def adapt_logits(self, y: mx.array, x: mx.array) -> mx.array:
        """The logits of x [..., dim] from the base's logits y [..., vocab]."""
        if not self.output_side:
            return y
        a, b, *ratio = self.applied(x.dtype)
        y = _add_product(y, layers.linear(x, b), a.T)
        return y * ratio[0] if ratio else y


class DoRAEmbedding(LoRAEmbedding):
    """The same, times m / lengths: of the adapted embedding's columns, as in PEFT; then m is [dim].

    With `output_side`, lengths are those of its rows, as in mlx-lm, and m is [vocab].
    """

    def __init__(self, embedding: nn.Module, change: LowRank):
        super().__init__(embedding, change)
        matrix = matrix_of(embedding)
        self._squares = _row_squares(matrix if self.output_side else matrix.T)
        self.m = _lengths(self._squares) if change.magnitude is None else change.magnitude.astype(mx.float32)

    def change(self) -> LowRank:
        return LowRank(self.lora_a, self.lora_b, self.scale, self.m, self.output_side)

    def __call__(self, tokens: mx.array) -> mx.array:
        ratio = (self._make_factors if self.training else self.applied)(mx.float32)[-1]
        return super().__call__(tokens) * (ratio[tokens][..., None] if self.output_side else ratio)

    def _sources(self) -> Factors:
        return self["lora_a"], self["lora_b"], self["m"], self._squares

    def _make_factors(self, dtype: mx.Dtype, scale: float | None = None) -> Factors:
        a, b = (mx.stop_gradient(self[name].astype(mx.float32)) for name in ("lora_a", "lora_b"))
        if self.output_side:
            products = mx.stop_gradient(self["embedding"].as_linear(b.astype(dtype)))
            lengths = _changed_lengths(self._squares, products, b.T, a.T, self.scale)
        else:
            products = mx.stop_gradient(_columns_times(self["embedding"], a))
            lengths = _changed_lengths(self._squares, products, a, b, self.scale)
        return (*super()._make_factors(dtype, scale), (self["m"] / lengths).astype(dtype))


def _add_product(y: mx.array, z: mx.array, b: mx.array) -> mx.array:
    """y [..., out] plus z [..., rank] times b [rank, out]."""
    if backend.on_gpu():
        return mx.addmm(y, z, b)
    if z.ndim > 2 and z.shape[-2] > 1:
        return y + z @ b
    single = chosen_products(z.reshape(-1, z.shape[-1]), b[None], _zeros(z.size // z.shape[-1]))
    return y + single.reshape(y.shape).astype(y.dtype)


def chosen_products(z: mx.array, matrices: mx.array, choices: mx.array) -> mx.array:
    """z [rows, rank] times, for each row, one of several matrices [count, rank, out]: [rows, 1, out].

    On a CPU it is in float32 and one product for each row, which with so few numbers takes no longer than one for all;
    then a BLAS gives a row the same bits whatever its neighbors.
    """
    if backend.on_gpu():
        return z[:, None] @ matrices[choices]
    return mx.gather_mm(z[:, None].astype(mx.float32), matrices.astype(mx.float32), rhs_indices=choices)


@lru_cache(maxsize=64)
def _zeros(count: int) -> mx.array:
    zeros = mx.zeros(count, mx.uint32)
    mx.eval(zeros)
    return zeros


def _columns_times(embedding: nn.Module, a: mx.array) -> mx.array:
    """a^T W [rank, dim] for an embedding W [vocab, dim] and a [vocab, rank]."""
    if not isinstance(embedding, nn.QuantizedEmbedding):
        return a.T @ embedding["weight"].astype(a.dtype)
    return packed.columns_product(a.T, embedding)


def matrix_of(base: nn.Module) -> mx.array:
    """The weight [out, in] or [vocab, dim] of a linear layer or embedding in float32, unpacked."""
    if not isinstance(base, nn.QuantizedLinear | nn.QuantizedEmbedding):
        return base["weight"].astype(mx.float32)
    packing = Quantization(base.group_size, base.bits, base.mode)
    return packing.unpack({part: base[part] for part in PARTS if part in base}, mx.float32)


def _row_squares(matrix: mx.array) -> mx.array:
    """The squared length of each row; evaluated, so that the matrix is gone and the result may be shared."""
    squares = mx.sum(mx.square(matrix), axis=1)
    mx.eval(squares)
    return squares


def _lengths(squares: mx.array) -> mx.array:
    return mx.sqrt(mx.maximum(squares, MIN_NORM**2))


def _changed_lengths(squares: mx.array, products: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """The length of each row of W + scale * (a b)^T; exactly `_lengths(squares)` where b is zero.

    Args:
        squares: of W's rows [rows]. products: a^T W^T [rank, rows]. a [columns, rank], b [rank, rows].
    """
    change = 2 * scale * products.astype(mx.float32) + scale**2 * ((a.T @ a) @ b)
    return _lengths(squares + mx.sum(change * b, axis=0))
