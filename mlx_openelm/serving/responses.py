"""`/v1/responses`, for text: OpenAI's newer form of a chat. Nothing is stored here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..generation.piece import Piece
from .chat import MAX_MESSAGES, render
from .checks import (
    Check,
    array,
    boolean,
    check_unused,
    choice,
    integer,
    mapping,
    max_tokens,
    only,
    read_fields,
    short_text,
    text,
)
from .completions import MAX_LOGPROBS, stream, whole
from .context import Context, new_id, now
from .failures import APIError
from .logprobs import chat_logprobs
from .models import Entry
from .protocol import ABOUT, SAMPLING, STREAM_OPTIONS, options_of, schema_options
from .texts import Texts, event

_LOGPROBS = "message.output_text.logprobs"
_ROLES = ("system", "developer", "user", "assistant")
_ITEM: dict[str, Check] = {
    "type": choice("message"),
    "role": choice(*_ROLES),
    "content": lambda name, value: value,
    "id": short_text,
    "status": short_text,
}
_PART: dict[str, Check] = {
    "type": choice("input_text", "output_text"),
    "text": text,
    "annotations": only([]),
    "logprobs": lambda name, value: value,
}


def _input(name: str, value: Any) -> list[dict[str, Any]]:
    """The messages of an input: a text, or a list of messages, those of earlier answers too."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise APIError(f"{name} must be a text, or a list of 1 to {MAX_MESSAGES} messages.", param=name)
    found = []
    for number, item in enumerate(value):
        place = f"{name}[{number}]"
        given = read_fields(mapping(place, item), _ITEM, f"{place}.")
        for key in ("role", "content"):
            if key not in given:
                raise APIError(f"{place}.{key} is missing.", param=f"{place}.{key}")
        found.append({"role": given["role"], "content": _text_of(f"{place}.content", given["content"])})
    return found


def _text_of(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise APIError(f"{name} must be a text, or a list of parts with texts.", param=name)
    parts = []
    for number, part in enumerate(value):
        given = read_fields(mapping(f"{name}[{number}]", part), _PART, f"{name}[{number}].")
        for key in ("type", "text"):
            if key not in given:
                raise APIError(f"{name}[{number}].{key} is missing.", param=f"{name}[{number}].{key}")
        parts.append(given["text"])
    return "".join(parts)


def _text_format(name: str, value: Any) -> dict[str, Any]:
    """`text`: the options of its format, and the format itself, which the answer repeats."""
    given = read_fields(mapping(name, value), {"format": mapping, "verbosity": only("medium")}, f"{name}.")
    chosen = given.get("format", {"type": "text"})
    kind = choice("text", "json_object", "json_schema")(f"{name}.format.type", chosen.get("type"))
    rest = {key: one for key, one in chosen.items() if key != "type"}
    if kind == "json_schema":
        options = schema_options(f"{name}.format", rest)
    else:
        read_fields(rest, {}, f"{name}.format.")
        options = {"json_object": True} if kind == "json_object" else {}
    return {"options": options, "format": chosen}


def _include(name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not all(one == _LOGPROBS for one in value):
        raise APIError(f"{name} may only have {_LOGPROBS}.", param=name)
    return value


def _reasoning(name: str, value: Any) -> dict[str, Any]:
    return read_fields(mapping(name, value), {"effort": only("none"), "summary": only()}, f"{name}.")


FIELDS: dict[str, Check] = {
    "model": short_text,
    "input": _input,
    "instructions": text,
    "max_output_tokens": max_tokens(1),
    "stream": boolean,
    "stream_options": lambda name, value: read_fields(
        mapping(name, value), {"include_obfuscation": STREAM_OPTIONS["include_obfuscation"]}, f"{name}."
    ),
    "text": _text_format,
    "top_logprobs": integer(0, MAX_LOGPROBS),
    "include": _include,
    "truncation": only("disabled"),
    "tools": array,
    "tool_choice": only("none", "auto"),
    "parallel_tool_calls": boolean,
    "background": only(False),
    "reasoning": _reasoning,
    "previous_response_id": only(),
    "conversation": only(),
    "prompt": only(),
    "max_tool_calls": only(),
    **{key: check for key, (_, check) in SAMPLING.items() if key != "response_format"},
    **ABOUT,
}


async def responses(context: Context, request: Request) -> Response:
    """`POST /v1/responses`."""
    given, entry, adapter = await context.take(request, FIELDS, "input")
    check_unused(given, "tools", "tool_choice")
    conversation = given["input"]
    if "instructions" in given:
        conversation = [{"role": "system", "content": given["instructions"]}, *conversation]
    ids = await context.prepare(request, lambda: render(context, entry, conversation, param="input"))
    options = options_of(given, context.options)
    options["max_tokens"] = given.get("max_output_tokens", context.options.max_tokens)
    options |= given.get("text", {}).get("options", {})
    options["top_logprobs"] = given.get("top_logprobs", 0)
    constraint = await context.constrain(request, entry, options, "text.format")
    texts = Texts(context.worker, entry, adapter, [ids], [options], constraint, max_tokens="max_output_tokens")
    response = _Response(given, entry, texts, options)
    texts.submit()
    if given.get("stream"):
        return await stream(context, request, "responses", response.events(), texts, response.failed)
    return await whole(request, response.whole(), texts)


class _Response:
    """One request: its events, or its whole answer."""

    def __init__(self, given: dict[str, Any], entry: Entry, texts: Texts, options: dict[str, Any]):
        self.given, self.entry, self.texts, self.options = given, entry, texts, options
        self._id, self._item_id, self._created = new_id("resp_"), new_id("msg_"), now()
        self._number = 0  # of the next event
        self._wants_logprobs = _LOGPROBS in given.get("include", []) or "top_logprobs" in given

    async def whole(self) -> dict[str, Any]:
        (result,) = await self.texts.collect()
        return self._object(result.pieces)

    async def events(self) -> AsyncGenerator[bytes, None]:
        empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        yield b"".join(
            [
                self._event("response.created", response=self._object(None)),
                self._event("response.in_progress", response=self._object(None)),
                self._event("response.output_item.added", output_index=0, item=self._item("in_progress", [])),
                self._event("response.content_part.added", **place, part=empty),
            ]
        )
        pieces: list[Piece] = []
        async for batch in self.texts.events():
            new = [piece for _, piece in batch]
            pieces += new
            parts = [
                self._event("response.output_text.delta", **place, delta=piece.text, logprobs=self._logprobs([piece]))
                for piece in new
                if piece.text or self._logprobs([piece])
            ]
            if parts:
                yield b"".join(parts)
        final = self._object(pieces)
        (item,) = final["output"]
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield b"".join(
            [
                self._event("response.output_text.done", **place, **done),
                self._event("response.content_part.done", **place, part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{final['status']}", response=final),
            ]
        )

    def failed(self, error: APIError) -> bytes:
        """The event of an error in the middle."""
        return self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, kind: str, **values: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return event({"type": kind, "sequence_number": number, **values}, kind)

    def _logprobs(self, pieces: list[Piece]) -> list[dict[str, Any]]:
        if not self._wants_logprobs:
            return []
        return chat_logprobs(self.entry.tokenizer, pieces, self.given.get("top_logprobs", 0))

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _object(self, pieces: list[Piece] | None) -> dict[str, Any]:
        """The response, with all pieces, or before the first."""
        status, details, output, usage = "in_progress", None, [], None
        if pieces is not None:
            is_cut = pieces[-1].finish_reason == "length"
            status = "incomplete" if is_cut else "completed"
            details = {"reason": "max_output_tokens"} if is_cut else None
            part = {"type": "output_text", "text": "".join(piece.text for piece in pieces), "annotations": []}
            output = [self._item(status, [{**part, "logprobs": self._logprobs(pieces)}])]
            counts = self.texts.usage([0], len(pieces))
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        given = self.given
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": details,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "model": given.get("model", self.entry.name),
            "output": output,
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": self.options["temp"],
            "text": {"format": given.get("text", {}).get("format", {"type": "text"})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_logprobs": given.get("top_logprobs", 0),
            "top_p": self.options["top_p"],
            "truncation": "disabled",
            "usage": usage,
            "user": given.get("user"),
            "metadata": given.get("metadata", {}),
        }
