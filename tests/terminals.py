"""Commands on a terminal of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from processes import environment

ROOT = Path(__file__).parent.parent


def run_on_terminal(columns: int, *words: object, cwd: Path = ROOT, stdout: int | None = None) -> str:
    """What a command shows on a terminal; with `stdout`, what it shows there on standard error alone."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = environment()
    variables.pop("COLUMNS", None)  # pytest-xdist sets it
    command = [sys.executable, "-m", "mlx_openelm", *map(str, words)]
    out = child if stdout is None else stdout
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=child, env=variables, cwd=cwd) as run:
        os.close(child)
        shown = b""
        while part := _read(parent):
            shown += part
        run.wait(60)
    os.close(parent)
    return shown.decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux says that the other side is closed
        return b""
