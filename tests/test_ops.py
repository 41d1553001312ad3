"""The CPU's and the GPU's form of each layer compute the same; the fused functions also run, slowly, on a CPU."""

from __future__ import annotations

import threading
from pathlib import Path

from mlx_openelm import generate, load, native
from mlx_openelm.cache import BatchKVCache, make_cache
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.ops import layers

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from devices import pretend

FIXTURES = Path(__file__).parent / "fixtures"

pytestmark = pytest.mark.usefixtures("either_way")


@pytest.fixture(scope="module")
def model():
    return load(FIXTURES / "shakespeare-hf", dtype="float32")[0]


@pytest.fixture
def fused(monkeypatch):
    pretend(monkeypatch, "Metal")


@pytest.mark.parametrize("prompt", range(4))
def test_the_fused_form_gives_the_reference_logits(model, fused, prompt, reference):
    ids, logits = reference["ids"][prompt], reference[f"logits_{prompt}"]
    assert np.abs(np.array(model(mx.array([ids]))[0]) - logits).max() < 1e-4


def test_the_fused_form_generates_the_reference_tokens(model, fused, reference):
    tokens = [token for token, _ in generate_step(model, reference["ids"][0], max_tokens=20, prefill_step_size=4)]
    assert tokens == reference["greedy"][0][:20]


def test_both_forms_agree_on_rows_at_different_offsets(model, monkeypatch):
    rows = mx.array([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])

    def run() -> mx.array:
        caches = [BatchKVCache([0, 2]) for _ in model.layers]
        first = model(rows, cache=caches)[:, -1:]
        return mx.concatenate([first, model(mx.array([[3], [4]]), cache=caches)], axis=1)

    plain = run()
    pretend(monkeypatch, "Metal")
    assert mx.abs(run() - plain).max().item() < 1e-4
    alone = model(mx.array([[11, 12, 13, 4]]))[0, -2:]
    assert mx.abs(plain[1] - alone).max().item() < 1e-4


@pytest.mark.covering
@pytest.mark.parametrize("bits", [4, 8])
def test_both_forms_agree_on_quantized_caches(model, monkeypatch, bits):
    def run() -> list[float]:
        options = CacheOptions(kv_bits=bits)
        return [logprob for _, logprob in generate_step(model, [1, 5, 9, 300], max_tokens=12, options=options)]

    plain = run()
    pretend(monkeypatch, "Metal")
    # A key between two steps may be rounded to either.
    assert np.abs(np.array(run()) - np.array(plain)).max() < 2e-3


def test_a_quantized_cache_stays_close_to_an_exact_one(model):
    prompt = mx.array([[1, *range(20, 60)]])
    exact = model(prompt, cache=make_cache(len(model.layers)))
    quantized = [c.to_quantized(group_size=32, bits=8) for c in make_cache(len(model.layers))]
    assert 0 < mx.abs(model(prompt, cache=quantized) - exact).max().item() < 0.5


@pytest.mark.covering
@pytest.mark.parametrize(("out_dims", "in_dims"), [(3200, 1280), (1280, 3200), (4093, 1100), (40, 110_000), (64, 64)])
def test_blocked_products_of_a_row_equal_the_plain_product(out_dims, in_dims):
    weight = mx.random.normal((out_dims, in_dims), key=mx.random.key(1))
    x = mx.random.normal((1, in_dims), key=mx.random.key(2))
    expected = np.array(x, dtype=np.float64) @ np.array(weight, dtype=np.float64).T
    assert np.abs(np.array(layers.linear(x, weight)) - expected).max() < 1e-5 * in_dims**0.5 * 10
    assert layers.linear(x[None], weight).shape == (1, 1, out_dims)
    two = mx.concatenate([x, x])
    assert np.abs(np.array(layers.linear(two, weight))[1] - expected[0]).max() < 1e-5 * in_dims**0.5 * 10


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_many_rows_in_half_precision_are_multiplied_in_float32(dtype, monkeypatch):
    """A CPU has a BLAS only for float32: product and gradients are computed in float32 and rounded once."""
    monkeypatch.setattr(native, "kernels", None)
    draw = [mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate([(16, 96), (64, 96), (16, 64)])]
    x, weight, residual = (array.astype(dtype) for array in draw)
    wide = [array.astype(mx.float32) for array in (x, weight, residual)]
    for rest in ([], [2]):
        given, exact = [x, weight, *(residual for _ in rest)], [*wide[:2], *(wide[i] for i in rest)]
        product = layers.linear(*given)
        assert product.dtype == dtype
        assert mx.array_equal(product, layers.linear(*exact).astype(dtype))
    by_weight = mx.grad(lambda weight: layers.linear(x, weight).astype(mx.float32).sum())(weight)
    assert by_weight.dtype == dtype
    assert mx.array_equal(by_weight, mx.broadcast_to(wide[0].sum(axis=0), weight.shape).astype(dtype))


def test_blocks_divide_the_matrix_and_stay_below_the_packing_limit():
    assert layers._blocks(5120, 1280) == (8, 640, 1280)
    assert layers._blocks(1280, 5120) == (8, 160, 5120)
    assert layers._blocks(2560, 1280) is None  # too small to be worth it
    assert layers._blocks(4093, 1100) is None  # a prime number of rows


@pytest.mark.parametrize("rows", [1, 3])
def test_rms_norm_equals_numpys_in_every_dtype(rows):
    x = mx.random.normal((rows, 96), key=mx.random.key(0)) * 3
    weight = mx.random.uniform(shape=(96,), key=mx.random.key(1))
    wide = np.array(x, dtype=np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.array(weight)
    assert np.abs(np.array(layers.rms_norm(x, weight, 1e-6)) - expected).max() < 1e-5
    half = layers.rms_norm(x.astype(mx.bfloat16), weight.astype(mx.bfloat16), 1e-6)
    assert half.dtype == mx.bfloat16
    assert np.abs(np.array(half.astype(mx.float32)) - expected).max() < 0.05


@pytest.mark.parametrize("rows", [1, 100])
def test_swiglu_is_silu_of_the_first_half_times_the_second(rows):
    x = mx.random.normal((rows, 64), key=mx.random.key(3)) * 4
    wide = np.array(x, dtype=np.float64)
    gate, up = wide[:, :32], wide[:, 32:]
    assert np.abs(np.array(layers.swiglu(x)) - gate / (1 + np.exp(-gate)) * up).max() < 1e-5


@pytest.mark.parametrize("length", [1, 5])
def test_rotation_of_one_or_many_positions_is_half_rotation_rope(length):
    x = mx.random.normal((2, length, 3, 8), key=mx.random.key(4))
    offsets = np.array([7, 1000])
    angles = (offsets[:, None] + np.arange(length))[:, :, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    low, high = np.array(x)[..., :4], np.array(x)[..., 4:]
    expected = np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
    )
    rotation = layers.Rotation(8, 100.0, mx.array(offsets), length)
    assert np.abs(np.array(rotation(x)) - expected).max() < 1e-3


def test_two_threads_may_share_a_fresh_model():
    """Arrays derived from weights on first use must not connect the graphs of two threads."""
    model, tokenizer = load("tiny")
    texts = []
    threads = [
        threading.Thread(target=lambda: texts.append(generate(model, tokenizer, "ROMEO", max_tokens=16)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(texts) == 2 and texts[0] == texts[1], texts


def test_replaced_norm_weights_are_used_and_gradients_reach_them(model):
    tokens = mx.array([[1, 5, 9]])
    attention = model.layers[0].attn
    before, weight = model(tokens), attention.q_norm.weight
    try:
        attention.q_norm.weight = weight * 2
        assert mx.abs(model(tokens) - before).max().item() > 0.01
    finally:
        attention.q_norm.weight = weight
    assert mx.abs(model(tokens) - before).max().item() == 0
    _, gradients = nn.value_and_grad(model, lambda m, t: m(t).square().mean())(model, tokens)
    assert mx.abs(gradients["transformer"]["layers"][0]["attn"]["q_norm"]["weight"]).max().item() > 0
    assert mx.abs(model(tokens) - before).max().item() == 0


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_additive_masks_work_in_every_dtype_of_the_fused_form(fused, dtype):
    model, _ = load(FIXTURES / "shakespeare-hf", dtype=dtype)
    tokens = mx.array([[1, 5, 9, 11]])
    mask = mx.where(mx.arange(4)[:, None] >= mx.arange(4), 0.0, -1e9)
    difference = model(tokens, mask=mask) - model(tokens)
    assert mx.abs(difference).max().item() < (0.3 if dtype == mx.bfloat16 else 1e-4)
