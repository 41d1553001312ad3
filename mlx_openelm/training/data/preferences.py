"""Preferences in files: a prompt with a chosen and a rejected completion, or with one completion and a label.

The formats are TRL's, and those of data sets on the hub that repeat the prompt in each completion, call it a question
or an instruction, or have the messages before an answer beside it, as LLaMA-Factory's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RequestError, quote
from .conversations import read_turns, system_of, with_system
from .kinds import BESIDE_PROMPTS, BESIDE_TURNS, OF_TEMPLATES, TYPES, Kind, Record, instruction_of, recognize

# A text, or messages.
Content = str | list[Any]


@dataclass(frozen=True)
class Preference:
    """A prompt and what may follow it.

    Args:
        prompt: what all completions follow; completions are messages exactly if it is.
        completions: the chosen and the rejected one; or one alone, with a label.
        label: whether the only completion is desirable; None for a pair.
        system, tools: as in a record, for the chat template; in messages the system's text is the first of them.
        is_cut: whether the prompt is the common beginning of two texts, which may end anywhere.
    """

    prompt: Content
    completions: tuple[Content, ...]
    source: str
    label: bool | None = None
    system: str = ""
    tools: Any = None
    is_cut: bool = False


def _fault_in_pair(values: dict[str, Any]) -> str | None:
    return _fault(values, ("chosen", "rejected"))


def _fault_in_labeled(values: dict[str, Any]) -> str | None:
    return _fault_in_label(values) or _fault(values, ("completion",))


def _fault_in_labeled_chat(values: dict[str, Any]) -> str | None:
    if (fault := _fault_in_label(values)) is not None:
        return fault
    try:
        found = _labeled_chat(values, "")
    except RequestError as error:
        return str(error)
    return None if found.prompt else "an answer needs the messages before it"


def _fault_in_label(values: dict[str, Any]) -> str | None:
    label = values["label"]
    return None if label in (0, 1) else f"'label' must be true or false, got {quote(label)}"


_PARTS = ("instruction", "input")
# The messages before the answers; some data sets have copies of them, or of everything, beside a prompt.
_BEFORE = ("conversations", "messages")
PAIRS = Kind(
    "preference pairs",
    ("chosen", "rejected"),
    ("prompt", "question", *_PARTS, *_BEFORE, *BESIDE_TURNS),
    BESIDE_PROMPTS,
    fault=_fault_in_pair,
)
LABELED = Kind(
    "labeled completions", ("prompt", "completion", "label"), BESIDE_TURNS, BESIDE_PROMPTS, fault=_fault_in_labeled
)
LABELED_CHATS = [
    Kind(f"labeled {key}", (key, "label"), BESIDE_TURNS, OF_TEMPLATES, fault=_fault_in_labeled_chat) for key in _BEFORE
]
PREFERENCE_KINDS = (PAIRS, LABELED, *LABELED_CHATS)


def read_preferences(records: Sequence[Record], *, labeled: bool) -> tuple[Kind, list[Preference]]:
    """The kind of records, and their preferences.

    Args:
        labeled: give labeled completions; pairs become two each, first all that are chosen, then all that are rejected.

    Raises:
        RequestError: as `kinds.recognize`; or labeled completions where pairs are needed.
    """
    kind = recognize(records, PREFERENCE_KINDS)
    if kind is not PAIRS:
        if not labeled:
            raise RequestError(
                f"{records[0].source}: holds {kind.name} ({', '.join(kind.keys)}), which --loss-type kto learns from; "
                "other losses need chosen and rejected."
            )
        read = _labeled if kind is LABELED else _labeled_chat
        return kind, [read(record.values, record.source) for record in records]
    pairs = [_pair(record.values, record.source) for record in records]
    if not labeled:
        return kind, pairs
    return kind, [
        replace(pair, completions=(pair.completions[index],), label=index == 0) for index in (0, 1) for pair in pairs
    ]


def _fault(values: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """What is wrong with the prompt and completions of a record."""
    for key in ("prompt", *keys):
        value = values.get(key)
        is_answer = key != "prompt" and isinstance(value, Mapping)
        if not isinstance(value, str | list) and not is_answer and not (value is None and key == "prompt"):
            return f"{quote(key)} is {TYPES.get(type(value), type(value).__name__)}, not text or messages"
    are_texts = {isinstance(values[key], str) for key in keys}
    if len(are_texts) > 1:
        return "one of 'chosen' and 'rejected' is text and the other holds messages"
    try:
        for key in keys:
            if isinstance(values[key], Mapping) and read_turns([values[key]])[0].get("role") != "assistant":
                return f"{quote(key)} must be the assistant's message"
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
        RequestError: messages that cannot be read, or several prompts.
    """
    chosen, rejected = (_content(values[key]) for key in ("chosen", "rejected"))
    is_whole = isinstance(chosen, list) and bool(chosen) and chosen[0].get("role") != "assistant"
    prompt = _given_prompt(values, is_whole)
    is_cut = prompt is None and isinstance(chosen, str)
    if is_cut and values.get("system"):
        raise RequestError("'system' stands beside texts without a 'prompt'; give what they answer as 'prompt'")
    # A text beside whole conversations is their first message, as in UltraFeedback.
    if prompt is None or (is_whole and isinstance(prompt, str)):
        end = _common_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:end], chosen[end:], rejected[end:]
    return replace(_preference(values, prompt, (chosen, rejected), source), is_cut=is_cut)


def _given_prompt(values: dict[str, Any], is_whole: bool) -> Content | None:
    """The prompt of a record, also by its names in Orca's and Alpaca's data sets; None if it has none.

    Args:
        is_whole: whether the answers are whole conversations, which have their prompt.
    """
    given = None if values.get("prompt") is None else _content(values["prompt"])
    if given or is_whole:
        return given
    for key in ("question", *_PARTS):
        if not isinstance(values.get(key), str | None):
            raise RequestError(f"{quote(key)} is {TYPES.get(type(values[key]), 'no text')}, not text")
    question, instruction = values.get("question"), instruction_of(values)
    if question and instruction:
        raise RequestError("'question' stands beside an 'instruction' or 'input'; give what is asked as 'prompt'")
    return question or instruction or _messages_before(values) or given


def _messages_before(values: dict[str, Any]) -> Content | None:
    """The messages that a record has beside its answers; None if it has none."""
    key, turns = _messages(values)
    if key is None:
        return None
    if turns[-1].get("role") == "assistant":
        raise RequestError(f"{quote(key)} ends with an answer; give what 'chosen' and 'rejected' answer as 'prompt'")
    return turns


def _labeled(values: dict[str, Any], source: str) -> Preference:
    found = _preference(values, _content(values["prompt"]), (_content(values["completion"]),), source)
    return replace(found, label=bool(values["label"]))


def _labeled_chat(values: dict[str, Any], source: str) -> Preference:
    """The preference of a whole conversation, whose last message is the answer.

    Raises:
        RequestError: it does not end with one, or cannot be read.
    """
    turns = _messages(values)[1]
    if not turns or turns[-1].get("role") != "assistant":
        raise RequestError("The last message must be the assistant's")
    found = _preference(values, turns[:-1], (turns[-1:],), source)
    return replace(found, label=bool(values["label"]))


def _preference(values: dict[str, Any], prompt: Content, completions: tuple[Content, ...], source: str) -> Preference:
    prompt, completions = _alike(prompt, completions)
    system = system_of(values)
    if isinstance(prompt, list):
        prompt, system = with_system(system, prompt), ""
    return Preference(prompt, completions, source, system=system, tools=values.get("tools"))


def _alike(prompt: Content, completions: tuple[Content, ...]) -> tuple[Content, tuple[Content, ...]]:
    """A prompt and completions that are all texts, or all messages."""
    if isinstance(prompt, str) and all(isinstance(completion, str) for completion in completions):
        return prompt, completions
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return prompt, tuple(
        [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        for completion in completions
    )


def _messages(values: dict[str, Any]) -> tuple[str | None, list[Any]]:
    """The messages of a record, and their key; None if it has none.

    Raises:
        RequestError: they cannot be read, or differ from those under the other key.
    """
    keys = [key for key in _BEFORE if values.get(key)]
    if not keys:
        return None, []
    turns, *others = (read_turns(values[key]) for key in keys)
    if any(other != turns for other in others):
        raise RequestError(f"{' and '.join(map(quote, keys))} have different messages; keep one of them")
    return keys[0], turns


def _content(value: Any) -> Content:
    """A text, or messages; one message may stand without a list around it."""
    if isinstance(value, str):
        return value
    return read_turns([value] if isinstance(value, Mapping) else value)


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
