"""Folders and files that appear complete or not at all: written beside their place, then renamed.

Beside it means in `.NAME.partial-PID`, with a number after it where one process writes to one place several times
at once. What is to be replaced waits as `.NAME.partial-PID-previous` while the new folder takes its place.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from ..errors import OpenELMError, RequestError, quote
from ..inputs import to_path

# What this process is writing now. Its pid alone would not tell: a dead process may have had the same one.
_live: set[Path] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, flag: str = "--mlx-path") -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes when it does not.

    What killed processes left behind is removed.

    Raises:
        RequestError: `path` exists and `overwrite` is not asked for, or its parent cannot hold it.
        OpenELMError: the disk is full, writing failed otherwise, or somebody else made `path` meanwhile.
    """
    path = check_target(path, overwrite=overwrite, flag=flag)
    with _partial_folder(path) as partial:
        yield partial
        _replace(partial, path, overwrite=overwrite, flag=flag)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes `path`'s place when the block ends well and vanishes when it does not.

    It lies in a folder beside it, which the next run removes if this one is killed.

    Raises:
        RequestError: its parent cannot hold it.
        OpenELMError: the disk is full, or writing failed otherwise.
    """
    with _partial_folder(path) as partial:
        yield partial / path.name
        os.replace(partial / path.name, path)


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which is gone after the block unless it was moved; leftovers of others are too."""
    parent = Path(os.path.realpath(path.parent))
    try:
        with _lock:
            parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(parent / path.name)
            stem = f".{path.name}.partial-{os.getpid()}"
            names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
            partial = next(parent / name for name in names if parent / name not in _live)
            partial.mkdir()
            _live.add(partial)
    except OSError as error:
        raise RequestError(f"{path} cannot be made: {error.strerror}.") from None
    try:
        yield partial
    except OSError as error:
        raise _failed(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with _lock:
            _live.discard(partial)


def _failed(path: Path, error: OSError) -> OpenELMError:
    # NumPy says how many bytes it could not write, and not why; there is one reason.
    reason = error.strerror or f"the disk is probably full ({error})"
    return OpenELMError(f"Writing {path} failed: {reason}; nothing was left there.")


def check_target(path: Path, *, overwrite: bool = False, flag: str = "--mlx-path") -> Path:
    """Where `path` really lies; asked before long work too, so that it is not done in vain.

    A folder that a killed process had moved away to replace it is put back first.

    Args:
        flag: what the command calls `path`, for its messages.

    Raises:
        RequestError: no path, a file, a folder that exists while `overwrite` is not asked for, or one that
            is no model's and so is never replaced.
    """
    if str(path) in ("", ".") or Path.cwd().is_relative_to(os.path.realpath(to_path(path))):
        raise RequestError(f"{quote(str(path))} is the folder you are in, or above it; name a new one with {flag}.")
    given, path = to_path(path), Path(os.path.realpath(to_path(path)))
    with _lock:  # or another thread's replacement would be seen half done
        _restore(path)
        if not path.exists():
            return path
        if not path.is_dir():
            raise RequestError(f"{given} is a file, not a folder.")
        if not overwrite:
            raise RequestError(f"{given} exists; choose another {flag}, or replace it with --overwrite.")
        entries = list(path.iterdir())
        if entries and (not (path / "config.json").is_file() or any(entry.is_dir() for entry in entries)):
            raise RequestError(f"{given} holds more than a model, so it is not overwritten; choose another {flag}.")
    return path


def keep_apart(target: Path, source: Path, what: str, flag: str = "--mlx-path") -> None:
    """Refuse to write to `target` if it is, or contains, a file or folder that is read.

    Args:
        source: what is read.
        what: how to call it, such as "the model to convert".
        flag: the flag that names another target.

    Raises:
        RequestError: it is, or contains it.
    """
    if source.resolve().is_relative_to(target):
        raise RequestError(f"{target} is {what}, or contains it; choose another {flag}.")


def _replace(partial: Path, path: Path, *, overwrite: bool, flag: str) -> None:
    """Put `partial` in the place of `path`; what was there is kept until the new one is."""
    previous = partial.with_name(f"{partial.name}-previous")
    with _lock:
        if not path.exists():
            partial.rename(path)
            return
        if not overwrite:
            raise OpenELMError(f"{path} was made by somebody else meanwhile, so it was kept; choose another {flag}.")
        path.rename(previous)
        try:
            partial.rename(path)
        except OSError:
            previous.rename(path)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def _restore(path: Path) -> None:
    """Put back what a process was about to replace when it was killed: it is the only copy."""
    with contextlib.suppress(OSError):  # no such parent, or another process was faster
        previous = [] if path.exists() else [entry for entry, is_previous in _leftovers(path) if is_previous]
        if previous:
            previous[0].rename(path)


def _remove_leftovers(path: Path) -> None:
    for entry, is_previous in _leftovers(path):
        # What was to be replaced goes only where it was: otherwise it is the only copy.
        if not is_previous or path.exists():
            shutil.rmtree(entry, ignore_errors=True)


def _leftovers(path: Path) -> list[tuple[Path, bool]]:
    """What processes that are gone left beside `path`, and whether it is what they were about to replace."""
    pattern = re.compile(re.escape(f".{path.name}.partial-") + r"(\d+)(?:-\d+)?(-previous)?")
    matches = [(entry, pattern.fullmatch(entry.name)) for entry in path.parent.iterdir()]
    return [(entry, bool(match[2])) for entry, match in matches if match and not _is_running(entry, int(match[1]))]


def _is_running(entry: Path, pid: int) -> bool:
    """Whether the process that made `entry` still works on it."""
    if pid == os.getpid():
        return entry.with_name(entry.name.removesuffix("-previous")) in _live
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
