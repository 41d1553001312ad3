"""TensorBoard's event files, read back without TensorBoard, and what is sent to Weights & Biases."""

from __future__ import annotations

import math
import struct
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.training.run.metrics import Metrics
from mlx_openelm.training.run.trackers import check, make_trackers

import pytest


def events(folder: Path) -> list[Any]:
    """The records of an event file: length, its checksum, the message, its checksum."""
    event = pytest.importorskip("tensorboardX.proto.event_pb2").Event
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [(event.step, value.tag, value.simple_value) for event in events(folder) for value in event.summary.value]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    trackers = make_trackers("tensorboard", tmp_path, None, {})
    with Metrics(tmp_path, trackers=trackers, plot=False) as log:
        log.log(10, {"train_loss": 2.5, "learning_rate": 0.25})
        end = time.monotonic() + 20
        while len(scalars(tmp_path / "tensorboard")) < 2:  # soon, not only when closed
            assert time.monotonic() < end
            time.sleep(0.05)
        log.log(20, {"train_loss": math.nan, "tokens": 512})
    found = scalars(tmp_path / "tensorboard")
    assert found[:2] == [(10, "train_loss", 2.5), (10, "learning_rate", 0.25)]
    assert found[2][:2] == (20, "train_loss") and math.isnan(found[2][2])
    assert found[3] == (20, "tokens", 512.0)


def test_tensorboard_hides_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    (tracker,) = make_trackers("tensorboard", tmp_path, None, {}, resume_step=30)
    tracker.log(31, {"train_loss": 1.0})
    tracker.close()
    starts = [event.step for event in events(tmp_path / "tensorboard") if event.session_log.status == 1]
    assert starts == [31]


class FakeRun:
    def __init__(self, **settings: Any):
        self.settings, self.rows, self.finished = settings, [], False
        self.id = settings["id"] or "abc123"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.rows.append((step, dict(values)))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs started by a stand-in for the package."""
    made: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        made.append(FakeRun(**settings))
        return made[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return made


def test_weights_and_biases(tmp_path: Path, runs: list[FakeRun]) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    trackers = make_trackers("wandb", folder, "plays", {"rank": 8})
    with Metrics(folder, trackers=trackers, plot=False) as log:
        log.log(10, {"train_loss": 2.5, "grad_norm": math.inf})
    (run,) = runs
    assert run.settings == {
        "project": "plays",
        "name": "adapters",
        "dir": str(folder),
        "config": {"rank": 8},
        "id": None,
        "resume": None,
    }
    assert run.rows == [(10, {"train_loss": 2.5})]
    assert run.finished


def test_weights_and_biases_continues_the_same_run(tmp_path: Path, runs: list[FakeRun]) -> None:
    for resume_step in (None, 10, None):
        make_trackers("wandb", tmp_path, None, {}, resume_step)
    assert [(run.settings["id"], run.settings["resume"]) for run in runs] == [
        (None, None),
        ("abc123", "allow"),
        (None, None),
    ]
    assert runs[0].settings["project"] == "mlx-openelm"


def test_a_service_that_does_not_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**settings: Any) -> None:
        raise RuntimeError("not\nlogged in")

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(OpenELMError, match="did not start: not logged in. WANDB_MODE=offline"):
        make_trackers("wandb", tmp_path, None, {})


def install(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make exactly these of the trackers' packages importable, as stand-ins."""
    for name in ("tensorboardX", "tensorboard", "wandb", "torch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if name in packages else None)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorboardX", "wandb")
    assert check(None) == check("") == check(" , ") == ()
    assert check("wandb, TensorBoard,wandb") == ("wandb", "tensorboard")
    with pytest.raises(RequestError, match="report_to knows tensorboard and wandb, not 'swanlab'."):
        check("wandb,swanlab")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_reported_before_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "torch")
    with pytest.raises(RequestError, match=rf"report_to {name} needs .*pip install '\.\[trackers\]'"):
        check(name)


def test_pytorchs_writer_may_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "torch", "tensorboard")
    writers: list[str] = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, **_: writers.append(folder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    make_trackers("tensorboard", tmp_path, None, {})
    assert writers == [str(tmp_path / "tensorboard")]


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases creates a folder `wandb`, which Python would import."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if any((Path(folder) / "wandb" / "__init__.py").exists() for folder in sys.path):
        pytest.skip("Weights & Biases is installed")
    with pytest.raises(RequestError, match="needs Weights & Biases' package"):
        check("wandb")
