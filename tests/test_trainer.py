"""The training loop: what it reports, when it validates, saves and stops; with an updater of known losses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import Metrics, read
from mlx_openelm.training.run.state import Checkpoints
from mlx_openelm.training.run.trainer import TrainingRun, train
from mlx_openelm.training.step.evaluation import Evaluation
from mlx_openelm.training.step.updater import Update

import mlx.core as mx
import pytest
from processes import environment

TIMING = {"tokens_per_second", "iterations_per_second", "peak_memory", "val_seconds"}


@dataclass(frozen=True)
class Step:
    batches: tuple[Batch, ...]
    num_targets: int
    num_tokens: int
    examples: tuple[int, ...]
    epoch: float


class Data:
    """Step i learns examples 2i and 2i + 1, with i + 1 tokens."""

    def __init__(self):
        self.requested: list[int] = []

    def step(self, index: int, rank: int) -> Step:
        self.requested.append(index)
        tokens = mx.full((1, index + 1), index)
        batch = Batch(tokens, tokens, None, (2 * index, 2 * index + 1), index + 1, index + 1)
        return Step((batch,), index + 1, index + 1, batch.examples, index / 10)


class Counting:
    """The loss at step i is 10 - i, or `losses[i]`; the weight is the sum of all learning rates so far."""

    def __init__(self, losses: dict[int, float] | None = None, seconds: float = 0.0):
        self.weight, self.losses, self.seconds = mx.array(0.0), losses or {}, seconds
        self.rates: list[float] = []

    def update(self, batches, num_targets, learning_rate, step):
        assert num_targets == step + 1 and batches[0].num_tokens == step + 1
        time.sleep(self.seconds)
        self.rates.append(learning_rate)
        self.weight = self.weight + learning_rate
        loss = mx.array(self.losses.get(step, 10.0 - step))
        return Update(loss, loss, mx.array(math.inf if self.losses.get(step) == 77.0 else 2.0))

    def held(self):
        return [self.weight]

    def state(self):
        return {"weights.w": self.weight, "optimizer.step": mx.array(len(self.rates), dtype=mx.uint64)}

    def restore(self, state):
        self.weight = state["weights.w"]


class Notes(Listener):
    def __init__(self):
        self.lines, self.saved_steps, self.losses = [], [], []

    def stepped(self, step, loss, tokens_per_second):
        self.losses.append(loss)

    def saved(self, step, path):
        self.saved_steps.append(step)

    def say(self, line):
        self.lines.append(line)


OPTIONS = TrainOptions(steps_per_report=3, steps_per_eval=4, save_every=5)


def run(folder: Path, updater: Counting, total: int, options: TrainOptions = OPTIONS, *, val=None, **rest):
    """Train in `folder`, continuing the run there; `val` maps steps to validation losses, None to an interrupt."""
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=options.keep_last, keep_every=options.keep_every)
    found = checkpoints.load(pytest.fail)
    if found is not None:
        updater.restore(found[1])
    state = found[0] if found else None
    start = state.step if state else 0
    notes, data = Notes(), Data()
    evaluated = []

    def evaluate(check):
        evaluated.append(start + len(notes.losses))
        loss = val(evaluated[-1])
        if loss is None:  # this validation is interrupted
            os.kill(os.getpid(), signal.SIGINT)
            until_it_raises(check)
        return Evaluation(loss, 5)

    validated = state.validated if state else None
    with Metrics(folder, resume_step=start if state else None, validated=validated, plot=False) as metrics:
        job = TrainingRun(updater=updater, steps=data, options=options, total_steps=total,
                          learning_rate=lambda step: 0.5 ** (step + 1), checkpoints=checkpoints, metrics=metrics,
                          evaluate=evaluate if val else None, listener=notes, **rest)  # fmt: skip
        result = train(job, state)
    return result, notes, data, evaluated, checkpoints


def until_it_raises(check) -> None:
    for _ in range(2000):
        time.sleep(0.001)
        check()
    raise AssertionError("the validation was not interrupted")


def rows(folder: Path) -> list[dict]:
    """The metrics, without those that vary between runs."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read(folder / "metrics.jsonl")]


def test_losses_are_weighted_by_tokens_and_everything_happens_when_due(tmp_path):
    updater = Counting()
    result, notes, data, evaluated, checkpoints = run(tmp_path, updater, 10, val=lambda step: 20.0 - step)
    assert updater.rates == [0.5 ** (i + 1) for i in range(10)] and data.requested == list(range(10))
    assert evaluated == [0, 4, 8, 10]
    reports = [row for row in rows(tmp_path) if "train_loss" in row]
    assert [row["step"] for row in reports] == [3, 6, 9, 10]
    for row, window in zip(reports, ([0, 1, 2], [3, 4, 5], [6, 7, 8], [9]), strict=True):
        expected = sum((10 - i) * (i + 1) for i in window) / sum(i + 1 for i in window)
        assert row["train_loss"] == pytest.approx(expected, rel=1e-12)
        assert row["trained_tokens"] == sum(range(1, row["step"] + 1))
        assert row["learning_rate"] == 0.5 ** row["step"] and row["grad_norm"] == 2.0
    assert [(r["step"], r["val_loss"]) for r in rows(tmp_path) if "val_loss" in r] == [
        (0, 20.0), (4, 16.0), (8, 12.0), (10, 10.0)]  # fmt: skip
    # Every save_every steps, at the best validation, and at the end.
    assert notes.saved_steps == [4, 5, 8, 10] and checkpoints.steps() == [8, 10]
    assert (result.steps, result.stopped, result.best_step, result.best_val_loss) == (10, "finished", 10, 10.0)
    assert result.train_loss == 1.0 and result.val_loss == 10.0 and result.trained_tokens == 55


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, Counting(), 11, val=lambda step: abs(6.0 - step))
    # Stopped by an error after step 7: the last checkpoint is of step 5, and the metrics end at 6.
    with pytest.raises(OpenELMError):
        run(parts, Counting({7: math.nan}), 11, val=lambda step: abs(6.0 - step))
    assert rows(parts)[-1]["step"] == 6
    result, _, data, evaluated, checkpoints = run(parts, Counting(), 11, val=lambda step: abs(6.0 - step))
    assert data.requested == list(range(5, 11)) and evaluated == [8, 11]
    assert rows(parts) == rows(whole) and result.trained_tokens == 66
    expected = Checkpoints(whole / "checkpoints", keep_last=2).load(pytest.fail)
    found = checkpoints.load(pytest.fail)
    assert found[1]["weights.w"].item() == expected[1]["weights.w"].item() == 1 - 0.5**11
    assert replace(found[0], seconds=0.0) == replace(expected[0], seconds=0.0)
    # Nothing is left to do, and nothing is done.
    again, _, data, evaluated, _ = run(parts, Counting(), 11, val=lambda step: abs(6.0 - step))
    assert (again.steps, again.stopped, data.requested, evaluated) == (11, "finished", [], [])
    assert rows(parts) == rows(whole)


@pytest.mark.parametrize(("loss", "what"), [(math.nan, "loss is nan"), (77.0, "gradient's norm is inf (loss 77")])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path, loss, what):
    # Step 10 (index 9) would be saved.
    with pytest.raises(OpenELMError) as caught:
        run(tmp_path, Counting({9: loss}), 20, describe="train.jsonl, line {}".format)
    message = str(caught.value)
    assert what in message and "at step 10" in message and "train.jsonl, line 18, train.jsonl, line 19" in message
    assert "step 5 is intact" in message and "0000005" in message and "resume" in message
    assert Checkpoints(tmp_path / "checkpoints", keep_last=2).steps() == [5]


def test_a_validation_loss_that_is_not_finite_ends_the_run_too(tmp_path):
    with pytest.raises(OpenELMError, match="validation loss is nan after step 8.*step 5 is intact"):
        run(tmp_path, Counting(), 20, val=lambda step: math.nan if step == 8 else 1.0)


def test_an_error_in_a_validation_does_not_lose_the_training_before_it(tmp_path):
    def reward(step):
        if step == 8:
            raise OpenELMError("The reward function failed.")
        return 9.0 - step

    with pytest.raises(OpenELMError, match="reward function failed"):
        run(tmp_path / "stopped", Counting(), 12, val=reward)
    assert (tmp_path / "stopped/checkpoints/0000008").is_dir()
    *_, evaluated, checkpoints = run(tmp_path / "stopped", Counting(), 12, val=lambda step: 9.0 - step)
    assert evaluated == [8, 12]
    whole = run(tmp_path / "whole", Counting(), 12, val=lambda step: 9.0 - step)
    assert checkpoints.steps() == whole[-1].steps()
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")


def test_an_error_in_a_measurement_of_tasks_does_not_lose_the_best_checkpoint(tmp_path):
    def fail():
        raise ValueError("no data")

    options = replace(OPTIONS, eval_tasks_every=4)
    with pytest.raises(ValueError, match="no data"):
        run(tmp_path, Counting(), 12, options, val=lambda step: 9.0 - step, tasks=fail)
    assert (tmp_path / "checkpoints/best").resolve().name == "0000004"
    state, _ = Checkpoints(tmp_path / "checkpoints", keep_last=2).load(pytest.fail)
    assert (state.step, state.validated, state.best_step) == (4, 4, 4)


def test_early_stop_counts_validations_without_a_new_best_across_a_resume(tmp_path):
    losses = {0: 9.0, 4: 5.0, 8: 6.0, 12: 4.0, 16: 4.0, 20: 4.5, 24: 3.0}
    options = replace(OPTIONS, early_stop=2, keep_last=1, save_every=9)
    with pytest.raises(OpenELMError):
        run(tmp_path, Counting({18: math.nan}), 40, options, val=losses.get)
    result, notes, _, evaluated, checkpoints = run(tmp_path, Counting(), 40, options, val=losses.get)
    assert evaluated == [20] and notes.saved_steps == [20]
    assert (result.stopped, result.steps, result.best_step, result.best_val_loss) == ("stopped early", 20, 12, 4.0)
    assert checkpoints.steps() == [12, 20]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "0000012"


def _signal_after(steps: int, updater: Counting, number: int = signal.SIGINT) -> None:
    """Send this process a signal after this many updates."""

    def wait() -> None:
        while len(updater.rates) < steps:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_continues(tmp_path, number):
    updater = Counting(seconds=0.03)
    before = signal.getsignal(number)
    _signal_after(3, updater, number)
    result, notes, *_ = run(tmp_path, updater, 100)
    assert result.stopped == "interrupted" and 3 <= result.steps <= 6
    assert notes.saved_steps[-1] == result.steps and "Ctrl-C again" in notes.lines[0]
    assert signal.getsignal(number) == before
    total = result.steps + 4
    finished, *_ = run(tmp_path, Counting(), total)
    run(tmp_path / "whole", Counting(), total)
    assert finished.steps == total and rows(tmp_path) == rows(tmp_path / "whole")


def test_an_interrupted_validation_is_repeated_after_a_resume(tmp_path):
    def evaluate(check):
        os.kill(os.getpid(), signal.SIGINT)
        until_it_raises(check)

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    job = TrainingRun(updater=Counting(), steps=Data(), options=OPTIONS, total_steps=10,
                      learning_rate=lambda _: 1.0, checkpoints=checkpoints, evaluate=evaluate)  # fmt: skip
    result = train(job)
    assert (result.stopped, result.steps, checkpoints.steps()) == ("interrupted", 0, [0])
    _, _, _, evaluated, _ = run(tmp_path, Counting(), 10, val=lambda step: 1.0)
    assert evaluated == [0, 4, 8, 10]


def test_an_interrupted_last_validation_is_done_after_a_resume(tmp_path):
    losses = {0: 9.0, 4: 5.0, 8: 6.0}

    def validations(folder: Path) -> list[tuple[int, float]]:
        return [(row["step"], row["val_loss"]) for row in rows(folder) if "val_loss" in row]

    result, *_ = run(tmp_path, Counting(), 8, val={0: 9.0, 4: 5.0, 8: None}.get)
    assert (result.stopped, result.steps, result.val_loss) == ("interrupted", 8, 5.0)
    result, _, data, evaluated, _ = run(tmp_path, Counting(), 8, val=losses.get)
    assert (result.stopped, result.val_loss, data.requested, evaluated) == ("finished", 6.0, [], [8])
    assert validations(tmp_path) == [(0, 9.0), (4, 5.0), (8, 6.0)]
    # Step 8 was saved without that validation, so it is done now, and logged once.
    result, *_ = run(tmp_path, Counting(), 9, val=lambda step: losses.get(step, 4.0))
    assert validations(tmp_path) == [(0, 9.0), (4, 5.0), (8, 6.0), (9, 4.0)]


# A step that never ends, in a call that returns to Python for no signal, as MLX's do.
ENDLESS = """
import hashlib, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import test_trainer
class Endless(test_trainer.Counting):
    def update(self, *args):
        print("step", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
test_trainer.Notes.say = lambda self, line: print(line, flush=True)
test_trainer.run(Path({folder!r}), Endless(), 100)
"""


def test_a_second_interrupt_stops_at_once_even_within_a_step(tmp_path):
    script = ENDLESS.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment())
    try:
        assert process.stdout.readline() == b"step\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline().startswith(b"Finishing the step")
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(tmp_path, monkeypatch):
    save = mx.save_safetensors

    def full(file, tensors):
        if any(float(value) > 0.99 for value in tensors.values() if value.dtype == mx.float32):
            raise OSError(28, "No space left on device")
        save(file, tensors)

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(OpenELMError, match="No space left on device.*step 5 is intact.*resume"):
        run(tmp_path, Counting(), 20)
    monkeypatch.undo()
    result, *_ = run(tmp_path, Counting(), 20)
    run(tmp_path / "whole", Counting(), 20)
    assert result.steps == 20 and rows(tmp_path) == rows(tmp_path / "whole")


def test_the_next_step_is_built_while_the_device_computes(tmp_path, monkeypatch):
    order: list[str] = []
    launch, data = mx.async_eval, Data()
    monkeypatch.setattr(mx, "async_eval", lambda *args: order.append("launched") or launch(*args))
    build = data.step
    monkeypatch.setattr(data, "step", lambda *args: order.append(f"built {args[0]}") or build(*args))
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    train(TrainingRun(updater=Counting(), steps=data, options=OPTIONS, total_steps=3, learning_rate=lambda _: 1.0,
                      checkpoints=checkpoints))  # fmt: skip
    assert order == ["built 0", "launched", "built 1", "launched", "built 2", "launched"]


def test_the_saved_record_is_plain_json(tmp_path):
    run(tmp_path, Counting(), 5, val=lambda step: 1.0)
    record = json.loads((tmp_path / "checkpoints" / "0000005" / "state.json").read_text())
    assert record["state"]["step"] == 5 and record["state"]["best_step"] == 0


def test_metrics_of_an_objective_are_logged(tmp_path):
    class Preferring(Counting):
        def update(self, *arguments):
            update = super().update(*arguments)
            return replace(update, metrics={"accuracy": update.loss / 10})

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    with Metrics(tmp_path, plot=False) as metrics:
        train(TrainingRun(updater=Preferring(), steps=Data(), options=OPTIONS, total_steps=4,
                          learning_rate=lambda _: 1.0, checkpoints=checkpoints, metrics=metrics,
                          evaluate=lambda check: Evaluation(2.0, 5, {"accuracy": 0.75})))  # fmt: skip
    logged = rows(tmp_path)
    assert [row["accuracy"] for row in logged if "train_loss" in row] == [pytest.approx(5.2 / 6), pytest.approx(0.7)]
    assert [row["val_accuracy"] for row in logged if "val_loss" in row] == [0.75, 0.75]
