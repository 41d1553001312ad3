"""The line about compiled kernels: once, on CUDA alone, and only for work that takes long the first time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from mlx_openelm import backend, compiling

import pytest


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What is said, in a process that has done nothing yet, on a GPU that has little patience."""
    monkeypatch.setattr(compiling, "_begun", set())
    monkeypatch.setattr(compiling, "_said", threading.Event())
    monkeypatch.setattr(compiling, "PATIENCE", 0.05)
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    return []


def work(name: str, seconds: float, say: Callable[[str], None]) -> None:
    with compiling.notice(name, say):
        time.sleep(seconds)


def test_long_first_work_is_told_once(said):
    work("Validating", 0.3, said.append)
    work("Training", 0.3, said.append)
    assert said == [compiling.LINE]


def test_quick_work_and_later_work_is_not_told(said):
    work("Training", 0.0, said.append)
    work("Training", 0.3, said.append)
    assert said == []
    work("Testing", 0.3, said.append)
    assert said == [compiling.LINE]


def test_nothing_is_told_elsewhere(said, monkeypatch):
    monkeypatch.setattr(backend, "on_cuda", lambda: False)
    work("Training", 0.3, said.append)
    assert said == []


def test_work_that_fails_ends_the_wait(said):
    with pytest.raises(ZeroDivisionError), compiling.notice("Training", said.append):
        print(1 / 0)
    time.sleep(0.3)
    assert said == []
