"""A program on a pseudo-terminal, which a test types into and reads from."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from processes import environment

SECONDS = 90.0
# Colors, and what readline sends to move the cursor and to ask for marked pastes.
_ESCAPES = re.compile(r"\x1b\[[?0-9;]*[a-zA-Z]|\x1b[=>]|\x07")


class PseudoTerminal:
    """`python -m mlx_openelm` with these words, on a terminal of 100 columns; with `stdout`, all but that is there.

    Without `module` the words are those of Python itself.
    """

    def __init__(self, *words: object, cwd: Path, stdout: int | None = None, module: bool = True):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        variables = environment(TERM="xterm", INPUTRC="/dev/null", XDG_STATE_HOME=str(cwd))
        for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them
            variables.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, *(["-m", "mlx_openelm"] if module else []), *map(str, words)],
            stdin=child,
            stdout=child if stdout is None else stdout,
            stderr=child,
            env=variables,
            cwd=cwd,
            preexec_fn=_take_terminal,
        )
        os.close(child)
        self._parent = parent
        self._shown = ""
        self._place = 0  # what `expect` has found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._parent)

    def type(self, text: str) -> None:
        """Press keys: text as it is, `\\r` for Enter, `\\x03` for Ctrl-C."""
        os.write(self._parent, text.encode())

    def expect(self, text: str, seconds: float = SECONDS) -> str:
        """What is shown up to a text that appears after the last one found, that text included."""
        end = time.monotonic() + seconds
        while (place := self._shown.find(text, self._place)) < 0:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} is not in {self._shown[self._place :]!r}")
        start, self._place = self._place, place + len(text)
        return self._shown[start : self._place]

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C at a prompt until `text` is shown.

        Python's readline notices a signal only while it waits for a key; one that comes just before that is noticed
        with the next key.
        """
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            self.type("\x03")
            while self._read(1):
                if (place := self._shown.find(text, self._place)) >= 0:
                    self._place = place + len(text)
                    return
        raise AssertionError(f"{text!r} is not in {self._shown[self._place :]!r}")

    def exit_code(self, seconds: float = SECONDS) -> int:
        """The exit code, once everything was shown."""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(max(1.0, end - time.monotonic()))

    def rest(self) -> str:
        """What was shown after the last text found."""
        return self._shown[self._place :]

    def _read(self, seconds: float) -> bool:
        """Wait for something to be shown; False if nothing comes or the program has ended."""
        if seconds <= 0 or not select.select([self._parent], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._parent, 1 << 16)
        except OSError:  # how Linux says that the other side is closed
            return False
        self._shown = _ESCAPES.sub("", self._shown + data.decode(errors="replace").replace("\r", ""))
        return bool(data)


def _take_terminal() -> None:
    """Make the terminal that of a new session, so that Ctrl-C is a signal there."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
