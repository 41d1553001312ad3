"""A download as the user sees it: its size before it starts, then a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from ..messages import say
from ..wording import size

# Seconds between two lines of progress, if there is no terminal.
LINE_SECONDS = 5.0


class Transfer:
    """The progress of one download, in a `with` block. Threads may share it.

    Nothing is shown before `start`, so a download whose files are all in the cache is silent.
    """

    def __init__(self, name: str):
        self.name = name
        self._lock = threading.RLock()
        self._total: int | None = None
        self._done = 0
        self._has_started = False
        self._last_line = 0.0
        self._bar: Any = None

    def start(self, total: int | None, done: int = 0) -> None:
        """Say that the transfer begins; only the first call counts.

        Args:
            total: bytes of the download; None if unknown.
            done: those that arrived earlier, before the transfer was interrupted.
        """
        with self._lock:
            if self._has_started:
                return
            self._has_started, self._total = True, total
            self._done += done
            amount = "" if total is None else f", {size(total)}"
            if self._done:
                amount += f" ({size(self._done)} of them are here)"
            say(f"Downloading {self.name}{amount} ...")
            self._last_line = time.monotonic()
            if sys.stderr.isatty():
                self._open()

    def advance(self, count: float | None) -> None:
        """Count bytes that arrived."""
        with self._lock:
            self._done += int(count or 0)
            if self._bar is not None:
                self._bar.update(count)
            elif self._has_started and time.monotonic() - self._last_line >= LINE_SECONDS:
                self._last_line = time.monotonic()
                total = "" if self._total is None else f" of {size(self._total)}"
                say(f"Downloading {self.name}: {size(self._done)}{total}")

    def close(self) -> None:
        """Remove the bar."""
        with self._lock:
            bar, self._bar = self._bar, None
            if bar is not None:
                bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None and self._has_started:
            say(f"Downloaded {self.name}")

    def _open(self) -> None:
        from huggingface_hub.utils import tqdm  # honours HF_HUB_DISABLE_PROGRESS_BARS

        self._bar = tqdm(
            total=self._total, initial=self._done, unit="B", unit_scale=True, leave=False, dynamic_ncols=True
        )


def snapshot_bars(
    transfer: Transfer,
    repo: str,
    *,
    repo_type: str = "model",
    revision: str | None,
    allow: Sequence[str],
    ignore: Sequence[str],
) -> Any:
    """A class for `snapshot_download(tqdm_class=...)` that shows nothing itself and reports to `transfer`."""
    from huggingface_hub.utils import tqdm

    class Reporter(tqdm):
        """huggingface_hub makes one bar for files and two for bytes: those received, and those written to disk."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._counts = kwargs.get("unit") == "B" and kwargs.get("desc") != "Downloading bytes"
            super().__init__(*args, **{**kwargs, "disable": True})
            if self._counts:  # the list of files has just been stored
                self._missing = missing_bytes(repo, repo_type, revision, allow, ignore)

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            # Called when a file that is not in the cache adds to the total.
            if self._counts and self.total:
                transfer.start(self._missing)

        def update(self, n: float | None = 1) -> None:
            if self._counts:
                transfer.advance(n)

    return Reporter


def missing_bytes(
    repo: str, repo_type: str, revision: str | None, allow: Iterable[str], ignore: Iterable[str]
) -> int | None:
    """The bytes of a repository's files that match the patterns and are not in the cache; None if unknown.

    Makes no network request: the list of files is the one that a download stores before its transfers. If another
    version of the repository is in the cache, nobody knows yet which of its files are used again.
    """
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    try:
        tree = get_cached_repo_tree(repo, repo_type=repo_type, revision=revision)
    except CachedRepoTreeNotFoundError:
        return None
    folder = Path(constants.HF_HUB_CACHE, f"{repo_type}s--{repo.replace('/', '--')}")
    branch = folder / "refs" / (revision or "main")
    snapshot = folder / "snapshots" / (branch.read_text() if branch.is_file() else revision or "")
    if any(other != snapshot for other in snapshot.parent.glob("*")):
        return None
    files = filter_repo_objects(
        tree, allow_patterns=list(allow), ignore_patterns=list(ignore), key=lambda file: file.path
    )
    return sum(file.size for file in files if not (snapshot / file.path).exists())
