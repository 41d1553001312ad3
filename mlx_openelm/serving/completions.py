"""`/v1/completions`: text that follows a prompt."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..generation.piece import Piece
from ..generation.scoring import prompt_logprobs
from ..model import OpenELM
from .checks import Check, boolean, integer, max_tokens, only
from .context import Context, answer, as_ids, check_characters, check_length, encode, new_id, now
from .failures import APIError
from .logprobs import Place, completion_logprobs, shown
from .models import Entry
from .protocol import COMMON, options_of, seeded
from .texts import EventStream, Result, Texts, event, while_here
from .work import Task

MAX_PROMPTS = 128
MAX_LOGPROBS = 20


FIELDS: dict[str, Check] = {
    **COMMON,
    "prompt": lambda name, value: value,  # it depends on the model: see `read_prompts`
    "max_tokens": max_tokens(0),
    "echo": boolean,
    "logprobs": integer(0, MAX_LOGPROBS),
    "best_of": only(1),
    "suffix": only(""),
}


async def completions(context: Context, request: Request) -> Response:
    """`POST /v1/completions`."""
    given, entry, adapter = await context.take(request, FIELDS, "prompt")
    check_stream(given)
    prompts = await context.prepare(request, lambda: read_prompts(entry, given["prompt"]))
    options = options_of(given, context.options)
    if "logprobs" in given:
        options["top_logprobs"] = given["logprobs"]
    constraint = await context.constrain(request, entry, options) if options["max_tokens"] else None
    n, echo = given.get("n", 1), given.get("echo", False)
    texts = Texts(
        context.worker,
        entry,
        adapter,
        [ids for ids in prompts for _ in range(n)],
        [{**seeded(options, index), "echo": echo} for _ in prompts for index in range(n)],
        constraint,
        continues=True,
    )
    completion = _Completion(given, entry, texts, prompts, n)

    async def begin() -> None:
        if echo and "logprobs" in given:
            completion.scores = await _score(context, entry, adapter, prompts, given["logprobs"])
        if options["max_tokens"]:
            texts.submit()

    await while_here(request, begin())
    if given.get("stream"):
        return await stream(context, request, "completions", completion.events(), texts)
    return await whole(request, completion.whole(), texts)


async def stream(
    context: Context,
    request: Request,
    route: str,
    events: AsyncGenerator[bytes, None],
    texts: Texts,
    failed: Callable[[APIError], bytes] = lambda error: event(error.body),
) -> EventStream:
    """A stream that ends its texts when the client leaves; APIError, before it begins, if the engine refuses them."""
    try:
        await while_here(request, texts.taken())
    except BaseException:
        texts.cancel()
        raise

    def ended(outcome: str) -> None:
        texts.cancel()
        context.metrics.requests.labels(route, outcome).inc()

    return EventStream(events, request.state.deadline, ended, failed)


async def whole(request: Request, body: Awaitable[dict[str, Any]], texts: Texts) -> Response:
    """An answer in one piece, whose texts end when the client leaves."""
    try:
        return answer(await while_here(request, body))
    finally:
        texts.cancel()


def check_stream(given: dict[str, Any]) -> None:
    """Refuse what only a stream can have."""
    if "stream_options" in given and not given.get("stream"):
        raise APIError("stream_options needs stream: true.", param="stream_options")


def read_prompts(entry: Entry, value: Any, name: str = "prompt", most: int = MAX_PROMPTS) -> list[list[int]]:
    """The ids of each prompt: a text, a list of texts, a list of ids, or a list of such lists."""
    form = APIError(f"{name} must be a text, a list of texts, or token ids.", param=name)
    if not isinstance(value, str | list):
        raise form
    if not value:
        raise APIError(f"{name} is empty; give some text.", param=name)
    ids = as_ids(entry, value, name)
    each = [value] if isinstance(value, str) else value if ids is None else [ids]
    if len(each) > most:
        raise APIError(f"{name} may have {most} texts at most, got {len(each)}.", param=name)
    found = []
    for one in each:
        if isinstance(one, str):
            check_characters(entry, len(one), name)
        ids = (encode(entry, one) if one else []) if isinstance(one, str) else as_ids(entry, one, name)
        if ids is None:
            raise form
        check_length(entry, ids, name)
        found.append(ids)
    return found


async def _score(
    context: Context, entry: Entry, adapter: str | None, prompts: Sequence[Sequence[int]], top: int
) -> list[list[Any]]:
    """The log-probabilities of the tokens of prompts."""

    def work(model: OpenELM) -> Generator[None, None, list[list[Any]]]:
        scores = []
        for ids in prompts:
            scores.append((yield from prompt_logprobs(model, ids, top)))
        return scores

    task = Task(entry, adapter, work)
    context.worker.submit([task])
    try:
        scores: list[list[Any]] = await task.future
        return scores
    finally:
        context.worker.cancel([task])


class _Completion:
    """One request: its chunks, or its whole answer.

    Args:
        n: the number of texts for each prompt.
    """

    def __init__(self, given: dict[str, Any], entry: Entry, texts: Texts, prompts: list[list[int]], n: int):
        self.given, self.entry, self.texts, self.prompts, self.n = given, entry, texts, prompts, n
        self.scores: list[list[Any]] | None = None
        self.generates = given.get("max_tokens") != 0
        self._offsets = [0] * len(texts.texts)
        self._head = {"id": new_id("cmpl-"), "object": "text_completion", "created": now()}
        self._head["model"] = given.get("model", entry.name)

    async def whole(self) -> dict[str, Any]:
        if self.generates:
            results = await self.texts.collect()
        else:
            results = [Result() for _ in self.texts.texts]
        choices = [self._choice(index, result.pieces, is_first=True) for index, result in enumerate(results)]
        return {**self._head, "choices": choices, "usage": self._usage(sum(len(one.pieces) for one in results))}

    async def events(self) -> AsyncGenerator[bytes, None]:
        wants_usage = self.given.get("stream_options", {}).get("include_usage", False)
        usage = {"usage": None} if wants_usage else {}
        generated, begun = 0, set()
        if not self.generates:
            for index in range(len(self.texts.texts)):
                yield event({**self._head, "choices": [self._choice(index, [], is_first=True)], **usage})
        else:
            async for batch in self.texts.events():
                chunks = []
                for index, piece in batch:
                    choice = self._choice(index, [piece], is_first=index not in begun)
                    begun.add(index)
                    generated += 1
                    if choice["text"] or choice["finish_reason"] or choice["logprobs"]:
                        chunks.append(event({**self._head, "choices": [choice], **usage}))
                if chunks:
                    yield b"".join(chunks)
        if wants_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(generated)})
        yield b"data: [DONE]\n\n"

    def _usage(self, generated: int) -> dict[str, Any]:
        return self.texts.usage(range(0, len(self.texts.texts), self.n), generated)

    def _choice(self, index: int, pieces: Sequence[Piece], is_first: bool) -> dict[str, Any]:
        """A text, or the next part of one."""
        tokenizer, ids = self.entry.tokenizer, self.prompts[index // self.n]
        echo = bool(self.given.get("echo"))
        finish_reason = pieces[-1].finish_reason if pieces else "length"
        text = "".join(piece.text for piece in pieces)
        if not self.generates and echo:
            text = tokenizer.decode(ids)
        logprobs = None
        if "logprobs" in self.given:
            places: list[Place] = self._prompt_places(index) if echo and is_first else []
            prompt = tokenizer.decode(ids) if echo and is_first else ""
            self._offsets[index] += len(prompt)
            for piece in pieces:
                added = len(piece.text) - (len(prompt) if piece is pieces[0] else 0)
                if shown(tokenizer, [piece]):
                    places.append((piece.token, piece.logprob, piece.top_logprobs, self._offsets[index]))
                self._offsets[index] += added
            logprobs = completion_logprobs(tokenizer, places, self.given["logprobs"])
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _prompt_places(self, index: int) -> list[Place]:
        assert self.scores is not None
        ids, scores = self.prompts[index // self.n], self.scores[index // self.n]
        decoder, offset, places = self.entry.tokenizer.streaming_decoder(), 0, []
        for token, (logprob, likeliest) in zip(ids, [(None, []), *scores], strict=True):
            places.append((token, logprob, likeliest, offset))
            offset += len(decoder.add(token))
        return places
