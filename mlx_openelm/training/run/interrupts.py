"""Ctrl-C while training: the first asks for an end after the step, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within it, SIGINT and SIGTERM set `requested`; a second one exits with 130 wherever the process is.

    Python runs signal handlers between its own instructions only, and a step may compute for seconds, so a thread
    of its own hears of signals. Outside the main thread, which alone may handle signals, nothing is changed.

    Args:
        noticed: called once, in that thread, at the first signal.
    """

    def __init__(self, noticed: Callable[[], None] = lambda: None):
        self.requested = False
        self._noticed = noticed
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._theirs = theirs
            self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._handlers = [signal.signal(number, lambda *_: None) for number in _SIGNALS]
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._active:
            for number, handler in zip(_SIGNALS, self._handlers, strict=True):
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup)
            self._theirs.close()  # ends the thread
            self._thread.join()
            self._ours.close()

    def _listen(self) -> None:
        while heard := self._ours.recv(1):
            if heard[0] not in _SIGNALS:
                continue
            if self.requested:
                os._exit(130)
            self.requested = True
            self._noticed()
