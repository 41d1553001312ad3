"""The chunked cross-entropy against PyTorch's formula in plain MLX, finite differences, and its memory."""

from __future__ import annotations

import math
from dataclasses import replace

from mlx_openelm import load
from mlx_openelm.model import OpenELM
from mlx_openelm.training.data.batches import IGNORED
from mlx_openelm.training.step import loss as loss_module
from mlx_openelm.training.step.loss import cross_entropy
from mlx_openelm.training.step.strategy import CHUNK, here

import mlx.core as mx
import pytest
from small_models import small

ROWS = 2 * CHUNK + 37  # the last chunk is partial


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return load("tiny", expand=True)[0]


def plain(model: OpenELM, hidden: mx.array, targets: mx.array, z_loss: float, smoothing: float) -> mx.array:
    """All logits at once; label smoothing as torch.nn.functional.cross_entropy has it."""
    logits = model.logits(hidden)
    lse = mx.logsumexp(logits, axis=-1)
    likelihood = lse - mx.take_along_axis(logits, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    objective = (1 - smoothing) * likelihood + smoothing * (lse - mx.mean(logits, axis=-1)) + z_loss * lse**2
    return mx.sum(mx.where(targets == IGNORED, 0.0, objective))


def example(model: OpenELM, rows: int = ROWS, seed: int = 0) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    hidden = mx.random.normal((rows, model.config.model_dim), key=keys[0])
    targets = mx.random.randint(0, model.config.vocab_size, (rows,), key=keys[1])
    return hidden, mx.where(mx.random.uniform(shape=(rows,), key=keys[2]) < 0.2, IGNORED, targets)


@pytest.mark.covering
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.0), (0.0, 0.1), (1e-2, 0.1)])
def test_value_and_gradients_equal_the_plain_loss(model, trained, z_loss, smoothing):
    hidden, targets = example(model)
    head = model.transformer.token_embeddings
    weight = head.weight
    model.freeze()
    if trained:
        head.unfreeze()

    def with_weight(function):
        def call(hidden, weight):
            head.weight = weight
            return function(hidden)

        return mx.value_and_grad(call, argnums=(0, 1))(hidden, weight)

    try:
        expected, (by_hidden, by_weight) = with_weight(lambda h: plain(model, h, targets, z_loss, smoothing))
        value, (ours_hidden, ours_weight) = with_weight(
            lambda h: cross_entropy(model, h, targets, z_loss=z_loss, label_smoothing=smoothing)[0]
        )
        mx.eval(expected, by_hidden, by_weight, value, ours_hidden, ours_weight)
    finally:
        head.weight = weight
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.abs(ours_hidden - by_hidden).max().item() < 1e-5 * mx.abs(by_hidden).max().item()
    if trained:
        assert mx.abs(ours_weight - by_weight).max().item() < 1e-5 * mx.abs(by_weight).max().item()
    else:
        assert mx.abs(ours_weight).max().item() == 0  # a frozen head has no gradient


def test_gradient_agrees_with_finite_differences(model):
    hidden, targets = example(model, rows=5, seed=1)
    model.freeze()

    def objective(hidden: mx.array) -> mx.array:
        return cross_entropy(model, hidden, targets, z_loss=0.01, label_smoothing=0.1)[0]

    gradient = mx.grad(objective)(hidden)
    for seed in range(3):
        direction = mx.random.normal(hidden.shape, key=mx.random.key(10 + seed))
        step = 1e-2
        slope = (objective(hidden + step * direction) - objective(hidden - step * direction)) / (2 * step)
        assert slope.item() == pytest.approx(mx.sum(gradient * direction).item(), rel=2e-3)


def test_the_likelihood_excludes_z_loss_and_smoothing(model):
    hidden, targets = example(model)
    objective, likelihood = cross_entropy(model, hidden, targets, z_loss=0.1, label_smoothing=0.2)
    assert likelihood.item() == pytest.approx(plain(model, hidden, targets, 0.0, 0.0).item(), rel=1e-6)
    assert objective.item() > likelihood.item()


def test_without_gradients_the_values_are_the_same(model):
    hidden, targets = example(model)
    kept = cross_entropy(model, hidden, targets)
    quick = cross_entropy(model, hidden, targets, differentiable=False)
    assert [value.item() for value in quick] == [value.item() for value in kept]


def test_without_targets_loss_and_gradients_are_zero(model):
    hidden, _ = example(model)
    targets = mx.full((ROWS,), IGNORED)
    value, gradient = mx.value_and_grad(lambda h: cross_entropy(model, h, targets, z_loss=0.1)[0])(hidden)
    assert value.item() == 0
    assert mx.abs(gradient).max().item() == 0


def test_large_logits_stay_finite(model):
    hidden, targets = example(model, rows=8)
    value, gradient = mx.value_and_grad(lambda h: cross_entropy(model, h * 1000, targets)[0])(hidden)
    assert math.isfinite(value.item())
    assert mx.all(mx.isfinite(gradient)).item()


def test_bfloat16_hidden_states_get_bfloat16_gradients():
    model = load("tiny", expand=True, dtype="bfloat16")[0]
    model.freeze()
    hidden, targets = example(model, rows=20)
    expected = mx.grad(lambda h: plain(model, h, targets, 0.0, 0.0))(hidden)
    gradient = mx.grad(lambda h: cross_entropy(model, h, targets)[0])(hidden.astype(mx.bfloat16))
    assert gradient.dtype == mx.bfloat16
    assert mx.abs(gradient - expected).max().item() < 0.05 * mx.abs(expected).max().item()


def test_the_heads_gradient_in_bfloat16_does_not_depend_on_the_number_of_chunks(monkeypatch):
    model = small(mx.bfloat16)
    model.freeze()
    head = model.transformer.token_embeddings
    head.unfreeze()
    keys = mx.random.split(mx.random.key(0))
    hidden = (mx.random.normal((1024, model.config.model_dim), key=keys[0]) + 0.5).astype(mx.bfloat16)
    targets = mx.random.randint(0, 64, (1024,), key=keys[1])  # a few tokens that repeat
    weight = head.weight

    def gradient(function):
        def call(weight):
            head.weight = weight
            return function()

        found = mx.grad(call)(weight)
        head.weight = weight
        return found.astype(mx.float32)

    expected = gradient(lambda: plain(model, hidden, targets, 0.0, 0.0))
    monkeypatch.setattr(loss_module, "here", lambda: replace(here(), loss_rows=8))
    ours = gradient(lambda: cross_entropy(model, hidden, targets)[0])
    assert mx.sqrt(mx.sum((ours - expected) ** 2) / mx.sum(expected**2)).item() < 5e-3


def test_logits_exist_for_one_chunk_at_a_time(model):
    rows = 32 * CHUNK
    hidden, targets = example(model, rows=rows)
    model.freeze()
    gradient = mx.grad(lambda h: cross_entropy(model, h, targets)[0])
    mx.eval(hidden, targets, model.parameters())
    mx.eval(gradient(hidden))  # so that compiling and constants are not measured
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(gradient(hidden))
    chunk = CHUNK * model.config.vocab_size * 4
    # The gradient of the hidden states, in pieces and joined, and some chunk-sized arrays; all logits are 32 chunks.
    assert mx.get_peak_memory() - before < 2 * hidden.nbytes + 12 * chunk
