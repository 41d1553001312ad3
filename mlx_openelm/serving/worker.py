"""The engine's thread: the one place that computes. The event loop hands it texts, and gets their pieces.

The thread takes what was handed to it between two steps, so that a cancelled text frees its row within one step. What
it has for the event loop, it delivers once a step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import mlx.core as mx

from .. import backend
from ..generation.piece import Piece
from ..generation.row import Row
from .failures import APIError, as_api_error, unavailable
from .metrics import Metrics
from .models import Entry, Models, Resident

log = logging.getLogger("mlx_openelm.serving")

# Seconds without work after which held prompts are written to the folder.
_IDLE_SECONDS = 5.0
# A thread that dies is started again after so many seconds, but not more often than so many times in a minute.
_RESTART_SECONDS, _MOST_DEATHS = 1.0, 3


class Text:
    """One text of a request: what to generate, and where its pieces go.

    Args:
        leader: another text with the same prompt, which is processed first, so that this one finds it held.

    Attributes:
        events: (index, `Piece`) for each token, or (index, `APIError`) at the end of a text that failed.
        is_done: whether there will be no more.
    """

    def __init__(
        self,
        entry: Entry,
        adapter: str | None,
        prompt: Sequence[int],
        options: dict[str, Any],
        events: asyncio.Queue[tuple[int, Piece | APIError]],
        index: int,
        leader: Text | None = None,
    ):
        self.entry, self.adapter, self.prompt, self.options = entry, adapter, prompt, options
        self.events, self.index, self.leader = events, index, leader
        self.is_done = self.is_cancelled = False
        self.row: Row | None = None
        self.submitted = time.perf_counter()
        self.last: float | None = None  # when its last piece came

    @property
    def must_wait(self) -> bool:
        """Whether its leader's prompt is still being processed."""
        row = None if self.leader is None else self.leader.row
        return row is not None and bool(row.prompt) and not row.is_done

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were processed before, for another request."""
        return 0 if self.row is None else self.row.cached_tokens


class Task:
    """Work on a model that generates no text, such as an embedding; a piece of it is done between two steps.

    Args:
        work: makes a generator, which stops after each piece and returns the result.
    """

    def __init__(self, entry: Entry, adapter: str | None, work: Callable[[Any], Generator[None, None, Any]]):
        self.entry, self.adapter, self.work = entry, adapter, work
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False
        self.running: Generator[None, None, Any] | None = None


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
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._outbox: list[Callable[[], object]] = []
        self._pending: deque[Text | Task] = deque()  # until their models are in memory
        self._texts: dict[Row, tuple[Text, Resident]] = {}
        self._tasks: deque[tuple[Task, Resident]] = deque()
        self._stopping = False
        self._has_new = False  # held prompts that are not in the folder yet
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)
        self._durations: deque[float] = deque(maxlen=32)
        self._thread: threading.Thread | None = None

    # For the event loop, and for the thread that starts the server.

    @property
    def is_alive(self) -> bool:
        """Whether requests can be served."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Texts that have not joined the others yet."""
        return len(self._pending) + sum(len(resident.engine.waiting) for resident in self.models.residents)

    @property
    def running(self) -> int:
        """Texts that advance together."""
        return sum(len(resident.engine.rows) for resident in self.models.residents)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in the engine's thread."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._inbox.put(call)
        return future

    def submit(self, work: Sequence[Text | Task]) -> None:
        """Hand over what a request needs.

        Raises:
            APIError: there is too much already (429), or the thread is gone (503).
        """
        if not self.is_alive or self._stopping:
            raise unavailable()
        if len(work) > self.max_texts:
            raise APIError(f"A request may ask for {self.max_texts} texts at most; this one asks for {len(work)}.")
        if len(self.in_flight) + len(work) > self.max_texts:
            message = "The server has as many requests as it takes; try again later."
            headers = {"Retry-After": str(self._seconds_to_wait())}
            raise APIError(message, 429, code="queue_full", headers=headers)
        self.in_flight.update(work)
        for one in work:
            self._inbox.put(partial(self._pending.append, one))

    def cancel(self, work: Sequence[Text | Task]) -> None:
        """End what is not done yet."""
        for one in work:
            if one in self.in_flight and not one.is_cancelled:
                one.is_cancelled = True
                self._inbox.put(partial(self._cancelled, one))

    def stop(self) -> None:
        """Finish what is there, write held prompts to the folder, and end the thread."""
        self._stopping = True
        self._inbox.put(lambda: None)

    def join(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def _seconds_to_wait(self) -> int:
        """When a place will be free, from what texts took lately."""
        if not self._durations:
            return 1
        mean = sum(self._durations) / len(self._durations)
        return max(1, min(60, round(mean)))

    def _piece(self, text: Text, piece: Piece, now: float) -> None:
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
            self._leave(text)
            if piece.drafts is not None:
                self.metrics.drafted.inc(piece.drafts.drafted)
                self.metrics.accepted.inc(piece.drafts.accepted)
        text.events.put_nowait((text.index, piece))

    def _ended(self, text: Text, error: APIError | None) -> None:
        """A text has failed, or was cancelled."""
        if text in self.in_flight:
            self._leave(text)
            if error is not None:
                text.events.put_nowait((text.index, error))

    def _solved(self, task: Task, result: Any, error: APIError | None) -> None:
        if task in self.in_flight:
            self.in_flight.discard(task)
            if task.future.done():
                return
            if error is None:
                task.future.set_result(result)
            else:
                task.future.set_exception(error)

    def _leave(self, text: Text) -> None:
        self.in_flight.discard(text)
        text.is_done = True

    def _died(self) -> None:
        """Fail what was there, and start the thread again."""
        for one in list(self.in_flight):
            self._ended(one, unavailable()) if isinstance(one, Text) else self._solved(one, None, unavailable())
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == _MOST_DEATHS and now - self._deaths[0] < 60:
            log.critical("The engine's thread cannot be kept alive; the server ends")
            self._give_up()
        elif self.loop is not None:
            self.loop.call_later(_RESTART_SECONDS, self._restart)

    def _restart(self) -> None:
        self._inbox, self._outbox = queue.SimpleQueue(), []
        self._pending.clear()
        self._tasks.clear()
        self._texts.clear()
        self._inbox.put(self._rebuild_all)
        self.start()
        self.metrics.restarts.inc()
        log.warning("The engine's thread was started again")

    # For the thread.

    def _main(self) -> None:
        try:
            with backend.wired_limit():
                self._work()
        except BaseException as error:
            log.critical("The engine's thread died: %s", type(error).__name__)
            log.debug("The reason:", exc_info=error)
            if self.loop is not None and not self._stopping:
                with suppress(RuntimeError):  # the loop has ended
                    self.loop.call_soon_threadsafe(self._died)

    def _work(self) -> None:
        while True:
            self._receive()
            self._admit()
            if self._stopping and not self._is_busy:
                self._flush()
                self.models.save()
                return
            for resident in self.models.residents:
                if resident.engine.is_busy:
                    self._step(resident)
            self._advance_task()
            self._flush()

    @property
    def _is_busy(self) -> bool:
        return bool(self._pending or self._tasks) or any(one.engine.is_busy for one in self.models.residents)

    def _receive(self) -> None:
        """Do what was handed over; without work, wait for it."""
        try:
            if not self._is_busy and not self._stopping:
                self._inbox.get(timeout=_IDLE_SECONDS if self._has_new else None)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            if self._has_new and not self._is_busy:
                self.models.save()
                mx.clear_cache()
                self._has_new = False

    def _admit(self) -> None:
        """Hand to the engines what waits, in order: one that waits for memory or its leader lets the others wait."""
        while self._pending:
            one = self._pending[0]
            if one.is_cancelled:
                self._pending.popleft()
                self._end(one, None)
                continue
            if isinstance(one, Text) and one.must_wait:
                return
            try:
                resident = self.models.get(one.entry)
                if resident is None:
                    return
                if isinstance(one, Task):
                    self._tasks.append((one, resident))
                else:
                    resident.engine.budget.max_bytes = self.models.text_bytes
                    one.row = resident.engine.submit(one.prompt, adapter=one.adapter, **one.options)
                    one.row.warns = False
                    self._texts[one.row] = one, resident
                    self._has_new = True
            except Exception as error:
                self._end(one, error)
            self._pending.popleft()

    def _step(self, resident: Resident) -> None:
        """A step of a model's texts."""
        engine, others = resident.engine, [one for one in self.models.residents if one is not resident]
        engine.budget.max_bytes = self.models.text_bytes - sum(one.engine.budget.reserved for one in others)
        try:
            pieces = engine.step()
        except Exception as error:
            self._lose(resident, error)
            return
        now = time.perf_counter()
        for row, piece in pieces:
            self._outbox.append(partial(self._piece, self._texts[row][0], piece, now))
        for row in [row for row, (_, owner) in self._texts.items() if owner is resident and row.is_done]:
            text, _ = self._texts.pop(row)
            if row.error is not None or row.finish_reason == "cancelled":
                self._end(text, row.error)

    def _lose(self, resident: Resident, error: Exception) -> None:
        """A step failed as a whole: so do its texts, and a new engine goes on."""
        log.error("A step failed: %s", self.models.without_paths(f"{type(error).__name__}: {error}"))
        log.debug("The reason:", exc_info=error)
        for row in [row for row, (_, owner) in self._texts.items() if owner is resident]:
            self._end(self._texts.pop(row)[0], error)
        self.models.rebuild(resident)
        mx.clear_cache()

    def _rebuild_all(self) -> None:
        for resident in self.models.residents:
            self.models.rebuild(resident)

    def _advance_task(self) -> None:
        """Do a piece of the first task."""
        if not self._tasks:
            return
        task, resident = self._tasks[0]
        try:
            if task.is_cancelled:
                raise GeneratorExit
            if task.running is None:
                task.running = _with_adapter(task, resident)
            next(task.running)
            return
        except StopIteration as stop:
            self._outbox.append(partial(self._solved, task, stop.value, None))
        except GeneratorExit:
            if task.running is not None:
                task.running.close()
            self._end(task, None)
        except Exception as error:
            self._end(task, error)
        self._tasks.popleft()

    def _cancelled(self, one: Text | Task) -> None:
        if isinstance(one, Text) and one.row is not None:
            one.row.cancel()

    def _end(self, one: Text | Task, error: Exception | None) -> None:
        """Tell the event loop that something failed or was cancelled."""
        failure = None
        if error is not None:
            failure = as_api_error(error)
            failure.message = self.models.without_paths(failure.message)
            if failure.status >= 500:
                log.error("%s: %s", type(error).__name__, self.models.without_paths(str(error)))
        if isinstance(one, Text):
            self._outbox.append(partial(self._ended, one, failure))
        else:
            self._outbox.append(partial(self._solved, one, None, failure))

    def _flush(self) -> None:
        """Deliver to the event loop."""
        if self._outbox and self.loop is not None:
            batch, self._outbox = self._outbox, []
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(_call_all, batch)


def _call_all(functions: Sequence[Callable[[], object]]) -> None:
    for function in functions:
        function()


def _with_adapter(task: Task, resident: Resident) -> Generator[None, None, Any]:
    """A task whose model has the adapter that it names, at each of its pieces."""
    if task.adapter is None or resident.pool is None:
        return (yield from task.work(resident.model))
    handle = resident.pool.acquire(task.adapter)
    try:
        work = task.work(resident.model)
        while True:
            with resident.pool.rows([handle]):
                try:
                    next(work)
                except StopIteration as stop:
                    return stop.value
            yield
    finally:
        resident.pool.release(handle)
