"""Skipping batches whose loss or gradient norm is far above the last steps'."""

from __future__ import annotations

import json
import math

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.run.spikes import Spikes
from mlx_openelm.training.run.state import RunState
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Limits, Updater

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import tiny_model
from test_trainer import OPTIONS, Counting, run


def batch(seed: int) -> Batch:
    tokens = mx.random.randint(3, 256, (2, 9), key=mx.random.key(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], None, (0, 1), 16, 16)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_batch_changes_nothing(optimizer):
    options = PretrainOptions(optimizer=optimizer, learning_rate=1e-2)
    updater = Updater(tiny_model(), make_optimizer(options, ema_decay=0.9, embedding_learning_rate=1e-3))
    updater.update([batch(0)], 16, 1e-2, 0)
    before = {name: np.array(value) for name, value in updater.state().items() if "learning_rate" not in name}
    for limits in (Limits(1.0, math.inf), Limits(1e9, 1e-9)):
        skipped = updater.update([batch(1)], 16, 1e-2, 1, limits)
        assert skipped.skipped.item() and skipped.loss.item() > 1
        after = updater.state()
        assert all(np.array_equal(value, np.array(after[name])) for name, value in before.items())
    kept = updater.update([batch(1)], 16, 1e-2, 1, Limits(1e9, 1e9))
    assert not kept.skipped.item()
    # The same as without limits.
    other = Updater(tiny_model(), make_optimizer(options, ema_decay=0.9, embedding_learning_rate=1e-3))
    for step in range(2):
        assert other.update([batch(step)], 16, 1e-2, step).skipped is None
    for name, value in updater.state().items():
        np.testing.assert_allclose(np.array(value), np.array(other.state()[name]), rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_limit_is_so_many_deviations_above_the_mean():
    spikes, state = Spikes(2.0, window=6), RunState()
    for number, loss in enumerate((9.0, 1.0, 2.0, 3.0)):
        assert (spikes.limits(state).loss > 1e38) == (number < 3)
        spikes.remember(state, loss, 10 * loss)
    limits = spikes.limits(state)
    assert limits.loss == pytest.approx(15 / 4 + 2 * np.std([9, 1, 2, 3], ddof=1))
    assert limits.grad_norm == pytest.approx(10 * limits.loss)
    for _ in range(4):
        spikes.remember(state, 5.0, 5.0)
    spikes.remember(state, math.nan, 1.0)  # a mean of this would be useless
    assert [loss for loss, _ in state.recent] == [2.0, 3.0, 5.0, 5.0, 5.0, 5.0]


class Skipping(Counting):
    """An updater that obeys the limits."""

    def update(self, batches, num_targets, learning_rate, step, limits):
        update = super().update(batches, num_targets, learning_rate, step)
        exceeds = not (update.loss.item() <= limits.loss and update.grad_norm.item() <= limits.grad_norm)
        if exceeds:
            self.weight = self.weight - learning_rate
        from dataclasses import replace

        return replace(update, skipped=mx.array(exceeds))


def test_skipped_batches_are_counted_recorded_and_no_part_of_the_loss(tmp_path):
    losses = {6: 50.0, 7: math.nan}
    updater = Skipping(losses)
    run(tmp_path, updater, 9, spikes=Spikes(4.0, window=8))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    skipped = [row for row in rows if "skipped_loss" in row]
    assert [(row["step"], row["skipped_loss"]) for row in skipped] == [(7, 50.0), (8, None)]
    reports = {row["step"]: row for row in rows if "train_loss" in row}
    assert [row["skipped"] for row in reports.values()] == [0, 0, 2]
    assert reports[9]["train_loss"] == 2.0  # of step 9 alone: 10 - 8
    record = max((tmp_path / "checkpoints").glob("0*")) / "state.json"
    state = json.loads(record.read_text())["state"]
    assert state["skipped"] == 2 and state["skipped_in_row"] == 0
    assert state["recent"][-2:] == [[50.0, 2.0], [2.0, 2.0]]


def test_losses_that_stay_without_a_value_stop_the_run(tmp_path):
    losses = dict.fromkeys(range(3, 40), math.nan)
    with pytest.raises(OpenELMError, match="loss is nan at step 14"):
        run(tmp_path, Skipping(losses), 40, spikes=Spikes(4.0, window=8))


def test_without_the_option_nothing_is_skipped(tmp_path):
    run(tmp_path, Counting({6: 50.0}), 9, OPTIONS)
    assert "skipped" not in (tmp_path / "metrics.jsonl").read_text()
