"""Prompts that are processed at the start, so that requests which begin with them find them held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import OpenELMError, RequestError
from ..inputs import read_text_source, split_lines, to_path
from .chat import messages, render
from .checks import Check, read_fields, short_text, text
from .context import Context, check_length, encode
from .failures import APIError
from .models import Entry

_LINE: dict[str, Check] = {"model": short_text, "prompt": text, "messages": messages}


@dataclass
class Warm:
    """A prompt to process."""

    entry: Entry
    adapter: str | None
    ids: list[int]


def read_warm(context: Context, name: str) -> list[Warm]:
    """The prompts of a file: one on each line; in a .jsonl file objects with `prompt` or `messages`, and `model`.

    Raises:
        RequestError: the file cannot be read, or a line is not right, which is named.
    """
    path = to_path(name)
    try:
        lines = split_lines(read_text_source(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8 text (byte {error.start}).") from None
    is_json = name.lower().endswith((".jsonl", ".ndjson"))
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_read(context, json.loads(line) if is_json else {"prompt": line}))
        except (APIError, OpenELMError, ValueError, RecursionError) as error:
            raise RequestError(f"{name}:{number}: {error}") from None
    if not found:
        raise RequestError(f"{name} has no prompts; write one on each line.")
    return found


def _read(context: Context, values: Any) -> Warm:
    if not isinstance(values, dict):
        raise APIError("A line must be a JSON object.")
    given = read_fields(values, _LINE)
    if ("prompt" in given) == ("messages" in given):
        raise APIError("A line needs either prompt or messages.")
    entry, adapter = context.models.find(given.get("model"))
    if "messages" in given:
        return Warm(entry, adapter, render(context, entry, given["messages"]))
    ids = encode(entry, given["prompt"])
    check_length(entry, ids, "prompt")
    return Warm(entry, adapter, ids)


def warm(context: Context, prompts: list[Warm]) -> int:
    """Process prompts, in the engine's thread before it serves; returns the number of their tokens."""
    for one in prompts:
        resident = context.models.get(one.entry)
        assert resident is not None  # nothing else runs
        # The last piece of a prompt is not held where pieces must be exact, so a token more costs nothing.
        row = resident.engine.submit(one.ids, adapter=one.adapter, max_tokens=1)
        row.warns = False
        while resident.engine.is_busy:
            resident.engine.step()
        if row.error is not None:
            raise row.error
    return sum(len(one.ids) for one in prompts)
