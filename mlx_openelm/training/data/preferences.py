"""Preferences in files: a prompt with a chosen and a rejected completion, or with one completion and a label.

The formats are TRL's, and those of data sets on the hub that repeat the prompt in each completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RequestError, quote
from .conversations import read_turns
from .kinds import OF_TEMPLATES, TYPES, Kind, Record, recognize

# A text, or messages.
Content = str | list[Any]


@dataclass(frozen=True)
class Preference:
    """A prompt and what may follow it.

    Args:
        prompt: what all completions follow; completions are messages exactly if it is.
        completions: the chosen and the rejected one; or one alone, with a label.
        label: whether the only completion is desirable; None for a pair.
        tools: as in a record, for the chat template.
        is_cut: whether the prompt is the common beginning of two texts, which may end anywhere.
    """

    prompt: Content
    completions: tuple[Content, ...]
    source: str
    label: bool | None = None
    tools: Any = None
    is_cut: bool = False


def _fault_in_pair(values: dict[str, Any]) -> str | None:
    return _fault(values, ("chosen", "rejected"))


def _fault_in_labeled(values: dict[str, Any]) -> str | None:
    label = values["label"]
    if label not in (0, 1):
        return f"'label' must be true or false, got {quote(label)}"
    return _fault(values, ("completion",))


PAIRS = Kind("preference pairs", ("chosen", "rejected"), ("prompt", "tools"), OF_TEMPLATES, fault=_fault_in_pair)
LABELED = Kind(
    "labeled completions", ("prompt", "completion", "label"), ("tools",), OF_TEMPLATES, fault=_fault_in_labeled
)
PREFERENCE_KINDS = (PAIRS, LABELED)


def read_preferences(records: Sequence[Record], *, labeled: bool) -> tuple[Kind, list[Preference]]:
    """The kind of records, and their preferences.

    Args:
        labeled: give labeled completions; pairs become two each, first all that are chosen, then all that are rejected.

    Raises:
        RequestError: as `kinds.recognize`; or labeled completions where pairs are needed.
    """
    kind = recognize(records, PREFERENCE_KINDS)
    if kind is LABELED:
        if not labeled:
            raise RequestError(
                f"{records[0].source}: holds {LABELED.name} (prompt, completion, label), which --loss-type kto learns "
                "from; other losses need chosen and rejected."
            )
        return kind, [_labeled(record.values, record.source) for record in records]
    pairs = [_pair(record.values, record.source) for record in records]
    if not labeled:
        return kind, pairs
    return kind, [
        Preference(pair.prompt, (pair.completions[index],), pair.source, index == 0, pair.tools, pair.is_cut)
        for index in (0, 1)
        for pair in pairs
    ]


def _fault(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """What is wrong with the prompt and completions of a record."""
    for key in ("prompt", *keys):
        value = values.get(key)
        if not isinstance(value, str | list) and not (value is None and key == "prompt"):
            return f"{quote(key)} is {TYPES.get(type(value), type(value).__name__)}, not text or messages"
    are_lists = {isinstance(values[key], list) for key in keys}
    if len(are_lists) > 1:
        return "one of 'chosen' and 'rejected' is text and the other holds messages"
    try:
        found = _pair(values, "") if len(keys) > 1 else _labeled(values, "")
    except RequestError as error:
        return str(error)
    if isinstance(found.prompt, list) and not found.prompt:
        return "'chosen' and 'rejected' begin with different messages, so they have no prompt; give 'prompt'"
    for key, completion in zip(keys, found.completions, strict=True):
        if isinstance(completion, list) and (not completion or completion[-1].get("role") != "assistant"):
            return f"the last message of {quote(key)} must be the assistant's"
    return None


def _pair(values: dict[str, Any], source: str) -> Preference:
    """The pair of a record.

    Raises:
        RequestError: messages that cannot be read.
    """
    chosen, rejected = (_content(values[key]) for key in ("chosen", "rejected"))
    prompt = None if values.get("prompt") is None else _content(values["prompt"])
    tools = values.get("tools")
    is_cut = prompt is None and isinstance(chosen, str)
    # A text beside whole conversations is their first message, as in UltraFeedback.
    repeats = isinstance(prompt, str) and isinstance(chosen, list) and chosen and chosen[0].get("role") != "assistant"
    if prompt is None or repeats:
        end = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    prompt, completions = _alike(prompt, (chosen, rejected))
    return Preference(prompt, completions, source, tools=tools, is_cut=is_cut)


def _labeled(values: dict[str, Any], source: str) -> Preference:
    prompt, completions = _alike(_content(values["prompt"]), (_content(values["completion"]),))
    return Preference(prompt, completions, source, bool(values["label"]), values.get("tools"))


def _alike(prompt: Content, completions: tuple[Content, ...]) -> tuple[Content, tuple[Content, ...]]:
    """A prompt and completions that are all texts, or all messages."""
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        return prompt, completions
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt, tuple(
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        for completion in completions
    )


def _content(value: Any) -> Content:
    return value if isinstance(value, str) else read_turns(value)


def _common_length(chosen: Content, rejected: Content) -> int:
    """How much of two texts or conversations is their prompt, as TRL decides it.

    That is their common beginning, without a space at its end; if one begins with the whole other, all but the last
    character or message.
    """
    shorter = min(len(chosen), len(rejected))
    end = next((index for index in range(shorter) if chosen[index] != rejected[index]), None)
    if end is None:
        return max(shorter - 1, 0)
    return end - 1 if end and chosen[end - 1] == " " else end
