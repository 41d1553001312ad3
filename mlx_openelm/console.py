"""What commands and functions show: lines on standard error, JSON, lines that fit the terminal, progress bars."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Self, TextIO

from .messages import printable, say
from .wording import duration, size

__all__ = ["Progress", "print_json", "printable", "say"]

# Work that takes less than this shows no progress, in seconds.
QUIET_SECONDS = 1.0
# Seconds between two lines of progress, if there is no terminal.
_LINE_SECONDS = 5.0
# What the stages of a job count, where it is not evident.
_UNITS = {
    "Writing": "bytes",
    "Reading the corpus": "bytes",
    "Learning merges": "merges",
    "Reading the text": "batches",
    "Reading the held-out text": "batches",
    "Measuring sensitivities": "matrices",
    "Quantizing": "matrices",
    "Distilling": "steps",
    "Comparing": "choices",
}


def print_line(line: str) -> None:
    """Print a line of a result on standard output, with control characters escaped."""
    print(printable(line))


def print_json(values: Any) -> None:
    """One JSON object on one line of standard output; NaN and infinity, which JSON does not have, become null.

    If the stream cannot encode the text, characters beyond ASCII are escaped, so that none is lost.
    """
    values = _finite(values)
    text = printable(json.dumps(values, ensure_ascii=False, allow_nan=False))
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


def columns(stream: TextIO) -> int | None:
    """The width to print for: $COLUMNS, or that of the terminal; None if `stream` is not one."""
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):  # ValueError: closed, or no file at all
        return None


def wrap(text: str, width: int | None, indent: str = "") -> str:
    """Text in lines of at most `width`, broken between words only; all but the first begin with `indent`."""
    if width is None or len(text) <= width:
        return text
    import textwrap

    return textwrap.fill(
        text, max(width, len(indent) + 10), subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Labels and texts in two columns; on a terminal, long texts go on below their beginning.

    A text with a word that does not fit, such as a long path, begins below its label; it is broken after slashes.
    """
    rows = list(rows)
    label_width = max(len(label) for label, _ in rows)
    indent = " " * (label_width + 2)
    width = columns(sys.stdout)
    for label, text in rows:
        text = text.replace("pip install ", "pip\xa0install\xa0")
        if width is None or max(map(len, text.split(" "))) <= width - len(indent):
            lines = wrap(f"{label:{label_width}}  {text}".rstrip(), width, indent)
        else:
            words = " ".join(_parts(word, width - 2) for word in text.split(" "))
            lines = "\n".join(filter(None, (label, wrap(f"  {words}", width, "  "))))
        print_line(lines.replace("\xa0", " "))


def _parts(word: str, width: int) -> str:
    """A word with a space after slashes, where it has to be broken to fit; `wrap` breaks it there."""
    import re

    lines = [""]
    for part in re.findall("[^/]*/|[^/]+", word):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return " ".join(lines)


class Progress:
    """Progress of work that takes over a second: call it with what is done and the total.

    On a terminal it is a bar that disappears at the end; elsewhere, with `lines`, a plain line every few seconds.
    Use it in a `with` block, so that an error removes the bar.

    Args:
        lines_tell_time: whether lines say how much time is left, as the bar does.
    """

    def __init__(self, label: str, *, unit: str, lines: bool = True, lines_tell_time: bool = False):
        self._label, self._unit, self._lines, self._lines_tell_time = label, unit, lines, lines_tell_time
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
                say(f"{self._label}: {self._amounts(done, total)}{self._left(now, done, total)}")
        elif self._expected_seconds(now, done, total) > QUIET_SECONDS:
            self._open(done, total)

    def _expected_seconds(self, now: float, done: int, total: int) -> float:
        spent = now - self._started
        return spent * total / done if done else spent

    def _left(self, now: float, done: int, total: int) -> str:
        """The time left, where lines show it."""
        if not self._lines_tell_time or not done:
            return ""
        return f", about {duration(self._expected_seconds(now, done, total) - (now - self._started))} left"

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
    """One progress bar after another, each labelled with its stage.

    Args:
        unit: what all stages count; by default each its own.
    """

    def __init__(self, unit: str | None = None) -> None:
        self._stage, self._unit, self._bar = "", unit, Progress("", unit="")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._bar.close()
            unit = _UNITS.get(stage, "") if self._unit is None else self._unit
            self._stage, self._bar = stage, Progress(stage, unit=unit, lines_tell_time=self._unit is not None)
        self._bar(done, total)

    def say(self, line: str) -> None:
        """Print a line, in place of the bar."""
        self._bar.close()
        say(wrap(line, columns(sys.stderr)))

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
