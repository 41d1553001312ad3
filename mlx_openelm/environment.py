"""Settings from the environment: switches, and the number of threads."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

# The first of these that is set gives the number of threads for kernels.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def says_off(value: str) -> bool:
    """Whether an environment variable with this value switches its feature off."""
    return value.lower() in ("0", "off", "false", "no")


def thread_count() -> int:
    """The number of threads for arithmetic: from the environment, else the processors this process may use.

    `OMP_NUM_THREADS` may be a list with one number for each nesting level; the first is used.
    """
    for name in THREAD_VARIABLES:
        with contextlib.suppress(ValueError):
            if (count := int(os.environ.get(name, "").split(",")[0])) > 0:
                return count
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A container may use fewer processors than it sees (cgroup v2: microseconds of each period).
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count
