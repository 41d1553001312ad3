"""Damaged and hostile files: each is soon refused in one clean line, or read as by another program."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import KINDS, write_good
from processes import environment

TESTS = Path(__file__).parent
# Seconds until a worker counts as hung; a case that answers is a fault from 4 seconds on.
PATIENCE = 20.0


class Worker:
    """A process that reads mutants; restarted when one kills it."""

    def __init__(self, good: Path, scratch: Path):
        self._arguments = [sys.executable, str(TESTS / "fuzz_worker.py"), str(good), str(scratch)]
        self._errors = scratch / "stderr"
        scratch.mkdir(parents=True)
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        with self._errors.open("a") as errors:
            process = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment(TESTS),
            )  # fmt: skip
        assert process.stdout is not None
        if not (line := process.stdout.readline()):
            raise AssertionError(f"the worker does not start: {self._errors.read_text()[-2000:]}")
        assert json.loads(line) == {"ready": True}
        return process

    def judge(self, kind: str, seed: int) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{kind} {seed}\n")
        process.stdin.flush()
        answers, _, _ = select.select([process.stdout], [], [], PATIENCE)
        line = process.stdout.readline() if answers else ""
        if line:
            answer = json.loads(line)
            if answer["outcome"] == "fault":  # its peak memory would hide that of the next case
                self.stop()
            return answer
        self.stop()
        reason = f"died ({process.returncode})" if answers else "hangs"
        return {"kind": kind, "seed": seed, "outcome": "fault", "reason": reason}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    folder = tmp_path_factory.mktemp("fuzz")
    write_good(folder / "good")
    started = Worker(folder / "good", folder / "scratch")
    yield started
    started.stop()


def check(worker: Worker, kind: str, seeds: range) -> None:
    answers = [worker.judge(kind, seed) for seed in seeds]
    faults = [answer for answer in answers if answer["outcome"] == "fault"]
    assert not faults, "\n".join(json.dumps(fault) for fault in faults[:20])
    # Mutants that are all refused, or all read, do not test a kind.
    if len(answers) > 100:
        assert {answer["outcome"] for answer in answers} == {"right", "refused"}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(worker: Worker, kind: str) -> None:
    check(worker, kind, range(4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files(worker: Worker, kind: str) -> None:
    check(worker, kind, range(4, 315))
