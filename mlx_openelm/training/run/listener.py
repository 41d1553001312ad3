"""Callbacks that report the progress of a run, to the command's display or to another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Listener:
    """The callbacks; they do nothing by default. Losses are in nats per learned token, memory in GB (1e9 bytes)."""

    def started(self, step: int, total_steps: int) -> None:
        """Training begins after `step` updates, 0 for a new run."""

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """An update is done."""

    def reported(self, step: int, values: Mapping[str, Any]) -> None:
        """The values that are logged: train_loss, learning_rate, tokens_per_second, peak_memory and more."""

    def working(self, what: str, done: int, total: int) -> None:
        """Progress of work other than updates, such as a validation."""

    def validated(self, step: int, values: Mapping[str, Any]) -> None:
        """The values that are logged: val_loss, val_seconds."""

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        """The scores of `--eval-tasks` that are logged, by task and metric: openbookqa_acc."""

    def saved(self, step: int, path: Path) -> None:
        """A checkpoint is complete."""

    def say(self, line: str) -> None:
        """A line of information for the user."""

    def warn(self, line: str) -> None:
        """A warning for the user, one line."""

    def close(self) -> None:
        """Training is over, or the user asked to stop."""
