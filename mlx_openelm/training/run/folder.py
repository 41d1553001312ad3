"""The folder of a run: its record (`run.json`), whether it may be used, and the files written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from ... import inputs
from ...errors import OpenELMError, RequestError
from ...formats import adapter, atomic
from ...version import __version__
from ...wording import flag
from ..options import TrainOptions
from . import metrics, trackers

RUN, CHECKPOINTS = "run.json", "checkpoints"
_LOCK = ".lock"
# The files of a run beside its checkpoints. --overwrite removes these and nothing else.
_FILES = (
    RUN,
    metrics.FILE,
    metrics.PICTURE,
    *adapter.FILES,
    "wandb-run.txt",
)

# Options that may differ when a run is continued. These do not change what is trained...
_FREE = (
    "data",  # only the path: the content is compared
    "num_workers",
    "token_cache",
    "skip_damaged",
    "train",
    "test",
    "test_batches",
    "iters",
    "epochs",
    "recompute",
    "grad_checkpoint",
    "steps_per_report",
    "steps_per_eval",
    "eval_tasks",
    "eval_tasks_every",
    "eval_tasks_data",
    "eval_tasks_limit",
    "early_stop",
    "save_every",
    "keep_last",
    "keep_every",
    "average_last",
    "report_to",
    "project_name",
    "adapter_path",
    "output",
    "adapter_format",
    "resume",
    "resume_adapter_file",
    "sample_prompts",
    "sample_tokens",
)
# ...and these do. They may be changed on purpose, to get past a loss that was not finite; a warning is printed.
_CHANGEABLE = (
    "learning_rate",
    "lr_schedule",
    "min_learning_rate",
    "decay_steps",
    "warmup",
    "warmup_init",
    "max_grad_norm",
    "weight_decay",
    "skip_spikes",
    "spike_window",
)


def check_folder(path: Path, *, resume: bool, overwrite: bool, folder_flag: str = "--adapter-path") -> None:
    """Refuse a folder that already holds a run, or with `resume` one that does not.

    Args:
        folder_flag: the flag that names the folder.

    Raises:
        RequestError: it says what to do.
    """
    if path.exists() and not path.is_dir():
        raise RequestError(f"{folder_flag} {path} is a file, not a folder.")
    atomic.check_parents(path)
    if resume and overwrite:
        raise RequestError("--resume continues a run and --overwrite removes it; give one of them.")
    if resume and not (path / RUN).is_file():
        raise RequestError(f"There is no run in {path} to --resume; start one without it.")
    if not resume and not overwrite and holds_run(path):
        raise RequestError(
            f"{path} holds {_describe_content(path)}replace it with --overwrite, or choose another {folder_flag}."
        )


def _describe_content(path: Path) -> str:
    """The run or adapter in a folder, and how to continue it if that is possible."""
    if (path / RUN).exists():
        try:
            read_run(path)
        except RequestError:
            return f"a run whose {RUN} is damaged; "
        return "a run already; continue it with --resume, "
    return "an adapter already; " if (path / adapter.CONFIG).exists() else f"parts of a run without {RUN}; "


def holds_run(path: Path) -> bool:
    """Whether a folder has any file of a run, or an adapter."""
    return any((path / name).exists() for name in (*_FILES, CHECKPOINTS))


def read_run(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The record of the run in a folder, as `make_record` made it.

    Args:
        kind: the command that must have made the run; None for any.

    Raises:
        RequestError: there is none, its `run.json` cannot be read, or another command made it.
    """
    if not (path / RUN).exists():
        raise RequestError(f"There is no run in {path} to --resume; start one without it.")
    other = ""
    with contextlib.suppress(RequestError, KeyError):
        record = inputs.read_json(path / RUN)
        if isinstance(record["options"], dict) and isinstance(record["data"], dict) and "model" in record:
            found = record.get("kind", "lora")
            if kind in (None, found):
                return record
            other = f"The run in {path} is one of `mlx-openelm {found}`; continue it with that command."
    raise RequestError(
        other or f"{path / RUN} is damaged, so the run cannot be continued; start a new one with --overwrite."
    )


def make_record(
    model: Any,
    options: TrainOptions,
    *,
    kind: str = "lora",
    loading: Mapping[str, Any],
    data: Mapping[str, Any],
    processes: int,
    recompute: str,
) -> dict[str, Any]:
    """The content of `run.json`: all that is needed to repeat a run.

    Args:
        model: its name, or for a new model its sizes.
        kind: the command that makes the run.
        loading: how the model was loaded: dtype, tokenizer and so on.
        data: the fingerprint of the data, and the number of examples of each split.
        recompute: what the backward pass recomputes, as the plan chose it.
    """
    return {
        "kind": kind,
        "model": model,
        "loading": dict(loading),
        "options": dataclasses.asdict(options) | {"resume": False},
        "data": dict(data),
        "processes": processes,
        "recompute": recompute,
        "command": _command(),
        "versions": {"mlx_openelm": __version__, "mlx": version("mlx"), "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "device": str(mx.default_device())},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed": [],
    }


def _command() -> list[str]:
    program = Path(sys.argv[0]).name
    return ["mlx-openelm" if program == "__main__.py" else program, *sys.argv[1:]]


def compare(
    model: Any,
    options: TrainOptions,
    loading: Mapping[str, Any],
    before: Mapping[str, Any],
    file: Path = Path(RUN),
    *,
    folder_flag: str = "--adapter-path",
) -> list[str]:
    """The permitted differences between a continued run and its record, a line each.

    Args:
        before: the record, which is in `file`.
        folder_flag: the flag that names the run's folder.

    Raises:
        RequestError: it would not be the same run; the message names the flag that differs.
    """
    refuse_change = partial(_refuse_change, file=file, folder_flag=folder_flag)
    refuse_change("--model", model, before["model"])
    for name, value in loading.items():
        refuse_change(flag(name), value, before.get("loading", {}).get(name))
    changes = []
    now, then = json.loads(json.dumps(dataclasses.asdict(options))), before["options"]
    for name, value in now.items():
        if name in _FREE or name not in then or value == then[name]:
            continue
        if name not in _CHANGEABLE:
            refuse_change(flag(name), value, then[name])
        changes.append(f"{flag(name)} is {_show(value)}, {_show(then[name])} in {file}")
    if now["lr_schedule"] != "constant" and _length(now) != _length(then):
        changes.append("The run has another length, over which the learning rate falls")
    return changes


def continue_record(record: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Give the record of a continued run its original start, and the list of times it was resumed.

    Raises:
        RequestError: the data is not the same, or what a method records.
    """
    for name, value in record.get("method", {}).items():
        _refuse_change(name, value, before.get("method", {}).get(name, value), file=Path(RUN))
    if record["data"]["fingerprint"] != before["data"].get("fingerprint"):
        raise RequestError(
            "The data is not what this run learned from before, or is read in another way; --resume needs the same. "
            "To learn from other data, start a new run with --resume-adapter-file."
        )
    resumed = {"at": record["started"], "command": record["command"]}
    record["resumed"] = [*before.get("resumed", ()), resumed]
    record["started"], record["command"] = before.get("started"), before.get("command")
    if "resume_adapter_file" in record["options"]:
        record["options"]["resume_adapter_file"] = before["options"].get("resume_adapter_file")


def _length(options: Mapping[str, Any]) -> tuple[Any, Any]:
    return options.get("iters") if options.get("epochs") is None else None, options.get("epochs")


def _refuse_change(name: str, value: Any, old: Any, *, file: Path, folder_flag: str = "--adapter-path") -> None:
    if value != old:
        raise RequestError(
            f"The run to --resume has {name} {_show(old)}, not {_show(value)} (see {file}); give the same value, or "
            f"start a new run in another {folder_flag}."
        )


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, dict):  # a source of text
        return str(value.get("path", value))
    return " ".join(map(_show, value)) or "unset" if isinstance(value, list | tuple) else str(value)


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write `run.json`; it appears complete or not at all."""
    with atomic.new_file(path / RUN) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def remove_run(path: Path) -> None:
    """Remove a run's files except its checkpoints; other files in the folder stay."""
    for file in (*(path / name for name in _FILES), *trackers.event_files(path)):
        file.unlink(missing_ok=True)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Put files into a folder so that each appears complete, the configuration last.

    Args:
        write: writes the files into a temporary folder.

    Raises:
        OpenELMError: the disk is full, or writing failed otherwise; existing files stay.
    """
    try:
        for leftover in path.glob(".writing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as partial:
            write(Path(partial))
            for file in sorted(Path(partial).iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
                os.replace(file, path / file.name)
    except OSError as error:
        raise OpenELMError(f"Writing into {path} failed: {error.strerror or error}.") from None


@contextlib.contextmanager
def locked(path: Path, folder_flag: str = "--adapter-path") -> Iterator[None]:
    """Lock the folder for this process. The lock ends with the process, however that ends.

    Args:
        folder_flag: the flag that names the folder.

    Raises:
        RequestError: another process trains into it, or it cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = (path / _LOCK).open("w")
    except OSError as error:
        raise RequestError(f"{folder_flag} {path} cannot be written to: {error.strerror}.") from None
    with file:
        _lock(file, path, folder_flag)
        yield


def _lock(file: Any, path: Path, folder_flag: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RequestError(
            f"Another process is training into {path}; wait for it, or choose another {folder_flag}."
        ) from None
    except OSError:  # a file system without locks
        pass
