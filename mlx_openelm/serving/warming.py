"""Prompts that are processed at the start, so that requests which begin with them find them held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .. import backend
from ..errors import OpenELMError, RequestError
from ..inputs import read_text_source, split_lines, to_path
from ..wording import counted
from .chat import messages, render
from .checks import Check, read_fields, short_text, text
from .context import Context, check_length, encode
from .failures import APIError
from .models import Entry

_LINE: dict[str, Check] = {"model": short_text, "prompt": text, "messages": messages}


@dataclass
class Warm:
    """A prompt to process, and the line of the file that it is on."""

    entry: Entry
    adapter: str | None
    ids: list[int]
    line: int


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
            found.append(_read(context, json.loads(line) if is_json else {"prompt": line}, number))
        except (APIError, OpenELMError, ValueError, RecursionError) as error:
            raise RequestError(f"{name}:{number}: {error}") from None
    if not found:
        raise RequestError(f"{name} has no prompts; write one on each line.")
    return found


def _read(context: Context, values: Any, line: int) -> Warm:
    if not isinstance(values, dict):
        raise APIError("A line must be a JSON object.")
    given = read_fields(values, _LINE)
    if ("prompt" in given) == ("messages" in given):
        raise APIError("A line needs either prompt or messages.")
    entry, adapter = context.models.find(given.get("model"))
    if "messages" in given:
        return Warm(entry, adapter, render(context, entry, given["messages"]), line)
    ids = encode(entry, given["prompt"])
    check_length(entry, ids, "prompt")
    return Warm(entry, adapter, ids, line)


def warm(context: Context, prompts: list[Warm]) -> list[Warm]:
    """Process prompts as requests do that give no options, in the engine's thread before it serves.

    Returns:
        Those that no later request will find held: most are too short.
    """
    options, missed = {**context.options.for_requests(), "max_tokens": 1}, []
    for one in prompts:
        resident = context.models.get(one.entry)
        assert resident is not None  # nothing else runs
        # The last piece of a prompt is not held where pieces must be exact, so a token more costs nothing.
        row = resident.engine.submit(one.ids, adapter=one.adapter, **options)
        row.warns = False
        while resident.engine.is_busy:
            resident.engine.step()
        if row.error is not None:
            raise row.error
        if not resident.engine.held_tokens(row):
            missed.append(one)
    return missed


def missed_prompts(context: Context, name: str, missed: list[Warm]) -> str:
    """The warning about prompts of a file that are not held."""
    least = backend.MANY_POSITIONS
    whole = backend.prefill_step_size(size=context.options.prefill_step_size) + least
    return (
        f"{counted(len(missed), 'prompt')} of {name} {'is' if len(missed) == 1 else 'are'} not held, the first on line "
        f"{missed[0].line}; make prompts longer: {least} tokens are held, or {whole} where only whole pieces are, "
        "such as with an adapter, as far as --prompt-cache-bytes allows."
    )
