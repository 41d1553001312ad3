"""The numbers of a run: lines of JSON in `metrics.jsonl`, and a plot of the curves."""

from __future__ import annotations

import importlib.util
import json
import math
import textwrap
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from ...errors import OpenELMError
from ...formats import atomic
from ...wording import install
from .trackers import Tracker

FILE, PICTURE = "metrics.jsonl", "losses.png"
# The logged values that the plot shows.
TRAIN_LOSS, VALID_LOSS, LEARNING_RATE = "train_loss", "val_loss", "learning_rate"
# Those of preference tuning and GRPO, which are drawn below the losses, by the label of their axis.
OTHERS = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "reward": "reward",
    "KL divergence": "kl",
    "tokens a completion": "completions/mean_length",
}
_CURVES = (
    *(TRAIN_LOSS, VALID_LOSS, LEARNING_RATE),
    *(prefix + name for name in OTHERS.values() for prefix in ("", "val_")),
)

# The plot is drawn at most this often, and takes at most this share of the time.
_PAUSE_SECONDS = 10.0
_SHARE = 0.01
# The losses have a logarithmic axis if the highest is this many times the lowest: on a linear one, the loss before
# training would leave no room for the differences between the later ones.
_LOG_RATIO = 4.0
# A title is broken into lines of at most this many characters.
_TITLE_WIDTH = 80
# Up to this many reports are drawn as points on the line: a line alone would not show a single one.
_FEW_REPORTS = 50

Points = list[tuple[int, float]]


class Metrics:
    """Records the numbers of a run; as a context manager it closes itself.

    Args:
        folder: where `metrics.jsonl` and `losses.png` go.
        title: of the plot.
        resume_step: the step from which a run is continued: later lines are removed, and so is an incomplete line that
            a killed process left. None for a new run, which starts a new file.
        validated: the step of the last complete validation; later validations are removed, as they will be repeated.
        trackers: further destinations of the numbers; they are closed together with this.
        plot: keep the plot up to date, if matplotlib is installed.

    Raises:
        OpenELMError: the disk is full, or writing failed otherwise; `log` raises it too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        title: str = "",
        resume_step: int | None = None,
        validated: int | None = None,
        trackers: Sequence[Tracker] = (),
        plot: bool = True,
    ):
        self._path = folder / FILE
        self._trackers = trackers
        rows = [] if resume_step is None else _keep_until(self._path, resume_step, validated)
        self._curves: dict[str, Points] = {name: [] for name in _CURVES}
        for row in rows:
            self._remember(row["step"], row)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is written at once and completely, so that a later kill does not lose it.
            self._file = self._path.open("wb" if resume_step is None else "ab", buffering=0)
        except OSError as error:
            raise _failed(self._path, error) from None
        if plot and importlib.util.find_spec("matplotlib") is None:
            warnings.warn(f"Without matplotlib there is no picture of the losses: {install('plots')}.", stacklevel=2)
            plot = False
        self._picture = _Picture(folder / PICTURE, title) if plot else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line with the values of a step; a value that is not finite is written as null.

        A step may have several lines. The plot shows `train_loss`, `val_loss`, `learning_rate`, of preference tuning
        accuracies and margins, and of GRPO rewards, divergence and lengths.
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
        """Draw the final plot, and close the trackers."""
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
    """The complete lines of a `metrics.jsonl`: `step` and the values, null for those that were not finite."""
    return [row for line in path.read_bytes().splitlines() if (row := _row(line)) is not None]


def _keep_until(path: Path, last_step: int, validated: int | None) -> list[dict[str, Any]]:
    """Cut the file after that step, validations after `validated`; returns the rows that are left."""
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
    """Draws curves into a PNG in a thread, so rarely that training is not slowed down."""

    def __init__(self, path: Path, title: str):
        self._path, self._title = path, title
        self._thread: threading.Thread | None = None
        self._next = time.monotonic() + _PAUSE_SECONDS

    def refresh(self, curves: Mapping[str, Points]) -> None:
        """Start drawing if it is time; returns at once."""
        if time.monotonic() < self._next:
            return
        self._next = math.inf  # until this one is done
        copy = {name: list(points) for name, points in curves.items()}
        self._thread = threading.Thread(target=self._draw_in_thread, args=(copy,), name="metrics picture", daemon=True)
        self._thread.start()

    def finish(self, curves: Mapping[str, Points]) -> None:
        """Draw the final picture, and wait for it."""
        if self._thread is not None:
            self._thread.join()
        if any(curves.values()):
            self._try(curves)

    def _draw_in_thread(self, curves: Mapping[str, Points]) -> None:
        started = time.monotonic()
        self._try(curves)
        now = time.monotonic()
        self._next = now + max(_PAUSE_SECONDS, (now - started) / _SHARE)

    def _try(self, curves: Mapping[str, Points]) -> None:
        try:
            draw(curves, self._path, self._title)
        except Exception as error:  # any error of matplotlib's: a plot must not stop a run
            warnings.warn(f"Could not plot the losses: {error}", stacklevel=2)


def draw(curves: Mapping[str, Points], path: Path, title: str = "") -> None:
    """Draw losses above and the learning rate below, over steps, into a PNG that appears complete or not at all."""
    with atomic.new_file(path) as file:
        figure(curves, title).savefig(file, format="png", dpi=120)


def figure(curves: Mapping[str, Points], title: str = "") -> Any:
    """The matplotlib figure of the curves, made without pyplot, whose global state is not thread-safe."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    picture = Figure(figsize=(8, 6), layout="constrained")
    picture.suptitle(textwrap.fill(title, _TITLE_WIDTH, break_on_hyphens=False), parse_math=False)
    shares = {label: name for label, name in OTHERS.items() if curves.get(name) or curves.get(f"val_{name}")}
    heights = (3, *([1.5] * len(shares)), 1)
    picture.set_size_inches(8, 2 * sum(heights) - 2)
    losses, *others, rates = picture.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    style = ".-" if len(curves[TRAIN_LOSS]) <= _FEW_REPORTS else "-"
    if curves[TRAIN_LOSS]:
        losses.plot(*zip(*curves[TRAIN_LOSS], strict=True), style, label="training", color="C0", linewidth=1.2)
    # Of rewards it is the reward again, with another sign.
    validations = [] if curves.get("val_reward") else curves[VALID_LOSS]
    if validations:
        # Points alone: a line would show values between validations, where nothing was measured.
        losses.plot(*zip(*validations, strict=True), "o", label="validation", color="C1", markersize=6)
        if any(step for step, _ in validations):  # not that of the untrained model alone
            step, loss = min(validations, key=lambda point: point[1])
            best = f"lowest validation loss: {loss:.3f} at step {step:,}"
            losses.plot(step, loss, "*", label=best, color="C3", markersize=15, zorder=3)
    if curves[LEARNING_RATE]:
        rates.plot(*zip(*curves[LEARNING_RATE], strict=True), style, color="C2", linewidth=1.2)
    for axes, (label, name) in zip(others, shares.items(), strict=True):
        if curves.get(name):
            axes.plot(*zip(*curves[name], strict=True), style, color="C0", linewidth=1.2)
        if curves.get(f"val_{name}"):
            axes.plot(*zip(*curves[f"val_{name}"], strict=True), "o", color="C1", markersize=6)
        axes.set(ylabel=label)
        if label == "accuracy":
            axes.set_ylim(-0.05, 1.05)
    unit = "loss" if shares else "loss (nats per token)"
    losses.set(ylabel=unit)
    shown = [loss for points in (curves[TRAIN_LOSS], validations) for _, loss in points]
    if shown and 0 < _LOG_RATIO * min(shown) <= max(shown):
        losses.set(yscale="log", ylabel=f"{unit}, log scale" if shares else "loss (nats per token, log scale)")
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        losses.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        losses.yaxis.set_minor_formatter(NullFormatter())
    rates.set(xlabel="step", ylabel="learning rate")
    rates.set_ylim(bottom=0)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True, steps=(1, 2, 5, 10)))
    rates.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    rates.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for axes in (losses, *others, rates):
        axes.grid(alpha=0.3)
    if losses.get_legend_handles_labels()[0]:
        losses.legend()
    return picture
