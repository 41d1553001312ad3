"""A line about the kernels that MLX compiles for a GPU when they are first used, which can take a minute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import backend

LINE = "This takes longer the first time: GPU kernels are being compiled, once per machine."
# Work that takes no longer than this has compiled little, in seconds.
PATIENCE = 2.0

_begun: set[str] = set()
_said = threading.Event()


@contextmanager
def notice(work: str, say: Callable[[str], None]) -> Iterator[None]:
    """While work of a kind runs for the first time in this process: say so if it takes long on CUDA.

    MLX compiles a kernel for each expression there; for a CPU it compiles little, and Metal's kernels come compiled.
    It is said once a process, from another thread.
    """
    is_first = work not in _begun
    _begun.add(work)
    if not is_first or _said.is_set() or not backend.on_cuda():
        yield
        return
    timer = threading.Timer(PATIENCE, _say_once, [say])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_once(say: Callable[[str], None]) -> None:
    if not _said.is_set():
        _said.set()
        say(LINE)
