"""What commands and functions show: lines on standard error, JSON, progress bars."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self

from .wording import size

# Work that takes less than this shows no progress, in seconds.
QUIET_SECONDS = 1.0
# Seconds between two lines of progress, if there is no terminal.
_LINE_SECONDS = 5.0
# What the stages of a job count, where it is not evident.
_UNITS = {
    "Writing": "bytes",
    "Reading the text": "batches",
    "Reading the held-out text": "batches",
    "Measuring sensitivities": "matrices",
    "Quantizing": "matrices",
    "Distilling": "steps",
    "Comparing": "choices",
}


def say(line: str) -> None:
    """Print a line on standard error, where everything but the result goes."""
    print(line, file=sys.stderr, flush=True)


def print_json(values: Any) -> None:
    """One JSON object on one line of standard output; NaN and infinity, which JSON does not have, become null.

    If the stream cannot encode the text, characters beyond ASCII are escaped, so that none is lost.
    """
    values = _finite(values)
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(values, allow_nan=False)
    print(text)


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, in nested dictionaries and lists too."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """Progress of work that takes over a second: call it with what is done and the total.

    On a terminal it is a bar that disappears at the end; elsewhere, with `lines`, a plain line every few seconds.
    Use it in a `with` block, so that an error removes the bar.
    """

    def __init__(self, label: str, *, unit: str, lines: bool = True):
        self._label, self._unit, self._lines = label, unit, lines
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total:
            self.close()
        elif self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif not sys.stderr.isatty():
            if self._lines and now - self._last_line >= _LINE_SECONDS:
                self._last_line = now
                say(f"{self._label}: {self._amounts(done, total)}")
        elif self._expected_seconds(now, done, total) > QUIET_SECONDS:
            self._open(done, total)

    def _expected_seconds(self, now: float, done: int, total: int) -> float:
        spent = now - self._started
        return spent * total / done if done else spent

    def _amounts(self, done: int, total: int) -> str:
        if self._unit == "bytes":
            return f"{size(done)} of {size(total)}"
        return f"{done:,} of {total:,} {self._unit}"

    def _open(self, done: int, total: int) -> None:
        # rich costs a tenth of a second, so it is imported when there is something to show.
        from rich import progress
        from rich.console import Console

        is_bytes = self._unit == "bytes"
        counts = progress.DownloadColumn() if is_bytes else progress.MofNCompleteColumn()
        columns = (progress.TextColumn(self._label), progress.BarColumn(), counts, progress.TimeRemainingColumn())
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._label, total=total, completed=done)
        self._bar.start()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


class Stages:
    """One progress bar after another, each labelled with its stage."""

    def __init__(self) -> None:
        self._stage, self._bar = "", Progress("", unit="")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._bar.close()
            self._stage, self._bar = stage, Progress(stage, unit=_UNITS.get(stage, ""))
        self._bar(done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def writing(progress: Callable[[int, int], None] | bool | None) -> AbstractContextManager[Any]:
    """A function's argument `progress` as a callback or None: True shows a bar for the bytes written."""
    return Progress("Writing", unit=_UNITS["Writing"]) if progress is True else nullcontext(progress or None)


def stages(progress: Callable[[str, int, int], None] | bool | None) -> AbstractContextManager[Any]:
    """A function's argument `progress` as a callback for stages: True shows a bar for each."""
    return Stages() if progress is True else nullcontext(progress or (lambda *_: None))
