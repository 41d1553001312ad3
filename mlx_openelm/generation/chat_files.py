"""Conversations in files: JSON with OpenAI's messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.atomic import new_file
from ..inputs import read_text, to_path
from ..text.chat_messages import Message, check_messages

# The longest conversation that is read, in bytes.
_MAX_BYTES = 1 << 24


def save_messages(path: str | Path, messages: Sequence[Message], *, overwrite: bool = False) -> Path:
    """Write `{"messages": [...]}`, which `lora --data` reads too; returns the path, with `.json` if it had no suffix.

    Raises:
        RequestError: the file exists and `overwrite` is false, or cannot be created.
        OpenELMError: writing failed; the file is as it was.
    """
    path = conversation_file(path)
    if path.is_dir():
        raise RequestError(f"{path} is a folder, not a file.")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} exists; choose another name, or replace it with --overwrite.")
    text = json.dumps({"messages": list(messages)}, ensure_ascii=False, indent=2)
    with new_file(path) as partial:
        partial.write_text(f"{text}\n", encoding="utf-8", errors="replace")
    return path


def load_messages(path: str | Path) -> tuple[list[Message], Path]:
    """The messages of a file, and its path: `{"messages": [...]}`, as in a request to OpenAI's API, or a bare list.

    Raises:
        RequestError: there is no such file, or it has no such messages.
    """
    path = given if (given := to_path(path)).exists() else conversation_file(path)
    text = read_text(path, max_bytes=_MAX_BYTES)
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"{path} is not a conversation: it is not JSON.") from None
    messages = values.get("messages") if isinstance(values, dict) else values
    if not isinstance(messages, list):
        raise RequestError(f'{path} is not a conversation: it has no list of messages, as in {{"messages": [...]}}.')
    try:
        check_messages(messages)
    except RequestError as error:
        raise RequestError(f"{path} is not a conversation: {error}") from None
    return messages, path


def conversation_file(name: str | Path) -> Path:
    """The path that a name stands for: `hamlet` is `hamlet.json`."""
    path = to_path(name)
    return path if path.suffix or not path.name else path.with_suffix(".json")
