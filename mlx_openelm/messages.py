"""Lines on standard error, where everything but the result goes, and warnings."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings

_PACKAGE = __name__.partition(".")[0]
# What would change a terminal or the order of its text, rather than be shown: control characters other than tabs and
# line ends, marks of direction, line separators; and halves of surrogate pairs, which stand for bytes of file names.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text with control characters as `\\u001b`: names of files and models may have any character."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(line: str) -> None:
    """Print a line on standard error, with control characters escaped.

    If nobody reads it any more (`2>&1 | head`), this line and all later ones are dropped: a closed log must not end a
    long training run.
    """
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        _drop_standard_error()


def warn(message: str) -> None:
    """Warn about the line outside this package that called into it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _drop_standard_error() -> None:
    """Send standard error to the null device from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(null, sys.stderr.fileno())
    os.close(null)
