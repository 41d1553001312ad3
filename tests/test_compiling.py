"""The announcement of compiled kernels: once, only on CUDA, and only if new ones appear during long work."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

from mlx_openelm import backend

import pytest


class Machine:
    """A GPU, a short `PATIENCE`, and a fresh process; `announced` collects the lines."""

    def __init__(self, compiling: ModuleType, cache: Path):
        self.compiling = compiling
        self.cache = cache
        self.announced: list[str] = []

    def work(self, name: str, seconds: float = 0.3, kernels: int = 0) -> None:
        with self.compiling.notice(name, self.announced.append):
            for _ in range(kernels):
                file = self.cache / "a long name" / f"{len(list(self.cache.rglob('*')))}.ptx"
                file.parent.mkdir(exist_ok=True)
                file.touch()
            time.sleep(seconds)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    # A fresh copy of the module, as in a process that has done nothing yet.
    spec = importlib.util.find_spec("mlx_openelm.cuda.compiling")
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    compiling.PATIENCE = 0.05
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    return Machine(compiling, tmp_path)


def test_long_first_work_is_announced_once(machine):
    machine.work("Validating", kernels=2)
    machine.work("Training", kernels=2)
    assert machine.announced == [machine.compiling.LINE]


def test_quick_work_and_later_work_are_not_announced(machine):
    machine.work("Training", seconds=0.0, kernels=1)
    machine.work("Training", kernels=1)
    assert machine.announced == []
    machine.work("Testing", kernels=1)
    assert machine.announced == [machine.compiling.LINE]


def test_long_work_without_new_kernels_is_not_announced(machine):
    machine.work("Training", kernels=3, seconds=0.0)
    machine.work("Testing")
    assert machine.announced == []


def test_nothing_is_announced_on_other_devices(machine, monkeypatch):
    monkeypatch.setattr(backend, "on_cuda", lambda: False)
    machine.work("Training", kernels=1)
    assert machine.announced == []


def test_work_that_fails_ends_the_wait(machine):
    with pytest.raises(ZeroDivisionError), machine.compiling.notice("Training", machine.announced.append):
        print(1 / 0)
    time.sleep(0.1)
    machine.work("Testing", seconds=0.0, kernels=1)
    time.sleep(0.2)
    assert machine.announced == []
