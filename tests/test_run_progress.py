"""The time left of a run, and the live line on a terminal."""

from __future__ import annotations

import io
import re
import time
from typing import Any

from mlx_openelm.training.run import progress
from mlx_openelm.training.run.progress import RunProgress, TimeLeft

import pytest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the clock shows."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_steps_since_the_start_without_the_first(clock: list[float]) -> None:
    left = TimeLeft(20, 100)
    shown = []
    for step, seconds in enumerate([60.0, 2.0, 2.0, 2.0, 2.0], 21):
        clock[0] += seconds
        left.stepped(step)
        shown.append(str(left))
    assert shown == ["", "", "", "2:32 left", "2:30 left"]  # 76 and 75 steps of 2 seconds
    for step in range(26, 101):
        clock[0] += 2.0
        left.stepped(step)
    assert str(left) == "0:00 left"


def test_the_time_left_follows_a_change_of_speed(clock: list[float]) -> None:
    left = TimeLeft(0, 10_000)
    for step in range(1, 201):
        clock[0] += 1.0 if step <= 100 else 3.0
        left.stepped(step)
    assert str(left).startswith("8:09:")  # 9,800 steps of 3 seconds are 8:10:00


def test_a_validation_counts_once_for_each_that_is_to_come(clock: list[float]) -> None:
    left = TimeLeft(0, 40)
    clock[0] += 30.0
    left.validated(0, 30.0)  # before training; its interval is not known yet
    for step in range(1, 11):
        clock[0] += 1.0
        left.stepped(step)
    assert str(left) == "0:30 left"
    clock[0] += 30.0
    left.validated(10, 30.0)
    assert str(left) == "2:00 left"  # 30 steps and 3 validations
    clock[0] += 1.0
    left.stepped(11)
    assert str(left) == "1:59 left"


class Bar:
    """What a terminal of some width shows of a run."""

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch):
        self.stream = io.StringIO()
        self.stream.isatty = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr(progress.sys, "stderr", self.stream)
        for name, value in {"COLUMNS": str(columns), "LINES": "24", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)

    def last(self, shown: Any) -> str:
        """The line as it is now."""
        self.stream.seek(0)
        self.stream.truncate()
        shown._bar.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.stream.getvalue()).strip("\r\n ")


def test_after_a_validation_the_line_shows_the_step_again(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Bar(80, monkeypatch)
    with RunProgress() as shown:
        shown.started(0, 150)
        shown.stepped(20, 3.25, 1000.0)
        assert "loss 3.250" in terminal.last(shown)
        shown.working("Validating", 9, 10)
        assert terminal.last(shown).endswith("Validating 9 of 10")
        shown.validated(20, {"val_loss": 3.0, "val_seconds": 1.0})
        assert "Validating" not in (line := terminal.last(shown)) and "loss 3.250" in line


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_there_is_a_bar_and_the_line_fits(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Bar(columns, monkeypatch)
    with RunProgress() as shown:
        shown.started(0, 10_000)
        for step in range(1, 6):
            shown.stepped(step, 13.25, 12_345.0)
        line = terminal.last(shown)
        assert "━" in line and "5/10,000" in line and "loss 13.250  0:0" in line and len(line) <= columns
        assert "\n" not in line and "…" not in line
        shown.working("Validating", 99, 100)
        assert "━" in (line := terminal.last(shown)) and line.endswith("Validating 99 of 100")
