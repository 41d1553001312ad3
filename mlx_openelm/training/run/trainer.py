"""The training loop: update, report, validate, save, and stop without losing anything."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from ...cuda.compiling import notice
from ...errors import OpenELMError
from ..options import TrainOptions
from ..step.evaluation import Evaluation
from ..step.updater import Update, Updater
from .distributed import Processes
from .interrupts import Interrupts
from .listener import Listener
from .spikes import Spikes
from .state import Checkpoints, RunState

# How many examples an error names; the rest are counted.
_NAMED = 8
# So many batches in a row may be skipped for a loss that is not finite.
MOST_IN_ROW = 10
# Added to errors in the first step.
_FROM_THE_START = (
    " If the model never gives a finite loss, its weights are damaged, or --dtype float16 is too small for them: use "
    "bfloat16 or float32."
)

FINISHED, INTERRUPTED, EARLY = "finished", "interrupted", "stopped early"


class Step(Protocol):
    """The data of one update (see `batches.Step`): this process's micro-batches, and counts over all processes."""

    @property
    def batches(self) -> Sequence[Any]: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def examples(self) -> Sequence[int]: ...
    @property
    def epoch(self) -> float: ...


class Steps(Protocol):
    """Gives each update its data, such as `batches.Batches`."""

    def step(self, index: int, rank: int) -> Step: ...


class Log(Protocol):
    """Where numbers are logged, such as `metrics.Metrics`."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Result:
    """How training ended: `stopped` is "finished", "interrupted" or "stopped early".

    `train_loss` is the last reported, `val_loss` the last measured, at `val_step`. `trained_tokens` counts learned
    tokens; `tokens_per_second` counts all tokens without padding, over the time of this process's updates.
    `peak_memory` is in GB (1e9 bytes).
    """

    steps: int
    total_steps: int
    stopped: str
    train_loss: float | None
    val_loss: float | None
    val_step: int | None
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
    """A validation was abandoned because the user asked to stop."""


class _NotFinite(OpenELMError):
    """The validation loss is not finite, so the weights are not worth keeping."""


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """The parts of a training run.

    Args:
        steps: the data of each update.
        learning_rate: the rate of an update, counted from 0.
        metrics: where numbers are logged; None in processes that do not lead.
        evaluate: measures the validation loss. Before each batch it calls its argument, which raises if the user asked
            to stop; it must call it equally often in every process. None means no validation.
        tasks: measures tasks every `eval_tasks_every` steps and at the end; None measures none.
        describe: names an example by its index, for errors.
        position: where a stream of data continues after so many steps; None for data whose order derives from the step.
        spikes: decides which batches are skipped; None skips none.
        further: more numbers to report, given the tokens per second since the last report.
        counts: what the objective counts, in the names of logged numbers.
        report: what to log of the means of the objective's metrics.
    """

    updater: Updater
    steps: Steps
    options: TrainOptions
    total_steps: int
    learning_rate: Callable[[int], float]
    checkpoints: Checkpoints
    metrics: Log | None = None
    evaluate: Callable[[Callable[[], None]], Evaluation] | None = None
    tasks: Callable[[], Mapping[str, float]] | None = None
    describe: Callable[[int], str] = "example {}".format
    position: Callable[[int], dict[str, Any] | None] = lambda step: None
    spikes: Spikes | None = None
    further: Callable[[float], Mapping[str, Any]] = lambda tokens_per_second: {}
    counts: str = "tokens"
    report: Callable[[Mapping[str, float]], Mapping[str, float]] = dict
    listener: Listener = field(default_factory=Listener)
    processes: Processes = field(default_factory=Processes)


def train(run: TrainingRun, state: RunState | None = None) -> Result:
    """Train up to `run.total_steps` updates.

    Validates before the first update, every `steps_per_eval` steps and at the end. Saves every `save_every` steps, when
    the validation loss is the lowest so far, and at the end. Ctrl-C or SIGTERM ends the run after the current step,
    which is saved; a second one ends the process.

    Args:
        state: where the run stopped, if it is continued; the updater already has the weights of that step.

    Raises:
        OpenELMError: a loss or a gradient is not finite, and nothing was saved since; or a checkpoint could not be
            written. After an error in a validation, or in the measurement of tasks, the last step is saved.
    """
    loop = _Loop(run, state or RunState(), None if state is None else state.step)
    try:
        with Interrupts(loop.on_interrupt) as loop.interrupts:
            return loop.go()
    except Exception:
        run.processes.ignore_termination()
        raise
    finally:
        run.listener.close()


@dataclass
class _Loop:
    """The state of the loop; `state` is what checkpoints keep of it."""

    run: TrainingRun
    state: RunState
    saved_step: int | None

    def __post_init__(self) -> None:
        self.interrupts = Interrupts()
        # Since the last report, and since this process began. They are not saved: only reported speeds depend on them.
        self.window_seconds, self.window_steps, self.window_tokens, self.window_targets = 0.0, 0, 0, 0
        self.first_seconds, self.tokens = self.state.seconds, 0

    def on_interrupt(self) -> None:
        """At the first Ctrl-C or SIGTERM."""
        self.run.listener.close()
        self.run.listener.say("Finishing the step, then saving; Ctrl-C again stops at once.")

    def go(self) -> Result:
        """Train until the run is complete, is interrupted, or stops early."""
        self.run.listener.started(self.state.step, self.run.total_steps)
        upcoming = self._build(self.state.step)
        while True:
            stopped = self._validate_and_save()
            if stopped is not None:
                return self._result(stopped)
            upcoming = self._update(upcoming)

    def _validate_and_save(self) -> str | None:
        """Validate and save if due. Returns why the run ends now, None if it continues."""
        finished = self.state.step >= self.run.total_steps
        stopped = self.run.processes.any(self.interrupts.requested)
        improved = False
        try:
            if not stopped and self._validation_is_due(finished):
                improved = self._validate()
            if not stopped and self.run.tasks is not None and self._tasks_are_due(finished):
                self._measure()
        except _Stop:
            stopped = True
        except _NotFinite:
            raise
        except Exception:  # of a user's reward, or of a task: the training before it must not be lost
            if self.state.step > 0:
                self._save()
            raise
        limit = self.run.options.early_stop
        early = limit is not None and self.state.stale >= limit
        due = self.state.step > 0 and self.state.step % self.run.options.save_every == 0
        if due or improved or finished or stopped or early:
            self._save()
        # A run is not finished while its last validation is missing.
        if finished and not (stopped and self._validation_is_due(finished)):
            return FINISHED
        return INTERRUPTED if stopped else EARLY if early else None

    def _validation_is_due(self, finished: bool) -> bool:
        if self.run.evaluate is None or self.state.validated == self.state.step:
            return False
        return finished or self.state.step % self.run.options.steps_per_eval == 0

    def _tasks_are_due(self, finished: bool) -> bool:
        due = finished or (self.state.step > 0 and self.state.step % self.run.options.eval_tasks_every == 0)
        return due and self.run.processes.leads

    def _measure(self) -> None:
        """Measure tasks; only the process that leads does, and the others wait at the next update."""
        assert self.run.tasks is not None
        values = self.run.tasks()
        self._log(values)
        self.run.listener.measured(self.state.step, values)

    def _build(self, index: int) -> Step | None:
        return self.run.steps.step(index, self.run.processes.rank) if index < self.run.total_steps else None

    def _update(self, step: Step | None) -> Step | None:
        """Do one update. Returns the data of the next one, which is built while the device computes."""
        assert step is not None
        state, rate = self.state, self.run.learning_rate(self.state.step)
        started = time.perf_counter()
        with notice("Training", self.run.listener.say):
            limits = () if self.run.spikes is None else (self.run.spikes.limits(state),)
            update = self.run.updater.update(step.batches, step.num_targets, rate, state.step, *limits)
            results = [update.loss, update.objective, update.grad_norm, update.metrics, update.skipped]
            results.append(self.run.updater.held())
            mx.async_eval(results)
            upcoming = self._build(state.step + 1)
            mx.eval(results)
        loss, norm = _number(update.loss), _number(update.grad_norm)
        skipped = update.skipped is not None and bool(update.skipped.item())
        may_skip = skipped and state.skipped_in_row < MOST_IN_ROW
        if not (math.isfinite(loss) and math.isfinite(norm)) and not may_skip:
            raise self._not_finite(loss, norm, step)
        seconds = time.perf_counter() - started

        state.step += 1
        state.seconds += seconds
        if self.run.spikes is not None:
            self._note(loss, norm, skipped)
        if not skipped:
            state.trained_tokens += step.num_targets
            state.window_loss += loss * step.num_targets
            state.window_tokens += step.num_targets
            for name, mean in update.metrics.items():
                state.window_metrics[name] = state.window_metrics.get(name, 0.0) + _number(mean) * step.num_targets
        self.window_seconds, self.window_steps = self.window_seconds + seconds, self.window_steps + 1
        self.window_targets += step.num_targets
        self.window_tokens += step.num_tokens
        self.tokens += step.num_tokens
        self.run.listener.stepped(state.step, loss, step.num_tokens / seconds)
        if state.step % self.run.options.steps_per_report == 0 or state.step == self.run.total_steps:
            self._report(update, rate, step.epoch)
        return upcoming

    def _note(self, loss: float, norm: float, skipped: bool) -> None:
        """Remember loss and gradient norm, by which spikes are recognized, and record a batch that was skipped."""
        assert self.run.spikes is not None
        state = self.state
        self.run.spikes.remember(state, loss, norm)
        state.skipped += skipped
        state.skipped_in_row = state.skipped_in_row + 1 if skipped else 0
        if skipped:
            self._log({"skipped_loss": loss, "skipped_grad_norm": norm})
            self.run.listener.warn(
                f"Step {state.step:,}: the batch was skipped, loss {loss:.3f}, gradient norm {norm:.3g}; "
                f"{state.skipped:,} so far."
            )

    def _report(self, update: Update, rate: float, epoch: float) -> None:
        """Log the means of the loss and the objective's metrics since the last report, and numbers of the last step."""
        state = self.state
        if state.window_tokens or state.reported is None:  # nothing if every batch since then was skipped
            state.reported = state.window_loss / max(1, state.window_tokens)
        tokens_per_second = self.window_tokens / self.window_seconds
        values = {
            "train_loss": state.reported,
            "learning_rate": rate,
            "grad_norm": _number(update.grad_norm),
            "epoch": epoch,
            f"trained_{self.run.counts}": state.trained_tokens,
            "tokens_per_second": tokens_per_second,
            "iterations_per_second": self.window_steps / self.window_seconds,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        if self.run.options.z_loss or self.run.options.label_smoothing:
            values["objective"] = _number(update.objective)  # what is minimized; train_loss is the likelihood alone
        if self.run.counts != "tokens":
            values[f"{self.run.counts}_per_second"] = self.window_targets / self.window_seconds
        means = {name: total / max(1, state.window_tokens) for name, total in state.window_metrics.items()}
        values |= self.run.report(means)
        values |= self.run.further(tokens_per_second)
        if self.run.spikes is not None:
            values["skipped"] = state.skipped
        state.window_loss, state.window_tokens, state.window_metrics = 0.0, 0, {}
        self.window_seconds, self.window_steps, self.window_tokens, self.window_targets = 0.0, 0, 0, 0
        self._log(values)
        self.run.listener.reported(state.step, values)

    def _validate(self) -> bool:
        """Measure the validation loss. Returns whether it is the lowest so far, so that the weights must be saved."""
        assert self.run.evaluate is not None
        state, started = self.state, time.perf_counter()
        evaluation = self.run.evaluate(self._check_interrupt)
        loss = evaluation.loss
        if not math.isfinite(loss):
            raise _NotFinite(
                f"The validation loss is {loss} after step {state.step}; nothing was saved since. "
                f"{self.run.checkpoints.advice()}{_FROM_THE_START if state.step == 0 else ''}"
            )
        state.validated, state.val_loss = state.step, loss
        improved = state.best_loss is None or loss < state.best_loss
        if improved:
            state.best_loss, state.best_step, state.stale = loss, state.step, 0
        else:
            state.stale += 1
        values = {"val_loss": loss, "val_seconds": time.perf_counter() - started}
        values |= {f"val_{name}": value for name, value in evaluation.metrics.items()}
        self._log(values)
        self.run.listener.validated(state.step, values)
        # Before the first update there is nothing to save.
        return improved and state.step > 0

    def _check_interrupt(self) -> None:
        # All processes check together, so that they all stop, and notice at once if one of them is gone.
        if self.run.processes.any(self.interrupts.requested):
            raise _Stop

    def _log(self, values: Mapping[str, Any]) -> None:
        if self.run.metrics is not None and self.run.processes.leads:
            self.run.metrics.log(self.state.step, values)

    def _save(self) -> None:
        if self.saved_step == self.state.step:
            return
        arrays = self.run.updater.state()
        damaged = next((name for name, array in arrays.items() if not mx.all(mx.isfinite(array)).item()), None)
        if damaged is not None:
            raise OpenELMError(
                f"{damaged} is not finite after step {self.state.step}; nothing was saved since. "
                f"{self.run.checkpoints.advice()} A smaller --learning-rate may help."
            )
        self.state.stream = self.run.position(self.state.step)
        if self.run.processes.leads:
            path = self.run.checkpoints.save(self.state, arrays)
            self.run.listener.saved(self.state.step, path)
        self.saved_step = self.state.step

    def _not_finite(self, loss: float, norm: float, step: Step) -> OpenELMError:
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient's norm is {norm} (loss {loss:.3f})"
        names = [self.run.describe(index) for index in step.examples]
        listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        return OpenELMError(
            f"The {what} at step {self.state.step + 1}, from {listed}. Nothing was saved since. "
            f"{self.run.checkpoints.advice()} A smaller --learning-rate, more --warmup or --max-grad-norm 1 may help."
            f"{_FROM_THE_START if self.state.step == 0 else ''}"
        )

    def _result(self, stopped: str) -> Result:
        state, seconds = self.state, self.state.seconds - self.first_seconds
        return Result(
            steps=state.step,
            total_steps=self.run.total_steps,
            stopped=stopped,
            train_loss=state.reported,
            val_loss=state.val_loss,
            val_step=None if state.val_loss is None else state.validated,
            best_step=state.best_step,
            best_val_loss=state.best_loss,
            trained_tokens=state.trained_tokens,
            seconds=state.seconds,
            tokens_per_second=self.tokens / seconds if seconds else None,
            peak_memory=mx.get_peak_memory() / 1e9,
        )
