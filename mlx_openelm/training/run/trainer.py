"""The loop of every kind of training: update, report, validate, save, and stop without losing anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ...cuda.compiling import notice
from ...errors import OpenELMError
from ..data.batches import Batch
from ..options import TrainOptions
from ..step.updater import Evaluation, Updater
from .distributed import Processes
from .interrupts import Interrupts
from .state import Checkpoints, RunState

# Examples named in an error before the rest is only counted.
_NAMED = 8
# Added where nothing was learned before a number was not finite.
_FROM_THE_START = (
    " If the model never gives a finite loss, its weights are damaged, or --dtype float16 is too small for them: use "
    "bfloat16 or float32."
)

FINISHED, INTERRUPTED, EARLY = "finished", "interrupted", "stopped early"


class Step(Protocol):
    """What an update learns from (see `batches.Step`): its own micro-batches; tokens and examples of all processes."""

    @property
    def batches(self) -> Sequence[Batch]: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def examples(self) -> Sequence[int]: ...
    @property
    def epoch(self) -> float: ...


class Steps(Protocol):
    def step(self, index: int, rank: int) -> Step: ...


class Log(Protocol):
    def log(self, step: int, values: Mapping[str, Any]) -> None: ...


class Listener:
    """Told how a run goes; does nothing by itself. Losses are in nats a learned token, memory in GB (1e9 bytes)."""

    def started(self, step: int, total_steps: int) -> None:
        """Training goes on after `step` updates, 0 for a new run."""

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """An update is done."""

    def reported(self, step: int, values: Mapping[str, Any]) -> None:
        """As logged: train_loss, learning_rate, tokens_per_second, peak_memory and more."""

    def working(self, what: str, done: int, total: int) -> None:
        """Something else than updates is under way: so much of it is done."""

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        """As logged: val_loss, val_seconds."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete."""

    def say(self, line: str) -> None:
        """A line for the person."""

    def warn(self, line: str) -> None:
        """A line about what is not as it should be."""

    def close(self) -> None:
        """No updates come any more, or a person asked for the end."""


@dataclass(frozen=True)
class Result:
    """How training ended: `stopped` is "finished", "interrupted" or "stopped early".

    `train_loss` is the last that was reported, `val_loss` the last measured. `trained_tokens` counts what was learned,
    `tokens_per_second` what was read, without padding, in the time of updates since the process began. `peak_memory`
    is in GB (1e9 bytes).
    """

    steps: int
    total_steps: int
    stopped: str
    train_loss: float | None
    val_loss: float | None
    best_step: int | None
    best_val_loss: float | None
    trained_tokens: int
    seconds: float
    tokens_per_second: float | None
    peak_memory: float


def _number(scalar: mx.array) -> float:
    value = scalar.item()
    assert isinstance(value, float)
    return value


class _Stop(Exception):
    """A validation was left since a person asked for the end."""


def train(
    updater: Updater,
    steps: Steps,
    options: TrainOptions,
    *,
    total_steps: int,
    learning_rate: Callable[[int], float],
    checkpoints: Checkpoints,
    metrics: Log | None = None,
    state: RunState | None = None,
    evaluate: Callable[[Callable[[], None]], Evaluation] | None = None,
    describe: Callable[[int], str] = "example {}".format,
    listener: Listener | None = None,
    processes: Processes | None = None,
) -> Result:
    """Train up to `total_steps` updates, from `state` on, whose weights the updater has.

    Validates before the first update, every `steps_per_eval` and at the end; saves every `save_every`, where the
    validation loss is the lowest so far, and at the end. Ctrl-C or SIGTERM ends it after the step, saved; a second
    one ends the process.

    Args:
        learning_rate: of an update, counted from 0.
        evaluate: measures the validation loss; before each batch, and as often in every process, it calls what it is
            given, which raises if a person asked for the end. None for no validation.
        describe: names an example, by its index, for errors.

    Raises:
        OpenELMError: a loss or a gradient is not finite; nothing was saved since. A checkpoint could not be written.
    """
    processes = processes or Processes()
    saved_step = None if state is None else state.step
    run = _Run(updater, steps, options, total_steps, learning_rate, checkpoints, metrics, state or RunState(),
               evaluate, describe, listener or Listener(), processes, saved_step)  # fmt: skip
    try:
        with Interrupts(run.noticed) as run.interrupts:
            return run.go()
    except Exception:
        processes.speak_last()
        raise
    finally:
        run.listener.close()


@dataclass
class _Run:
    updater: Updater
    steps: Steps
    options: TrainOptions
    total_steps: int
    learning_rate: Callable[[int], float]
    checkpoints: Checkpoints
    metrics: Log | None
    state: RunState
    evaluate: Callable[[Callable[[], None]], Evaluation] | None
    describe: Callable[[int], str]
    listener: Listener
    processes: Processes
    saved_step: int | None

    def __post_init__(self) -> None:
        self.interrupts = Interrupts()
        # Since the last report, and in all of this process's time; they are not saved, nothing depends on them.
        self.window_seconds, self.window_steps, self.window_tokens = 0.0, 0, 0
        self.first_seconds, self.tokens = self.state.seconds, 0

    def noticed(self) -> None:
        self.listener.close()
        self.listener.say("Finishing the step, then saving; Ctrl-C again stops at once.")

    def go(self) -> Result:
        self.listener.started(self.state.step, self.total_steps)
        upcoming = self._build(self.state.step)
        while True:
            stopped = self._settle()
            if stopped is not None:
                return self._result(stopped)
            upcoming = self._update(upcoming)

    def _settle(self) -> str | None:
        """After an update: validate and save if it is time. Why the run ends now, if it does."""
        finished = self.state.step >= self.total_steps
        stopped = self.processes.any(self.interrupts.requested)
        improved = False
        if not stopped and self._validation_is_due(finished):
            try:
                improved = self._validate()
            except _Stop:
                stopped = True
        limit = self.options.early_stop
        early = limit is not None and self.state.stale >= limit
        due = self.state.step > 0 and self.state.step % self.options.save_every == 0
        if due or improved or finished or stopped or early:
            self._save()
        # A validation that was left out is still to be done.
        if finished and not (stopped and self._validation_is_due(finished)):
            return FINISHED
        return INTERRUPTED if stopped else EARLY if early else None

    def _validation_is_due(self, finished: bool) -> bool:
        if self.evaluate is None or self.state.validated == self.state.step:
            return False
        return finished or self.state.step % self.options.steps_per_eval == 0

    def _build(self, index: int) -> Step | None:
        return self.steps.step(index, self.processes.rank) if index < self.total_steps else None

    def _update(self, step: Step | None) -> Step | None:
        """Do one update, and return what the next one learns from, built while the device computes."""
        assert step is not None
        state, rate = self.state, self.learning_rate(self.state.step)
        started = time.perf_counter()
        with notice("Training", self.listener.say):
            update = self.updater.update(step.batches, step.num_targets, rate, state.step)
            results = [update.loss, update.objective, update.grad_norm, self.updater.state()]
            mx.async_eval(results)
            upcoming = self._build(state.step + 1)
            mx.eval(results)
        loss, norm = _number(update.loss), _number(update.grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(loss, norm, step)
        seconds = time.perf_counter() - started

        state.step += 1
        state.seconds += seconds
        state.trained_tokens += step.num_targets
        state.window_loss += loss * step.num_targets
        state.window_tokens += step.num_targets
        self.window_seconds, self.window_steps = self.window_seconds + seconds, self.window_steps + 1
        self.window_tokens += step.num_tokens
        self.tokens += step.num_tokens
        self.listener.stepped(state.step, loss, step.num_tokens / seconds)
        if state.step % self.options.steps_per_report == 0 or state.step == self.total_steps:
            self._report(rate, norm, _number(update.objective), step.epoch)
        return upcoming

    def _report(self, rate: float, norm: float, objective: float, epoch: float) -> None:
        state = self.state
        state.reported = state.window_loss / max(1, state.window_tokens)
        values = {
            "train_loss": state.reported,
            "learning_rate": rate,
            "grad_norm": norm,
            "epoch": epoch,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": self.window_tokens / self.window_seconds,
            "iterations_per_second": self.window_steps / self.window_seconds,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        if self.options.z_loss or self.options.label_smoothing:
            values["objective"] = objective  # what is minimized; train_loss is the likelihood alone
        state.window_loss, state.window_tokens = 0.0, 0
        self.window_seconds, self.window_steps, self.window_tokens = 0.0, 0, 0
        self._log(values)
        self.listener.reported(state.step, values)

    def _validate(self) -> bool:
        """Measure the validation loss; returns whether it is the lowest so far."""
        assert self.evaluate is not None
        state, started = self.state, time.perf_counter()
        loss = self.evaluate(self._check_interrupt).loss
        if not math.isfinite(loss):
            raise OpenELMError(
                f"The validation loss is {loss} after step {state.step}; nothing was saved since. "
                f"{self.checkpoints.advice()}{_FROM_THE_START if state.step == 0 else ''}"
            )
        state.validated, state.val_loss = state.step, loss
        improved = state.best_loss is None or loss < state.best_loss
        if improved:
            state.best_loss, state.best_step, state.stale = loss, state.step, 0
        else:
            state.stale += 1
        values = {"val_loss": loss, "val_seconds": time.perf_counter() - started}
        self._log(values)
        self.listener.validated(state.step, values)
        # What no update has changed need not be saved.
        return improved and state.step > 0

    def _check_interrupt(self) -> None:
        # Asked together, so that all processes leave, and notice at once if one is gone.
        if self.processes.any(self.interrupts.requested):
            raise _Stop

    def _log(self, values: Mapping[str, Any]) -> None:
        if self.metrics is not None and self.processes.leads:
            self.metrics.log(self.state.step, values)

    def _save(self) -> None:
        if self.saved_step == self.state.step:
            return
        arrays = self.updater.state()
        damaged = next((name for name, array in arrays.items() if not mx.all(mx.isfinite(array)).item()), None)
        if damaged is not None:
            raise OpenELMError(
                f"{damaged} is not finite after step {self.state.step}; nothing was saved since. "
                f"{self.checkpoints.advice()} A smaller --learning-rate may help."
            )
        if self.processes.leads:
            path = self.checkpoints.save(self.state, arrays)
            self.listener.saved(self.state.step, path)
        self.saved_step = self.state.step

    def _not_finite(self, loss: float, norm: float, step: Step) -> OpenELMError:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm} (loss {loss:.3f})"
        names = [self.describe(index) for index in step.examples]
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        return OpenELMError(
            f"The {what} at step {self.state.step + 1}, from {listed}. Nothing was saved since. "
            f"{self.checkpoints.advice()} A smaller --learning-rate, more --warmup or --max-grad-norm 1 may help."
            f"{_FROM_THE_START if self.state.step == 0 else ''}"
        )

    def _result(self, stopped: str) -> Result:
        state, seconds = self.state, self.state.seconds - self.first_seconds
        return Result(
            steps=state.step,
            total_steps=self.total_steps,
            stopped=stopped,
            train_loss=state.reported,
            val_loss=state.val_loss,
            best_step=state.best_step,
            best_val_loss=state.best_loss,
            trained_tokens=state.trained_tokens,
            seconds=state.seconds,
            tokens_per_second=self.tokens / seconds if seconds else None,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
