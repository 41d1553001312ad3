"""The kernels for CPUs, as operations of MLX: against MLX's own, on random numbers and at the edges."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from mlx_openelm import convert, generate, load, native
from mlx_openelm.cache import BatchKVCache, KVCache, RotatingKVCache, make_cache
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.loading import ROUNDED_BITS
from mlx_openelm.native import build
from mlx_openelm.ops.layers import rotation_table

import mlx.core as mx
import numpy as np
import pytest
from covering import chosen
from in_process import run_here

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
BITS = (2, 3, 4, 5, 6, 8)
TYPES = (mx.float32, mx.bfloat16, mx.float16)
kernels = native.kernels

needs_kernels = pytest.mark.skipif(kernels is None, reason=f"the kernels are not used: {native.status.detail}")


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def apart(ours: mx.array, theirs: mx.array) -> float:
    """The largest difference, relative to the largest number, or to 1."""
    ours, theirs = ours.astype(mx.float32), theirs.astype(mx.float32)
    assert ours.shape == theirs.shape and ours.size
    assert mx.isfinite(ours).all().item()  # NaN would compare as no difference
    return (mx.max(mx.abs(ours - theirs)) / mx.maximum(mx.max(mx.abs(theirs)), 1.0)).item()


def test_kernels_are_compiled_if_there_is_a_compiler():
    if os.environ.get(native.VARIABLE) == "0" or not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("the kernels are turned off, or there is no compiler")
    assert native.status.state == "used", native.status


def test_the_library_is_the_one_under_test():
    expected = os.environ.get("OPENELM_CHECKED_LIBRARY")
    assert expected is None or kernels.__file__ == expected


# Products.


def linear(x, weight):
    return kernels.linear(x, (weight, None, None, 0, 0, False))


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 63), (200, 192), (97, 1280)])
def test_products_with_plain_weights(outputs, inputs, dtype):
    weight = normal(outputs, inputs).astype(dtype)
    for rows in (1, 2, 3, 4, 5, 11, 12, 33, 70):
        x = normal(rows, inputs, seed=1)
        assert apart(linear(x, weight), x @ weight.astype(mx.float32).T) < 1e-5


@pytest.mark.covering
@needs_kernels
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("inputs", [1, 7, 13, 31, 33, 63, 100, 192, 200, 1000, 1297])
def test_steps_with_plain_weights_equal_those_of_each_row_alone(inputs, dtype):
    """Bit for bit, also where rows of weights end within a vector."""
    for outputs in (1, 2, 3, 25, 61):
        weight, x = normal(outputs, inputs).astype(dtype), normal(33, 1, inputs, seed=1)
        alone = mx.concatenate([linear(row[None], weight) for row in x])
        for rows in (2, 3, 4, 5, 7, 8, 11, 12, 16, 33):
            assert mx.array_equal(linear(x[:rows], weight), alone[:rows]).item(), (outputs, rows)


@needs_kernels
@pytest.mark.parametrize(("bits", "group_size"), [*itertools.product(BITS, (32, 64, 128))])
def test_products_with_packed_weights(bits, group_size):
    for outputs, groups in ((1, 1), (50, 3), (7, 4), (97, 8), (64, 10), (9, 12)):
        packed = [p.astype(t) for p, t in zip(mx.quantize(normal(outputs, groups * group_size), group_size, bits),
                                               (mx.uint32, mx.bfloat16, mx.bfloat16), strict=True)]  # fmt: skip
        full = mx.dequantize(packed[0], *(p.astype(mx.float32) for p in packed[1:]), group_size, bits)
        for rows in (1, 2, 3, 6, 11, 12, 40):
            x = normal(rows, groups * group_size, seed=1)
            expected = x @ full.T
            exact = kernels.linear(x, (*packed, bits, group_size, False))
            assert apart(exact, expected) < 1e-5
            # Rounding to 1/127 of a group's largest number: the error is a few thousandths of |x| |w|.
            rounded = kernels.linear(x, (*packed, bits, group_size, True))
            allowed = 0.02 * mx.linalg.norm(x, axis=1)[:, None] * mx.linalg.norm(full, axis=1)
            assert mx.all(mx.abs(rounded - expected) <= allowed).item()
            has_rounded = rows < 12 and bits <= 6
            assert (mx.abs(rounded - exact).max().item() > 0) == has_rounded


@needs_kernels
def test_products_of_other_types_are_computed_in_float32():
    weight, x = normal(40, 64), normal(3, 64, seed=1).astype(mx.bfloat16)
    y = linear(x, weight.astype(mx.bfloat16))
    assert y.dtype == mx.bfloat16
    exact = x.astype(mx.float32) @ weight.astype(mx.bfloat16).astype(mx.float32).T
    assert mx.array_equal(y, exact.astype(mx.bfloat16)) or apart(y, exact) < 0.01


@needs_kernels
def test_inputs_need_not_be_contiguous_and_may_be_empty():
    weight, x = normal(64, 48), normal(96, 20, seed=1)
    for rows in (slice(None), slice(0, 3)):
        assert apart(linear(x.T[rows, ::2], weight), x.T[rows, ::2] @ weight.T) < 1e-5
        assert apart(linear(x.T[rows, 48:], weight[::-1]), x.T[rows, 48:] @ weight[::-1].T) < 1e-5
    assert apart(kernels.rms_norm(x.T, mx.ones(96), 1e-6), mx.fast.rms_norm(x.T, mx.ones(96), 1e-6)) < 1e-5
    assert apart(kernels.swiglu(x.T), kernels.swiglu(mx.contiguous(x.T))) == 0
    for y, shape in (
        (linear(mx.zeros((0, 48)), weight), (0, 64)),
        (linear(mx.zeros((2, 0, 48)), weight), (2, 0, 64)),
        (linear(mx.zeros((2, 48)), mx.zeros((0, 48))), (2, 0)),
        (kernels.swiglu(mx.zeros((0, 8))), (0, 4)),
        (kernels.swiglu(mx.zeros((2, 0))), (2, 0)),
        (kernels.rms_norm(mx.zeros((2, 0)), mx.zeros(0), 1e-6), (2, 0)),
        (kernels.log_softmax(mx.zeros((2, 0))), (2, 0)),
    ):
        mx.eval(y)
        assert y.shape == shape
    for rows in (2, 20):
        assert mx.array_equal(linear(mx.zeros((rows, 0)), mx.zeros((3, 0))), mx.zeros((rows, 3))).item()


@needs_kernels
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 1280), (3, 200, 192), (13, 130, 128), (50, 40, 256)])
def test_gradients_of_products(rows, outputs, inputs):
    weight, x, pull = normal(outputs, inputs), normal(rows, inputs, seed=1), normal(rows, outputs, seed=3)

    def slopes(product, *arrays):
        return mx.vjp(lambda *a: [product(*a)], list(arrays), [pull])[1]

    for dtype in (mx.float32, mx.bfloat16):
        stored = weight.astype(dtype)
        ours = slopes(linear, x, stored)
        theirs = slopes(lambda x, w: x @ w.astype(mx.float32).T, x, stored)
        assert max(map(apart, ours, theirs)) < (1e-5 if dtype == mx.float32 else 1e-2)
    for bits, group_size in itertools.product(BITS, (32, 64, 128)):
        if inputs % group_size:
            continue
        packed = mx.quantize(weight, group_size, bits)
        ours = slopes(lambda x, p=packed, b=bits, g=group_size: kernels.linear(x, (*p, b, g, True)), x)[0]
        assert apart(ours, pull @ mx.dequantize(*packed, group_size, bits)) < 1e-5


@needs_kernels
def test_invalid_shapes_and_dtypes_are_refused():
    packed = mx.quantize(normal(8, 64), 64, 4)
    for call in (
        lambda: linear(normal(2, 5), normal(3, 4)),
        lambda: linear(normal(2, 4), mx.zeros((3, 4), mx.int32)),
        lambda: kernels.linear(normal(2, 64), (*packed, 7, 64, False)),
        lambda: kernels.linear(normal(2, 64), (*packed, 4, 32, False)),
        lambda: kernels.linear(normal(2, 32), (*packed, 4, 64, False)),
        lambda: kernels.linear(normal(2, 64), (packed[0], packed[1][:3], packed[2][:3], 4, 64, False)),
        lambda: kernels.attention(normal(1, 1, 3, 8), [normal(1, 2, 5, 8)], [normal(1, 2, 5, 8)], 1, False, None, 5),
        lambda: kernels.attention(normal(1, 1, 4, 8), [normal(1, 2, 5, 8)], [normal(1, 2, 5, 8)], 1, False, None, 6),
        lambda: kernels.attention(normal(1, 0, 4, 8), [normal(1, 2, 5, 8)], [normal(1, 2, 5, 8)], 1, False, None, 5),
        lambda: kernels.attention(normal(1, 1, 4, 8), [mx.zeros((1, 0, 5, 8))], [mx.zeros((1, 0, 5, 8))], 1, False,
                                  None, 5),
        lambda: kernels.attention(normal(4, 1, 2, 8), [normal(4, 2, 5, 8)], [normal(4, 2, 5, 8)], 1, False,
                                  mx.zeros((2, 1, 1, 5)), 5),
        lambda: kernels.split_heads(normal(2, 24), normal(1, 2, 4), None, None, None, None, 4, 2, 0.0, 0),
        lambda: kernels.split_heads(normal(1, 32), normal(1, 1, 4), None, None, mx.zeros((1, 2, 4, 4)),
                                    mx.zeros((1, 2, 4, 4)), 4, 2, 0.0, 4),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"mlx_openelm\.native: "):
            call()


# Element-wise kernels.


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 64), (5, 1280), (600, 40)])
def test_elementwise_kernels(shape):
    x, weight = normal(*shape) * 3, normal(shape[-1], seed=1)
    assert apart(kernels.rms_norm(x, weight, 1e-6), mx.fast.rms_norm(x, weight, 1e-6)) < 1e-5
    expected = x - mx.logsumexp(x, axis=-1, keepdims=True)
    assert mx.abs(kernels.log_softmax(x) - expected).max().item() < 1e-5
    wide = mx.concatenate([x * 10, normal(*shape, seed=2)], axis=-1)
    gate, up = mx.split(wide, 2, axis=-1)
    assert apart(kernels.swiglu(wide), gate * mx.sigmoid(gate) * up) < 1e-6
    pull = normal(*shape, seed=3)
    ours = mx.grad(lambda x: (kernels.swiglu(x) * pull).sum())(wide)
    plain = mx.grad(lambda x: (mx.split(x, 2, -1)[0] * mx.sigmoid(mx.split(x, 2, -1)[0]) * mx.split(x, 2, -1)[1]
                               * pull).sum())(wide)  # fmt: skip
    assert apart(ours, plain) < 1e-5
    for function, reference in (
        (lambda x: kernels.log_softmax(x), lambda x: x - mx.logsumexp(x, axis=-1, keepdims=True)),
        (lambda x: kernels.rms_norm(x, weight, 1e-6), lambda x: mx.fast.rms_norm(x, weight, 1e-6)),
    ):
        slopes = [mx.grad(lambda x, f=f: (f(x) * pull).sum())(x) for f in (function, reference)]
        assert mx.abs(slopes[0] - slopes[1]).max().item() < 1e-4
        assert mx.abs(mx.jvp(function, [x], [pull])[1][0] - mx.jvp(reference, [x], [pull])[1][0]).max().item() < 1e-4
        assert apart(mx.vmap(function)(x[None]), function(x)[None]) < 1e-5


@needs_kernels
def test_log_softmax_of_banned_tokens():
    x = mx.array([[0.0, -mx.inf, 1.0], [5.0, -mx.inf, -mx.inf]])
    assert np.allclose(np.array(kernels.log_softmax(x)), np.array(x - mx.logsumexp(x, axis=-1, keepdims=True)))


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_rows_of_a_packed_embedding(bits):
    packed = mx.quantize(normal(9, 128), 64, bits)
    for tokens in (mx.array([[3, 0], [8, 3]]), mx.array(5), mx.array([-1], mx.int64), mx.zeros((0,), mx.int32)):
        expected = mx.dequantize(*packed, 64, bits)[tokens]
        rows = kernels.lookup(tokens, (*packed, bits, 64, False))
        assert rows.shape == expected.shape and mx.allclose(rows, expected, atol=1e-6).item()


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 4, 1, 64), (2, 5, 6, 2, 24), (1, 70, 3, 1, 8)])
def test_heads_are_normalized_and_rotated(shape):
    batch, length, queries, kv, dim = shape
    qkv, norms = normal(batch * length, (queries + 2 * kv) * dim), (normal(dim, seed=1), normal(dim, seed=2))
    for offset in (3, mx.array([3, -2][:batch])):
        table = rotation_table(dim, 1e4, offset, length)
        for weights in ((None, None), norms):
            q, k, v = mx.split(qkv.reshape(batch, length, -1, dim), [queries, queries + kv], axis=2)
            if weights[0] is not None:
                q, k = (mx.fast.rms_norm(x, w, 1e-6) for x, w in zip((q, k), weights, strict=True))
            starts = offset if isinstance(offset, int) else mx.array(offset)
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            q, k = (mx.fast.rope(x, dim, traditional=False, base=1e4, scale=1.0, offset=starts) for x in (q, k))
            ours = kernels.split_heads(qkv, table, *weights, None, None, queries, kv, 1e-6, 0)
            assert max(map(apart, ours, (q.swapaxes(1, 2), k, v))) < 1e-4
            buffers = [normal(batch, kv, length + 9, dim, seed=s) for s in (3, 4)]
            kept = [mx.array(b) for b in buffers]
            ours = kernels.split_heads(qkv, table, *weights, *buffers, queries, kv, 1e-6, 4)
            for now, before, new in zip(ours[1:], kept, (k, v), strict=True):
                before[:, :, 4 : 4 + length] = new
                assert apart(now, before) < 1e-4


# Attention.


def plain_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """q [B, L, H, D], k and v [B, K, T, D], a mask to add: [B * L, H * D]."""
    batch, length, heads, dim = q.shape
    k, v = (mx.repeat(x, heads // k.shape[1], axis=1) for x in (k, v))
    scores = q.swapaxes(1, 2) @ k.swapaxes(-1, -2) * scale
    weights = mx.softmax(scores if mask is None else scores + mask, axis=-1)
    return (weights @ v).swapaxes(1, 2).reshape(batch * length, heads * dim)


def hiding(kind: str, batch: int, length: int, total: int) -> tuple[bool, mx.array | None, mx.array | None]:
    """Whether causal, the mask for the kernel, and what plain attention adds."""
    causal = mx.where(mx.arange(total - length, total)[:, None] >= mx.arange(total), 0.0, -1e30)
    if kind == "causal":
        return True, None, causal
    if kind == "mask":
        seen = mx.random.uniform(shape=(batch, 1, length, total), key=mx.random.key(9)) > 0.4
        mask = mx.where(seen | (mx.arange(total) == 0), 0.0, -1e9)
        return False, mask, mask
    return False, None, None


SHAPES = [
    # rows, new positions, past, query heads, key-value heads, head_dim
    *itertools.product((1, 2), (1,), (0, 5, 63, 64, 700), (6,), (2,), (16, 64)),
    *itertools.product((1,), (3, 17, 70), (0, 5, 200), (4,), (1, 4), (24, 64, 128)),
    (1, 1, 4000, 4, 1, 64),
    (2, 130, 0, 8, 2, 80),
]
# Each pair of sizes occurs in one of them.
FEW_SHAPES = [SHAPES[index] for index in chosen([dict(enumerate(map(str, shape))) for shape in SHAPES], 2)]


@needs_kernels
@pytest.mark.parametrize("shapes", [FEW_SHAPES, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_attention(kind, shapes):
    for batch, length, past, heads, kv, dim in shapes:
        total = past + length
        q = normal(batch, length, heads, dim)
        k, v = (normal(batch, kv, total + 7, dim, seed=s) for s in (1, 2))
        causal, mask, added = hiding(kind, batch, length, total)
        expected = plain_attention(q, k[:, :, :total], v[:, :, :total], dim**-0.5, added)
        mixed, sums = kernels.attention(q, [k], [v], dim**-0.5, causal, mask, total)
        assert apart(mixed, expected) < 2e-5
        seen = 0.0 if added is None else added
        scores = q.swapaxes(1, 2) @ mx.repeat(k[:, :, :total], heads // kv, axis=1).swapaxes(-1, -2) * dim**-0.5 + seen
        assert apart(sums, mx.logsumexp(scores, axis=-1)) < 1e-5
        half = [x.astype(mx.bfloat16) for x in (k, v)]
        expected = plain_attention(q, *(x[:, :, :total].astype(mx.float32) for x in half), dim**-0.5, added)
        assert apart(kernels.attention(q, half[:1], half[1:], dim**-0.5, causal, mask, total)[0], expected) < 2e-5


@needs_kernels
def test_attention_under_other_transformations():
    q, k, v = normal(3, 2, 5, 4, 16), normal(3, 2, 2, 5, 16, seed=1), normal(3, 2, 2, 5, 16, seed=2)

    def both(q, k, v):
        return kernels.attention(q, [k], [v], 0.25, True, None, 5)

    mapped = mx.vmap(both)(q, k, v)
    for index in range(3):
        for ours, theirs in zip(mapped, both(q[index], k[index], v[index]), strict=True):
            assert apart(ours[index], theirs) < 1e-5
    one = q[0], k[0], v[0]
    tangents = [normal(*x.shape, seed=5) for x in one]
    _, slopes = mx.jvp(both, list(one), tangents)
    step = 1e-2
    moved = [both(*(x + sign * step * t for x, t in zip(one, tangents, strict=True)))[0] for sign in (1, -1)]
    assert apart(slopes[0], (moved[0] - moved[1]) / (2 * step)) < 1e-2


@needs_kernels
@pytest.mark.parametrize("bits", BITS)
def test_attention_to_packed_keys_and_values(bits):
    for batch, length, past, heads, kv, dim in ((1, 1, 70, 6, 2, 64), (2, 9, 30, 4, 4, 64), (1, 40, 3, 4, 1, 128)):
        total = past + length
        q = normal(batch, length, heads, dim)
        packed = [mx.quantize(normal(batch, kv, total + 5, dim, seed=s), 32, bits) for s in (1, 2)]
        full = [mx.dequantize(*p, 32, bits)[:, :, :total] for p in packed]
        expected = plain_attention(q, *full, dim**-0.5, hiding("causal", batch, length, total)[2])
        # Also as in a cache: the used part of its buffers.
        for parts in (packed, [[x[:, :, :total] for x in p] for p in packed]):
            ours = kernels.attention(q, *(list(p) for p in parts), dim**-0.5, True, None, total, bits, 32)[0]
            assert apart(ours, expected) < 2e-5


@needs_kernels
@pytest.mark.parametrize("kind", ["none", "causal", "mask"])
def test_gradients_of_attention(kind):
    for batch, length, past, heads, kv, dim in ((1, 1, 4, 4, 2, 16), (2, 70, 0, 6, 2, 24), (1, 33, 100, 4, 1, 64)):
        total = past + length
        arrays = normal(batch, length, heads, dim), *(normal(batch, kv, total, dim, seed=s) for s in (1, 2))
        causal, mask, added = hiding(kind, batch, length, total)
        pull = normal(batch * length, heads * dim, seed=3)

        def ours(q, k, v, pull=pull, causal=causal, mask=mask, total=total):
            return (kernels.attention(q, [k], [v], 0.2, causal, mask, total)[0] * pull).sum()

        def theirs(q, k, v, pull=pull, added=added):
            return (plain_attention(q, k, v, 0.2, added) * pull).sum()

        slopes = [mx.grad(f, argnums=(0, 1, 2))(*arrays) for f in (ours, theirs)]
        assert max(map(apart, *slopes)) < 1e-4
        # Queries in [batch, heads, length, dim] memory order.
        turned = mx.contiguous(arrays[0].swapaxes(1, 2)).swapaxes(1, 2)
        assert apart(mx.grad(ours)(turned, *arrays[1:]), slopes[1][0]) < 1e-4


# Whole layers.


def layer_arguments(batch, length, start, bits, group_size, has_norms, room=40):
    """Arguments of `kernels.layer`, and the dequantized projections."""
    dim, queries, kv, head_dim, inner = 128, 4, 2, 32, 192
    shapes = (queries + 2 * kv) * head_dim, dim, 2 * inner, dim
    widths = dim, queries * head_dim, dim, inner
    stored, opened = [], []
    for seed, shape in enumerate(zip(shapes, widths, strict=True)):
        weight = normal(*shape, seed=seed) * 0.1
        if bits:
            packed = mx.quantize(weight, group_size, bits)
            stored.append((*packed, bits, group_size, False))
            opened.append(mx.dequantize(*packed, group_size, bits))
        else:
            stored.append((weight.astype(mx.bfloat16), None, None, 0, 0, False))
            opened.append(stored[-1][0].astype(mx.float32))
    norms = [(1 + 0.1 * normal(n, seed=9)).astype(mx.bfloat16) for n in (dim, dim, head_dim, head_dim)]
    buffers = [normal(batch, kv, room, head_dim, seed=s) for s in (5, 6)]
    table = rotation_table(head_dim, 1e4, start, length)
    x = normal(batch * length, dim, seed=7)
    return [x, table, *buffers, start, queries, kv, 1e-6, 0.2, norms[: 4 if has_norms else 2], stored], opened


def plain_layer(arguments, opened):
    """The same in MLX's own operations: output, keys and values."""
    x, table, keys, values, start, queries, kv, eps, scale, norms, _ = arguments
    norms = [norm.astype(mx.float32) for norm in norms]
    batch, length, dim = keys.shape[0], table.shape[1], table.shape[2]
    heads = (mx.fast.rms_norm(x, norms[0], eps) @ opened[0].T).reshape(batch, length, -1, dim)
    q, k, v = mx.split(heads, [queries, queries + kv], axis=2)
    if len(norms) == 4:
        q, k = mx.fast.rms_norm(q, norms[2], eps), mx.fast.rms_norm(k, norms[3], eps)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k = (mx.fast.rope(x, dim, traditional=False, base=1e4, scale=1.0, offset=start) for x in (q, k))
    keys, values = (mx.slice_update(old, new, mx.array(start), [2]) for old, new in ((keys, k), (values, v)))
    total = start + length
    hidden = mx.where(mx.arange(start, total)[:, None] >= mx.arange(total), 0.0, -mx.inf)
    mixed = plain_attention(q.swapaxes(1, 2), keys[:, :, :total], values[:, :, :total], scale, hidden)
    x = x + mixed @ opened[1].T
    gate, up = mx.split(mx.fast.rms_norm(x, norms[1], eps) @ opened[2].T, 2, axis=-1)
    return x + (gate * mx.sigmoid(gate) * up) @ opened[3].T, keys, values


@pytest.mark.covering(2)
@needs_kernels
@pytest.mark.parametrize("has_norms", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(0, 0), (4, 64), (4, 32), (8, 64), (3, 64)])
@pytest.mark.parametrize(("batch", "length", "start"), [(1, 1, 0), (1, 1, 7), (2, 3, 5), (1, 30, 4), (3, 1, 39)])
def test_a_whole_layer(batch, length, start, bits, group_size, has_norms):
    arguments, opened = layer_arguments(batch, length, start, bits, group_size, has_norms)
    mx.eval(arguments[:4])
    for a, b in zip(kernels.layer(*arguments), plain_layer(arguments, opened), strict=True):
        assert apart(a, b) < 1e-4


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3])
def test_a_layer_has_projections_of_every_kind(rows):
    """Packed differently, with or without rounding: equal to the kernels one by one."""
    x, table, keys, values, start, queries, kv, eps, scale, norms, stored = layer_arguments(1, rows, 5, 0, 0, True)[0]
    kinds = ((4, 64, True), (0, 0, False), (3, 32, True), (4, 64, False))
    for i, (bits, group_size, rounds) in enumerate(kinds):
        if bits:
            packed = mx.quantize(stored[i][0].astype(mx.float32), group_size, bits)
            stored[i] = (*packed, bits, group_size, rounds)
    wide = mx.stack([x, x], axis=-1)
    arguments = wide[..., 0], table, keys, values, start, queries, kv, eps, scale, norms, stored
    qkv = kernels.linear(kernels.rms_norm(x, norms[0], eps), stored[0])
    q, k, v = kernels.split_heads(qkv, table, *norms[2:], keys, values, queries, kv, eps, start)
    y = x + kernels.linear(kernels.attention(q, [k], [v], scale, True, None, start + rows)[0], stored[1])
    gate_and_up = kernels.linear(kernels.rms_norm(y, norms[1], eps), stored[2])
    expected = y + kernels.linear(kernels.swiglu(gate_and_up), stored[3])
    for ours, theirs in zip(kernels.layer(*arguments), (expected, k, v), strict=True):
        assert apart(ours, theirs) < 1e-6


@needs_kernels
def test_gradients_of_a_layer():
    arguments, opened = layer_arguments(2, 3, 5, 8, 64, True)
    arguments[9] = [norm.astype(mx.float32) for norm in arguments[9]]
    pull = normal(6, 128, seed=8)

    def slopes(layer):
        def total(x, keys, norm):
            changed = [x, arguments[1], keys, *arguments[3:9], [norm, *arguments[9][1:]], arguments[10]]
            y, keys, values = layer(changed)
            return (y * pull).sum() + (keys * values).sum()

        return mx.grad(total, argnums=(0, 1, 2))(arguments[0], arguments[2], arguments[9][0])

    theirs = slopes(lambda changed: plain_layer(changed, opened))
    assert max(map(apart, slopes(lambda changed: kernels.layer(*changed)), theirs)) < 1e-4


@needs_kernels
@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda x: x[:, :64]),
        (0, lambda x: x.astype(mx.float16)),
        (1, lambda table: table[:, :, :16]),
        (2, lambda keys: keys[:, :1]),
        (3, lambda values: values[:, :, :-1]),
        (4, lambda _: 38),
        (4, lambda _: -1),
        (5, lambda _: 3),
        (9, lambda norms: norms[:3]),
        (9, lambda norms: norms[::-1]),
        (10, lambda stored: stored[:3]),
        (10, lambda stored: [stored[1], *stored[1:]]),
        (10, lambda stored: [*stored[:3], (*stored[3][:3], 8, 32, False)]),
        (10, lambda stored: [(stored[0][0].reshape(-1), *stored[0][1:]), *stored[1:]]),
    ],
)
def test_a_layer_refuses_invalid_arguments(place, change):
    arguments, _ = layer_arguments(1, 3, 4, 4, 64, True)
    kernels.layer(*arguments)
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=r"mlx_openelm\.native: "):
        kernels.layer(*arguments)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads():
    model, _ = load("tiny")
    cache = make_cache(len(model.layers))
    mx.eval(model(mx.array([[*range(40, 250)]]), cache))
    logits = []
    try:
        for count in (1, 2, 3):
            kernels.set_threads(count)
            logits.append(np.array(model(mx.array([[7]]), cache)))
            for layer in cache:
                layer.trim(1)
    finally:
        kernels.set_threads(native.thread_count())
    assert np.array_equal(logits[0], logits[1]) and np.array_equal(logits[0], logits[2])


# Caches.


@needs_kernels
def test_overlapping_steps_extend_a_cache_in_place():
    """As in decoding, a token's kernels are dispatched before earlier ones have run."""
    model, _ = load("tiny")
    cache = make_cache(len(model.layers))
    mx.eval(model(mx.array([[1, 5, 6, 7]]), cache))

    def addresses() -> list[int]:
        return [np.asarray(memoryview(layer.keys)).ctypes.data for layer in cache]

    before = addresses()
    for token in range(3):
        mx.async_eval(model(mx.array([[*range(60)]]), cache), model(mx.array([[token]]), cache))
        assert addresses() == before


@needs_kernels
def test_a_cache_is_extended_in_place_unless_it_has_other_references():
    model, _ = load("tiny")
    cache = make_cache(len(model.layers))
    mx.eval(model(mx.array([[1, 5, 6, 7]]), cache))

    def address() -> int:
        return np.asarray(memoryview(cache[0].keys)).ctypes.data

    before = address()
    for token in range(8):
        mx.eval(model(mx.array([[token]]), cache))
        assert address() == before
    held, copy = cache[0].keys, np.array(cache[0].keys)
    mx.eval(model(mx.array([[9]]), cache))
    assert address() != before and np.array_equal(np.array(held), copy)
    assert not np.array_equal(np.array(cache[0].keys), copy)


@needs_kernels
@pytest.mark.parametrize("make", [lambda: KVCache(), lambda: RotatingKVCache(12, keep=4), lambda: BatchKVCache([0])])
def test_every_cache_equals_plain_mlx(make, monkeypatch):
    model, _ = load(FOLDER)
    rows = [[1, 20, 21, 22, 23], [7], [30, 31, 32], *([token] for token in range(12))]
    pieces = [mx.array([row]) for row in rows]

    def run() -> list[np.ndarray]:
        cache = [make() for _ in model.layers]
        return [np.array(model(piece, cache)) for piece in pieces]

    ours = run()
    monkeypatch.setattr(native, "kernels", None)
    for a, b in zip(ours, run(), strict=True):
        assert np.abs(a - b).max() < 1e-4


@needs_kernels
def test_a_cache_in_half_precision_stays_usable():
    """As in a prompt cache saved on a GPU."""
    model, _ = load(FOLDER)
    exact, half = (make_cache(len(model.layers)) for _ in range(2))
    mx.eval(model(mx.array([[1, 20, 21]]), exact))
    for layer, other in zip(half, exact, strict=True):
        layer.state = other.keys.astype(mx.bfloat16), other.values.astype(mx.bfloat16), other.offset
    difference = mx.abs(model(mx.array([[7]]), half) - model(mx.array([[7]]), exact)).max().item()
    assert half[0].offset == 4 and 0 < difference < 0.1


@needs_kernels
@pytest.mark.parametrize("name", [FOLDER, "tiny"], ids=["plain", "packed"])
def test_where_a_prompt_is_cut_changes_no_bit(name):
    model, ids = load(name)[0], [3 + i * i % 500 for i in range(620)]

    def run(lengths: list[int]) -> list[mx.array]:
        cache, start, parts = make_cache(len(model.layers)), 0, []
        for length in lengths:
            parts.append(model.hidden_states(mx.array([ids[start : start + length]]), cache)[0])
            start += length
        assert start == len(ids)
        return [mx.concatenate(parts), *(array for layer in cache for array in layer.keys_and_values())]

    whole = run([620])
    for lengths in ([64] * 9 + [44], [12, 495, 13, 100], [128] * 4 + [96, 12]):
        assert all(mx.array_equal(one, other).item() for one, other in zip(whole, run(lengths), strict=True))
    assert not mx.array_equal(whole[0], run([609, 11])[0]).item()  # few positions, as in a step


@needs_kernels
def test_trimmed_caches_forget(reference):
    model, _ = load(FOLDER)
    cache, ids = make_cache(len(model.layers)), reference["ids"][0]
    model(mx.array([[*ids, 9, 8, 7]]), cache)
    for layer in cache:
        layer.trim(3 + len(ids) - 2)
    logits = model(mx.array([ids[2:]]), cache)[0]
    assert np.abs(np.array(logits) - reference["logits_0"][2:]).max() < 1e-4


# The whole model.


@needs_kernels
def test_tokens_equal_the_reference(reference):
    for dtype, prompts in ((None, (0, 1)), ("float32", (2, 3))):
        model, _ = load(FOLDER, dtype=dtype)
        for prompt in prompts:
            ids, greedy = reference["ids"][prompt], reference["greedy"][prompt]
            assert [token for token, _ in generate_step(model, ids, max_tokens=48)] == greedy


@needs_kernels
def test_half_precision_activations_work_on_a_cpu(tmp_path):
    convert(FOLDER, tmp_path / "q", quantize=True, q_bits=8)
    half, _ = load(tmp_path / "q", dtype="bfloat16")
    exact, _ = load(tmp_path / "q")
    tokens = mx.array([[1, 5, 6, 7, 8]])
    difference = half(tokens).astype(mx.float32) - exact(tokens)
    assert half(tokens).dtype == mx.bfloat16 and 0 < mx.abs(difference).max().item() < 0.5


def divergence(expected: mx.array, got: mx.array) -> float:
    """The mean KL(expected || got) of rows of logits, in nats."""
    expected, got = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (expected, got))
    return (mx.exp(expected) * (expected - got)).sum(-1).mean().item()


@needs_kernels
@pytest.mark.parametrize("bits", [pytest.param(n, marks=() if n in (4, 8) else pytest.mark.slow) for n in BITS])
def test_rounding_activations_costs_less_than_quantizing_weights(bits, tmp_path):
    text = json.loads((FIXTURES / "valid.jsonl").read_text().splitlines()[0])["text"]
    full, tokenizer = load(FOLDER)
    ids = mx.array(tokenizer.encode(text)[:128])
    convert(FOLDER, tmp_path / "q", quantize=True, q_bits=bits, q_group_size=64 if bits != 2 else 32)
    model, _ = load(tmp_path / "q", exact_activations=True)

    def logits(of) -> mx.array:
        cache, parts = make_cache(len(of.layers)), []
        for start in range(0, ids.size, 8):  # few rows at a time, since only those are rounded
            parts.append(of(ids[None, start : start + 8], cache)[0])
        return mx.concatenate(parts)

    expected, exact = logits(full), logits(model)
    rounded = logits(load(tmp_path / "q")[0])  # as it is by default
    assert mx.array_equal(exact, rounded).item() == (bits > ROUNDED_BITS)
    assert divergence(exact, rounded) < 0.25 * divergence(expected, exact)


@needs_kernels
def test_few_activations_of_many_layers_are_in_memory_at_once():
    """MLX evaluates ahead of the processor: it would allocate the outputs of all 32 products before the first ends."""
    weight, x = normal(1024, 1024), normal(256, 1024, seed=1)  # 1 MiB each time
    mx.eval(weight, x)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(32):
        x = linear(x, weight)
    mx.eval(x)
    assert mx.get_peak_memory() - before < 12 << 20


@needs_kernels
def test_concurrent_generations_give_the_same_text_as_alone():
    model, tokenizer = load("tiny")
    prompts = ["ROMEO.", "To be, or not to be"]
    alone = [generate(model, tokenizer, p, max_tokens=60) for p in prompts]
    together: dict[int, str] = {}

    def run(index: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            together[index] = generate(model, tokenizer, prompts[index], max_tokens=60)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [together.get(i) for i in range(2)] == alone


@needs_kernels
def test_a_concurrent_blas_changes_nothing():
    """MLX's products, on OpenBLAS's threads if it is loaded, while a text is generated."""
    model, tokenizer = load("tiny")
    alone = generate(model, tokenizer, "ROMEO.", max_tokens=60)
    x = normal(300, 300)
    product, wrong = np.array(x @ x), []

    def multiply() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            wrong.extend(turn for turn in range(60) if np.abs(np.array(x @ x) - product).max() > 1e-3)
        wrong.append(-1)  # waits until it ends

    beside = threading.Thread(target=multiply)
    beside.start()
    assert generate(model, tokenizer, "ROMEO.", max_tokens=60) == alone
    beside.join(timeout=120)
    assert wrong == [-1]


@needs_kernels
def test_quantized_caches_work_with_the_kernels(reference):
    model, _ = load(FOLDER)
    tokens = [t for t, _ in generate_step(model, reference["ids"][0], max_tokens=24, options=CacheOptions(kv_bits=8))]
    assert tokens[:8] == reference["greedy"][0][:8]


# Whether they are used.


@pytest.mark.parametrize(
    ("variables", "count"),
    [({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "5,2"}, 5), ({"OPENBLAS_NUM_THREADS": "1"}, 1),
     ({"OMP_NUM_THREADS": "none", "OPENBLAS_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "0"}, None), ({}, None)],
)  # fmt: skip
def test_thread_counts_follow_the_usual_variables(variables, count, monkeypatch):
    for name in native.THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert native.thread_count() == count if count else 1 <= native.thread_count() <= (os.cpu_count() or 1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a library and a matching description."""
    monkeypatch.delenv(native.VARIABLE, raising=False)
    (tmp_path / build.LIBRARY).write_bytes(b"")
    describe(tmp_path)
    return tmp_path


def describe(folder: Path, **facts: object) -> None:
    known = {"mlx": mx.__version__, "sources": native.fingerprint(), "machine": os.uname().machine, "instructions": []}
    known["bytes"] = (folder / build.LIBRARY).stat().st_size
    (folder / build.FACTS).write_text(json.dumps(known | facts))


def test_a_library_that_fits_is_loaded(folder):
    assert native.examine(folder) is None


def test_a_library_for_another_mlx_is_not_loaded(folder):
    describe(folder, mlx="0.1.2")
    status = native.examine(folder)
    assert status is not None and status.state == "stale"
    assert status.detail == f"compiled for MLX 0.1.2, but {mx.__version__} is installed"
    assert "-m mlx_openelm.native" in (status.advice or "")


def test_a_library_built_from_other_sources_is_not_loaded(folder):
    describe(folder, sources=0)
    status = native.examine(folder)
    assert status is not None and (status.state, status.detail) == ("stale", "compiled from other sources")


def test_a_clone_uses_the_installed_library(monkeypatch, tmp_path):
    own = Path(native.__file__).parent
    installed = tmp_path / "mlx_openelm" / "native"
    installed.mkdir(parents=True)
    (installed / build.LIBRARY).write_bytes(b"")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    examined: list[Path] = []
    monkeypatch.setattr(native, "examine", lambda folder: examined.append(folder) or native.Status("off"))

    def folder() -> Path:
        native._load()
        return examined[-1]

    assert folder() == (own if (own / build.LIBRARY).is_file() else installed)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "clone" / "__init__.py"))
    assert folder() == installed
    (installed / build.LIBRARY).unlink()
    assert folder() == tmp_path / "clone"


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_a_library_for_another_processor_is_not_loaded(folder):
    describe(folder, instructions=["no_such_instruction"])
    status = native.examine(folder)
    assert status is not None and status.state == "foreign" and "lacks no_such_instruction" in status.detail
    describe(folder, machine="abacus")
    assert native.examine(folder).state == "foreign"  # type: ignore[union-attr]


def test_a_missing_or_damaged_library_is_reported(folder, monkeypatch):
    (folder / build.FACTS).write_text("{")
    assert native.examine(folder).state == "failed"  # type: ignore[union-attr]
    describe(folder)
    (folder / build.LIBRARY).write_bytes(b"longer than it was")
    assert "is damaged" in native.examine(folder).detail  # type: ignore[union-attr]
    (folder / build.LIBRARY).unlink()
    assert native.examine(folder).state == "missing"  # type: ignore[union-attr]
    monkeypatch.setenv(native.VARIABLE, "0")
    assert native.examine(folder).state == "off"  # type: ignore[union-attr]


@pytest.fixture
def unloaded(folder, monkeypatch) -> None:
    """Fresh kernels, not loaded yet, whose installed library is the one in `folder`."""
    assert native.status is not None  # loads them now, so that they can be restored afterwards
    monkeypatch.delattr(native, "kernels")
    monkeypatch.delattr(native, "status")
    monkeypatch.setattr(native, "__file__", str(folder / "__init__.py"))


def test_a_library_that_fails_to_load_is_reported(unloaded):
    assert native.kernels is None and native.status.state == "failed" and build.LIBRARY in native.status.detail


def test_a_library_with_another_nanobind_is_reported(unloaded, monkeypatch):
    def strange(*_):
        raise TypeError("rms_norm(): incompatible function arguments")

    loader = SimpleNamespace(exec_module=lambda module: None)
    monkeypatch.setattr(native, "spec_from_file_location", lambda *_: SimpleNamespace(loader=loader))
    monkeypatch.setattr(native, "module_from_spec", lambda _: SimpleNamespace(rms_norm=strange))
    assert native.kernels is None and native.status.state == "failed" and "nanobind differs" in native.status.detail


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_variable_turns_them_off_and_the_text_stays_the_same():
    code = (
        "from mlx_openelm import generate, load, native; import mlx.core as mx; mx.set_default_device(mx.cpu);"
        "print(native.status.state, repr(generate(*load('tiny'), 'ROMEO.', max_tokens=30)))"
    )
    plain = run(code, MLX_OPENELM_NATIVE="0")
    assert plain.startswith("off ")
    if kernels is not None:
        assert run(code) == plain.replace("off ", "used ", 1)


@needs_kernels
def test_doctor_says_which_kernels_are_used():
    done = run_here("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    if "CPU kernels" not in findings:
        pytest.skip("a GPU does not use the kernels")
    assert findings["CPU kernels"]["value"].startswith("used: ") and findings["CPU kernels"]["advice"] is None
    done = subprocess.run([sys.executable, "-m", "mlx_openelm", "doctor"], capture_output=True, text=True,
                          env=os.environ | {"MLX_OPENELM_NATIVE": "0"})  # fmt: skip
    assert "off: disabled by MLX_OPENELM_NATIVE" in done.stdout


def test_without_a_compiler_building_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match="There is no C\\+\\+ compiler; install one"):
        build.build(tmp_path / "there")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="CXX names 'no-such-compiler', which was not found"):
        build.build(tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_building_needs_nanobind_and_mlx(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(build.BuildError, match="nanobind is not installed; pip install nanobind==3"):
        build.find_nanobind()
    with pytest.raises(build.BuildError, match="MLX is not installed"):
        build.find_mlx()
    source, header = (tmp_path / "nanobind" / name for name in ("src/nb_combined.cpp", "include/nanobind/nanobind.h"))
    for file in (source, header):
        file.parent.mkdir(parents=True)
    source.touch()
    header.write_text("#define NB_VERSION_MAJOR 2\n#define NB_VERSION_MINOR 9\n#define NB_VERSION_PATCH 2\n")
    with pytest.raises(build.BuildError, match=r"nanobind 2\.9\.2 is installed; pip install nanobind==3"):
        build.find_nanobind()
    header.write_text("#define NB_VERSION_MAJOR 3\n#define NB_VERSION_MINOR 1\n#define NB_VERSION_PATCH 0\n")
    assert build.find_nanobind() == tmp_path / "nanobind"


@needs_kernels
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="needs g++ on Linux")
def test_kernels_are_clean_under_sanitizers(tmp_path):
    """Rerun this file's other tests with the address and undefined-behaviour sanitizers."""
    pytest.importorskip("nanobind")
    shutil.copytree(Path(native.__file__).parent.parent, tmp_path / "mlx_openelm")
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
    library = build.build(tmp_path / "mlx_openelm" / "native", flags=checks)
    # Preload it before Python, with the C++ runtime, so that exceptions are intercepted.
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    # Python frees some memory never, which would be reported as leaks.
    environment = {"PYTHONPATH": str(tmp_path), "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"OPENELM_CHECKED_LIBRARY": str(library)}
    ours = "not doctor and not variable and not sanitizers and not rounded_activations"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-k", ours, __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
