"""Weights in two parts and moments in bfloat16: `--optimizer-dtype bfloat16`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.model import OpenELM
from mlx_openelm.training.options import BFLOAT16, FineTuneOptions, TrainOptions
from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.run import planning
from mlx_openelm.training.step import compact
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Limits, Updater

import mlx.core as mx
import numpy as np
import pytest
from in_process import run_here
from quantization_models import tiny_model
from test_training_step import rows_of, sequences
from training_runs import write_run_folder

ADAMW = TrainOptions(optimizer="adamw", weight_decay=0.1, learning_rate=1e-3)


def model_of(dtype: mx.Dtype = mx.bfloat16) -> OpenELM:
    model = tiny_model(seed=4, head_dim=64)
    model.set_dtype(dtype)
    model.unfreeze()
    return model


def updater_of(is_compact: bool, options: TrainOptions = ADAMW, **others: Any) -> Updater:
    return Updater(model_of(), make_optimizer(options), compute_dtype=mx.bfloat16, is_compact=is_compact, **others)


def train(updater: Updater, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batch = rows_of(sequences([9, 12], vocab=200, seed=step % 4))
        update = updater.update([batch], batch.num_targets, 1e-3, step)
        mx.eval(update.loss, updater.held())
        losses.append(update.loss.item())
    return losses


def test_a_weight_is_the_nearest_in_bfloat16_and_loses_nothing():
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    special = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 3.4e38, 1.00390625]
    numbers = np.concatenate([values[~np.isnan(values)], np.array(special, np.float32)])
    high, low = compact.split(mx.array(numbers))
    assert high.dtype == mx.bfloat16 and low.dtype == mx.uint16
    again = np.array(compact.joined(high, low))
    assert np.array_equal(again.view(np.uint32), numbers.view(np.uint32))
    found, nearest = (np.array(x.astype(mx.float32)) for x in (high, mx.array(numbers).astype(mx.bfloat16)))
    tie = numbers.view(np.uint32) % 2**16 == 2**15
    assert np.array_equal(found[~tie], nearest[~tie])
    assert mx.isnan(compact.joined(*compact.split(mx.array([np.nan, -np.nan])))).all().item()


def test_numbers_are_rounded_to_neighbours_and_right_on_average():
    x = mx.array(np.random.default_rng(1).normal(0, 1, 500).astype(np.float32))
    x = mx.concatenate([x, mx.array([0.0, 1e-30, -3e38, np.inf, -np.inf, np.nan])])
    draws = []
    for step in range(400):
        random = compact._random((*x.shape,), mx.array(step, mx.uint32), 3)
        draws.append(np.array(compact._rounded_at_random(x, random).astype(mx.float32)))
    finite, draws = np.array(x)[:-3], np.stack(draws).astype(np.float64)
    assert np.isnan(draws[:, -1]).all() and (draws[:, -3] == np.inf).all() and (draws[:, -2] == -np.inf).all()
    low = (finite.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = ((finite.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    found = draws[:, :-3]
    assert ((found == low) | (found == high)).all()
    assert (found[:, finite == 0] == 0).all()
    spacing = np.abs(high.astype(np.float64) - low)
    error = (found.mean(0) - finite) / spacing
    assert np.abs(error).max() < 0.13  # five standard deviations of a mean of 400 draws
    assert abs(error.mean()) < 0.01
    assert np.mean(found[0] == found[1]) == pytest.approx(2 / 3, abs=0.1)  # steps are independent


def test_second_moments_follow_gradients_that_shrink():
    """To the nearest number of bfloat16 they would not: 0.999 of such a number is rounded to itself."""
    optimizer = make_optimizer(replace(ADAMW, weight_decay=0.0))
    weight, numbers = compact.split(mx.zeros((64, 64))), mx.array(1.0)
    state = {"step": mx.array(0, mx.uint64), "learning_rate": numbers, "w": {}}
    state["w"] = {"m": mx.zeros((64, 64), mx.bfloat16), "v": mx.ones((64, 64), mx.bfloat16)}
    gradient = mx.full((64, 64), 0.01, mx.bfloat16)
    for _ in range(500):
        weights, state = compact.update(optimizer, state, ["w"], [weight], [gradient], numbers, mx.array(0.0), None)
        mx.eval(weights, state)
    expected = 0.999**500 + (1 - 0.999**500) * 1e-4
    found = state["w"]["v"].astype(mx.float32)
    assert mx.mean(found).item() == pytest.approx(expected, rel=0.01)
    assert mx.sqrt(mx.var(found)).item() < 0.15 * expected
    assert state["step"].item() == 500 and state["w"]["v"].dtype == mx.bfloat16


@pytest.mark.compiled
@pytest.mark.parametrize("options", [ADAMW, replace(ADAMW, optimizer="adam", weight_decay=None, bias_correction=False)])
def test_a_first_update_is_that_of_float32(options):
    """The same gradients, so the same masters; moments differ by their rounding."""
    states = []
    for is_compact in (False, True):
        updater = updater_of(is_compact, options, max_grad_norm=0.5)
        train(updater, range(1))
        states.append(updater.state())
    for name, expected in states[0].items():
        found, expected = states[1][name].astype(mx.float32), expected.astype(mx.float32)
        is_moment = name.endswith((".m", ".v"))
        assert mx.allclose(found, expected, rtol=2**-7 if is_moment else 3e-7, atol=1e-12).item(), name


def test_training_goes_as_with_float32():
    plain, small = updater_of(False), updater_of(True)
    expected, found = train(plain, range(30)), train(small, range(30))
    assert expected[-1] < 0.5 * expected[0]
    assert np.allclose(found, expected, rtol=0.03, atol=0.02)
    for name, weight in plain.state().items():
        if name.startswith("weights."):
            difference = mx.linalg.norm((small.state()[name] - weight).reshape(-1))
            assert difference.item() < 0.03 * mx.linalg.norm(weight.reshape(-1)).item(), name


def test_a_weight_takes_eight_bytes():
    updater = updater_of(True)
    train(updater, range(2))
    values, low, copies, state = updater.held()
    assert all(a is b for a, b in zip(values, copies, strict=True))
    numbers = sum(value.size for value in values)
    moments = sum(value.nbytes for name, value in updater.state().items() if name.endswith((".m", ".v")))
    assert sum(value.nbytes for value in [*values, *low]) + moments == 8 * numbers
    assert {value.dtype for value in values} == {mx.bfloat16} and state["step"].item() == 2


def test_a_state_that_was_saved_continues_exactly(tmp_path):
    whole = updater_of(True)
    losses = train(whole, range(4))
    first, second = updater_of(True), updater_of(True)
    train(first, range(2))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), first.state())
    second.restore(mx.load(str(tmp_path / "state.safetensors")))
    assert train(second, range(2, 4)) == losses[2:]
    for name, value in whole.state().items():
        assert mx.array_equal(second.state()[name], value).item(), name


@pytest.mark.parametrize("was_compact", [False, True])
def test_a_run_continues_with_the_other_type(was_compact):
    before, after = updater_of(was_compact), updater_of(not was_compact)
    losses = train(before, range(6))
    part = updater_of(was_compact)
    train(part, range(3))
    after.restore(part.state())
    moments = {value.dtype for name, value in after.state().items() if name.endswith((".m", ".v"))}
    assert moments == {mx.float32 if was_compact else mx.bfloat16}
    assert np.allclose(train(after, range(3, 6)), losses[3:], rtol=0.03)


def test_a_batch_beyond_the_limits_changes_nothing():
    updater = updater_of(True)
    train(updater, range(2))
    before = updater.state()
    batch = rows_of(sequences([20], vocab=200))
    update = updater.update([batch], batch.num_targets, 1e-3, 2, Limits(0.0, 1e9))
    assert update.skipped.item()
    for name, value in updater.state().items():
        assert name.endswith("learning_rate") or mx.array_equal(value, before[name]).item(), name
    assert not updater.update([batch], batch.num_targets, 1e-3, 2, Limits(1e9, 1e9)).skipped.item()
    assert updater.state()["optimizer.step"].item() == 3


def test_gradients_of_several_micro_batches_are_added_in_float32():
    states = []
    for is_compact in (False, True):
        updater = updater_of(is_compact)
        batches = [rows_of(sequences([20], vocab=200, seed=seed)) for seed in range(3)]
        mx.eval(updater.update(batches, sum(batch.num_targets for batch in batches), 1e-3, 0).loss, updater.held())
        states.append(updater.state())
    for name, expected in states[0].items():
        if name.startswith("weights."):
            assert mx.allclose(states[1][name], expected, rtol=3e-7, atol=1e-12).item(), name


def test_a_state_that_a_plan_counts_is_the_one_held(monkeypatch):
    options = replace(ADAMW, batch_size=2)
    plain, small = updater_of(False, options), updater_of(True, options)
    plan = planning.plan(plain, options, (2, 64))
    held = planning.plan(small, replace(options, optimizer_dtype=BFLOAT16), (2, 64)).memory
    numbers = sum(value.size for name, value in plain.state().items() if name.startswith("weights."))
    assert plan.memory.model == held.model == 4 * numbers
    assert plan.memory.optimizer // 2 == pytest.approx(held.optimizer, abs=10) == pytest.approx(4 * numbers, abs=20)
    flags, memory = plan.alternatives[0]
    assert flags == "--optimizer-dtype bfloat16" and memory.peak == pytest.approx(held.peak, abs=20)
    assert all(flags.startswith("--optimizer-dtype bfloat16") for flags, _ in plan.alternatives)
    monkeypatch.setattr(planning, "available_memory", lambda: held.peak * 1.2 - plan.memory.model)
    assert "with optimizer_dtype bfloat16: " in plan.warning()
    assert not any("dtype" in flags for flags, _ in planning.plan(small, options, (2, 64)).alternatives)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(optimizer="lion", optimizer_dtype=BFLOAT16), "is for optimizer adam or adamw"),
        (TrainOptions(optimizer_dtype="float16"), "must be float32 or bfloat16, got 'float16'"),
        (FineTuneOptions(train=True, data="x", optimizer_dtype=BFLOAT16), "is for fine_tune_type full"),
        (
            PretrainOptions(data=("x",), output="y", optimizer="adamw", optimizer_dtype=BFLOAT16, ema_decay=0.9),
            "ema_decay needs optimizer_dtype float32",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(RequestError, match=message):
        options.check()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_type_of_the_model_is_refused(dtype):
    compact.check_dtype(TrainOptions(), dtype)
    for fitting in (BFLOAT16, None):
        compact.check_dtype(TrainOptions(optimizer_dtype=BFLOAT16), fitting)
    with pytest.raises(OpenELMError, match=f"optimizer_dtype bfloat16 needs dtype bfloat16, not {dtype}"):
        compact.check_dtype(TrainOptions(optimizer_dtype=BFLOAT16), dtype)


def test_the_command_trains_and_resumes(tmp_path: Path):
    write_run_folder(tmp_path)
    words = ["--model", "model", "--data", "data", "--fine-tune-type", "full", "--batch-size", 2, "--val-batches", 0]
    words += ["--train", "--optimizer-dtype", "bfloat16", "--learning-rate", 1e-3]
    words += ["--steps-per-report", 1]
    for folder, steps in (("whole", 4), ("part", 2)):
        done = run_here("lora", *words, "--iters", steps, "--adapter-path", folder, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run_here("lora", "--train", "--resume", "--iters", 4, "--adapter-path", "part", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = []
    for folder in ("whole", "part"):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["train_loss"] for row in rows if "train_loss" in row])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    weights = [mx.load(str(tmp_path / folder / "adapters.safetensors")) for folder in ("whole", "part")]
    assert {value.dtype for value in weights[0].values()} == {mx.float32}
    assert all(mx.array_equal(weights[1][name], value).item() for name, value in weights[0].items())
    done = run_here("lora", *words, "--dtype", "float32", "--iters", 1, "--adapter-path", "c", folder=tmp_path)
    assert done.returncode != 0 and "--optimizer-dtype bfloat16 needs --dtype bfloat16, not float32" in done.stderr
    assert not (tmp_path / "c").exists()
