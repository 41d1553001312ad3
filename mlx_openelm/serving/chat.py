"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..errors import RequestError
from ..text.chat_messages import ROLES, plain_text
from .checks import (
    Check,
    array,
    boolean,
    check_unused,
    choice,
    integer,
    max_tokens,
    only,
    read_fields,
    short_text,
    text,
)
from .completions import MAX_LOGPROBS, check_stream, stream, whole
from .context import Context, check_characters, check_length, new_id, now
from .failures import APIError, as_api_error
from .logprobs import chat_logprobs
from .models import Entry
from .protocol import COMMON, options_of, seeded
from .texts import Texts, event

MAX_MESSAGES = 4096


def _content(name: str, value: Any) -> Any:
    """A text, or a list of parts that are texts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise APIError(f"{name} must be a text, or a list of parts with texts.", param=name)
    parts = []
    for number, part in enumerate(value):
        place = f"{name}[{number}]"
        if not isinstance(part, dict):
            raise APIError(f'{place} must be {{"type": "text", "text": ...}}.', param=place)
        parts.append({"type": "text", **read_fields(part, _PART, f"{place}.")})
        if "text" not in parts[-1]:
            raise APIError(f"{place}.text is missing.", param=f"{place}.text")
    return parts


def _calls(name: str, value: Any) -> Any:
    """Calls of tools, for templates that render them; others refuse them."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise APIError(f"{name} must be a list of objects.", param=name)
    return value


_PART: dict[str, Check] = {"type": choice("text"), "text": text}
_MESSAGE: dict[str, Check] = {
    "role": choice(*ROLES),
    "content": _content,
    "name": short_text,
    "tool_calls": _calls,
    "tool_call_id": short_text,
    "reasoning_content": text,
    "refusal": only(""),
    "parsed": lambda name, value: None,  # what OpenAI's clients made of `content`, in a message that they send back
    "annotations": only([]),
    "audio": only(),
    "function_call": only(),
}


def messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Checked messages."""
    if not isinstance(value, list) or not value:
        raise APIError(f"{name} must be a list with at least one message.", param=name)
    if len(value) > MAX_MESSAGES:
        raise APIError(f"{name} may have {MAX_MESSAGES} messages at most, got {len(value)}.", param=name)
    found = []
    for number, message in enumerate(value):
        place = f"{name}[{number}]"
        if not isinstance(message, dict):
            raise APIError(f'{place} must be {{"role": ..., "content": ...}}.', param=place)
        given = read_fields(message, _MESSAGE, f"{place}.")
        given.pop("parsed", None)
        if not given.get("tool_calls", True):
            del given["tool_calls"]
        for key in ("role",) if "tool_calls" in given else ("role", "content"):
            if key not in given:
                raise APIError(f"{place}.{key} is missing.", param=f"{place}.{key}")
        found.append(given)
    return found


FIELDS: dict[str, Check] = {
    **COMMON,
    "messages": messages,
    "max_completion_tokens": max_tokens(1),
    "logprobs": boolean,
    "top_logprobs": integer(0, MAX_LOGPROBS),
    "continue_final_message": boolean,
    "tools": array,
    "tool_choice": only("none", "auto"),
    "functions": array,
    "function_call": only("none", "auto"),
    "parallel_tool_calls": boolean,
    "modalities": only(["text"]),
    "audio": only(),
    "prediction": only(),
    "reasoning_effort": only("none"),
    "verbosity": only("medium"),
    "web_search_options": only(),
}


async def chat(context: Context, request: Request) -> Response:
    """`POST /v1/chat/completions`."""
    given, entry, adapter = await context.take(request, FIELDS, "messages")
    check_stream(given)
    if given.get("top_logprobs") and not given.get("logprobs"):
        raise APIError("top_logprobs needs logprobs: true.", param="top_logprobs")
    check_unused(given, "tools", "tool_choice")
    check_unused(given, "functions", "function_call")
    continues = given.get("continue_final_message", False)
    ids = await context.prepare(request, lambda: render(context, entry, given["messages"], continues))
    options = options_of(given, context.options)
    options["top_logprobs"] = given.get("top_logprobs", 0)
    constraint = await context.constrain(request, entry, options)
    n = given.get("n", 1)
    each = [seeded(options, index) for index in range(n)]
    texts = Texts(context.worker, entry, adapter, [ids] * n, each, constraint, continues=continues)
    answers = _Chat(given, entry, texts)
    texts.submit()
    if given.get("stream"):
        return await stream(context, request, "chat/completions", answers.events(), texts)
    return await whole(request, answers.whole(), texts)


def render(
    context: Context,
    entry: Entry,
    conversation: list[dict[str, Any]],
    continues: bool = False,
    param: str = "messages",
) -> list[int]:
    """The ids of a conversation, up to where the answer begins.

    Args:
        param: the key of the request that has it, for errors.

    Raises:
        APIError: the template cannot render it, or it is too long.
    """
    check_characters(entry, sum(len(plain_text(message.get("content"))) for message in conversation), param)
    template = context.template or entry.tokenizer.default_template
    try:
        ids = entry.tokenizer.apply_chat_template(
            conversation, template, add_generation_prompt=not continues, continue_final_message=continues
        )
    except RequestError as error:
        raise APIError(f"{param}: {as_api_error(error).message}", param=param) from None
    check_length(entry, ids, param)
    return ids


class _Chat:
    """One request: its chunks, or its whole answer."""

    def __init__(self, given: dict[str, Any], entry: Entry, texts: Texts):
        self.given, self.entry, self.texts = given, entry, texts
        self._head = {"id": new_id("chatcmpl-"), "created": now(), "model": given.get("model", entry.name)}

    async def whole(self) -> dict[str, Any]:
        results = await self.texts.collect()
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs(result.pieces),
                "finish_reason": result.finish_reason,
            }
            for index, result in enumerate(results)
        ]
        generated = sum(len(result.pieces) for result in results)
        return {
            "object": "chat.completion",
            **self._head,
            "choices": choices,
            "usage": self.texts.usage([0], generated),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        wants_usage = self.given.get("stream_options", {}).get("include_usage", False)
        generated = 0
        roles = [{"role": "assistant", "content": ""} for _ in self.texts.texts]
        yield b"".join(self._chunk(index, delta, wants_usage) for index, delta in enumerate(roles))
        async for batch in self.texts.events():
            chunks = []
            for index, piece in batch:
                generated += 1
                logprobs = self._logprobs([piece])
                if piece.text or (logprobs and logprobs["content"]):
                    chunks.append(self._chunk(index, {"content": piece.text}, wants_usage, logprobs))
                if piece.finish_reason is not None:
                    chunks.append(self._chunk(index, {}, wants_usage, None, piece.finish_reason))
            if chunks:
                yield b"".join(chunks)
        if wants_usage:
            head = {"object": "chat.completion.chunk", **self._head}
            yield event({**head, "choices": [], "usage": self.texts.usage([0], generated)})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        wants_usage: bool,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if wants_usage else {}
        return event({"object": "chat.completion.chunk", **self._head, "choices": [choice], **usage})

    def _logprobs(self, pieces: list[Any]) -> dict[str, Any] | None:
        if not self.given.get("logprobs"):
            return None
        content = chat_logprobs(self.entry.tokenizer, pieces, self.given.get("top_logprobs", 0))
        return {"content": content, "refusal": None}
