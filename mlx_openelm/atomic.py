"""Folders that appear complete or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import OpenELMError, RequestError


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes when it does not.

    What killed processes left behind (`.NAME.partial-PID`) is removed.

    Raises:
        RequestError: `path` exists and `overwrite` is not asked for, or its parent cannot hold it.
        OpenELMError: the disk is full, or writing failed otherwise.
    """
    path = check_target(path, overwrite=overwrite)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        partial.mkdir()
    except OSError as error:
        raise RequestError(f"{path} cannot be made: {error.strerror}.") from None
    try:
        yield partial
        _replace(partial, path)
    except OSError as error:
        raise OpenELMError(f"Writing {path} failed: {error.strerror or error}; nothing was left there.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, *, overwrite: bool = False) -> Path:
    """Where `path` really lies; asked before long work too, so that it is not done in vain.

    Raises:
        RequestError: no path, a file, a folder that exists while `overwrite` is not asked for, or one that
            is no model's and so is never replaced.
    """
    if str(path) in ("", ".") or Path.cwd().is_relative_to(os.path.realpath(path.expanduser())):
        raise RequestError(f"{str(path)!r} is the folder you are in, or above it; name a new one with --mlx-path.")
    path = Path(os.path.realpath(path.expanduser()))
    if not path.exists():
        return path
    if not path.is_dir():
        raise RequestError(f"{path} is a file, not a folder.")
    if not overwrite:
        raise RequestError(f"{path} exists; choose another --mlx-path, or replace it with --overwrite.")
    entries = list(path.iterdir())
    if entries and (not (path / "config.json").is_file() or any(entry.is_dir() for entry in entries)):
        raise RequestError(f"{path} holds more than a model, so it is not overwritten; choose another --mlx-path.")
    return path


def _replace(partial: Path, path: Path) -> None:
    """Put `partial` in the place of `path`; what was there is kept until the new one is."""
    if not path.exists():
        partial.rename(path)
        return
    previous = path.parent / f".{path.name}.partial-{os.getpid()}-previous"
    path.rename(previous)
    try:
        partial.rename(path)
    except OSError:
        previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    # What was to be replaced goes only where it was: otherwise it is the only copy.
    pattern = re.compile(re.escape(f".{path.name}.partial-") + (r"(\d+)(-previous)?$" if path.exists() else r"(\d+)$"))
    for entry in path.parent.iterdir():
        match = pattern.match(entry.name)
        if match and not _is_running(int(match[1])):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
