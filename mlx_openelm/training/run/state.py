"""Checkpoints, from which a run continues exactly; each is complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import OpenELMError
from ...formats import atomic
from ...inputs import read_json

BEST = "best"
_STATE, _WEIGHTS, _OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
_VERSION = 1
_CHUNK = 1 << 20


@dataclass
class RunState:
    """The state of a run apart from its weights and its optimizer. Losses are means over learned tokens, in nats.

    Args:
        step: updates done; also the position in the data, whose order derives from seed and step.
        trained_tokens: learned tokens so far.
        seconds: time spent in updates so far.
        window_loss: the summed loss of the tokens learned since the last report; `window_tokens` is their number, and
            `window_metrics` has the sums of the objective's further metrics.
        reported: the loss last reported.
        validated: the step of the last validation, -1 before the first; `val_loss` is its loss.
        best_step: the step with the lowest validation loss, `best_loss`.
        stale: validations since the best one.
        stream: where a stream of training data continues, as its `state` gives it; None for data whose order derives
            from seed and step.
        recent: losses and gradient norms of the last steps, to recognize spikes by.
        skipped: the steps whose batch was skipped because of a spike; `skipped_in_row` counts the last ones.
    """

    step: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    window_loss: float = 0.0
    window_tokens: int = 0
    window_metrics: dict[str, float] = field(default_factory=dict)
    reported: float | None = None
    validated: int = -1
    val_loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    stream: dict[str, Any] | None = None
    recent: list[tuple[float, float]] = field(default_factory=list)
    skipped: int = 0
    skipped_in_row: int = 0


class Checkpoints:
    """The checkpoints of a run: `FOLDER/0000100` and so on, and `FOLDER/best`, a link to the best one.

    Args:
        keep_last: keep this many of the newest checkpoints.
        keep_every: also keep every N-th step's checkpoint; None keeps no others.
        keep_regular: also keep the last N checkpoints of the steps that are multiples of a number: (N, number).
        folder_flag: the flag that names the run's folder, for messages.
        export: writes further files into a checkpoint, so that it can be used directly.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        keep_regular: tuple[int, int] | None = None,
        folder_flag: str = "--adapter-path",
        export: Callable[[Path], None] | None = None,
    ):
        self.folder, self._keep_last, self._keep_every, self._export = folder, keep_last, keep_every, export
        self._keep_regular, self._folder_flag = keep_regular, folder_flag

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, whether it exists or not."""
        return self.folder / f"{step:07d}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order."""
        names = (entry.name for entry in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(int(name) for name in names if re.fullmatch(r"\d{7,}", name))

    def save(self, state: RunState, tensors: Mapping[str, mx.array]) -> Path:
        """Write a checkpoint; once it is complete, older ones that need not be kept are removed.

        Args:
            tensors: what `Updater.state` returns.

        Raises:
            OpenELMError: the disk is full, or writing failed otherwise; earlier checkpoints are unchanged.
        """
        path = self.path(state.step)
        if path.exists():  # it is damaged: the run would have continued from it otherwise
            shutil.rmtree(path)
        parts = {
            name: {key: tensors[key] for key in sorted(tensors) if key.startswith(prefix)}
            for name, prefix in ((_WEIGHTS, "weights."), (_OPTIMIZER, "optimizer."))
        }
        try:
            with atomic.new_folder(path, flag=self._folder_flag) as partial:
                sums = {name: _write(partial / name, part) for name, part in parts.items()}
                if self._export is not None:
                    self._export(partial)
                    others = (path for path in partial.iterdir() if path.name not in sums)
                    sums |= {path.name: _size_and_checksum(path) for path in others}
                record = {"version": _VERSION, "state": dataclasses.asdict(state), "files": sums}
                _write_text(partial / _STATE, json.dumps(record, indent=2) + "\n")
        except OpenELMError as error:
            raise OpenELMError(f"{error} {self.advice()}") from None
        self._prune(state)
        return path

    def load(self, warn: Callable[[str], None]) -> tuple[RunState, dict[str, mx.array]] | None:
        """The newest intact checkpoint, its tensors evaluated; None if there are no checkpoints.

        Args:
            warn: called with a line about each newer checkpoint that is damaged.

        Raises:
            OpenELMError: all checkpoints are damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            reason = _damage(self.path(step))
            if reason is None:
                state = RunState(**_read_record(self.path(step))["state"])
                return state, self.tensors(step)
            warn(f"The checkpoint {self.path(step)} is damaged: {reason}; the one before it is used.")
        if steps:
            raise OpenELMError(
                f"All checkpoints in {self.folder} are damaged; start a new run with --overwrite instead of --resume."
            )
        return None

    def weights(self, step: int) -> dict[str, mx.array]:
        """The weights alone of one checkpoint, by their names in `tensors`; errors as there."""
        return self._read(step, _WEIGHTS)

    def tensors(self, step: int) -> dict[str, mx.array]:
        """The weights and the optimizer's state of one checkpoint, as `Updater.restore` takes them.

        Raises:
            OpenELMError: it is missing or damaged.
        """
        return self._read(step, _WEIGHTS, _OPTIMIZER)

    def _read(self, step: int, *files: str) -> dict[str, mx.array]:
        path = self.path(step)
        if (reason := _damage(path)) is not None:
            raise OpenELMError(f"The checkpoint {path} is damaged: {reason}.")
        tensors: dict[str, mx.array] = {}
        for name in files:
            tensors.update(mx.load(str(path / name)))  # type: ignore[arg-type]
        mx.eval(tensors)  # MLX reads lazily, and the file may be removed
        return tensors

    def advice(self) -> str:
        """Which checkpoint is intact and how to continue, for errors that stop a run."""
        whole = [step for step in self.steps() if _damage(self.path(step)) is None]
        if not whole:
            return "No checkpoint was saved yet; --resume starts from the beginning."
        return f"The checkpoint of step {whole[-1]} is intact ({self.path(whole[-1])}); continue with --resume."

    def remove_all(self) -> None:
        """Remove all checkpoints and leftovers of killed processes, and no other files."""
        self.remove_leftovers()
        for step in self.steps():
            shutil.rmtree(self.path(step))
        if (self.folder / BEST).is_symlink():
            (self.folder / BEST).unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def remove_leftovers(self) -> None:
        """Remove unfinished checkpoints of killed processes; only while no other process writes here."""
        for entry in self.folder.glob(".*.partial-*"):
            shutil.rmtree(entry, ignore_errors=True)

    def _prune(self, state: RunState) -> None:
        done = [step for step in self.steps() if step <= state.step]
        kept = {state.best_step, *done[-self._keep_last :]}
        if self._keep_every is not None:
            kept |= {step for step in done if step % self._keep_every == 0}
        if self._keep_regular is not None:
            number, multiple = self._keep_regular
            kept |= {*[step for step in done if step % multiple == 0][-number:]}
        if state.best_step in done:
            self._link_best(self.path(state.best_step))
        for step in done:
            if step not in kept:
                # Rename it first: a process killed here must not leave half a checkpoint under the final name.
                going = self.folder / f".{step:07d}.partial-{os.getpid()}-going"
                self.path(step).rename(going)
                shutil.rmtree(going, ignore_errors=True)

    def _link_best(self, path: Path) -> None:
        link = self.folder / f".{BEST}.partial-{os.getpid()}"
        with contextlib.suppress(OSError):  # a file system without links; state.json has the best step as well
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self.folder / BEST)


def _write(path: Path, tensors: Mapping[str, mx.array]) -> dict[str, int]:
    """Write tensors; returns the file's size and checksum."""
    # Through a Python file, whose errors distinguish a full disk; MLX's own do not.
    with path.open("wb") as file:
        mx.save_safetensors(file, dict(tensors))  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    return _size_and_checksum(path)


def _size_and_checksum(path: Path) -> dict[str, int]:
    return {"bytes": path.stat().st_size, "crc32": _checksum(path)}


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is intact."""
    try:
        record = _read_record(path)
        if record["version"] != _VERSION:
            return f"{_STATE} has a version that this program does not know"
        RunState(**record["state"])
        for name in (_WEIGHTS, _OPTIMIZER, *record["files"]):
            expected, actual = record["files"][name], (path / name).stat().st_size
            if actual != expected["bytes"]:
                return f"{name} has {actual:,} bytes, not {expected['bytes']:,}"
            if _checksum(path / name) != expected["crc32"]:
                return f"the checksum of {name} is wrong"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{_STATE} cannot be read"
    return None


def _read_record(path: Path) -> dict:
    return read_json(path / _STATE)
