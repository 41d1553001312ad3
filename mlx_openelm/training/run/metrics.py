"""What a run measures: a line of JSON a step in `metrics.jsonl`, and a picture of the curves."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ...errors import OpenELMError
from ...formats import atomic
from .trackers import Tracker

FILE, PICTURE = "metrics.jsonl", "losses.png"
# What the picture shows of the values that are logged.
TRAIN_LOSS, VALID_LOSS, LEARNING_RATE = "train_loss", "val_loss", "learning_rate"

# The picture is drawn no more often than this, and at most this share of the time goes into it.
_PAUSE_SECONDS = 10.0
_SHARE = 0.01

Points = list[tuple[int, float]]


class Metrics:
    """Writes down what a run measures; a context manager, which closes.

    Args:
        folder: where `metrics.jsonl` and `losses.png` go.
        resume_step: the last step that counts of a run that is continued: what was written after it is removed, and
            so is a line that a killed process left cut. None for a new run, which starts a new file.
        validated: the last step whose validation counts, where a later one, broken off, will be done again.
        trackers: where numbers go as well; they are closed with this.
        plot: keep the picture up to date, where matplotlib is installed.

    Raises:
        OpenELMError: the disk is full, or writing failed otherwise; `log` raises it, too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        validated: int | None = None,
        trackers: Sequence[Tracker] = (),
        plot: bool = True,
    ):
        self._path = folder / FILE
        self._trackers = trackers
        rows = [] if resume_step is None else _keep_until(self._path, resume_step, validated)
        self._curves: dict[str, Points] = {TRAIN_LOSS: [], VALID_LOSS: [], LEARNING_RATE: []}
        for row in rows:
            self._remember(row["step"], row)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is written at once and whole, and a kill later cannot take it back.
            self._file = self._path.open("wb" if resume_step is None else "ab", buffering=0)
        except OSError as error:
            raise _failed(self._path, error) from None
        if plot and importlib.util.find_spec("matplotlib") is None:
            warnings.warn(
                "Without matplotlib there is no picture of the losses: pip install 'mlx-openelm[plots]'.", stacklevel=2
            )
            plot = False
        self._picture = _Picture(folder / PICTURE) if plot else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, of which there may be several lines; None stands for what is not finite.

        The picture shows `train_loss`, `val_loss` and `learning_rate`.
        """
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        written = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self._file.write(json.dumps({"step": step} | written).encode() + b"\n")
        except OSError as error:
            raise _failed(self._path, error) from None
        self._remember(step, written)
        for tracker in self._trackers:
            tracker.log(step, numbers)
        if self._picture is not None:
            self._picture.refresh(self._curves)

    def close(self) -> None:
        """Draw the picture as it is in the end, and close the trackers."""
        self._file.close()
        if self._picture is not None:
            self._picture.finish(self._curves)
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remember(self, step: int, values: Mapping[str, Any]) -> None:
        for name, curve in self._curves.items():
            if values.get(name) is not None:
                curve.append((step, values[name]))


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`: `step` and the values, null for what was not finite."""
    return [row for line in path.read_bytes().splitlines() if (row := _row(line)) is not None]


def _keep_until(path: Path, last_step: int, validated: int | None) -> list[dict[str, Any]]:
    """The rows of `path` up to that step, of validations up to `validated`, which are all that is left in it."""
    last_validation = last_step if validated is None else validated
    try:
        before = path.read_bytes()
        rows = [row for row in read(path) if row["step"] <= (last_validation if VALID_LOSS in row else last_step)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _failed(path, error) from None
    kept = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    if kept != before:
        with atomic.new_file(path) as file:
            file.write_bytes(kept)
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _failed(path: Path, error: OSError) -> OpenELMError:
    return OpenELMError(f"Writing {path} failed: {error.strerror}; the last checkpoint is there, for --resume.")


class _Picture:
    """Draws curves into a PNG, beside the training and so seldom that it costs next to none of its time."""

    def __init__(self, path: Path):
        self._path = path
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + _PAUSE_SECONDS

    def refresh(self, curves: Mapping[str, Points]) -> None:
        """Begin a new picture if it is time for one; returns at once."""
        if time.monotonic() < self._next:
            return
        self._next = math.inf  # until this one is done
        copy = {name: list(points) for name, points in curves.items()}
        self._thread = threading.Thread(target=self._draw_beside, args=(copy,), name="metrics picture", daemon=True)
        self._thread.start()

    def finish(self, curves: Mapping[str, Points]) -> None:
        """Draw the last picture, now."""
        if self._thread is not None:
            self._thread.join()
        if any(curves.values()):
            self._try(curves)

    def _draw_beside(self, curves: Mapping[str, Points]) -> None:
        started = time.monotonic()
        self._try(curves)
        now = time.monotonic()
        self._next = now + max(_PAUSE_SECONDS, (now - started) / _SHARE)

    def _try(self, curves: Mapping[str, Points]) -> None:
        try:
            draw(curves, self._path)
        except Exception as error:  # whatever matplotlib has: a run is worth more than its picture
            warnings.warn(f"The picture of the losses could not be drawn: {error}", stacklevel=2)


def draw(curves: Mapping[str, Points], path: Path) -> None:
    """Draw losses above and the learning rate below, over steps, into a PNG that appears complete."""
    with atomic.new_file(path) as file:
        figure(curves).savefig(file, format="png", dpi=120)


def figure(curves: Mapping[str, Points]) -> Any:
    """The matplotlib figure of the curves, made without pyplot, whose global state is for one thread."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, label, style in ((TRAIN_LOSS, "training", "-"), (VALID_LOSS, "validation", "o-")):
        if curves[name]:
            losses.plot(*zip(*curves[name], strict=True), style, label=label, markersize=4, linewidth=1.2)
    if curves[VALID_LOSS]:
        step, best = min(curves[VALID_LOSS], key=lambda point: point[1])
        losses.axhline(best, color="C1", linewidth=0.8, linestyle=":", label=f"best: {best:.4g} at step {step}")
    if curves[LEARNING_RATE]:
        rates.plot(*zip(*curves[LEARNING_RATE], strict=True), color="C2", linewidth=1.2)
    losses.set(ylabel="loss (nats a token)")
    rates.set(xlabel="step", ylabel="learning rate")
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    if losses.get_legend_handles_labels()[0]:
        losses.legend()
    return picture
