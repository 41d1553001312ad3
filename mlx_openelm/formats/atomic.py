"""Folders and files that appear complete or not at all: written beside their place, then renamed.

The temporary name is `.NAME.partial-PID`, plus a number for concurrent writes by one process. A folder that is replaced
is renamed to `.NAME.partial-PID-previous` until the new one is in place.
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

# The folders this process is writing now. The pid alone is not enough: it may be reused.
_live: set[Path] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False, flag: str = "--mlx-path") -> Iterator[Path]:
    """A folder to write into, which becomes `path` if the block succeeds and is removed if it fails.

    Leftovers of killed processes are removed.

    Raises:
        RequestError: `path` exists and `overwrite` is false, or a folder cannot be created there.
        OpenELMError: the disk is full, writing failed for another reason, or `path` was created in the meantime.
    """
    path = check_target(path, overwrite=overwrite, flag=flag)
    with _partial_folder(path) as partial:
        yield partial
        _replace(partial, path, overwrite=overwrite, flag=flag)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file replaces `path` if the block succeeds and is removed if it fails.

    It is in a folder beside `path`; if this process is killed, the next one removes it.

    Raises:
        RequestError: a folder cannot be created there.
        OpenELMError: the disk is full, or writing failed for another reason.
    """
    with _partial_folder(path) as partial:
        yield partial / path.name
        os.replace(partial / path.name, path)


@contextlib.contextmanager
def _partial_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, removed after the block unless it was moved; removes leftovers of dead processes."""
    parent = Path(os.path.realpath(path.parent))
    check_parents(path)
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
        raise RequestError(f"{path} cannot be created: {error.strerror}.") from None
    try:
        yield partial
    except OSError as error:
        raise _failed(path, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with _lock:
            _live.discard(partial)


def _failed(path: Path, error: OSError) -> OpenELMError:
    # NumPy reports how many bytes it could not write, but not why; in practice the disk is full.
    reason = error.strerror or f"the disk is probably full ({error})"
    return OpenELMError(f"Writing {path} failed: {reason}; nothing was left there.")


def check_target(path: Path, *, overwrite: bool = False, flag: str = "--mlx-path") -> Path:
    """The path of a folder to write, with links resolved; call it before long work, so that a bad path fails early.

    A previous version that a killed process left behind is put back first.

    Args:
        flag: the command's flag for `path`, for messages.

    Raises:
        RequestError: an empty path, the current folder, a file, a path through a file, a folder that exists while
            `overwrite` is false, or one that is not a model folder, which is never replaced.
    """
    try:
        current = Path.cwd()
    except FileNotFoundError:
        raise RequestError("The current folder does not exist any more; change to another.") from None
    if str(path) in ("", ".") or _contains(Path(os.path.realpath(to_path(path))), current):
        raise RequestError(f"{quote(str(path))} is the current folder or a parent of it; give a new one with {flag}.")
    given, path = to_path(path), Path(os.path.realpath(to_path(path)))
    with _lock:  # another thread may be in the middle of replacing it
        _restore(path)
        if not path.exists():
            check_parents(path)
            return path
        if not path.is_dir():
            raise RequestError(f"{given} is a file, not a folder.")
        if not overwrite:
            raise RequestError(f"{given} exists; choose another {flag}, or replace it with --overwrite.")
        entries = list(path.iterdir())
        if entries and (not (path / "config.json").is_file() or any(entry.is_dir() for entry in entries)):
            raise RequestError(
                f"{given} contains files that are not part of a model, so it will not be overwritten; choose another "
                f"{flag}."
            )
    return path


def check_parents(path: Path) -> None:
    """Refuse a path that leads through a file; folders that do not exist can be made."""
    for parent in path.parents:
        if parent.is_dir():
            return
        if parent.exists():
            raise RequestError(f"{path} cannot be created: {parent} is a file, not a folder.")


def keep_apart(target: Path, source: Path, what: str, flag: str = "--mlx-path") -> None:
    """Refuse to write to `target` if it is, or contains, a file or folder that is read.

    Args:
        source: the file or folder that is read.
        what: its name in the message, such as "the model to convert".
        flag: the flag that names another target.

    Raises:
        RequestError: it is, or contains it.
    """
    if _contains(target, source.resolve()):
        raise RequestError(f"{target} is {what}, or contains it; choose another {flag}.")


def _contains(target: Path, path: Path) -> bool:
    """Whether `path` is `target` or in it; both without links."""
    if path.is_relative_to(target):
        return True
    # Names that differ may be of one file: macOS ignores case, and a file may be mounted in two places.
    return any(_is_same(target, place) for place in (path, *path.parents))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there, or not any more: another thread may be replacing it
        return False


def _replace(partial: Path, path: Path, *, overwrite: bool, flag: str) -> None:
    """Move `partial` to `path`; a folder that was there is kept until the new one is in place."""
    previous = partial.with_name(f"{partial.name}-previous")
    with _lock:
        if not path.exists():
            partial.rename(path)
            return
        if not overwrite:
            raise OpenELMError(
                f"{path} was created by another process in the meantime and was not replaced; choose another {flag}."
            )
        path.rename(previous)
        try:
            partial.rename(path)
        except OSError:
            previous.rename(path)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def _restore(path: Path) -> None:
    """Put back the folder that a process was replacing when it was killed: it is the only copy."""
    with contextlib.suppress(OSError):  # the parent does not exist, or another process was faster
        previous = [] if path.exists() else [entry for entry, is_previous in _leftovers(path) if is_previous]
        if previous:
            previous[0].rename(path)


def _remove_leftovers(path: Path) -> None:
    for entry, is_previous in _leftovers(path):
        # Keep the previous version unless `path` exists: it may be the only copy.
        if not is_previous or path.exists():
            shutil.rmtree(entry, ignore_errors=True)


def _leftovers(path: Path) -> list[tuple[Path, bool]]:
    """Leftovers of dead processes beside `path`, and whether each is a previous version."""
    pattern = re.compile(re.escape(f".{path.name}.partial-") + r"(\d+)(?:-\d+)?(-previous)?")
    matches = [(entry, pattern.fullmatch(entry.name)) for entry in path.parent.iterdir()]
    return [(entry, bool(match[2])) for entry, match in matches if match and not _is_running(entry, int(match[1]))]


def _is_running(entry: Path, pid: int) -> bool:
    """Whether the process that created `entry` is still working on it."""
    if pid == os.getpid():
        return entry.with_name(entry.name.removesuffix("-previous")) in _live
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
