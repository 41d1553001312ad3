"""The model against the reference's numbers, and against an independent implementation in float64."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache, make_cache
from mlx_openelm.config import ModelConfig
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM
from mlx_openelm.ops import layers

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy_model
import pytest
from devices import pretend
from mlx.utils import tree_flatten

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())


@pytest.fixture(params=["plain", "fused"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of what a layer computes; the fused one is what a GPU runs, and a CPU can compute it too."""
    pretend(monkeypatch, "Metal" if request.param == "fused" else "CPU")
    return request.param


@pytest.fixture(scope="module")
def shakespeare() -> OpenELM:
    return build_model(mlx_format.read(FIXTURES / "shakespeare-hf"), dtype="float32")


def make_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "num_transformer_layers": 3,
        "model_dim": 32,
        "head_dim": 8,
        "vocab_size": 61,
        "num_query_heads": [2, 4, 4],
        "num_kv_heads": [1, 2, 2],
        "ffn_multipliers": [0.5, 2.0],
        "ffn_dim_divisor": 8,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }
    return ModelConfig.from_dict(values | changes)


def make_model(config: ModelConfig, seed: int = 0) -> OpenELM:
    """A model with random weights that make every part matter."""
    rng = np.random.default_rng(seed)
    model = OpenELM(config)
    weights = []
    for name, shape in config.tensor_shapes().items():
        noise = rng.standard_normal(shape)
        weight = 1 + 0.3 * noise if len(shape) == 1 else noise / shape[1] ** 0.5
        weights.append((name, mx.array(weight.astype(np.float32))))
    model.load_weights(weights)
    return model


def numpy_logits(
    model: OpenELM, rows: np.ndarray, mask: np.ndarray | None = None, positions: np.ndarray | None = None
) -> np.ndarray:
    """The reference's logits with the weights of a model; arguments as there."""
    weights = {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}
    return numpy_model.logits(model.config, weights, rows, mask, positions)


def tokens_for(config: ModelConfig, batch: int, length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


def assert_close(ours: mx.array, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    ours = np.array(ours.astype(mx.float32))
    assert ours.shape == expected.shape
    assert float(np.abs(ours - expected).max()) < tolerance


# The reference.


@pytest.mark.parametrize("prompt", range(4))
def test_logits_are_the_references(shakespeare: OpenELM, form: str, prompt: int) -> None:
    expected = np.load(FIXTURES / "shakespeare-reference.npz")[f"logits_{prompt}"]
    logits = shakespeare(mx.array([REFERENCE["ids"][prompt]]))
    assert logits.dtype == mx.float32
    assert_close(logits[0], expected)


@pytest.mark.parametrize("prompt", range(4))
def test_greedy_tokens_are_the_references(shakespeare: OpenELM, form: str, prompt: int) -> None:
    cache = make_cache(len(shakespeare.layers))
    tokens, generated = mx.array([REFERENCE["ids"][prompt]]), []
    for _ in range(48):
        token = shakespeare(tokens, cache)[0, -1].argmax().item()
        generated.append(token)
        tokens = mx.array([[token]])
    assert generated == REFERENCE["greedy"][prompt]


def test_the_numpy_implementation_is_right_too(shakespeare: OpenELM) -> None:
    expected = np.load(FIXTURES / "shakespeare-reference.npz")["logits_3"]
    assert np.abs(numpy_logits(shakespeare, np.array([REFERENCE["ids"][3]]))[0] - expected).max() < 1e-4


def rule_weights(config: ModelConfig) -> Iterator[tuple[str, mx.array]]:
    """The weights of the true-size references, which are a rule and not a file."""
    for name, shape in config.tensor_shapes().items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        values = rng.standard_normal(shape, np.float32)
        if len(shape) == 1:
            values = (1 + 0.1 * values).astype(np.float32)
        else:
            values /= np.float32(np.sqrt(shape[-1]))
        weight = mx.array(values)
        mx.eval(weight)
        yield name, weight


@pytest.mark.parametrize("size", ["270M", pytest.param("450M", marks=pytest.mark.slow)])
def test_true_sizes(size: str) -> None:
    reference = np.load(FIXTURES / f"true-size-OpenELM-{size}.npz")
    config = ModelConfig.from_name(size)
    model = OpenELM(config)
    model.load_weights(list(rule_weights(config)))
    count = sum(value.size for _, value in tree_flatten(model.parameters()))
    assert count == int(reference["num_parameters"]) == config.num_parameters
    ids = mx.array(reference["ids"])[None]
    cache = make_cache(len(model.layers))
    hidden = model.hidden_states(ids, cache)
    logits = model.logits(hidden)
    assert_close(logits[0, -1], reference["last_logits"])
    assert_close(logits[0, :, :32], reference["first32"])
    assert np.array_equal(np.array(logits[0].argmax(-1)), reference["argmax"])
    # A single row takes another way through the large products.
    for layer in cache:
        layer.trim(1)
    assert_close(model(ids[:, -1:], cache)[0, -1], reference["last_logits"])
    del model, logits, hidden, cache
    mx.clear_cache()


# The cache.


def test_one_at_a_time_is_all_at_once(shakespeare: OpenELM, form: str) -> None:
    ids = mx.array([REFERENCE["ids"][3] + REFERENCE["greedy"][3]])
    expected = np.array(shakespeare(ids)[0])
    cache = make_cache(len(shakespeare.layers))
    rows = mx.concatenate([shakespeare(ids[:, i : i + 1], cache)[0] for i in range(ids.shape[1])])
    assert_close(rows, expected)
    assert cache[0].offset == ids.shape[1]


@pytest.mark.parametrize("size", [1, 3, 7, 16, 62, 63])
def test_chunks_are_one_pass(shakespeare: OpenELM, form: str, size: int) -> None:
    ids = mx.array([REFERENCE["ids"][3] + REFERENCE["greedy"][3]])
    expected = np.array(shakespeare(ids)[0])
    cache = make_cache(len(shakespeare.layers))
    parts = [shakespeare(ids[:, i : i + size], cache)[0] for i in range(0, ids.shape[1], size)]
    assert_close(mx.concatenate(parts), expected)


@pytest.mark.parametrize("length", [255, 256, 257, 600])
def test_chunks_across_the_caches_steps(length: int) -> None:
    model = make_model(make_config())
    ids = tokens_for(model.config, 1, length)
    expected = np.array(model(mx.array(ids)))
    cache = make_cache(3)
    parts = [model(mx.array(ids[:, i : i + 100]), cache) for i in range(0, length - 2, 100)]
    rest = ids[:, sum(p.shape[1] for p in parts) :]
    parts += [model(mx.array(rest[:, i : i + 1]), cache) for i in range(rest.shape[1])]
    assert_close(mx.concatenate(parts, axis=1), expected)


def test_rows_at_different_offsets(form: str) -> None:
    """Rows padded on the left: each row's numbers are those it has alone, before and after a step."""
    model = make_model(make_config())
    lengths = [3, 9, 6, 1]
    rows = [tokens_for(model.config, 1, n + 5, seed=n)[0] for n in lengths]
    padding = [max(lengths) - n for n in lengths]
    cache = [BatchKVCache(padding) for _ in model.layers]
    prompt = np.stack([np.pad(row[:n], (p, 0)) for row, n, p in zip(rows, lengths, padding, strict=True)])
    parts = [model(mx.array(prompt), cache)]
    steps = np.stack([row[n:] for row, n in zip(rows, lengths, strict=True)])
    parts += [model(mx.array(steps[:, i : i + 1]), cache) for i in range(2)]
    parts += [model(mx.array(steps[:, 2:]), cache)]
    logits = mx.concatenate(parts, axis=1)
    for i, (row, p) in enumerate(zip(rows, padding, strict=True)):
        assert_close(logits[i, p:], numpy_logits(model, row[None])[0])
    assert cache[0].offset.tolist() == [n + 5 for n in lengths]


def test_a_batch_of_equal_rows_shares_one_plain_cache(form: str) -> None:
    model = make_model(make_config())
    ids = tokens_for(model.config, 3, 8)
    cache = make_cache(3)
    logits = mx.concatenate([model(mx.array(ids[:, :5]), cache), model(mx.array(ids[:, 5:]), cache)], axis=1)
    assert_close(logits, numpy_logits(model, ids))


@pytest.mark.parametrize("chunk", [1, 2, 5, 11, 40])
def test_a_sliding_cache_sees_the_first_and_the_latest_whatever_the_chunks(form: str, chunk: int) -> None:
    """Position p sees itself, the first `keep` and the latest of the rest, `max_size` in all."""
    model = make_model(make_config())
    ids, size, keep = tokens_for(model.config, 1, 40), 12, 4
    cache = [RotatingKVCache(size, keep=keep) for _ in model.layers]
    logits = mx.concatenate([model(mx.array(ids[:, i : i + chunk]), cache) for i in range(0, 40, chunk)], axis=1)
    p, c = np.arange(40)[:, None], np.arange(40)[None]
    visible = (c <= p) & ((c < keep) | (p - c < size - keep))
    assert_close(logits, numpy_logits(model, ids, np.where(visible, 0, -np.inf)[None]))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_cache_stays_close(form: str, bits: int) -> None:
    model = make_model(make_config(head_dim=32, num_query_heads=[2, 2, 4], num_kv_heads=[1, 2, 2]))
    ids = tokens_for(model.config, 1, 24)
    expected = numpy_logits(model, ids)
    cache = [QuantizedKVCache(32, bits) for _ in model.layers]
    parts = [model(mx.array(ids[:, :10]), cache), model(mx.array(ids[:, 10:13]), cache)]
    parts += [model(mx.array(ids[:, i : i + 1]), cache) for i in range(13, 24)]
    error = np.abs(np.array(mx.concatenate(parts, axis=1)) - expected)
    assert 0 < error.max() < {4: 1.0, 8: 0.1}[bits]


# The switches.

SWITCHES: dict[str, dict[str, Any]] = {
    "as published": {},
    "untied head": {"share_input_output_layers": False},
    "no query and key norms": {"normalize_qk_projections": False},
    "no GLU": {"ffn_with_glu": False},
    "GLU with gelu": {"activation_fn_name": "gelu"},
    "GLU with silu": {"activation_fn_name": "silu"},
    "GLU with relu": {"activation_fn_name": "relu"},
    "no GLU, gelu": {"ffn_with_glu": False, "activation_fn_name": "gelu"},
    "no GLU, relu": {"ffn_with_glu": False, "activation_fn_name": "relu"},
    "rope base": {"rope_freq_constant": 500.5},
    "rope base, whole": {"rope_freq_constant": 1_000_000},
    "norm eps": {"rms_norm_eps": 0.1},
    "no groups": {"num_query_heads": [1, 3, 4], "num_kv_heads": [1, 3, 4]},
    "groups of three": {"num_query_heads": [3, 6, 6], "num_kv_heads": [1, 2, 2]},
    "one key head": {"num_query_heads": [5, 6, 7], "num_kv_heads": [1, 1, 1]},
    "scaled by multipliers": {
        "num_query_heads": None,
        "num_kv_heads": None,
        "qkv_multipliers": [0.5, 1.0],
        "num_gqa_groups": 2,
    },
    "smallest head": {"head_dim": 2},
    "odd model width": {"model_dim": 23, "ffn_dim_divisor": 3},
    "one layer": {"num_transformer_layers": 1, "num_query_heads": 4, "num_kv_heads": 2},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switches(form: str, name: str) -> None:
    model = make_model(make_config(**SWITCHES[name]))
    ids = tokens_for(model.config, 2, 11)
    expected = numpy_logits(model, ids)
    assert_close(model(mx.array(ids)), expected)
    cache = make_cache(len(model.layers))
    parts = [model(mx.array(ids[:, :4]), cache)] + [model(mx.array(ids[:, i : i + 1]), cache) for i in range(4, 11)]
    assert_close(mx.concatenate(parts, axis=1), expected)


def test_every_switch_changes_the_numbers() -> None:
    """Otherwise the tests above could not notice a switch that is ignored."""
    ids = tokens_for(make_config(), 1, 9)
    base = numpy_logits(make_model(make_config()), ids)
    for changes in (
        {"activation_fn_name": "gelu"},
        {"activation_fn_name": "relu"},
        {"rope_freq_constant": 500.5},
        {"rms_norm_eps": 0.1},
        {"normalize_qk_projections": False},
        {"ffn_with_glu": False},
    ):
        assert np.abs(numpy_logits(make_model(make_config(**changes)), ids) - base).max() > 1e-2


def test_parameters_are_the_configs_tensors() -> None:
    for changes in SWITCHES.values():
        config = make_config(**changes)
        shapes = {name: value.shape for name, value in tree_flatten(OpenELM(config).parameters())}
        assert shapes == config.tensor_shapes()


# The pieces of a call.


def test_a_call_is_logits_of_hidden_states(shakespeare: OpenELM) -> None:
    ids = mx.array([REFERENCE["ids"][0]])
    hidden = shakespeare.hidden_states(ids)
    assert hidden.shape == (1, 9, 192)
    assert mx.array_equal(shakespeare.logits(hidden), shakespeare(ids))
    last = shakespeare.logits(hidden[:, -1])
    assert last.shape == (1, 2048)
    assert_close(last, np.array(shakespeare(ids)[:, -1]))


def test_large_single_rows_take_blocks_to_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6000, 700)).astype(np.float32)
    x = rng.standard_normal((1, 700)).astype(np.float32)
    assert layers._blocks(6000, 700) is not None
    assert_close(layers.linear(mx.array(x), mx.array(weight)), x.astype(np.float64) @ weight.T, 1e-3)
    assert layers.linear(mx.array(x[None]), mx.array(weight)).shape == (1, 1, 6000)
    assert layers.linear(mx.array(x[0]), mx.array(weight)).shape == (6000,)


# Masks.


def documents_mask(length: int, cuts: list[int]) -> np.ndarray:
    document = np.searchsorted(cuts, np.arange(length), side="right")
    return (document[:, None] == document[None]) & np.tril(np.ones((length, length), bool))


@pytest.mark.parametrize("kind", ["booleans", "numbers"])
@pytest.mark.parametrize("dims", [2, 4])
def test_masks(form: str, kind: str, dims: int) -> None:
    """Packed documents, each blind to the others; the rows of a batch are cut differently in four dimensions."""
    model = make_model(make_config())  # as many rows as key-value heads, the confusing case
    ids = tokens_for(model.config, 2, 10)
    visible = np.stack([documents_mask(10, cuts) for cuts in ([4, 7], [2])])
    if dims == 2:
        visible = visible[:1]
    added = np.where(visible, 0, -1e9)
    mask = mx.array(visible) if kind == "booleans" else mx.array(added.astype(np.float32))
    logits = model(mx.array(ids), mask=mask[0] if dims == 2 else mask[:, None])
    expected = numpy_logits(model, ids, added)
    assert np.abs(expected - numpy_logits(model, ids)).max() > 0.1
    assert_close(logits, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_additive_masks_of_any_batch(form: str, batch: int) -> None:
    model = make_model(make_config())
    ids = tokens_for(model.config, batch, 6)
    added = np.random.default_rng(3).standard_normal((batch, 6, 6)) * 2
    logits = model(mx.array(ids), mask=mx.array(added.astype(np.float32))[:, None])
    assert_close(logits, numpy_logits(model, ids, added))


def test_a_mask_over_a_cached_past(form: str) -> None:
    model = make_model(make_config())
    ids = tokens_for(model.config, 1, 9)
    visible = documents_mask(9, [3])
    cache = make_cache(3)
    model(mx.array(ids[:, :5]), cache, mask=mx.array(visible[:5, :5]))
    logits = model(mx.array(ids[:, 5:]), cache, mask=mx.array(visible[5:]))
    assert_close(logits, numpy_logits(model, ids, np.where(visible, 0, -np.inf)[None])[:, 5:])


def test_a_row_that_sees_nothing_is_finite() -> None:
    model = make_model(make_config())
    visible = np.tril(np.ones((5, 5), bool))
    visible[2] = False
    logits = np.array(model(mx.array(tokens_for(model.config, 2, 5)), mask=mx.array(visible)))
    assert np.isfinite(logits).all()


# Types.


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.bfloat16, 0.5), (mx.float16, 0.06)], ids=str)
def test_half_precision_is_close(shakespeare: OpenELM, form: str, dtype: mx.Dtype, tolerance: float) -> None:
    model = OpenELM(shakespeare.config)
    model.load_weights([(k, v.astype(dtype)) for k, v in tree_flatten(shakespeare.parameters())])
    expected = np.load(FIXTURES / "shakespeare-reference.npz")["logits_3"]
    ids = mx.array([REFERENCE["ids"][3]])
    logits = model(ids)
    assert logits.dtype == dtype
    assert_close(logits[0], expected, tolerance)
    cache = make_cache(len(model.layers))
    parts = [model(ids[:, :7], cache)] + [model(ids[:, i : i + 1], cache) for i in range(7, 15)]
    assert {p.dtype for p in parts} == {dtype}
    assert cache[0].keys.dtype == cache[0].values.dtype == dtype
    assert_close(mx.concatenate(parts, axis=1)[0], expected, tolerance)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_half_precision_stays_half_precision_under_masks(dtype: mx.Dtype) -> None:
    model = make_model(make_config())
    model.set_dtype(dtype)
    ids = mx.array(tokens_for(model.config, 2, 6))
    added = mx.zeros((2, 1, 6, 6), dtype)
    assert model(ids, mask=mx.tril(mx.ones((6, 6))) > 0).dtype == dtype
    assert model(ids, mask=added).dtype == dtype
    cache = [BatchKVCache([0, 3]) for _ in model.layers]
    assert model(ids, cache).dtype == dtype
    assert model(ids[:, :1], cache).dtype == dtype


# Gradients.


def loss(model: OpenELM, ids: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")


@pytest.mark.parametrize("changes", [{}, {"ffn_with_glu": False}, {"normalize_qk_projections": False}], ids=str)
def test_gradients_are_those_of_finite_differences(form: str, changes: dict) -> None:
    model = make_model(make_config(**changes))
    ids = tokens_for(model.config, 2, 7)
    value, gradients = nn.value_and_grad(model, loss)(model, mx.array(ids))
    gradients = dict(tree_flatten(gradients))
    assert gradients.keys() == model.config.tensor_shapes().keys()
    assert all(bool(mx.isfinite(g).all()) for g in gradients.values())

    def numpy_loss() -> float:
        logits = numpy_logits(model, ids[:, :-1])
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(-np.take_along_axis(logprobs, ids[:, 1:, None], -1).mean())

    assert abs(value.item() - numpy_loss()) < 1e-4
    rng = np.random.default_rng(5)
    for name in ("transformer.token_embeddings.weight", "transformer.layers.1.attn.qkv_proj.weight"):
        weight = dict(tree_flatten(model.parameters()))[name]
        direction = rng.standard_normal(weight.shape).astype(np.float32)
        values = []
        for sign in (1, -1):
            model.load_weights([(name, weight + sign * 1e-3 * mx.array(direction))], strict=False)
            values.append(numpy_loss())
        model.load_weights([(name, weight)], strict=False)
        expected = (values[0] - values[1]) / 2e-3
        assert abs(float((gradients[name] * mx.array(direction)).sum()) - expected) < 5e-3 * max(1, abs(expected))


def test_gradients_over_many_rows_are_the_fused_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough rows that element-wise parts may be compiled."""
    model = make_model(make_config())
    ids = mx.array(tokens_for(model.config, 2, 60))
    found = []
    for fused in (False, True):
        pretend(monkeypatch, "Metal" if fused else "CPU")
        value, gradients = nn.value_and_grad(model, loss)(model, ids)
        found.append({"loss": value} | dict(tree_flatten(gradients)))
    for name, gradient in found[0].items():
        assert float(mx.abs(gradient).max()) > 0
        assert_close(gradient, np.array(found[1][name]), 1e-4)


def test_gradients_of_large_single_rows() -> None:
    weight, x = mx.random.normal((6000, 700), key=mx.random.key(0)), mx.random.normal((1, 700), key=mx.random.key(1))
    ours = mx.grad(lambda w, x: layers.linear(x, w).square().sum(), argnums=(0, 1))(weight, x)
    plain = mx.grad(lambda w, x: (x @ w.T).square().sum(), argnums=(0, 1))(weight, x)
    for a, b in zip(ours, plain, strict=True):
        assert a.shape == b.shape
        assert_close(a, np.array(b), 1e-5 * float(mx.abs(b).max()))


def test_checkpointed_layers_have_the_same_gradients() -> None:
    model = make_model(make_config())
    ids = mx.array(tokens_for(model.config, 2, 7))
    _, plain = nn.value_and_grad(model, loss)(model, ids)
    run = mx.checkpoint(lambda params: loss(model.update(params), ids))
    gradients = dict(tree_flatten(mx.grad(run)(model.trainable_parameters())))
    for name, expected in tree_flatten(plain):
        assert_close(gradients[name], np.array(expected), 1e-5)


def test_a_first_call_may_be_compiled() -> None:
    """The constants a layer keeps must not be made inside a function that is being traced."""
    layers._norm_constants.cache_clear()
    layers._first_rotations.cache_clear()
    layers._identity_and_swap.cache_clear()
    if shutil.which("g++") is None:
        pytest.skip("on a CPU mx.compile needs a compiler")
    one_layer = {"num_transformer_layers": 1, "num_query_heads": 2, "num_kv_heads": 1}
    model = make_model(make_config(rms_norm_eps=3e-6, rope_freq_constant=777.0, **one_layer))
    ids = tokens_for(model.config, 2, 7)
    compiled = mx.compile(lambda tokens: model(tokens))
    assert_close(compiled(mx.array(ids)), numpy_logits(model, ids))
    assert_close(model(mx.array(ids)), numpy_logits(model, ids))
    gradients = nn.value_and_grad(model, loss)(model, mx.array(ids))[1]
    assert all(bool(mx.isfinite(g).all()) for _, g in tree_flatten(gradients))


def test_a_cache_for_too_few_layers_is_noticed() -> None:
    model = make_model(make_config())
    with pytest.raises(ValueError):
        model(mx.array([[1, 2]]), [KVCache(), KVCache()])
