"""A line about the kernels that MLX compiles for a GPU when they are first used, which can take a minute."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from .. import backend

LINE = "GPU kernels are being compiled, once per machine; this takes up to a minute."
# Work that takes no longer than this has compiled little, in seconds.
PATIENCE = 2.0

_begun: set[str] = set()
_said = threading.Event()


@contextmanager
def notice(work: str, say: Callable[[str], None]) -> Iterator[None]:
    """While work of a kind runs for the first time in this process: say so if MLX compiles kernels for long.

    It does for CUDA, a kernel for each expression; for a CPU it compiles little, and Metal's kernels come compiled.
    It is said once a process, from another thread.
    """
    is_first = work not in _begun
    _begun.add(work)
    if not is_first or _said.is_set() or not backend.on_cuda():
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done, _compiled(), say), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event, before: int, say: Callable[[str], None]) -> None:
    while not done.wait(PATIENCE):
        if _compiled() > before and not _said.is_set():
            _said.set()
            say(LINE)
            return


def _compiled() -> int:
    """The kernels in the folder where MLX keeps what it has compiled for CUDA."""
    usual = Path(tempfile.gettempdir(), "mlx", mx.__version__, "ptx")  # type: ignore[attr-defined]
    return sum(1 for _ in Path(os.environ.get("MLX_PTX_CACHE_DIR", usual)).rglob("*.ptx"))
