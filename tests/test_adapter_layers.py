"""LoRA and DoRA layers: against the formulas, bit-identical to the base at zero, attached to models and detached."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from mlx_openelm.adapters.attaching import (
    adapted_layers,
    attach,
    attach_new,
    detach,
    dropout_layers,
    extract,
    put,
)
from mlx_openelm.adapters.layers import DoRAEmbedding, DoRALinear, LoRAEmbedding, LoRALinear, matrix_of
from mlx_openelm.config import EMBEDDING, ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.adapter import PROJECTIONS, TARGET_MODULES, Adapter, LowRank
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.loading import build_model
from mlx_openelm.model import Embedding, Linear, OpenELM
from mlx_openelm.ops.packed import MODES

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"
IDS = mx.array([[1, 33, 7, 500, 12, 4, 90, 2]])
PACKINGS = [Quantization.make(mode, group_size=32 if mode == "affine" else None) for mode in MODES]
CONFIG = ModelConfig(
    num_transformer_layers=3,
    model_dim=64,
    head_dim=16,
    vocab_size=128,
    num_gqa_groups=2,
    qkv_multipliers=(0.5, 1.0),
    ffn_multipliers=(1.0, 2.0),
    ffn_dim_divisor=32,
    normalize_qk_projections=True,
    share_input_output_layers=True,
)


def load_model(dtype: str = "float32", packing: Quantization | None = None) -> OpenELM:
    checkpoint = mlx_format.read(FOLDER)
    if packing is not None:
        checkpoint.quantization = dict.fromkeys(checkpoint.config.matrix_shapes(), packing)
        checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return build_model(checkpoint, dtype=dtype, expand=False)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return load_model()


@pytest.fixture
def small() -> OpenELM:
    mx.random.seed(3)
    built = OpenELM(CONFIG)
    built.eval()
    return built


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed + 1000))


def change(inputs: int, outputs: int, rank: int = 4, scale: float = 0.5, **more: Any) -> LowRank:
    return LowRank(normal(inputs, rank, seed=1) / 8, normal(rank, outputs, seed=2), scale, **more)


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


def close(a: mx.array, b: np.ndarray, atol: float = 2e-5) -> bool:
    return np.allclose(np.array(a.astype(mx.float32)), b, rtol=0, atol=atol)


def plain_linear(inputs: int, outputs: int) -> Linear:
    """A layer with random weights of the size MLX initializes with; a new one of ours has zeros."""
    linear = Linear(inputs, outputs)
    linear.weight = normal(outputs, inputs, seed=11) / math.sqrt(3 * inputs)
    return linear


def bases(outputs: int, inputs: int, kind: type) -> list[nn.Module]:
    """A plain base and one of each packing."""
    plain = plain_linear(inputs, outputs) if kind is Linear else Embedding(outputs, inputs)
    if kind is Embedding:
        plain.weight = normal(outputs, inputs, seed=12) / math.sqrt(inputs)
    pack: Any = nn.QuantizedLinear.from_linear if kind is Linear else nn.QuantizedEmbedding.from_embedding
    return [plain, *(pack(plain, p.group_size, p.bits, p.mode) for p in PACKINGS)]


def wide(array: mx.array) -> np.ndarray:
    return np.array(array, dtype=np.float64)


# New adapters: the base, bit for bit.


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_nothing(dora: bool, dtype: str) -> None:
    model = load_model(dtype)
    base, one = model(IDS), model(IDS[:, :1])
    attach_new(model, target_modules=TARGET_MODULES, rank=4, scale=20.0, dora=dora)
    assert len(dict(adapted_layers(model))) == 1 + 4 * 6
    assert same(model(IDS), base)
    assert same(model(IDS[:, :1]), one)
    if dtype == "float32":
        model.train()
        assert same(model(IDS), base)
    detach(model)
    assert same(model(IDS), base)
    assert not list(adapted_layers(model))
    assert not tree_flatten(model.trainable_parameters())


@pytest.mark.covering
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: p.mode)
@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_on_packed_matrices_changes_nothing(packing: Quantization, dora: bool) -> None:
    model = load_model(packing=packing)
    base = model(IDS)
    attach_new(model, target_modules=TARGET_MODULES, num_layers=2, rank=2, dora=dora)
    assert same(model(IDS), base)


# Formulas.


@pytest.mark.parametrize("index", range(5))
def test_lora_linear_equals_the_formula(index: int) -> None:
    linear, x, residual = bases(96, 128, Linear)[index], normal(7, 128), normal(7, 96, seed=5)
    w, c = wide(matrix_of(linear)), change(128, 96)
    expected = wide(x) @ (w + 0.5 * (wide(c.a) @ wide(c.b)).T).T
    layer = LoRALinear(linear, c)
    for training in (True, False):
        layer.train(training)
        assert close(layer(x), expected, 1e-4)
        assert close(layer(x, residual), expected + wide(residual), 1e-4)


@pytest.mark.parametrize("index", range(5))
def test_dora_linear_equals_the_formula(index: int) -> None:
    linear, x, residual = bases(96, 128, Linear)[index], normal(7, 128), normal(7, 96, seed=5)
    w, c = wide(matrix_of(linear)), change(128, 96, magnitude=mx.abs(normal(96, seed=7)))
    adapted = w + 0.5 * (wide(c.a) @ wide(c.b)).T
    expected = wide(x) @ (adapted * (wide(c.magnitude) / np.linalg.norm(adapted, axis=1))[:, None]).T
    layer = DoRALinear(linear, c)
    assert np.allclose(wide(DoRALinear(linear, change(128, 96)).m), np.linalg.norm(w, axis=1), rtol=1e-5)
    for training in (True, False):
        layer.train(training)
        assert close(layer(x), expected, 1e-4)
        assert close(layer(x, residual), expected + wide(residual), 1e-4)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("output_side", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_equal_the_formula(index: int, output_side: bool, dora: bool) -> None:
    embedding, x = bases(96, 128, Embedding)[index], normal(7, 128)
    magnitude = mx.abs(normal(96 if output_side else 128, seed=7)) if dora else None
    w, c = wide(matrix_of(embedding)), change(96, 128, magnitude=magnitude, output_side=output_side)
    adapted = w + 0.5 * wide(c.a) @ wide(c.b)
    if magnitude is not None:  # per row as in mlx-lm, per column as in PEFT
        lengths = np.linalg.norm(adapted, axis=1 if output_side else 0)
        adapted = adapted * (wide(magnitude) / lengths if not output_side else (wide(magnitude) / lengths)[:, None])
    layer = DoRAEmbedding(embedding, c) if dora else LoRAEmbedding(embedding, c)
    for training in (True, False):
        layer.train(training)
        assert close(layer(mx.array([5, 95, 5, 0])), adapted[[5, 95, 5, 0]], 1e-4)
        assert close(layer.as_linear(x), wide(x) @ (adapted if output_side else w).T, 2e-4)


def test_magnitudes_of_empty_rows_do_not_divide_by_zero() -> None:
    linear = plain_linear(16, 8)
    linear.weight = mx.zeros((8, 16))
    layer = DoRALinear(linear, LowRank(normal(16, 2), mx.zeros((2, 8)), 1.0))
    assert same(layer(normal(3, 16)), mx.zeros((3, 8)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("onto", [False, True])
def test_dora_gradients_treat_the_norm_as_constant(onto: bool, training: bool) -> None:
    linear, x, residual = plain_linear(48, 32), normal(5, 48), 3 * normal(5, 32, seed=9)
    c = change(48, 32, magnitude=mx.abs(normal(32, seed=7)))
    layer, cotangent = DoRALinear(linear, c), normal(5, 32, seed=8)
    layer.freeze()
    layer.unfreeze(recurse=False, keys=["lora_a", "lora_b", "m"])

    def ours(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return mx.sum(cotangent * (layer(x, residual) if onto else layer(x)))

    def formula(parameters: dict[str, Any], x: mx.array) -> mx.array:
        w = linear.weight + 0.5 * (parameters["lora_a"] @ parameters["lora_b"]).T
        lengths = mx.stop_gradient(mx.linalg.norm(w, axis=1))
        return mx.sum(cotangent * ((x @ w.T) * (parameters["m"] / lengths) + (residual if onto else 0)))

    layer.train(training)
    parameters = {"lora_a": c.a, "lora_b": c.b, "m": c.magnitude}
    (got, got_x), (expected, expected_x) = (mx.grad(f, argnums=(0, 1))(parameters, x) for f in (ours, formula))
    for name in parameters:
        assert close(got[name], np.array(expected[name]), 2e-4), name
    assert close(got_x, np.array(expected_x), 2e-4)


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_half_precision_is_close_and_keeps_its_type(cls: type) -> None:
    linear, x, residual = plain_linear(128, 96), normal(7, 128), normal(7, 96, seed=5)
    layer = cls(linear, change(128, 96))
    expected, onto = np.array(layer(x)), np.array(layer(x, residual))
    linear.weight = linear.weight.astype(mx.bfloat16)
    for training in (True, False):
        layer.train(training)
        got, got_onto = layer(x.astype(mx.bfloat16)), layer(x.astype(mx.bfloat16), residual.astype(mx.bfloat16))
        assert got.dtype == got_onto.dtype == mx.bfloat16
        assert close(got, expected, 0.1)
        assert close(got_onto, onto, 0.1)


def test_magnitude_gradients_are_summed_in_float32() -> None:
    linear, x, residual = plain_linear(128, 96), normal(64, 128), 100 * normal(64, 96, seed=5)
    linear.weight, cotangent = linear.weight.astype(mx.bfloat16), normal(64, 96, seed=8)
    layer = DoRALinear(linear, change(128, 96))
    layer.train()

    def gradient(dtype: mx.Dtype) -> np.ndarray:
        def loss(m: mx.array) -> mx.array:
            layer.m = m
            return mx.sum(cotangent * layer(x.astype(dtype), residual.astype(dtype)))

        return np.array(mx.grad(loss)(layer.m))

    exact = gradient(mx.float32)
    # Within 1%; a sum in 16 bits that is a hundred times as large would give an error of half.
    assert np.linalg.norm(gradient(mx.bfloat16) - exact) < 0.02 * np.linalg.norm(exact)


# Caching outside of training.


def test_generation_computes_dora_norms_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = plain_linear(48, 32), normal(1, 48)
    layer = DoRALinear(linear, change(48, 32))
    calls = []
    plain = Linear.__call__
    monkeypatch.setattr(Linear, "__call__", lambda self, x: calls.append(x.shape) or plain(self, x))
    layer.eval()
    first = layer(x)
    assert sorted(calls) == [(1, 48), (4, 48)]  # the input, and `a` for the norms
    calls.clear()
    assert same(layer(x), first)
    assert calls == [(1, 48)]
    layer.lora_b = 2 * layer.lora_b
    changed = layer(x)
    assert not same(changed, first)
    layer.train()
    assert close(changed, np.array(layer(x)))
    calls.clear()
    layer(x)
    assert sorted(calls) == [(1, 48), (4, 48)]


@pytest.mark.compiled
def test_values_cached_in_a_trace_are_not_used_afterwards() -> None:
    layer, x = DoRALinear(plain_linear(48, 32), change(48, 32)), normal(5, 48)
    layer.eval()

    def run(b: mx.array) -> mx.array:
        layer.lora_b = b
        return layer(x)

    original = layer.lora_b
    compiled = mx.compile(run)
    doubled = compiled(2 * original)
    layer.lora_b = original
    plain = layer(x)
    assert not same(plain, doubled)
    assert close(run(2 * original), np.array(doubled))
    layer.lora_b = original
    assert same(layer(x), plain)


# Dropout.


def test_dropout_needs_a_key_and_repeats_with_it() -> None:
    linear = plain_linear(64, 32)
    linear.weight = mx.zeros((32, 64))
    layer, x = LoRALinear(linear, LowRank(mx.eye(64), mx.ones((64, 32)) / 64, 1.0), 0.25), mx.ones((400, 64))
    assert close(layer(x), np.ones((400, 32)))
    layer.set_dropout_key(mx.random.key(1))
    once, again = layer(x), layer(x)
    assert same(once, again)
    # Each output is the kept share of 64 inputs, divided by 0.75.
    kept = np.array(once)[:, 0] * 0.75 * 64
    assert np.allclose(kept, kept.round(), atol=1e-3)
    assert abs(kept.mean() / 64 - 0.75) < 0.01
    assert 2.5 < kept.std() < 4.5  # standard deviation of a binomial with 64 draws: 3.46
    layer.set_dropout_key(mx.random.key(2))
    assert not same(layer(x), once)
    layer.set_dropout_key(None)
    assert close(layer(x), np.ones((400, 32)))


def test_dropout_keys_are_not_parameters(small: OpenELM) -> None:
    attach_new(small, target_modules=TARGET_MODULES, dropout=0.1)
    layers = dropout_layers(small)
    assert len(layers) == 12  # the embedding has none
    before = [name for name, _ in tree_flatten(small.parameters())]
    for number, layer in enumerate(layers):
        layer.set_dropout_key(mx.random.key(number))
    assert [name for name, _ in tree_flatten(small.parameters())] == before
    attach_new(small)
    assert dropout_layers(small) == []


def test_the_same_key_gives_the_same_dropout_when_recomputed() -> None:
    layer, x = LoRALinear(plain_linear(64, 32), change(64, 32), 0.5), normal(9, 64)
    layer.set_dropout_key(mx.random.key(4))
    run = lambda x: mx.sum(mx.square(layer(x)))  # noqa: E731
    assert close(mx.grad(mx.checkpoint(run))(x), np.array(mx.grad(run)(x)), 1e-6)


# In models.


@pytest.mark.parametrize(("num_layers", "layers"), [(1, [2]), (3, [0, 1, 2]), (-1, [0, 1, 2])])
def test_the_last_layers_are_adapted(small: OpenELM, num_layers: int, layers: list[int]) -> None:
    paths = attach_new(small, target_modules=["out_proj"], num_layers=num_layers)
    assert paths == [f"transformer.layers.{layer}.attn.out_proj" for layer in layers]


def test_only_the_adapter_is_trainable(small: OpenELM) -> None:
    small.unfreeze()
    paths = attach_new(small, target_modules=["token_embeddings", "out_proj"], num_layers=2, rank=3, dora=True)
    assert paths == [EMBEDDING, "transformer.layers.1.attn.out_proj", "transformer.layers.2.attn.out_proj"]
    trainable = {name: value.shape for name, value in tree_flatten(small.trainable_parameters())}
    width = CONFIG.num_query_heads[1] * 16
    expected = {f"{path}.{name}" for path in paths for name in ("lora_a", "lora_b", "m")}
    assert set(trainable) == expected
    assert trainable[f"{EMBEDDING}.lora_a"] == (128, 3)
    assert trainable[f"{EMBEDDING}.m"] == (64,)
    assert trainable[f"{paths[1]}.lora_a"] == (width, 3)
    assert trainable[f"{paths[1]}.m"] == (64,)


def test_new_adapters_use_the_given_settings(small: OpenELM) -> None:
    attach_new(small, rank=16, scale=2.5, seed=5)
    first = extract(small)
    assert list(first.modules) == [
        f"transformer.layers.{n}.{block}.{name}"
        for n in range(3)
        for block, name in zip(("attn", "attn", "ffn", "ffn"), PROJECTIONS, strict=True)
    ]
    for path, low_rank in first.modules.items():
        bound = 1 / math.sqrt(CONFIG.matrix_shapes()[path][1])
        assert (low_rank.rank, low_rank.scale) == (16, 2.5)
        assert 0.95 * bound < mx.max(mx.abs(low_rank.a)).item() <= bound
        assert abs(mx.mean(low_rank.a).item()) < 0.1 * bound
        assert not mx.any(low_rank.b).item()
    attach_new(small, rank=16, seed=5)
    again = extract(small)
    attach_new(small, rank=16, seed=6)
    other = extract(small)
    assert all(same(again.modules[path].a, first.modules[path].a) for path in first.modules)
    assert not any(same(other.modules[path].a, first.modules[path].a) for path in first.modules)
    a = [low_rank.a for low_rank in first.modules.values()]
    assert not same(a[0][:64], a[4][:64])  # of two layers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj"]}, "token_embeddings, qkv_proj, out_proj, proj_1, proj_2; got 'q_proj'"),
        ({"target_modules": []}, "target_modules must be among .* got none"),
        ({"num_layers": 0}, "num_layers must be from 1 to 3, or -1 for all, got 0"),
        ({"num_layers": 4}, "num_layers must be from 1 to 3"),
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"dropout": 1.0}, "dropout must be from 0 to below 1, got 1.0"),
    ],
)
def test_invalid_settings_are_refused(small: OpenELM, options: dict[str, Any], message: str) -> None:
    before = small(IDS[:, :3] % 128)
    with pytest.raises(RequestError, match=message):
        attach_new(small, **options)
    assert not list(adapted_layers(small))
    assert same(small(IDS[:, :3] % 128), before)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_moves_to_another_model(model: OpenELM, dora: bool) -> None:
    attach_new(model, target_modules=TARGET_MODULES, rank=3, scale=1.5, dropout=0.1, dora=dora)
    for _, layer in adapted_layers(model):
        layer.lora_b = normal(*layer.lora_b.shape) / 20
        if dora:
            layer.m = layer.m * (1 + normal(*layer.m.shape) / 20)
    logits = model(IDS)
    adapter = extract(model, "base")
    detach(model)
    assert (adapter.base_model, adapter.dropout, adapter.weights) == ("base", 0.1, {})
    base = model(IDS)
    assert not same(base, logits)
    attach(model, adapter)
    attach(model, adapter)  # replaces the attached adapter instead of stacking on it
    assert same(model(IDS), logits)
    detach(model)
    assert same(model(IDS), base)


def test_adapters_of_another_shape_are_refused_and_change_nothing(small: OpenELM) -> None:
    path = "transformer.layers.0.ffn.proj_1"
    outputs, inputs = CONFIG.matrix_shapes()[path]
    wrong = {
        "a of .*proj_1 has shape": LowRank(mx.zeros((inputs + 1, 2)), mx.zeros((2, outputs)), 1.0),
        "b of .*proj_1 has shape": LowRank(mx.zeros((inputs, 2)), mx.zeros((3, outputs)), 1.0),
        "magnitude of": LowRank(mx.zeros((inputs, 2)), mx.zeros((2, outputs)), 1.0, mx.zeros(inputs)),
    }
    base = small(IDS % 128)
    for message, low_rank in wrong.items():
        with pytest.raises(RequestError, match=message):
            attach(small, Adapter({path: low_rank}))
    with pytest.raises(RequestError, match="changes transformer.layers.7.ffn.proj_1, which the model does not have"):
        attach(small, Adapter({"transformer.layers.7.ffn.proj_1": change(inputs, outputs)}))
    with pytest.raises(RequestError, match=r"norm.weight has shape \[63\] instead of \[64\]"):
        attach(small, Adapter(weights={"transformer.norm.weight": mx.zeros(63)}))
    with pytest.raises(RequestError, match=r"has transformer.norm.bias, which the model does not have"):
        attach(small, Adapter(weights={"transformer.norm.bias": mx.zeros(64)}))
    assert same(small(IDS % 128), base)


@pytest.mark.parametrize("packing", [None, *PACKINGS], ids=lambda p: p and p.mode)
def test_full_weights_replace_the_base_and_can_be_removed(packing: Quantization | None) -> None:
    model = load_model(packing=packing)
    base = model(IDS)
    names = [f"{EMBEDDING}.weight", "transformer.layers.2.ffn.proj_2.weight", "transformer.layers.1.attn_norm.weight"]
    shapes = model.config.tensor_shapes()
    weights = {name: 0.1 * normal(*shapes[name], seed=n) for n, name in enumerate(names)}
    expected = copy.deepcopy(model)
    for name, weight in weights.items():  # by hand
        owner: Any = expected
        *parents, last = name.removesuffix(".weight").split(".")
        for part in parents:
            owner = owner[int(part)] if part.isdigit() else owner[part]
        if len(weight.shape) == 2:
            owner[last] = Embedding(*weight.shape) if last == "token_embeddings" else Linear(*weight.shape[::-1])
        owner[last].weight = weight
    replaced = attach(model, Adapter(weights=weights))
    assert not same(model(IDS), base)
    assert close(model(IDS), np.array(expected(IDS)), 1e-5)
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == set(names)
    assert set(extract(model).weights) == set(names)
    put(model, replaced)
    assert same(model(IDS), base)
