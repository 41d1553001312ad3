"""A custom loss in a training step: several forward passes, the base as the reference, and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_openelm import load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.adapters.switching import without_adapters
from mlx_openelm.model import OpenELM
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS
from mlx_openelm.training.step.evaluation import evaluate
from mlx_openelm.training.step.objectives import CrossEntropy, Forward, Sums
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

BETA = 0.3


@dataclass(frozen=True)
class Pairs:
    """Rows of preferred and rejected tokens [rows, length]; each row is a pair."""

    preferred: mx.array
    rejected: mx.array

    @property
    def num_targets(self) -> int:
        return len(self.preferred)


class Contrast:
    """The logistic loss of the model's preference margin over the base's, as in DPO."""

    metrics = ("margin", "accuracy")

    def arrays(self, batch: Pairs) -> tuple[mx.array, mx.array]:
        return batch.preferred, batch.rejected

    def __call__(self, forward: Forward, arrays: tuple[mx.array, mx.array]) -> Sums:
        preferred, rejected = (self._likelihoods(forward, rows) for rows in arrays)
        with without_adapters(forward.model):
            base = [mx.stop_gradient(self._likelihoods(forward, rows)) for rows in arrays]
        margins = BETA * ((preferred - base[0]) - (rejected - base[1]))  # [rows]
        loss = mx.sum(mx.logaddexp(0.0, -margins))
        return Sums(loss, loss, {"margin": mx.sum(margins), "accuracy": mx.sum(margins > 0).astype(mx.float32)})

    def _likelihoods(self, forward: Forward, rows: mx.array) -> mx.array:
        """log p of each row [rows]."""
        hidden = forward.hidden_states(rows[:, :-1])
        logits = forward.model.logits(hidden).reshape(len(rows), rows.shape[1] - 1, -1)
        return _likelihoods(logits, rows)


def _likelihoods(logits: mx.array, rows: mx.array) -> mx.array:
    chosen = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]  # [rows, length]
    return mx.sum(chosen - mx.logsumexp(logits, axis=-1), axis=-1)


def adapted(*, dora: bool = False, dropout: float = 0.0) -> OpenELM:
    model = load("tiny", expand=True)[0]
    modules = ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2")
    attach_new(model, target_modules=modules, rank=4, scale=2.0, dora=dora, dropout=dropout)
    keys = iter(mx.random.split(mx.random.key(5), 200))
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.update(tree_unflatten([(name, 0.05 * mx.random.normal(value.shape, key=next(keys)))]))
    mx.eval(model.parameters())
    return model


def pairs(rows: int, seed: int = 0) -> Pairs:
    tokens = mx.random.randint(3, 2048, (2, rows, 12), key=mx.random.key(seed))
    return Pairs(tokens[0], tokens[1])


def expected(model: OpenELM, batch: Pairs) -> tuple[dict[str, float], dict[str, mx.array]]:
    """Means and gradients by brute force: two models, all logits, otherwise NumPy."""
    base = load("tiny", expand=True)[0]
    rows = (batch.preferred, batch.rejected)
    reference = [_likelihoods(base(tokens[:, :-1]), tokens) for tokens in rows]

    def loss(model: OpenELM) -> mx.array:
        own = [_likelihoods(model(tokens[:, :-1]), tokens) for tokens in rows]
        margins = BETA * ((own[0] - reference[0]) - (own[1] - reference[1]))
        return mx.mean(-mx.log(mx.sigmoid(margins)))

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    own = [np.array(_likelihoods(model(tokens[:, :-1]), tokens), dtype=np.float64) for tokens in rows]
    then = [np.array(values, dtype=np.float64) for values in reference]
    margins = BETA * ((own[0] - then[0]) - (own[1] - then[1]))
    means = {"loss": np.log1p(np.exp(-margins)), "margin": margins, "accuracy": margins > 0}
    return {name: float(np.mean(values)) for name, values in means.items()}, gradients


@pytest.mark.covering
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("recompute", [NOTHING, PARTS, LAYERS])
def test_a_contrastive_loss_against_the_base_equals_brute_force(recompute, dora):
    model = adapted(dora=dora)
    batches = [pairs(3), pairs(2, seed=1)]
    whole = Pairs(*(mx.concatenate([getattr(b, name) for b in batches]) for name in ("preferred", "rejected")))
    means, gradients = expected(model, whole)
    before = dict(tree_flatten(model.trainable_parameters()))
    updater = Updater(model, optim.SGD(1.0), objective=Contrast(), recompute=recompute)
    update = updater.update(batches, 5, 1.0, 0)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert update.loss.item() == update.objective.item() == pytest.approx(means["loss"], rel=1e-4)
    assert {name: value.item() for name, value in update.metrics.items()} == {
        name: pytest.approx(means[name], rel=1e-3, abs=1e-4) for name in ("margin", "accuracy")
    }
    assert gradients.keys() == before.keys()
    for name, gradient in gradients.items():
        error = mx.abs(before[name] - after[name] - gradient).max().item()
        assert error <= 1e-3 * mx.abs(gradient).max().item() + 2e-7, name


def test_a_custom_loss_is_evaluated_and_learned():
    model, batch = adapted(), pairs(2)
    means, _ = expected(model, batch)
    updater = Updater(model, optim.Adam(1e-2), objective=Contrast())
    found = updater.evaluate([batch])
    assert found == evaluate(model, [batch], objective=Contrast())
    assert (found.loss, found.tokens) == (pytest.approx(means["loss"], rel=1e-4), 2)
    assert found.metrics == {n: pytest.approx(means[n], rel=1e-3, abs=1e-4) for n in ("margin", "accuracy")}
    losses = [updater.update([batch], 2, 1e-3, step).loss.item() for step in range(4)]
    assert losses[-1] < losses[0] / 2
    assert updater.evaluate([batch]).metrics["accuracy"] == 1


def test_dropout_applies_to_the_adapters_alone():
    """The reference has none: with a new adapter the margin is zero apart from dropout."""
    model = load("tiny", expand=True)[0]
    attach_new(model, rank=4, dropout=0.5)
    update = Updater(model, optim.SGD(0.0), objective=Contrast()).update([pairs(3)], 3, 0.0, 0)
    assert update.metrics["margin"].item() == 0


def test_a_process_without_batches_has_all_the_sums():
    update = Updater(adapted(), optim.SGD(1.0), objective=Contrast()).update([], 3, 1.0, 0)
    assert (update.loss.item(), update.grad_norm.item()) == (0, 0)
    assert {name: value.item() for name, value in update.metrics.items()} == {"margin": 0, "accuracy": 0}


def test_cross_entropy_is_the_default():
    assert Updater(adapted(), optim.SGD(1.0)).objective == CrossEntropy()
