"""Announces that MLX is compiling its kernels for a GPU, which happens on first use and can take a minute."""

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
# Seconds; work that takes less than this has compiled little.
PATIENCE = 2.0

_begun: set[str] = set()
_announced = threading.Event()


@contextmanager
def notice(work: str, announce: Callable[[str], None]) -> Iterator[None]:
    """Announce if MLX spends long compiling kernels, while a kind of work runs for the first time in this process.

    For CUDA MLX compiles a kernel for each expression; for a CPU it compiles little, and Metal's kernels come compiled.
    There is one announcement per process; it comes from another thread.
    """
    is_first = work not in _begun
    _begun.add(work)
    if not is_first or _announced.is_set() or not backend.on_cuda():
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(done, _compiled(), announce), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(done: threading.Event, before: int, announce: Callable[[str], None]) -> None:
    while not done.wait(PATIENCE):
        if _compiled() > before and not _announced.is_set():
            _announced.set()
            announce(LINE)
            return


def _compiled() -> int:
    """How many kernels are in the folder where MLX keeps those it has compiled for CUDA."""
    usual = Path(tempfile.gettempdir(), "mlx", mx.__version__, "ptx")  # type: ignore[attr-defined]
    return sum(1 for _ in Path(os.environ.get("MLX_PTX_CACHE_DIR", usual)).rglob("*.ptx"))
