"""What the environment says: switches, and how many threads to use. Imports nothing of ours."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# The first that is set says how many threads a kernel may use.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def says_off(value: str) -> bool:
    """Whether an environment variable of this value turns off what it is about."""
    return value.lower() in ("0", "off", "false", "no")


def thread_count() -> int:
    """Threads for arithmetic: what the environment says, else the processors this process may use.

    `OMP_NUM_THREADS` may be a list, one number for each level of nesting; the first counts.
    """
    for name in THREAD_VARIABLES:
        with contextlib.suppress(ValueError):
            if (count := int(os.environ.get(name, "").split(",")[0])) > 0:
                return count
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A container may be given fewer than it sees (cgroup v2: microseconds of a period).
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count
