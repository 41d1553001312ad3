"""The engine's thread: the one place that computes.

It takes what was handed to it between two steps, so that a cancelled text frees its row within one step. What it has
for the event loop, it delivers once a step.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import mlx.core as mx

from .. import backend
from ..generation.piece import Piece
from ..generation.row import Row
from .failures import APIError, as_api_error
from .models import Models, Resident
from .work import Task, Text, steps_of

log = logging.getLogger("mlx_openelm.serving")

# Seconds without work after which held prompts are written to the folder.
_IDLE_SECONDS = 5.0


class Sink(Protocol):
    """Where the thread delivers: `deliver` is called in the thread, and calls the others in the event loop."""

    def deliver(self, batch: Sequence[Callable[[], object]]) -> None: ...

    def piece(self, text: Text, piece: Piece, now: float) -> None: ...

    def taken(self, text: Text) -> None: ...

    def ended(self, text: Text, error: APIError | None) -> None: ...

    def solved(self, task: Task, result: Any, error: APIError | None) -> None: ...

    def died(self) -> None: ...


class EngineThread(threading.Thread):
    """Runs the engines of all models until it is stopped, or dies.

    Args:
        rebuilds: make new engines for the models in memory first: an earlier thread died in the middle of a step.

    Attributes:
        pending: what waits until its model is in memory.
        texts: those that the engines have, by row, with their models.
        tasks: those that are worked on in turns, the first of them now.
    """

    def __init__(self, models: Models, sink: Sink, rebuilds: bool = False):
        super().__init__(name="engine", daemon=True)
        self._models, self._sink = models, sink
        self.pending: deque[Text | Task] = deque()
        self.texts: dict[Row, tuple[Text, Resident]] = {}
        self.tasks: deque[tuple[Task, Resident]] = deque()
        self.is_stopping = False
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._outbox: list[Callable[[], object]] = []
        self._has_new = False  # held prompts that are not in the folder yet
        if rebuilds:
            self.call(self._rebuild_all)

    # For other threads.

    def call(self, function: Callable[[], object]) -> None:
        """Call a function in the thread, between two steps."""
        self._inbox.put(function)

    def submit(self, work: Text | Task) -> None:
        self._inbox.put(partial(self.pending.append, work))

    def cancel(self, work: Text | Task) -> None:
        """End something, whose `is_cancelled` is set."""
        self._inbox.put(partial(self._cancelled, work))

    def stop(self) -> None:
        """Finish what is there, write held prompts to the folder, and end."""
        self.is_stopping = True
        self._inbox.put(lambda: None)

    # For the thread itself.

    def run(self) -> None:
        """Work until the thread is stopped; if it dies, the sink is told."""
        try:
            with backend.wired_limit():
                self._work()
        except BaseException as error:
            log.critical("The engine's thread died: %s", type(error).__name__)
            log.debug("The reason:", exc_info=error)
            self._sink.deliver([self._sink.died])

    def _rebuild_all(self) -> None:
        for resident in self._models.residents:
            self._models.rebuild(resident)

    def _cancelled(self, work: Text | Task) -> None:
        if isinstance(work, Text) and work.row is not None:
            work.row.cancel()
        elif work in self.pending:
            self.pending.remove(work)
            self._end(work, None)

    def _work(self) -> None:
        while True:
            self._receive()
            self._admit()
            self._flush()  # what is refused or taken need not wait for a step
            if self.is_stopping and not self._is_busy:
                self._models.save()
                return
            for resident in self._models.residents:
                if resident.engine.is_busy:
                    self._step(resident)
            self._advance_task()
            self._flush()

    @property
    def _is_busy(self) -> bool:
        return bool(self.pending or self.tasks) or any(one.engine.is_busy for one in self._models.residents)

    def _receive(self) -> None:
        """Do what was handed over; without work, wait for it."""
        try:
            if not self._is_busy and not self.is_stopping:
                self._inbox.get(timeout=_IDLE_SECONDS if self._has_new else None)()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            if self._has_new and not self._is_busy:
                self._models.save()
                mx.clear_cache()
                self._has_new = False

    def _admit(self) -> None:
        """Hand to the engines what waits, in order.

        What waits for its leader lets others pass; what waits until its model fits into memory does not, so that the
        models there come to an end.
        """
        behind: list[Text | Task] = []
        while self.pending:
            one = self.pending.popleft()
            if isinstance(one, Text) and one.must_wait:
                behind.append(one)
            elif not self._begin(one):
                behind.append(one)
                break
        self.pending.extendleft(reversed(behind))

    def _begin(self, one: Text | Task) -> bool:
        """Hand something to its model's engine; False if the model has to wait for memory."""
        try:
            resident = self._models.get(one.entry, [resident for _, resident in self.tasks])
            if resident is None:
                return False
            if isinstance(one, Task):
                self.tasks.append((one, resident))
            elif one.options.get("num_draft_tokens") and resident.draft is None:
                message = "num_draft_tokens needs a draft model, and the server has none; leave it out."
                raise APIError(message, param="num_draft_tokens")
            else:
                resident.engine.budget.max_bytes = self._models.text_bytes
                one.row = resident.engine.submit(
                    one.prompt, adapter=one.adapter, constraint=one.constraint, **one.options
                )
                one.row.warns, one.row.continues = False, one.continues
                self.texts[one.row] = one, resident
                self._has_new = True
                self._outbox.append(partial(self._sink.taken, one))
        except Exception as error:
            self._end(one, error)
        return True

    def _step(self, resident: Resident) -> None:
        """A step of a model's texts."""
        engine, others = resident.engine, [one for one in self._models.residents if one is not resident]
        engine.budget.max_bytes = self._models.text_bytes - sum(one.engine.budget.reserved for one in others)
        try:
            pieces = engine.step()
        except Exception as error:
            self._lose(resident, error)
            return
        now = time.perf_counter()
        for row, piece in pieces:
            self._outbox.append(partial(self._sink.piece, self.texts[row][0], piece, now))
        for row in [row for row, (_, owner) in self.texts.items() if owner is resident and row.is_done]:
            text, _ = self.texts.pop(row)
            if row.error is not None or row.finish_reason == "cancelled":
                self._end(text, row.error)

    def _lose(self, resident: Resident, error: Exception) -> None:
        """A step failed as a whole: so do its texts, and a new engine goes on."""
        log.error("A step failed: %s", self._models.without_paths(f"{type(error).__name__}: {error}"))
        log.debug("The reason:", exc_info=error)
        for row in [row for row, (_, owner) in self.texts.items() if owner is resident]:
            self._end(self.texts.pop(row)[0], error)
        self._models.rebuild(resident)
        mx.clear_cache()

    def _advance_task(self) -> None:
        """Do a piece of the first task."""
        if not self.tasks:
            return
        task, resident = self.tasks[0]
        try:
            if task.is_cancelled:
                raise GeneratorExit
            if task.running is None:
                task.running = steps_of(task, resident)
            next(task.running)
            self.tasks.rotate(-1)
            return
        except StopIteration as stop:
            self._outbox.append(partial(self._sink.solved, task, stop.value, None))
        except GeneratorExit:
            if task.running is not None:
                task.running.close()
            self._end(task, None)
        except Exception as error:
            self._end(task, error)
        self.tasks.popleft()

    def _end(self, one: Text | Task, error: Exception | None) -> None:
        """Tell the event loop that something failed or was cancelled."""
        failure = None
        if error is not None:
            failure = as_api_error(error)
            failure.message = self._models.without_paths(failure.message)
            if failure.status >= 500:
                log.error("%s: %s", type(error).__name__, self._models.without_paths(str(error)))
        if isinstance(one, Text):
            self._outbox.append(partial(self._sink.ended, one, failure))
        else:
            self._outbox.append(partial(self._sink.solved, one, None, failure))

    def _flush(self) -> None:
        """Deliver to the event loop."""
        if self._outbox:
            batch, self._outbox = self._outbox, []
            self._sink.deliver(batch)
