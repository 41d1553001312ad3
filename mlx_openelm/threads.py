"""Threads and forked processes, in which MLX needs some care."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from pathlib import Path

FORKED = (
    "A process forked after its parent used MLX cannot use it; start the process with multiprocessing's "
    '"spawn" or "forkserver" method, or fork before MLX is used.'
)
# Whether this process was forked from one that had used MLX, whose own threads are missing here: MLX would wait for
# them forever.
forked = False

_TASKS = Path("/proc/self/task")  # of Linux: a folder for each of the system's threads
_noted: set[int] = set()  # by the numbers that the system gives


def note() -> None:
    """Note that this thread uses MLX, unless it is the main one, for the end of the process."""
    if threading.current_thread() is not threading.main_thread():
        _noted.add(threading.get_native_id())


def _wait(limit: float = 2.0) -> None:
    """Wait until threads that used MLX have ended for the system too, at most `limit` seconds.

    Before Python 3.13, `Thread.join` returns earlier. When such a thread ends, MLX frees its compiled functions, for
    which it needs the interpreter; without one it aborts the process.
    """
    end = time.monotonic() + limit
    waiting = _noted - {thread.native_id for thread in threading.enumerate()}
    if waiting and not _TASKS.is_dir():
        time.sleep(0.05)  # the system does not say
    while any((_TASKS / str(thread)).exists() for thread in waiting) and time.monotonic() < end:
        time.sleep(0.001)


def _after_fork() -> None:
    """In the child: whether MLX has allocated memory is how its parent's use shows."""
    global forked
    _noted.clear()
    mlx = sys.modules.get("mlx.core")
    forked = forked or (mlx is not None and mlx.get_peak_memory() > 0)


if sys.version_info < (3, 13):
    atexit.register(_wait)
os.register_at_fork(after_in_child=_after_fork)
