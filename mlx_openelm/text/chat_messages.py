"""Conversations: checking messages, and preparing them for a chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError, quote

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Message = Mapping[str, Any]

# What a message may have instead of a content, in OpenAI's newer and older form.
_CALLS = ("tool_calls", "function_call")
# Keys of an assistant's reasoning: templates read the first, gpt-oss's template the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# A template that handles parts reads the text of each.
_READS_PARTS = re.compile(r"""\[\s*["']text["']\s*\]|\.text\b""")


def check_messages(messages: Sequence[Message], continue_final_message: bool = False) -> None:
    """Raise `RequestError` unless `messages` is a non-empty list of `{"role": ..., "content": text}`.

    A content may also be a list of text parts; an assistant's may be missing if it has tool calls.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError('Messages must be a list with at least one {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        calls = isinstance(message, Mapping) and any(message.get(key) for key in _CALLS)
        if not isinstance(message, Mapping) or "role" not in message or not ("content" in message or calls):
            raise RequestError(f'Message {index} must be an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise RequestError(f"Message {index} has role {quote(message['role'])}: use one of {', '.join(ROLES)}")
        if calls and message["role"] != "assistant":
            raise RequestError(f"Message {index} has tool calls, which only an assistant can make")
        content = message.get("content")
        if isinstance(content, list | tuple):
            _check_parts(content, index)
        elif not isinstance(content, str) and not (content is None and calls):
            raise RequestError(f"The content of message {index} must be text")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise RequestError("Only an assistant's message can be continued, and the last message is not one")
    if continue_final_message and messages[-1].get("content") in (None, [], ()):
        raise RequestError("The last message has no content that could be continued")


def _check_parts(parts: Sequence[Any], index: int) -> None:
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind != "text":
            raise RequestError(
                f"Part {number} of the content of message {index} is of type {quote(kind)}, which is not supported: "
                "only text is"
            )
        if kind is None or not isinstance(part.get("text"), str):
            raise RequestError(
                f'Part {number} of the content of message {index} must be {{"type": "text", "text": ...}}'
            )


def plain_text(content: Any) -> str:
    """A content as one text, with its parts joined."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def for_built_in(messages: Sequence[Message], tools: Any, title: str) -> list[dict[str, str]]:
    """Role and text of each message, for the built-in templates, which know the roles system, user and assistant.

    `title` is what messages call the template.

    Raises:
        RequestError: tools, or their calls and results, which these templates cannot render.
    """
    tool_roles = any(message["role"] in ("tool", "function") for message in messages)
    if tools or tool_roles or any(message.get(key) for message in messages for key in _CALLS):
        raise _not_rendered(title, "tools or their calls")
    # OpenAI's newer models call the system role developer.
    return [
        {"role": "system" if role == "developer" else role, "content": plain_text(message["content"])}
        for message in messages
        for role in [message["role"]]
    ]


def for_jinja(messages: Sequence[Message], source: str, tools: Any, title: str) -> list[dict[str, Any]]:
    """Copies of the messages as transformers passes them to a template: without nulls, reasoning under both names.

    Parts are joined for a template that does not read them; it would print a Python list. `title` as above.

    Raises:
        RequestError: tools or their calls, if the template does not mention them and so would drop them.
    """
    for key in _CALLS:
        if key not in source and any(message.get(key) for message in messages):
            raise _not_rendered(title, key)
    if tools and "tools" not in source:
        raise _not_rendered(title, "tools")
    reads_parts = _READS_PARTS.search(source) is not None
    prepared = []
    for message in messages:
        values = {key: value for key, value in message.items() if value is not None}
        if not reads_parts and "content" in values:
            values["content"] = plain_text(values["content"])
        reasoning = next((values[key] for key in _REASONING if key in values), None)
        if reasoning is not None:
            values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
        prepared.append(values)
    return prepared


def _not_rendered(title: str, what: str) -> RequestError:
    return RequestError(f"{title} does not render {what}: give one that does with --chat-template FILE")
