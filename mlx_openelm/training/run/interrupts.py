"""Ctrl-C while training: the first one stops the run after the current step, the second one ends the process."""

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
    """A context in which SIGINT and SIGTERM set `requested`; a second signal exits with 130 at once.

    Python runs signal handlers only between its own instructions, and a step may compute for seconds, so a separate
    thread receives the signals. Signals can only be handled from the main thread; in other threads this does nothing.

    Args:
        on_request: called once, in that thread, at the first signal.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None):
        self.requested = False
        self._on_request = on_request
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
        while received := self._ours.recv(1):
            if received[0] not in _SIGNALS:
                continue
            if self.requested:
                os._exit(130)
            self.requested = True
            self._on_request()
