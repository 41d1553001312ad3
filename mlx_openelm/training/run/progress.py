"""A training run on standard error: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import mlx.core as mx

from ... import console
from ...wording import size
from .listener import Listener

# The time left is estimated from an average of the seconds per step, in which the latest step has at least this weight.
_LATEST = 0.1
# It is shown once so many steps were measured.
_MEASURED = 3
# The bar's width, for terminals of at least so many columns.
_BAR_WIDTHS = {100: 20, 60: 10}


def fitted(line: str, stream: TextIO) -> str:
    """A line as it is printed to a stream: on a terminal it is broken between words, but not after a number."""
    joined = re.sub(r"(?<=\d) (?=\w)", "\xa0", line)  # which textwrap takes for a letter
    return console.wrap(joined, console.columns(stream), "  ").replace("\xa0", " ")


def preferred(values: Mapping[str, Any], prefix: str = "") -> str:
    """How often, and by how much, chosen answers win, to follow a loss; empty where that is not measured."""
    accuracy, margin = (values.get(f"{prefix}rewards/{name}") for name in ("accuracies", "margins"))
    parts = [
        "" if accuracy is None else f", accuracy {accuracy:.1%}",
        "" if margin is None else f", margin {margin:.3f}",
    ]
    return "".join(parts)


def measured(loss: float, values: Mapping[str, Any], prefix: str = "") -> str:
    """What a validation or a test measured: the loss; for rewards these, and the length of completions."""
    if f"{prefix}reward" not in values:
        return f"loss {loss:.3f}{preferred(values, prefix)}"
    return f"reward {values[f'{prefix}reward']:.3f}, {_length(values, prefix)}"


def _rewarded(values: Mapping[str, Any]) -> str:
    """Reward, divergence and length of completions, to follow a training loss; empty where there are no rewards."""
    if "completions/mean_length" not in values:
        return ""
    reward = f", reward {values['reward']:.3f}" if "reward" in values else ""
    divergence = f", KL {values['kl']:.3g}" if "kl" in values else ""
    return f"{reward}{divergence}, {_length(values)}"


def _length(values: Mapping[str, Any], prefix: str = "") -> str:
    return f"{values[f'{prefix}completions/mean_length']:.1f} tokens a completion"


class TimeLeft:
    """The time that a run still takes, estimated from the steps and validations since it was started or resumed."""

    def __init__(self, step: int, total_steps: int):
        self._total, self._step = total_steps, step
        self._began = time.monotonic()  # the current step
        self._pace, self._measured = 0.0, -1  # seconds per step; the first is slower, since it is traced and compiled
        self._validation = self._interval = 0.0  # seconds, steps
        self._validated = step

    def stepped(self, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        seconds, self._began, self._step = now - self._began, now, step
        self._measured += 1
        if self._measured > 0:
            self._pace += max(_LATEST, 1 / self._measured) * (seconds - self._pace)

    def validated(self, step: int, seconds: float) -> None:
        """A validation is done; its time is not the next step's."""
        self._began += seconds
        self._validation, self._interval, self._validated = seconds, step - self._validated, step

    def __str__(self) -> str:
        """As hours, minutes and seconds; empty if there is no estimate yet."""
        if self._measured < _MEASURED:
            return ""
        steps = self._total - self._step
        validations = (self._total - self._validated) // self._interval if self._interval else 0
        minutes, seconds = divmod(round(self._pace * steps + self._validation * validations), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


class RunProgress(Listener):
    """Shows a run: reports as lines, and below them, on a terminal, a bar with the latest step.

    Use it in a `with` block, so that an error removes the bar.
    """

    def __init__(self) -> None:
        self.began = False  # training, after loading and tokenizing
        self._total = 0
        self._left = TimeLeft(0, 0)
        self._facts = ""  # of the latest step
        self._bar: Any = None
        self._task: Any = None
        self._work: tuple[str, console.Progress] | None = None
        self._room = 0  # characters beside the bar
        self._live = sys.stderr.isatty()

    def started(self, step: int, total_steps: int) -> None:
        """Training begins: open the bar, on a terminal."""
        self.began = True
        self._end_work()
        self._total, self._left = total_steps, TimeLeft(step, total_steps)
        if self._live and step < total_steps:
            self._open(step)

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the latest step beside the bar."""
        self._left.stepped(step)
        memory = size(mx.get_peak_memory())
        facts = [f"loss {loss:.3f}", str(self._left), f"{tokens_per_second:,.0f} tokens/s", memory]
        facts = [fact for fact in facts if fact]
        while len(facts) > 1 and len("  ".join(facts)) > self._room:
            facts.pop()
        self._facts = "  ".join(facts)
        self._show(completed=step, facts=self._facts)

    def reported(self, step: int, values: Mapping[str, Any]) -> None:
        """Print the training loss and speed."""
        left = str(self._left)
        total = f" (CoreNet's total {values['total_loss']:.3f})" if "total_loss" in values else ""
        share = f" ({values['flops_utilization']:.0%} of the peak)" if "flops_utilization" in values else ""
        loss = f"train loss {values['train_loss']:.3f}{total}{preferred(values)}{_rewarded(values)}"
        self.say(
            f"Step {step:,} of {self._total:,}: {loss}, learning rate {values['learning_rate']:.3g}, "
            f"{values['tokens_per_second']:,.0f} tokens/s{share}, peak {size(values['peak_memory'] * 1e9)}"
            f"{left and f', {left}'}"
        )

    def working(self, what: str, done: int, total: int) -> None:
        """Show other work: beside the bar while training, else with a bar of its own."""
        if self._bar is not None:
            self._show(facts=f"{what} {done:,} of {total:,}")
            return
        if self._work is None or self._work[0] != what:
            self._end_work()
            self._work = what, console.Progress(what, unit="")
        self._work[1](done, total)

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        """Print the validation loss."""
        self._end_work()
        self._left.validated(step, values["val_seconds"])
        self._show(facts=self._facts)
        bits = f", {values['val_bits_per_byte']:.3f} bits per byte" if "val_bits_per_byte" in values else ""
        found, seconds = measured(values["val_loss"], values, "val_"), values["val_seconds"]
        self.say(f"Step {step:,}: validation {found}{bits}, {seconds:.1f} s")

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """Print the scores of tasks, without standard errors."""
        self._end_work()
        scores = (f"{name} {value:.4g}" for name, value in values.items() if "_stderr" not in name)
        self.say(f"Step {step:,}: {', '.join(scores)}")

    def saved(self, step: int, path: Path) -> None:
        """Print where a checkpoint is."""
        self.say(f"Step {step:,}: saved {path}")

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one; on a terminal it is broken between words."""
        bar = self._bar
        line = fitted(line, sys.stderr)
        if bar is None:
            console.say(line)
        else:
            bar.console.print(console.printable(line), markup=False, highlight=False, soft_wrap=True)

    def warn(self, line: str) -> None:
        """Print a warning, as `say` does."""
        self.say(f"warning: {line}")

    def close(self) -> None:
        """Remove the bars; what follows is printed as plain lines."""
        bar, self._bar, self._live = self._bar, None, False
        if bar is not None:
            bar.stop()
        self._end_work()

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, step: int) -> None:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        bar_width = next((width for columns, width in _BAR_WIDTHS.items() if console.width >= columns), 0)
        columns = [
            progress.TextColumn("{task.completed:,}/{task.total:,}"),
            *([progress.BarColumn(bar_width=bar_width)] if bar_width else []),
            progress.TextColumn("{task.fields[facts]}"),
        ]
        self._room = console.width - 2 * len(f"{self._total:,}") - bar_width - 3
        self._bar = progress.Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=self._total, completed=step, facts="")
        self._bar.start()

    def _show(self, **fields: Any) -> None:
        bar = self._bar  # another thread may close it meanwhile
        if bar is not None:
            bar.update(self._task, **fields)

    def _end_work(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work[1].close()
