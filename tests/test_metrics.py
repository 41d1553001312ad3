"""`metrics.jsonl`, which survives interruptions of a run, and the plot of the curves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError
from mlx_openelm.training.finetune import _end
from mlx_openelm.training.run import metrics
from mlx_openelm.training.run.metrics import Metrics

import pytest

pytestmark = pytest.mark.pictures


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self.closed = True


def test_each_step_is_written_at_once(tmp_path: Path) -> None:
    tracker = Recorder()
    with Metrics(tmp_path / "run", trackers=[tracker], plot=False) as log:
        log.log(1, {"train_loss": 2.5, "tokens": 512})
        assert lines(tmp_path / "run") == [{"step": 1, "train_loss": 2.5, "tokens": 512}]
        log.log(1, {"val_loss": 2.25})
        log.log(2, {"train_loss": 0.1 + 0.2})
        assert not tracker.closed
    assert lines(tmp_path / "run")[1:] == [{"step": 1, "val_loss": 2.25}, {"step": 2, "train_loss": 0.1 + 0.2}]
    expected = [(1, {"train_loss": 2.5, "tokens": 512}), (1, {"val_loss": 2.25}), (2, {"train_loss": 0.1 + 0.2})]
    assert tracker.rows == expected
    assert tracker.closed
    assert isinstance(lines(tmp_path / "run")[0]["tokens"], int)


def test_values_that_are_not_finite_are_null_so_the_file_stays_json(tmp_path: Path) -> None:
    tracker = Recorder()
    with Metrics(tmp_path, trackers=[tracker], plot=False) as log:
        log.log(1, {"train_loss": math.nan, "grad_norm": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "train_loss": None, "grad_norm": None}
    assert math.isnan(tracker.rows[0][1]["train_loss"])


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with Metrics(tmp_path, plot=False) as log:
            log.log(1, {"train_loss": loss})
    assert lines(tmp_path) == [{"step": 1, "train_loss": 2.0}]


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 3, "train', b'{"step": 3, "train_loss": 1.0}', b"\x00\x00\x00", b"[1]\n"]
)
def test_resuming_removes_later_lines(tail: bytes, tmp_path: Path) -> None:
    with Metrics(tmp_path, plot=False) as log:
        for step in range(1, 6):
            log.log(step, {"train_loss": float(step)})
        log.log(5, {"val_loss": 1.0})
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + tail)
    with Metrics(tmp_path, resume_step=3, plot=False) as log:
        whole = tail == b'{"step": 3, "train_loss": 1.0}'
        kept = [{"step": step, "train_loss": float(step)} for step in (1, 2, 3)] + ([json.loads(tail)] if whole else [])
        assert lines(tmp_path) == kept
        log.log(4, {"train_loss": -4.0})
    assert lines(tmp_path) == [*kept, {"step": 4, "train_loss": -4.0}]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_truncated_line_is_removed_even_if_no_later_lines_are(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a"')
    with Metrics(tmp_path, resume_step=9, plot=False) as log:
        log.log(10, {"a": 2})
    assert lines(tmp_path) == [{"step": 1, "a": 1}, {"step": 10, "a": 2}]


def test_an_intact_file_is_not_rewritten(tmp_path: Path) -> None:
    with Metrics(tmp_path, plot=False) as log:
        log.log(1, {"train_loss": 1 / 3})
    before = (tmp_path / "metrics.jsonl").stat()
    Metrics(tmp_path, resume_step=1, plot=False).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_resuming_without_a_file(tmp_path: Path) -> None:
    with Metrics(tmp_path, resume_step=3, plot=False) as log:
        log.log(4, {"train_loss": 1.0})
    assert lines(tmp_path) == [{"step": 4, "train_loss": 1.0}]


def test_kill_9_loses_no_line(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from mlx_openelm.training.run.metrics import Metrics\n"
        "log = Metrics(pathlib.Path(sys.argv[1]), plot=False)\n"
        "for step in range(1, 10**9):\n"
        "    log.log(step, {'train_loss': 1 / step})\n"
        "    if step == 50: print('there', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    Metrics(tmp_path, resume_step=10**9, plot=False).close()
    rows = lines(tmp_path)
    assert len(rows) >= 50
    assert rows == [{"step": step, "train_loss": 1 / step} for step in range(1, len(rows) + 1)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = Metrics(tmp_path, plot=False)
    with pytest.raises(OpenELMError, match="metrics.jsonl failed: No space left on device"):
        log.log(1, {"train_loss": 1.0})


# The plot.


def read_png(path: Path) -> Any:
    return pytest.importorskip("matplotlib.image").imread(path)


def test_the_plot_shows_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with Metrics(tmp_path) as log:
        for step in range(1, 41):
            log.log(step, {"train_loss": 3 - step / 20, "learning_rate": 1e-4 * step})
        log.log(20, {"val_loss": 2.5})
        log.log(40, {"val_loss": 2.75, "train_loss": math.nan})
    pixels = read_png(tmp_path / "losses.png")
    assert pixels.shape == (720, 960, 4)
    # matplotlib's first three colours: training and validation in the upper panel, the rate in the lower one.
    colours = {"C0": (31, 119, 180), "C1": (255, 127, 14), "C2": (44, 160, 44)}
    rows = {
        name: (abs(pixels[:, :, :3] * 255 - colour).max(axis=2) < 2).nonzero()[0] for name, colour in colours.items()
    }
    assert min(len(found) for found in rows.values()) > 100
    assert max(rows["C0"]) < min(rows["C2"]) and max(rows["C1"]) < min(rows["C2"])
    assert sorted(os.listdir(tmp_path)) == ["losses.png", "metrics.jsonl"]


def test_axes_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = {"train_loss": [(1, 3.0), (2, 2.0)], "val_loss": [(1, 2.5), (2, 2.75)], "learning_rate": [(1, 0.1)]}
    picture = metrics.figure(curves, "Fine-tuning tiny on a_$b$")
    assert picture.get_suptitle() == "Fine-tuning tiny on a_$b$"
    picture.draw_without_rendering()  # dollars are no mathematics
    losses, rates = picture.axes
    drawn = [list(zip(*line.get_data(), strict=True)) for line in losses.lines]
    assert drawn == [curves["train_loss"], curves["val_loss"], [(1, 2.5)]]
    assert [line.get_linestyle() for line in losses.lines] == ["-", "None", "None"]
    assert [line.get_marker() for line in losses.lines] == [".", "o", "*"]
    assert list(zip(*rates.lines[0].get_data(), strict=True)) == curves["learning_rate"]
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training", "validation", "lowest validation loss: 2.500 at step 1"]
    assert (losses.get_ylabel(), rates.get_ylabel(), rates.get_xlabel()) == (
        "loss (nats per token)",
        "learning rate",
        "step",
    )
    assert all(tick == round(tick) for tick in rates.get_xticks())
    assert metrics.figure({"train_loss": [], "val_loss": [], "learning_rate": []}).axes[0].get_legend() is None
    # A run that was stopped before its first validation: the untrained model is the best of nothing.
    stopped = metrics.figure({**curves, "val_loss": [(0, 11.7)]}).axes[0]
    assert [text.get_text() for text in stopped.get_legend().get_texts()] == ["training", "validation"]


@pytest.mark.parametrize(("first", "scale"), [(11.7, "log"), (3.9, "linear"), (0.0, "linear")])
def test_a_high_first_loss_does_not_flatten_the_others(first: float, scale: str) -> None:
    pytest.importorskip("matplotlib")
    curves = {"train_loss": [(10, 3.0), (20, 1.2), (30, 1.0)], "val_loss": [(0, first), (30, 1.1)], "learning_rate": []}
    picture = metrics.figure(curves)
    picture.draw_without_rendering()
    losses = picture.axes[0]
    assert losses.get_yscale() == scale and ("log scale" in losses.get_ylabel()) == (scale == "log")
    bottom, top = losses.get_ylim()
    if scale == "log":
        numbers = {t.get_text() for t in losses.get_yticklabels() if bottom <= t.get_position()[1] <= top}
        assert numbers == {"1", "2", "5", "10"}
        assert not any(text.get_text() for text in losses.get_yticklabels(minor=True))


def test_a_title_has_whole_parts_of_a_path() -> None:
    long = "…/OpenELM-270M-Instruct-4bit"
    names = {
        "tiny": "tiny",
        "lora/data": "lora/data",
        "work/tmp/stranger15/lora/data": "…/tmp/stranger15/lora/data",
        "mlx-community/OpenELM-270M-Instruct-4bit": long,
        f"/a{long[1:]}/": long,
    }
    assert {name: _end(name) for name in names} == names


def test_a_long_title_is_broken_between_words() -> None:
    pytest.importorskip("matplotlib")
    title = f"Fine-tuning {'long-name-' * 5} on {'other_name_' * 4} (LoRA, rank 8)"
    picture = metrics.figure({"train_loss": [(1, 1.0)], "val_loss": [], "learning_rate": []}, title)
    shown = picture.get_suptitle()
    assert shown.count("\n") == 1 and shown.replace("\n", " ") == title
    picture.draw_without_rendering()
    assert picture._suptitle.get_window_extent().width < picture.bbox.width


def test_a_resumed_plot_has_the_old_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr(metrics, "draw", lambda curves, path, title: drawn.append(curves))
    for resume_step, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with Metrics(tmp_path, resume_step=resume_step) as log:
            for step in steps:
                log.log(step, {"train_loss": step * (1.0 if resume_step is None else 10.0)})
    assert drawn[-1]["train_loss"] == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]


def test_plotting_does_not_block_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    begun, go_on, drawn = threading.Event(), threading.Event(), []

    def draw(curves: Mapping[str, Any], path: Path, title: str) -> None:
        drawn.append(len(curves["train_loss"]))
        begun.set()
        assert go_on.wait(10)

    monkeypatch.setattr(metrics, "draw", draw)
    now = [0.0]
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    log = Metrics(tmp_path)
    now[0] = 100.0
    for step in range(1, 101):
        log.log(step, {"train_loss": 1.0})
    assert begun.wait(10)
    assert drawn == [1]  # one at a time, with the values at its start
    go_on.set()
    log.close()
    assert drawn == [1, 100]


def test_plots_take_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take at most 1% of the time, and none of the first seconds."""
    pytest.importorskip("matplotlib")
    now, begun = [0.0], []

    def draw(curves: Mapping[str, Any], path: Path, title: str) -> None:
        begun.append(now[0])
        now[0] += 2

    monkeypatch.setattr(metrics, "draw", draw)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    log = Metrics(tmp_path)
    while now[0] < 500:
        now[0] += 0.5
        log.log(1, {"train_loss": 1.0})
        for thread in threading.enumerate():
            if thread.name == "metrics picture":
                thread.join()
    assert begun == [10.0, 212.0, 414.0]
    log.close()
    assert len(begun) == 4


def test_a_plot_that_fails_is_only_reported_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")

    def draw(curves: Mapping[str, Any], path: Path, title: str) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr(metrics, "draw", draw)
    log = Metrics(tmp_path)
    log.log(1, {"train_loss": 1.0})
    with pytest.warns(UserWarning, match="Could not plot the losses: no fonts"):
        log.close()


def test_without_matplotlib_one_line_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = metrics.importlib.util.find_spec
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.warns(UserWarning, match=r"pip install '\.\[plots\]'") as caught:
        log = Metrics(tmp_path)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.log(1, {"train_loss": 1.0})
        log.close()
        Metrics(tmp_path, plot=False).close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_logging_without_plots_imports_neither_matplotlib_nor_numpy(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from mlx_openelm.training.run.metrics import Metrics\n"
        "log = Metrics(pathlib.Path(sys.argv[1]))\n"
        "log.log(1, {'train_loss': 1.0})\n"
        "assert not {'matplotlib', 'wandb', 'tensorboardX', 'yaml'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path)], check=True)
