"""With adapters switched off in place, the model equals the base bit for bit, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from mlx_openelm import load
from mlx_openelm.adapters.attaching import adapted_layers, attach_new
from mlx_openelm.adapters.switching import without_adapters
from mlx_openelm.model import OpenELM

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

EVERYTHING = ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "embeddings": {"target_modules": ("token_embeddings",)},
    "dora embeddings": {"target_modules": ("token_embeddings",), "dora": True},
    "everything": {"target_modules": EVERYTHING, "dora": True},
    "dropout": {"dropout": 0.5},
}
TOKENS = mx.array([[1, 5, 900, 17, 33], [1, 8, 8, 41, 2000]])


@cache
def base() -> OpenELM:
    """The model without an adapter, which no test changes."""
    return load("tiny", expand=True)[0]


def adapted(**options: Any) -> OpenELM:
    """A model with a nonzero adapter."""
    model = load("tiny", expand=True)[0]
    attach_new(model, rank=4, scale=2.0, **options)
    changed = [
        (name, 0.3 + mx.random.normal(value.shape, key=mx.random.key(len(name))))
        for name, value in tree_flatten(model.trainable_parameters())
        if name.endswith(("lora_b", ".m"))
    ]
    model.update(tree_unflatten(changed))
    mx.eval(model.parameters())
    return model


def same(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other).item())


# On a CPU the kernels of one kind are compiled each time, those of the others in slow tests.
THROUGH = pytest.mark.parametrize(
    ("kind", "through"),
    [
        *(pytest.param(kind, lambda call: call, id=kind) for kind in KINDS),
        pytest.param("lora", mx.compile, id="lora, compiled", marks=pytest.mark.compiled),
        *(
            pytest.param(kind, mx.compile, id=f"{kind}, compiled", marks=[pytest.mark.compiled, pytest.mark.slow])
            for kind in KINDS
            if kind != "lora"
        ),
    ],
)


@THROUGH
def test_the_logits_equal_the_bases(kind: str, through: Callable[..., Any]) -> None:
    model, other = adapted(**KINDS[kind]), base()

    def off(tokens: mx.array) -> mx.array:
        with without_adapters(model):
            return model(tokens)

    expected = through(lambda tokens: other(tokens))(TOKENS)
    before = model(TOKENS)
    assert same(through(off)(TOKENS), expected)
    assert same(model(TOKENS), before) and not same(before, expected)


@THROUGH
def test_no_gradient_reaches_disabled_adapters(kind: str, through: Callable[..., Any]) -> None:
    model, other = adapted(**KINDS[kind]), base()
    model.train()
    parameters = model.trainable_parameters()

    def loss(parameters: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
        model.update(parameters)
        own = mx.mean(mx.square(model(tokens)))
        with without_adapters(model):
            reference = model(tokens)
        return own + mx.mean(mx.square(reference)), reference

    def alone(parameters: Any, tokens: mx.array) -> mx.array:
        model.update(parameters)
        return mx.mean(mx.square(model(tokens)))

    (_, reference), gradients = through(mx.value_and_grad(loss))(parameters, TOKENS)
    expected = through(mx.grad(alone))(parameters, TOKENS)
    mx.eval(reference, gradients, expected)
    model.update(parameters)
    for (name, gradient), (_, wanted) in zip(tree_flatten(gradients), tree_flatten(expected), strict=True):
        assert mx.allclose(gradient, wanted, rtol=1e-4, atol=1e-6).item(), name
    if through is mx.compile:
        assert mx.allclose(reference, other(TOKENS), rtol=1e-4, atol=1e-4).item()
    else:
        assert same(reference, other(TOKENS))


def test_disabled_throughout_a_gradient_nothing_is_learned() -> None:
    model = adapted(target_modules=EVERYTHING, dora=True)

    def loss(model: OpenELM) -> mx.array:
        with without_adapters(model):
            return mx.sum(model(TOKENS))

    gradients = nn.value_and_grad(model, loss)(model)[1]
    sizes = tree_map(lambda gradient: mx.abs(gradient).max().item(), gradients)
    assert {size for _, size in tree_flatten(sizes)} == {0}


def test_blocks_are_nested_and_errors_restore() -> None:
    model, other = adapted(target_modules=EVERYTHING), base()
    layers, expected = dict(adapted_layers(model)), other(TOKENS)
    before = model(TOKENS)
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        with without_adapters(model):
            assert same(model(TOKENS), expected)
        assert same(model(TOKENS), expected)  # still off
        raise ZeroDivisionError
    after = dict(adapted_layers(model))
    assert after.keys() == layers.keys() and all(after[path] is layer for path, layer in layers.items())
    assert same(model(TOKENS), before)


def test_the_training_mode_set_inside_applies_to_the_adapters() -> None:
    model = adapted(dropout=0.5)
    for mode in (True, False):
        model.train(not mode)
        with without_adapters(model):
            model.train(mode)
        assert {layer.training for _, layer in adapted_layers(model)} == {mode}


def test_a_model_without_adapters_is_unchanged() -> None:
    model = base()
    with without_adapters(model):
        logits = model(TOKENS)
    assert same(model(TOKENS), logits)
