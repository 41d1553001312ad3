"""A record's conversation, in the formats of OpenAI, ShareGPT and TRL, as messages for a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import RequestError, quote
from ...inputs import kind_of
from ...text.chat_messages import check_messages

# ShareGPT's names of the roles. Its tool calls have no standard format.
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bing", "bard"), "assistant"),
    "system": "system",
}
# Flags of a message that say whether it is learned: OpenAI's weight, which is 0 or 1, and axolotl's and ms-swift's.
_WEIGHT, _LEARNED = "weight", ("train", "training", "loss")
# Axolotl's parts of a message.
_DETAILS = ("train_detail", "training_detail")
_TOOL_SPEAKERS = ("function_call", "observation", "tool", "tool_call", "tool_response", "function", "function_response")


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Args:
        weighted: for each message, whether it may be learned; `"weight": 0` or `"train": false` turns that off.
        tools: JSON schemas of functions, passed to the template.
        prompt: the number of messages that form the prompt, whatever their roles; `--mask-prompt` does not learn them.
    """

    messages: list[dict[str, Any]]
    weighted: tuple[bool, ...]
    tools: list[Any] | None = None
    prompt: int = 0


def conversation(turns: list[Any], tools: Any = None, prompt: int = 0) -> Conversation:
    """The conversation of `turns`, which `read_turns` returned.

    Args:
        tools: a list of JSON schemas, or that list as JSON text, as tables store it; or None.

    Raises:
        RequestError: invalid messages, or content that is not supported.
    """
    check_messages(turns)
    weighted = tuple(_may_be_learned(turn, index) for index, turn in enumerate(turns))
    return Conversation([_plain(turn) for turn in turns], weighted, _read_tools(tools), prompt)


def system_of(values: Mapping[str, Any]) -> str:
    """What a record says for the system beside its messages or texts; empty for nothing.

    Raises:
        RequestError: it is not text.
    """
    system = values.get("system") or ""
    if not isinstance(system, str):
        raise RequestError(f"'system' is {kind_of(system)}, not text")
    return system


def with_system(system: str, turns: list[Any]) -> list[Any]:
    """Messages, with the system's in front of them unless it is there.

    Raises:
        RequestError: they have another one.
    """
    own = next((turn for turn in turns if turn.get("role") in ("system", "developer")), None)
    if own is not None and system and own.get("content") != system:
        raise RequestError("'system' and the system's message have different texts; keep one of them")
    return [{"role": "system", "content": system}, *turns] if system and turns and own is None else turns


def check_texts(values: Mapping[str, Any]) -> None:
    """Refuse what only a chat template can show, in a record that is treated as text.

    Raises:
        RequestError: it has a system's text, or tools.
    """
    if values.get("tools"):
        raise RequestError("'tools' needs a chat template that shows them: give --chat-template FILE")
    if values.get("system"):
        raise RequestError("'system' needs a chat template that shows it: give --chat-template corenet, or a file")


def read_turns(turns: Any) -> list[Any]:
    """A list of messages with `role` and `content`; ShareGPT's `from` and `value` are converted."""
    if not isinstance(turns, list):
        raise RequestError("A conversation must be a list of messages")
    return [_turn(turn, index) for index, turn in enumerate(turns)]


def _turn(turn: Any, index: int) -> Any:
    if not isinstance(turn, Mapping):
        raise RequestError(f'Message {index} must be an object with "role" and "content"')
    if turn.get("from") is None or turn.get("role") is not None:
        return turn
    speaker = turn["from"]
    if speaker in _TOOL_SPEAKERS:
        raise RequestError(
            f"Message {index} is from {quote(speaker)}, and tool calls in ShareGPT's form are not offered: write them "
            "as messages with tool_calls"
        )
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise RequestError(f"Message {index} is from {quote(speaker)}: use one of {', '.join(_SPEAKERS)}")
    # Tables have null for the `role` and `content` of other rows.
    others = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return {"role": _SPEAKERS[speaker], "content": turn.get("value"), **others}


def _may_be_learned(turn: Mapping[str, Any], index: int) -> bool:
    weight = turn.get(_WEIGHT)
    if isinstance(weight, bool) or weight not in (None, 0, 1):
        raise RequestError(f"Message {index}: weight must be 0 or 1, got {quote(weight)}")
    for key in _LEARNED:
        if not isinstance(turn.get(key), bool | None):
            raise RequestError(f"Message {index}: {key} must be true or false, got {quote(turn[key])}")
    if (detail := next((key for key in _DETAILS if turn.get(key)), None)) is not None:
        raise RequestError(f"Message {index}: {detail} is not offered; a message is learned as a whole, or not")
    return weight != 0 and all(turn.get(key) is not False for key in _LEARNED)


def _plain(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message without such flags, and with the arguments of tool calls as objects: OpenAI writes them as JSON text,
    which templates would encode as JSON again."""
    message = {key: value for key, value in turn.items() if key not in (_WEIGHT, *_LEARNED, *_DETAILS)}
    if isinstance(calls := message.get("tool_calls"), list):
        message["tool_calls"] = [_call(call) for call in calls]
    return message


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _read_tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RequestError("'tools' is text that is not JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("'tools' must be a list of JSON schemas")
    return tools
