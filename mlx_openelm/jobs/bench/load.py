"""Load on a server: conversations of many clients at once, and how fast and how well they are answered."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from typing import Annotated, Any

from ...errors import OpenELMError, RequestError
from ...generation.options import check_number
from ...options import Option, Options
from .http_stream import Client, StatusError, check_url

_CHAT = "/v1/chat/completions"
# What texts are made of. Every conversation begins alike, as those with one system prompt do.
_WORDS = (
    "the king and queen of all this land who came to see a new day with us in the town where my lord did tell him "
    "not to go but then he said that we must do what is best for her son so they will have more time now as you know it"
)


@dataclass(frozen=True, repr=False)
class LoadOptions(Options):
    """The options of `bench --serve`: who asks, how often, for how long.

    - `clients`: without `rate`, how many ask, each as soon as it was answered.
    - `rate`: requests a second on average, at random times (a Poisson process), however long the answers take.
    - `turns`: messages of a conversation. Each goes on from the answer before it, so that its beginning is known.
    - `disconnects`: the share of requests whose client leaves before the end.
    """

    serve: Annotated[
        str | None, Option("Measure the server at this address instead.", group="Load", metavar="URL", default="none")
    ] = None
    clients: Annotated[int, Option("Clients of --serve, each of which waits for its answer.", group="Load")] = 8
    rate: Annotated[
        float | None,
        Option("Requests a second, at random times, in place of --clients.", group="Load", default="off"),
    ] = None
    seconds: Annotated[float, Option("Seconds in which requests are sent.", group="Load")] = 10.0
    turns: Annotated[int, Option("Messages of a conversation, which share their beginning.", group="Load")] = 3
    disconnects: Annotated[float, Option("Share of requests whose client leaves early.", group="Load")] = 0.0
    load_seed: Annotated[int, Option("Seed of the texts, times and disconnects.", group="Load")] = 0

    def validate(self) -> None:
        """Raise a `RequestError` that names the flag of a bad value."""
        if self.serve is not None:
            check_url(self.serve)
        check_number("--clients", self.clients, 1, 10_000, "from 1 to 10000", kind=Integral)
        if self.rate is not None:
            check_number("--rate", self.rate, 0.001, 10_000, "from 0.001 to 10000 requests a second")
        check_number("--seconds", self.seconds, 0.1, 86_400, "from 0.1 to 86400")
        check_number("--turns", self.turns, 1, 1000, "from 1 to 1000", kind=Integral)
        check_number("--disconnects", self.disconnects, 0, 1, "from 0 to 1")
        check_number("--load-seed", self.load_seed, 0, math.inf, "0 or more", kind=Integral)


@dataclass
class Load:
    """What was measured, times in seconds.

    Attributes:
        tokens: generated for clients that stayed or until they left, as far as they arrived.
        first: from the request to the first token, of each that had one.
        between: between two tokens.
        errors: how often, by what they say.
    """

    model: str
    seconds: float = 0.0
    answered: int = 0
    left: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """The numbers of `--json`."""
        return {
            "model": self.model,
            "seconds": self.seconds,
            "requests": self.answered + self.left + self.errors.total(),
            "answered": self.answered,
            "left": self.left,
            "errors": dict(self.errors),
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "requests_per_second": self.answered / self.seconds,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "time_to_first_token": percentiles(self.first),
            "inter_token": percentiles(self.between),
        }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The median and the slowest 5% and 1%, by rank; None without values."""
    ordered = sorted(values)
    return {
        f"p{share}": ordered[min(len(ordered) - 1, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None
        for share in (50, 95, 99)
    }


def measure_load(
    options: LoadOptions,
    *,
    model: str | None = None,
    prompt_tokens: int = 64,
    generation_tokens: int = 64,
    key: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Load:
    """Send requests to a server, and measure its answers; those that run at the end are waited for.

    Args:
        model: the name in the requests; by default the first that the server lists.
        prompt_tokens, generation_tokens: about so many in each message, and at most so many in each answer.
        key: an API key.
        progress: called with the seconds that are over, and all of them.

    Raises:
        RequestError: a bad option.
        OpenELMError: the server cannot be reached, or lists no model.
    """
    options.validate()
    if options.serve is None:
        raise RequestError("--serve is missing: the address of the server.")
    client = Client(options.serve, key)
    return asyncio.run(_Generator(options, client, prompt_tokens, generation_tokens).run(model, progress))


class _Generator:
    """Clients of one server, all in this thread."""

    def __init__(self, options: LoadOptions, client: Client, prompt_tokens: int, generation_tokens: int):
        self._options, self._client = options, client
        self._prompt_tokens, self._generation_tokens = prompt_tokens, generation_tokens
        self._random, self._words = random.Random(options.load_seed), _WORDS.split()
        self._started: list[list[dict[str, str]]] = []  # conversations that can go on
        self._shared = self._text(prompt_tokens)
        self._load = Load("")

    async def run(self, model: str | None, progress: Callable[[int, int], None]) -> Load:
        """Put the load on the server and measure it; `model` None is the first that the server lists."""
        self._load.model = await self._first_model() if model is None else model
        started = time.perf_counter()
        end = started + self._options.seconds
        reporting = asyncio.ensure_future(_report(self._options.seconds, progress))
        try:
            await (self._clients(end) if self._options.rate is None else self._arrivals(end, self._options.rate))
        finally:
            reporting.cancel()
        self._load.seconds = time.perf_counter() - started
        return self._load

    async def _first_model(self) -> str:
        try:
            listed = await self._client.get("/v1/models")
            return str(listed["data"][0]["id"])
        except StatusError as error:
            raise OpenELMError(f"The server answers {error}.") from None
        except (OSError, asyncio.IncompleteReadError, ValueError, LookupError, TypeError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise OpenELMError(f"{self._options.serve} gives no list of models: {reason}; is a server there?") from None

    async def _clients(self, end: float) -> None:
        """Clients that ask again as soon as they are answered."""

        async def one() -> None:
            while time.perf_counter() < end:
                await self._ask()

        await asyncio.gather(*(one() for _ in range(self._options.clients)))

    async def _arrivals(self, end: float, rate: float) -> None:
        """Requests at random times, whatever the others do."""
        running: set[asyncio.Task[None]] = set()
        following = time.perf_counter()
        while (following := following + self._random.expovariate(rate)) < end:
            await asyncio.sleep(max(0.0, following - time.perf_counter()))
            task = asyncio.ensure_future(self._ask())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _ask(self) -> None:
        """The next message of a conversation, or the first of a new one."""
        conversation = self._started.pop(self._random.randrange(len(self._started))) if self._started else []
        if not conversation:
            conversation = [{"role": "system", "content": self._shared}]
        conversation.append({"role": "user", "content": self._text(self._prompt_tokens)})
        leaves_after = None
        if self._random.random() < self._options.disconnects:
            leaves_after = self._random.randrange(self._generation_tokens)
        body = {
            **{"model": self._load.model, "messages": conversation, "max_tokens": self._generation_tokens},
            **{"stream": True, "stream_options": {"include_usage": True}},
        }
        try:
            answer = await self._read(body, leaves_after)
        except StatusError as error:
            self._load.errors[f"HTTP {error.status}"] += 1
            await asyncio.sleep(0.05)  # a server that refuses is not asked in a tight loop
            return
        except (OSError, asyncio.IncompleteReadError, ValueError, LookupError) as error:
            self._load.errors[type(error).__name__] += 1
            await asyncio.sleep(0.05)
            return
        if answer is not None and len(conversation) < 2 * self._options.turns:
            conversation.append({"role": "assistant", "content": answer})
            self._started.append(conversation)

    async def _read(self, body: dict[str, Any], leaves_after: int | None) -> str | None:
        """The answer to a request; None if the client left."""
        load, parts, generated, last = self._load, list[str](), 0, time.perf_counter()
        events = self._client.events(_CHAT, body)
        try:
            if leaves_after == 0:  # before the first token, or while the request waits
                with suppress(TimeoutError, StopAsyncIteration):
                    await asyncio.wait_for(anext(events), self._random.random() * 0.1)
                load.left += 1
                return None
            async for event in events:
                if usage := event.get("usage"):
                    generated = usage["completion_tokens"]
                    load.prompt_tokens += usage["prompt_tokens"]
                    load.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                for choice in event["choices"]:
                    if content := choice["delta"].get("content"):
                        now = time.perf_counter()
                        (load.between if parts else load.first).append(now - last)
                        last = now
                        parts.append(content)
                        if len(parts) == leaves_after:
                            load.left += 1
                            return None
            load.answered += 1
            load.tokens += generated - len(parts) if generated else 0  # some have no text
            return "".join(parts)
        finally:
            load.tokens += len(parts)
            await events.aclose()

    def _text(self, count: int) -> str:
        return " ".join(self._random.choices(self._words, k=count))


async def _report(seconds: float, progress: Callable[[int, int], None]) -> None:
    for second in range(int(seconds)):
        progress(second, int(seconds))
        await asyncio.sleep(1)
