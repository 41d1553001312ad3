"""Texts of a request: handing them to the engine, collecting or streaming their pieces, leaving with the client."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..generation.piece import Piece
from .failures import APIError, as_api_error, to_json
from .models import Entry
from .work import Text
from .worker import Worker

if TYPE_CHECKING:
    from ..generation.constraints import Constraint

T = TypeVar("T")

# A comment that is sent where no token came for so many seconds, so that nothing between takes the stream for dead.
_PING, _PING_SECONDS = b": still working\n\n", 10.0

# How long a stream waits to begin until the engine has taken its texts, so that what is wrong is a status.
_TAKING_SECONDS = 10.0

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second for nginx, which collects events


@dataclass
class Result:
    """A text that is complete."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish_reason(self) -> str:
        return self.pieces[-1].finish_reason or "stop"


class Texts:
    """The texts of one request.

    Args:
        prompts: the ids of each; one list for several texts is processed once.
        options: of each, for `Engine.submit`.
        constraint: of all of them; see `Context.constrain`.
        continues: whether each text is read right after its prompt, as in `generation.output.Output`.
        max_tokens: what the route calls this option, for errors.
    """

    def __init__(
        self,
        worker: Worker,
        entry: Entry,
        adapter: str | None,
        prompts: Sequence[Sequence[int]],
        options: Sequence[dict[str, Any]],
        constraint: Constraint | None = None,
        *,
        continues: bool = False,
        max_tokens: str = "max_tokens",
    ):
        self.worker, self._max_tokens = worker, max_tokens
        self._is_submitted = False
        self._events: asyncio.Queue[tuple[int, Piece | APIError]] = asyncio.Queue()
        self.texts: list[Text] = []
        leaders: dict[int, Text] = {}
        for index, (prompt, chosen) in enumerate(zip(prompts, options, strict=True)):
            own = None if constraint is None else constraint.copy()
            leader = leaders.get(id(prompt))
            text = Text(entry, adapter, prompt, chosen, self._events, index, leader, own, continues)
            self.texts.append(text)
            leaders.setdefault(id(prompt), text)

    def submit(self) -> None:
        """Hand them to the engine; APIError if there is no room."""
        self.worker.submit(self.texts)
        self._is_submitted = True

    async def taken(self) -> None:
        """Return once the engine has taken what was submitted, or is busy with other things for seconds.

        Raises:
            APIError: the engine refuses a text.
        """
        if self._is_submitted:
            with suppress(TimeoutError):
                async with asyncio.timeout(_TAKING_SECONDS):
                    for text in self.texts:
                        if text.leader is None:  # the others are handed over after it, and ask for the same
                            await text.is_settled.wait()
                            if text.error is not None:
                                raise self._named(text.error)

    def cancel(self) -> None:
        """End those that are not done; nothing if they are."""
        self.worker.cancel(self.texts)

    async def events(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What has come since the last time: the number of a text and its next piece. APIError if one failed."""
        left = len(self.texts)
        while left:
            batch = [await self._events.get()]
            while not self._events.empty():
                batch.append(self._events.get_nowait())
            pieces: list[tuple[int, Piece]] = []
            for index, event in batch:
                if isinstance(event, APIError):
                    if pieces:
                        yield pieces
                    raise self._named(event)
                pieces.append((index, event))
                left -= event.finish_reason is not None
            yield pieces

    def _named(self, error: APIError) -> APIError:
        error.message = re.sub(r"\bmax_tokens\b", self._max_tokens, error.message)
        return error

    async def collect(self) -> list[Result]:
        """All texts, when they are complete."""
        results = [Result() for _ in self.texts]
        async for batch in self.events():
            for index, piece in batch:
                results[index].pieces.append(piece)
        return results

    def usage(self, prompts: Sequence[int], generated: int) -> dict[str, Any]:
        """OpenAI's count of tokens.

        Args:
            prompts: the numbers of those texts whose prompts count: of several answers to one prompt, the first.
        """
        prompt = sum(len(self.texts[index].prompt) for index in prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self.texts[index].cached_tokens for index in prompts)},
        }


class Left(Exception):
    """The client has left."""


class Deadline:
    """When a request must be answered: so many seconds after it began. `request.state.deadline` has it."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._ends = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return max(0.0, self._ends - time.monotonic())

    @property
    def error(self) -> APIError:
        """The error of a request that takes longer."""
        message = f"The request took more than {self.seconds:g} seconds; ask for fewer tokens, or try again later."
        # OpenAI's clients repeat what got 408, and would wait as long again, twice.
        return APIError(message, 408, code="timeout", headers={"x-should-retry": "false"})


async def while_here(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client leaves or the request's time is over.

    Raises:
        Left: the client has left.
        APIError: the time is over, 408.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        deadline: Deadline = request.state.deadline
        await asyncio.wait({task, gone}, timeout=deadline.left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise Left
        raise deadline.error
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    """Return when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(values: Any, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return b"%sdata: %s\n\n" % (head, to_json(values))


class EventStream(Response):
    """A stream of server-sent events.

    Args:
        source: makes the events; it is closed when the client leaves, when the time is over, and at the end.
        deadline: when it has to end.
        ended: called with the outcome.
        failed: makes the event that tells of an error in the middle.
    """

    def __init__(
        self,
        source: AsyncGenerator[bytes, None],
        deadline: Deadline,
        ended: Callable[[str], object],
        failed: Callable[[APIError], bytes],
    ):
        super().__init__(media_type="text/event-stream", headers=_HEADERS)
        del self.headers["content-length"]
        self._source, self._deadline, self._ended, self._failed = source, deadline, ended, failed
        self._quiet = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        outcome = "cancelled"
        sending = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                outcome = sending.result()
        finally:
            for one in (sending, gone):
                one.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await one
            self._ended(outcome)

    async def _send_all(self, send: Send) -> str:
        """Send the events; returns the outcome."""
        outcome, source = "ok", self._source
        pings = asyncio.ensure_future(self._send_pings(send))
        try:
            async with asyncio.timeout(self._deadline.left):
                async for data in source:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    self._quiet = False
        except TimeoutError:
            outcome = "timeout"
            await self._send_error(send, self._deadline.error)
        except Exception as error:
            known = as_api_error(error)
            outcome = outcome_of(known)
            await self._send_error(send, known)
        finally:
            pings.cancel()
            await source.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return outcome

    async def _send_pings(self, send: Send) -> None:
        while True:
            self._quiet = True
            await asyncio.sleep(_PING_SECONDS)
            if self._quiet:
                await send({"type": "http.response.body", "body": _PING, "more_body": True})

    async def _send_error(self, send: Send, error: APIError) -> None:
        await send({"type": "http.response.body", "body": self._failed(error), "more_body": True})


def outcome_of(error: APIError) -> str:
    """What the metrics call the end of a request that failed."""
    names = {408: "timeout", 429: "rejected", 503: "unavailable"}
    return names.get(error.status, "server_error" if error.status >= 500 else "client_error")
