"""What the routes share: the engine's thread, the options, and how a request is taken and answered."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ..errors import RequestError
from ..generation.constraints import Constraint, make_constraint
from ..generation.options import GenerationOptions
from .checks import Check, read_fields
from .failures import APIError, as_api_error, to_json, unavailable
from .metrics import Metrics
from .models import Entry, Models
from .options import ServeOptions
from .protocol import read_json
from .texts import Deadline, Left, outcome_of, while_here
from .worker import Worker

log = logging.getLogger("mlx_openelm.serving")

# Seconds in which the whole body of a request has to arrive.
BODY_SECONDS = 30.0
# Bytes beyond the most that are read and dropped: many clients do not see an answer that comes before they are done.
_DROPPED_BYTES = 1 << 26
_CLOSE = {"Connection": "close"}

T = TypeVar("T")


@dataclass
class Context:
    """What every route needs.

    Args:
        template: the name of the chat template; None is the model's own, or plain text without one.
    """

    worker: Worker
    options: ServeOptions
    metrics: Metrics
    template: str | None = None
    # Text is made into tokens beside the event loop, one at a time.
    preparing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "preparing"))

    @property
    def models(self) -> Models:
        return self.worker.models

    async def prepare(self, request: Request, function: Callable[[], T]) -> T:
        """Call a function in the thread that makes text into tokens; errors as `while_here`."""
        return await while_here(request, asyncio.get_running_loop().run_in_executor(self.preparing, function))

    async def constrain(
        self, request: Request, entry: Entry, options: Mapping[str, Any], param: str = "response_format"
    ) -> Constraint | None:
        """What the options of a text, once they are checked, say that it must be; None if that is anything.

        A grammar is compiled in a thread of its own: the texts of others go on, and the tokens of other prompts too.

        Args:
            param: the key of the request that asks for JSON, for errors.

        Raises:
            APIError: a value is wrong, 400; also as `while_here`.
        """
        chosen, config = GenerationOptions(**options), entry.config
        chosen.validate(config.vocab_size, config.head_dim)
        if not chosen.constraints:
            return None
        try:
            made = asyncio.to_thread(make_constraint, chosen, entry.tokenizer, config.vocab_size)
            return await while_here(request, made)
        except RequestError as error:
            failed = as_api_error(error)
            if chosen.json_object or chosen.json_schema is not None:
                failed.param = param
            raise failed from None

    async def read(self, request: Request) -> dict[str, Any]:
        """The JSON object that a request sends.

        Raises:
            APIError: it is not JSON (400), too large (413), too slow (408).
        """
        most = self.options.max_body_bytes
        too_large = APIError(f"The body has more than {most} bytes.", 413, code="body_too_large", headers=_CLOSE)
        stated = request.headers.get("content-length", "0")
        stated_size = int(stated[:15]) if stated.isdecimal() else 0
        is_large = stated_size > most
        if stated_size > most + _DROPPED_BYTES or (is_large and "expect" in request.headers):
            raise too_large
        body, size = bytearray(), 0
        seconds = min(BODY_SECONDS, request.state.deadline.left)
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    size += len(part)
                    is_large = is_large or size > most
                    if size > most + _DROPPED_BYTES:
                        break
                    if not is_large:
                        body += part
        except TimeoutError:
            message = f"The body did not arrive within {seconds:.2g} seconds."
            raise APIError(message, 408, code="timeout", headers=_CLOSE) from None
        except ClientDisconnect:
            raise Left from None
        if is_large:
            raise too_large
        return read_json(bytes(body))

    async def take(
        self, request: Request, fields: Mapping[str, Check], *needed: str
    ) -> tuple[dict[str, Any], Entry, str | None]:
        """The checked values of a request, and the model and the adapter that it names.

        Raises:
            APIError: as `read`; a value is wrong or `needed` and missing (400), or there is no such model (404).
        """
        given = read_fields(await self.read(request), fields)
        entry, adapter = self.models.find(given.get("model"))
        for key in needed:
            if key not in given:
                raise APIError(f"{key} is missing.", param=key)
        return given, entry, adapter


Handler = Callable[[Context, Request], Awaitable[Response]]


def route(handler: Handler, name: str) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint of Starlette: answers errors in OpenAI's form, and counts the outcome.

    A stream counts its own.
    """

    async def endpoint(request: Request) -> Response:
        context: Context = request.app.state.context
        outcome = "ok"
        request.state.deadline = Deadline(context.options.timeout)
        try:
            if not context.worker.is_alive:
                raise unavailable()
            response = await handler(context, request)
            if response.media_type == "text/event-stream":
                return response
        except Left:
            outcome, response = "cancelled", Response(status_code=499)
        except Exception as error:
            known = as_api_error(error)
            outcome, response = outcome_of(known), failure(known)
            if not isinstance(error, APIError | RequestError):
                log.error("%s failed: %s", name, type(error).__name__)
                log.debug("The reason:", exc_info=error)
        context.metrics.requests.labels(name, outcome).inc()
        return response

    return endpoint


def failure(error: APIError) -> Response:
    """An error as an answer."""
    return answer(error.body, error.status, error.headers)


def answer(values: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON as an answer."""
    return Response(to_json(values), status, media_type="application/json", headers=dict(headers or {}))


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(16)}"


def now() -> int:
    return int(time.time())


def check_characters(entry: Entry, count: int, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before time is spent on making them.

    Raises:
        APIError: 400.
    """
    if count > entry.most_characters:
        message = f"{param} has {count} characters, more than the model's context can hold; shorten it."
        raise APIError(message, param=param, code="context_length_exceeded")


def check_length(entry: Entry, ids: Sequence[int], param: str) -> None:
    """Refuse a prompt that is empty or too long for the model's positions.

    Raises:
        APIError: 400.
    """
    most = entry.config.rope_max_length
    if not ids:
        raise APIError(f"{param} is empty; give some text.", param=param)
    if len(ids) > most:
        message = f"{param} has {len(ids)} tokens, and the model's context has {most}; shorten it."
        raise APIError(message, param=param, code="context_length_exceeded")


def as_ids(entry: Entry, value: Any, param: str) -> list[int] | None:
    """A list of token ids; None if it is something else.

    Raises:
        APIError: an id is not in the vocabulary.
    """
    if not isinstance(value, list) or not value or not all(type(one) is int for one in value):
        return None
    size = entry.config.vocab_size
    for one in value:
        if not 0 <= one < size:
            raise APIError(f"{param} has the token id {str(one)[:30]}; the vocabulary ends at {size - 1}.", param=param)
    return value


def encode(entry: Entry, text: str) -> list[int]:
    """The ids of a text as `generate` in Python encodes it: one that begins with BOS is a chat that was rendered."""
    tokenizer = entry.tokenizer
    if text.startswith(tokenizer.bos_token):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def close(context: Context) -> None:
    """Release what the context holds."""
    with suppress(RuntimeError):
        context.preparing.shutdown(wait=False, cancel_futures=True)
