"""What the event loop hands to the engine's thread: texts to generate, and other tasks on a model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ..generation.piece import Piece
from ..generation.row import Row
from .failures import APIError
from .models import Entry, Resident

if TYPE_CHECKING:
    from ..generation.constraints import Constraint


class Text:
    """One text of a request: what to generate, and where its pieces go.

    Args:
        leader: another text with the same prompt, which is processed first, so that this one finds it held.
        constraint: what `make_constraint` makes of the options, for this text alone.
        continues: as in `generation.output.Output`.

    Attributes:
        events: (index, `Piece`) for each token, or (index, `APIError`) at the end of a text that failed.
        is_settled: set when the engine has taken the text, or `error` has ended it.
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
        constraint: Constraint | None = None,
        continues: bool = False,
    ):
        self.entry, self.adapter, self.prompt, self.options = entry, adapter, prompt, options
        self.events, self.index, self.leader, self.constraint = events, index, leader, constraint
        self.continues = continues
        self.is_cancelled = False
        self.is_settled = asyncio.Event()
        self.error: APIError | None = None
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


def steps_of(task: Task, resident: Resident) -> Generator[None, None, Any]:
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
