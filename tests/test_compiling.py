"""The announcement of compiled kernels: once, only on CUDA, and only if new ones appear during long work."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType

from mlx_openelm import backend

import pytest


class Machine:
    """A GPU and a fresh process; `announced` collects the lines."""

    def __init__(self, compiling: ModuleType, cache: Path):
        self.compiling = compiling
        self.cache = cache
        self.announced: list[str] = []

    def compile(self, kernels: int) -> None:
        for _ in range(kernels):
            file = self.cache / "a long name" / f"{len(list(self.cache.rglob('*')))}.ptx"
            file.parent.mkdir(exist_ok=True)
            file.touch()

    def quick_work(self, name: str, kernels: int = 0) -> None:
        """Work that ends long before `PATIENCE`."""
        self.compiling.PATIENCE = 60.0
        with self.compiling.notice(name, self.announced.append):
            self.compile(kernels)

    def long_work(self, name: str, kernels: int = 0, is_announced: bool = False) -> None:
        """Work that takes much longer than `PATIENCE`, or as long as it takes to be announced."""
        self.compiling.PATIENCE = 0.05
        end = time.monotonic() + (20.0 if is_announced else 0.3)
        with self.compiling.notice(name, self.announced.append):
            self.compile(kernels)
            while time.monotonic() < end and not (is_announced and self.announced):
                time.sleep(0.01)


@pytest.fixture
def machine(monkeypatch, tmp_path) -> Machine:
    # A fresh copy of the module, as in a process that has done nothing yet.
    spec = importlib.util.find_spec("mlx_openelm.cuda.compiling")
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path))
    return Machine(compiling, tmp_path)


def test_long_first_work_is_announced_once(machine):
    machine.long_work("Validating", kernels=2, is_announced=True)
    machine.long_work("Training", kernels=2)
    assert machine.announced == [machine.compiling.LINE]


def test_quick_work_and_later_work_are_not_announced(machine):
    machine.quick_work("Training", kernels=1)
    machine.long_work("Training", kernels=1)
    assert machine.announced == []
    machine.long_work("Testing", kernels=1, is_announced=True)
    assert machine.announced == [machine.compiling.LINE]


def test_long_work_without_new_kernels_is_not_announced(machine):
    machine.quick_work("Training", kernels=3)
    machine.long_work("Testing")
    assert machine.announced == []


def test_nothing_is_announced_on_other_devices(machine, monkeypatch):
    monkeypatch.setattr(backend, "on_cuda", lambda: False)
    machine.long_work("Training", kernels=1)
    assert machine.announced == []


def test_work_that_fails_ends_the_wait(machine):
    machine.compiling.PATIENCE = 0.05
    with pytest.raises(ZeroDivisionError), machine.compiling.notice("Training", machine.announced.append):
        print(1 / 0)
    machine.compile(1)
    time.sleep(0.3)
    assert machine.announced == []
