"""A replaced, wrapped or reclassed module is used from the next call on, on every code path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

from mlx_openelm import native
from mlx_openelm.cache import make_cache
from mlx_openelm.model import (
    Attention,
    FeedForward,
    Linear,
    OpenELM,
    QuantizedEmbedding,
    RMSNorm,
    TransformerLayer,
)
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS
from mlx_openelm.training.step import forward

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from test_model import make_config, make_model

PROMPT = [5, 6, 7, 8]


class Wrapper(nn.Module):
    """Counts the calls of the wrapped module, and changes its output."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.calls = 0

    def __call__(self, *inputs: Any) -> mx.array:
        self.calls += 1
        return self.inner(*inputs) * 0.5


def subclass(module: nn.Module) -> nn.Module:
    """Give a module another class, whose calls are counted."""
    kind: Any = type(module)

    def call(self: Any, *inputs: Any) -> mx.array:
        self.calls += 1
        return kind.__call__(self, *inputs) * 0.5

    module.calls = 0
    module.__class__ = type("Mine", (kind,), {"__call__": call})
    return module


def replace(owner: Any, name: str) -> Callable[[OpenELM], nn.Module]:
    """A function that wraps a module; `owner` finds its parent."""

    def change(model: OpenELM) -> nn.Module:
        wrapper = Wrapper(owner(model)[name])
        setattr(owner(model), name, wrapper)
        return wrapper

    return change


def wrap_layer(model: OpenELM) -> nn.Module:
    model.layers[1] = Wrapper(model.layers[1])
    return model.layers[1]


CHANGES: dict[str, Callable[[OpenELM], nn.Module]] = {
    "attention": replace(lambda model: model.layers[1], "attn"),
    "feed-forward": replace(lambda model: model.layers[1], "ffn"),
    "layer norm": replace(lambda model: model.layers[1], "ffn_norm"),
    "head norm": replace(lambda model: model.layers[1]["attn"], "q_norm"),
    "projection": replace(lambda model: model.layers[1]["attn"], "out_proj"),
    "first projection": replace(lambda model: model.layers[1]["ffn"], "proj_1"),
    "layer": wrap_layer,
    "class of a layer": lambda model: subclass(model.layers[1]),
    "class of an attention": lambda model: subclass(model.layers[1].attn),
    "class of a feed-forward": lambda model: subclass(model.layers[1].ffn),
    "class of a norm": lambda model: subclass(model.layers[1].attn.k_norm),
    "class of a projection": lambda model: subclass(model.layers[1].ffn.proj_2),
}


@pytest.mark.covering(2)
@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("name", CHANGES)
def test_the_new_module_is_used(name: str, length: int) -> None:
    model = make_model(make_config())
    tokens = mx.array([[*range(length)]])

    def run() -> np.ndarray:
        cache = make_cache(len(model.layers))
        mx.eval(model(mx.array([PROMPT]), cache))
        return np.array(model(tokens, cache))

    before, original = run(), list(model.layers)
    changed = CHANGES[name](model)
    after = run()
    assert changed.calls == 2
    assert np.abs(after - before).max() > 1e-3
    # The same without a cache, where all positions take another path.
    whole = np.array(model(mx.array([[*PROMPT, *range(length)]])))[:, len(PROMPT) :]
    assert changed.calls == 3 and np.abs(whole - after).max() < 1e-4
    model.layers[1] = original[1]
    if name == "layer":
        assert np.array_equal(run(), before)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_training_uses_the_new_module_too(length: int) -> None:
    for name, change in CHANGES.items():
        model = make_model(make_config())
        change(model)
        tokens = mx.array([[*range(length)]])
        expected = np.array(model.hidden_states(tokens))[0]
        for recompute in (NOTHING, PARTS, LAYERS):
            found = np.array(forward.hidden_states(model, tokens, None, recompute=recompute))
            assert np.abs(found - expected).max() < 1e-4, (name, recompute)


def test_changed_settings_of_a_norm_are_used() -> None:
    model = make_model(make_config())
    tokens = mx.array([[7]])
    before = model(tokens, make_cache(3))
    model.layers[1].ffn_norm.eps = 0.5
    after = model(tokens, make_cache(3))
    assert mx.abs(after - before).max().item() > 1e-3
    assert mx.allclose(after, model(tokens), atol=1e-4).item()


# Copies.


def halve(model: nn.Module) -> None:
    model.update(tree_map(lambda weight: weight * 0.5, model.parameters()))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("changes", [{}, {"ffn_with_glu": False, "activation_fn_name": "gelu"}], ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_independent(copied: Callable[[OpenELM], OpenELM], changes: dict[str, Any]) -> None:
    model = make_model(make_config(**changes))
    tokens = mx.array([[1, 2, 3]])

    def logits(of: OpenELM) -> np.ndarray:
        return np.array(of(tokens, make_cache(3)))

    before = logits(model)
    other = copied(model)
    assert other.config == model.config and np.array_equal(logits(other), before)
    halve(other)
    assert np.array_equal(logits(model), before)
    changed = logits(other)
    assert not np.array_equal(changed, before)
    halve(model)
    assert np.array_equal(logits(model), changed)
    CHANGES["attention"](other)
    assert np.array_equal(logits(model), changed) and not np.array_equal(logits(other), changed)


def test_the_classes_replaced_here_match_the_model() -> None:
    """Otherwise the tests above would change nothing."""
    layer = make_model(make_config()).layers[1]
    found = layer, layer.attn, layer.ffn, layer.attn_norm, layer.attn.out_proj
    assert [*map(type, found)] == [TransformerLayer, Attention, FeedForward, RMSNorm, Linear]
    assert native.kernels is None or hasattr(native.kernels, "layer")


def test_a_wrapped_final_norm_is_used_in_generation_and_training() -> None:
    model = make_model(make_config())
    tokens = mx.array([PROMPT])
    expected = model.hidden_states(tokens) * 0.5
    cached = model.hidden_states(tokens, make_cache(len(model.layers))) * 0.5
    norm = model.transformer.norm = Wrapper(model.transformer.norm)
    assert mx.array_equal(model.hidden_states(tokens), expected)
    assert mx.array_equal(model.hidden_states(tokens, make_cache(len(model.layers))), cached)
    segments = mx.zeros(tokens.shape, mx.int32)
    np.testing.assert_allclose(
        forward.hidden_states(model, tokens, segments, recompute=NOTHING), expected[0], rtol=1e-4, atol=1e-5
    )
    assert norm.calls == 3


def test_a_packed_embedding_can_be_made_as_mlxs() -> None:
    layer = QuantizedEmbedding(96, 64)
    assert (layer.num_embeddings, layer.dims) == (96, 64)
    embedding = make_model(make_config()).transformer.token_embeddings
    sizes = embedding.weight.shape
    for packed in (embedding.to_quantized(32, 8), QuantizedEmbedding.from_embedding(embedding, 32, 8)):
        assert (packed.num_embeddings, packed.dims) == sizes
        np.testing.assert_allclose(packed(mx.array([3])), embedding(mx.array([3])), atol=0.02)
