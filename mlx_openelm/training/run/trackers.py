"""Experiment trackers for a run's numbers, behind one small interface (`--report-to tensorboard,wandb`)."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ...errors import OpenELMError
from ...formats import atomic
from ..options.trackers import check, tensorboard_module

_DEFAULT_PROJECT = "mlx-openelm"
# What each keeps in the run's folder.
_TENSORBOARD, _WANDB_ID = "tensorboard", "wandb-run.txt"
# How often TensorBoard's writer saves; by default a killed process would lose two minutes.
_FLUSH_SECONDS = 1


class Tracker(Protocol):
    """A destination of numbers beside `metrics.jsonl`."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def make_trackers(
    report_to: str | None,
    folder: Path,
    project_name: str | None,
    config: Mapping[str, Any],
    resume_step: int | None = None,
) -> list[Tracker]:
    """The trackers of a run.

    Args:
        folder: the run's; TensorBoard's events go into `tensorboard` in it.
        project_name: Weights & Biases' project; by default `mlx-openelm`.
        config: the settings to show with the numbers.
        resume_step: the step from which a run is continued, in the same curves.

    Raises:
        RequestError: an unknown name, or a package that is missing.
        OpenELMError: a service did not start.
    """
    trackers: list[Tracker] = []
    for name in check(report_to):
        if name == "tensorboard":
            trackers.append(_TensorBoard(folder / _TENSORBOARD, resume_step))
        else:
            trackers.append(_WeightsAndBiases(folder, project_name or _DEFAULT_PROJECT, config, resume_step))
    return trackers


def event_files(folder: Path) -> list[Path]:
    """TensorBoard's event files of a run's folder; it would show those of two runs as one curve."""
    return sorted((folder / _TENSORBOARD).glob("events.out.tfevents.*"))


class _TensorBoard:
    def __init__(self, folder: Path, resume_step: int | None):
        # Hides what the run wrote after that step before it stopped.
        purge = None if resume_step is None else resume_step + 1
        module = importlib.import_module(tensorboard_module() or "tensorboardX")
        self._writer = module.SummaryWriter(str(folder), purge_step=purge, flush_secs=_FLUSH_SECONDS)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, folder: Path, project: str, config: Mapping[str, Any], resume_step: int | None):
        import wandb

        # The run continues under its id. For repeated steps the service keeps the first numbers.
        file = folder / _WANDB_ID
        run_id = None
        if resume_step is not None:
            with contextlib.suppress(OSError):
                run_id = file.read_text(encoding="utf-8").strip() or None
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                id=run_id,
                resume=None if run_id is None else "allow",
            )
        except Exception as error:  # its errors have no common base class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OpenELMError(
                f"Weights & Biases did not start: {reason}. WANDB_MODE=offline keeps the numbers here."
            ) from None
        with atomic.new_file(file) as path:
            path.write_text(f"{self._run.id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._run.finish()
