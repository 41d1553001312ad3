"""benchmarks/engine.py on `tiny`: every part runs, and its bars can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Rows:
    """The rows of a command line, which runs in this process."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import engine

    def measured(*words: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["engine.py", "--size", "tiny", "--quick", "--json", *words])
        engine.main()
        found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        for row in found:
            assert set(row) == {"name", "ours", "other", "ratio", "bar", "pass"}
            assert row["ours"] > 0 and row["other"] > 0 and row["ratio"] == pytest.approx(row["ours"] / row["other"])
        return found

    return measured


def test_requests_that_begin_alike(rows: Rows) -> None:
    pytest.importorskip("mlx_lm")
    first, without, held = rows("--only", "prefixes")
    assert first["name"] == "first token (ms), 64 of 80 tokens shared, tiny" and first["ours"] == without["ours"]
    # The shared tokens once, against nine times 256 positions.
    assert held["pass"] and held["other"] / held["ours"] == pytest.approx(9 * 256 / (64 + 9 * 16), rel=0.01)


def test_what_parts_of_a_step_cost(rows: Rows) -> None:
    pytest.importorskip("llguidance")
    found = rows("--only", "extras,masks", "--steps", "2")
    assert [row["name"].split(",")[0] for row in found[:3]] == [
        "the top 10 log-probabilities", "4 adapters of rank 8", "one of rank 8",
    ]  # fmt: skip
    masks = found[3:]
    assert len(masks) == 3 and all(row["name"].startswith("mask and its application beside ") for row in masks)


def test_steps_beside_prompts(rows: Rows) -> None:
    found = rows("--only", "steps")
    assert len(found) == 9
    for kind in ("4 bits", "bfloat16", "float32"):
        bars = {row["name"]: row["bar"] for row in found if f", {kind}, tiny" in row["name"]}
        beside_prompt = None if kind == "float32" else 0.85
        assert bars == {
            f"a step of 8 rows beside a prompt (tokens/s), {kind}, tiny": beside_prompt,
            f"a step of 16 rows beside a prompt (tokens/s), {kind}, tiny": beside_prompt,
            f"a step of 16 rows beside 8 (tokens/s), {kind}, tiny": 1,
        }


@pytest.mark.slow  # six numbers of two programs, each in a process of its own
def test_batches_beside_mlx_lm(rows: Rows) -> None:
    pytest.importorskip("mlx_lm")
    found = rows("--only", "batches")
    bars = {row["name"]: row["bar"] for row in found if row["bar"] is not None}
    assert bars == {f"decoding (tokens/s), 16+8, {count} rows, tiny": 1.5 for count in (8, 16)}
    assert len(found) == 3 * 4


def test_bars_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import engine
    import engine_setup

    assert [engine_setup.at_least("", ours, 2.0, 1.5)["pass"] for ours in (2.9, 3.0)] == [False, True]
    assert [engine_setup.at_most("", ours, 2.0, 1.5)["pass"] for ours in (3.0, 3.1)] == [True, False]
    assert engine_setup.at_most("", 9.0, 1.0)["pass"]
    assert engine.as_text(engine_setup.at_least("x", 1.0, 2.0, 1.5)).endswith("ratio 0.5  (bar 1.5: FAIL)")


def test_an_unknown_part_is_named() -> None:
    command = [sys.executable, "engine.py", "--only", "masks,nothing"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 2 and "there is no part 'nothing'; there are batches, " in done.stderr
