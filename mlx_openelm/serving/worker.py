"""The event loop's side of the engine: what is in flight, what may come, and a thread that is kept alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from ..generation.piece import Piece
from .engine_thread import EngineThread
from .failures import APIError, unavailable
from .metrics import Metrics
from .models import Models
from .work import Task, Text

log = logging.getLogger("mlx_openelm.serving")

# A thread that dies is started again after so many seconds, but not more often than so many times in a minute.
_RESTART_SECONDS, _MOST_DEATHS = 1.0, 3


class Worker:
    """Runs the engines of all models in a thread of its own.

    Args:
        max_texts: texts that may be there at a time, waiting ones included.
        give_up: called when the thread cannot be kept alive.
    """

    def __init__(self, models: Models, metrics: Metrics, max_texts: int, give_up: Callable[[], object] = lambda: None):
        self.models, self.metrics, self.max_texts, self._give_up = models, metrics, max_texts, give_up
        self.loop: asyncio.AbstractEventLoop | None = None  # set when the server starts
        self.in_flight: set[Text | Task] = set()  # of the event loop
        self.thread = EngineThread(models, self)
        self._is_up = True  # a thread that dies still runs when the event loop hears of it
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._durations: deque[float] = deque(maxlen=32)

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._is_up and self.thread.is_alive()

    @property
    def waiting(self) -> int:
        """Texts that have not joined the others yet."""
        return len(self.thread.pending) + sum(len(resident.engine.waiting) for resident in self.models.residents)

    @property
    def running(self) -> int:
        """Texts that advance together."""
        return sum(len(resident.engine.rows) for resident in self.models.residents)

    def start(self) -> None:
        self.thread.start()

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in the engine's thread."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.thread.call(call)
        return future

    def submit(self, work: Sequence[Text | Task]) -> None:
        """Hand over what a request needs.

        Raises:
            APIError: there is too much already (429), or the thread is gone (503).
        """
        if not self.is_alive or self.thread.is_stopping:
            raise unavailable()
        if len(work) > self.max_texts:
            raise APIError(f"A request may ask for {self.max_texts} texts at most; this one asks for {len(work)}.")
        if len(self.in_flight) + len(work) > self.max_texts:
            message = "The server has as many requests as it takes; try again later."
            headers = {"Retry-After": str(self._seconds_to_wait())}
            raise APIError(message, 429, code="queue_full", headers=headers)
        self.in_flight.update(work)
        for one in work:
            self.thread.submit(one)

    def cancel(self, work: Sequence[Text | Task]) -> None:
        """End what is not done yet."""
        for one in work:
            if one in self.in_flight and not one.is_cancelled:
                one.is_cancelled = True
                self.thread.cancel(one)

    def stop(self) -> None:
        """Finish what is there, write held prompts to the folder, and end the thread."""
        self.thread.stop()

    def join(self) -> None:
        self.thread.join()

    # For the thread: see `Sink`.

    def deliver(self, batch: Sequence[Callable[[], object]]) -> None:
        """Call functions in the event loop; nothing before it has begun and after it has ended."""
        if self.loop is not None:
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(_call_all, batch)

    def _seconds_to_wait(self) -> int:
        """When a place will be free, from what texts took lately."""
        if not self._durations:
            return 1
        mean = sum(self._durations) / len(self._durations)
        return max(1, min(60, round(mean)))

    def piece(self, text: Text, piece: Piece, now: float) -> None:
        """Give a text its next piece."""
        if text not in self.in_flight:
            return
        if text.last is None:
            self.metrics.began(now - text.submitted, len(text.prompt), text.cached_tokens)
        else:
            self.metrics.between_tokens.observe(now - text.last)
        text.last = now
        self.metrics.tokens.inc()
        if piece.finish_reason is not None:
            self._durations.append(now - text.submitted)
            self.in_flight.discard(text)
            if piece.drafts is not None:
                self.metrics.drafted.inc(piece.drafts.drafted)
                self.metrics.accepted.inc(piece.drafts.accepted)
        text.events.put_nowait((text.index, piece))

    def taken(self, text: Text) -> None:
        """The engine has found nothing wrong with a text."""
        text.is_settled.set()

    def ended(self, text: Text, error: APIError | None) -> None:
        """A text has failed, or was cancelled."""
        if text in self.in_flight:
            self.in_flight.discard(text)
            text.error = error
            text.is_settled.set()
            if error is not None:
                text.events.put_nowait((text.index, error))

    def solved(self, task: Task, result: Any, error: APIError | None) -> None:
        if task in self.in_flight:
            self.in_flight.discard(task)
            if task.future.done():
                return
            if error is None:
                task.future.set_result(result)
            else:
                task.future.set_exception(error)

    def died(self) -> None:
        """Fail what was there, and start the thread again unless it was to end."""
        self._is_up = False
        for one in list(self.in_flight):
            self.ended(one, unavailable()) if isinstance(one, Text) else self.solved(one, None, unavailable())
        if self.thread.is_stopping:
            return
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == _MOST_DEATHS and now - self._deaths[0] < 60:
            log.critical("The engine's thread cannot be kept alive; the server ends")
            self._give_up()
        elif self.loop is not None:
            self.loop.call_later(_RESTART_SECONDS, self._restart)

    def _restart(self) -> None:
        if self.thread.is_stopping:
            return
        self.thread = EngineThread(self.models, self, rebuilds=True)
        self.start()
        self._is_up = True
        self.metrics.restarts.inc()
        log.warning("The engine's thread was started again")


def _call_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        function()
