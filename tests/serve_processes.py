"""`mlx-openelm serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from processes import environment


@dataclass
class Process:
    """A running server."""

    process: subprocess.Popen[str]
    messages: list[str] = field(default_factory=list)  # the lines on standard error
    url: str = ""

    def __post_init__(self) -> None:
        self._heard = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.messages.append(line)
                found = re.search(r"^Serving .* at (http://\S+)$", line)
                self.url = found[1] if found else self.url
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    def wait_until_it_serves(self) -> None:
        with self._heard:
            self._heard.wait_for(lambda: self.url or not self._reader.is_alive(), 60)
        assert self.url, self.messages

    def end(self, signal: int) -> tuple[int, str]:
        """Send a signal, and wait; returns the exit status and what was on standard error."""
        self.process.send_signal(signal)
        self.process.wait(30)
        self._reader.join(10)
        return self.process.returncode, "".join(self.messages)


@contextmanager
def process(*flags: str) -> Iterator[Process]:
    """A server with these flags, on a free port."""
    command = [sys.executable, "-m", "mlx_openelm", "serve", "--port", "0", *flags]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    server = Process(started)
    try:
        server.wait_until_it_serves()
        yield server
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
