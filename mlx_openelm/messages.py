"""Lines on standard error, where everything but the result goes."""

from __future__ import annotations

import contextlib
import os
import sys


def say(line: str) -> None:
    """Print a line on standard error.

    If nobody reads it any more (`2>&1 | head`), this line and all later ones are dropped: a closed log must not end a
    long training run.
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop_standard_error()


def _drop_standard_error() -> None:
    """Send standard error to the null device from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(null, sys.stderr.fileno())
    os.close(null)
