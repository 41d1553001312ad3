"""The kinds of examples in files, recognized by their keys, and what can be wrong with a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RequestError, quote
from .conversations import Conversation, conversation, read_turns, system_of, with_system


@dataclass(frozen=True)
class Kind:
    """A format of examples.

    Args:
        keys: a record must have these, and may have the `optional` ones.
        refused: keys that other programs read as part of the example, and that are not supported here.
        of_lists: whether the values of `keys` are lists of messages.
        fault: what is wrong with the values of a record, or None; by default conversations and texts are checked.
        keeps_others: whether other keys are part of the example too.
    """

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    of_lists: bool = False
    fault: Callable[[dict[str, Any]], str | None] | None = None
    keeps_others: bool = False

    def fits(self, values: dict[str, Any]) -> bool:
        """Whether a record has all the keys. Null does not count: tables have it for keys of other records."""
        return all(values.get(key) is not None for key in self.keys) and (
            not self.of_lists or all(isinstance(values[key], list) for key in self.keys)
        )


OF_TEMPLATES = ("images", "chat_template_kwargs")
BESIDE_TURNS = ("system", "tools")
# `history` is LLaMA-Factory's: the turns before the prompt, as pairs.
BESIDE_PROMPTS = (*OF_TEMPLATES, "history")
TURNS = Kind(
    "prompt and completion as messages", ("prompt", "completion"), BESIDE_TURNS, BESIDE_PROMPTS, of_lists=True
)  # fmt: skip
COMPLETION = Kind("prompt and completion", ("prompt", "completion"), BESIDE_TURNS, BESIDE_PROMPTS)
CHAT = Kind("chat messages", ("messages",), BESIDE_TURNS, (*OF_TEMPLATES, "functions"))
SHAREGPT = Kind("ShareGPT conversations", ("conversations",), BESIDE_TURNS, OF_TEMPLATES)
INSTRUCTION = Kind("instruction, input, output", ("instruction", "output"), ("input", "system"), ("history",))
TEXT = Kind("text", ("text",))
# In mlx-lm's order of precedence, with `text` after instructions, as many instruction data sets have a rendered copy
# under that key. ShareGPT, which mlx-lm does not read, is last: what mlx-lm recognizes as another kind, we do too.
KINDS = (TURNS, COMPLETION, CHAT, INSTRUCTION, TEXT, SHAREGPT)
_KNOWN = "prompt and completion; messages; conversations; instruction, input and output; text"
# The data of other kinds of training, and what to do with it.
_OTHERS = {
    **dict.fromkeys(("chosen", "rejected"), "preference pairs (chosen, rejected), which `mlx-openelm dpo` learns from"),
    "input_ids": "tokens (input_ids), which are not offered; give messages, or prompt and completion",
}

TYPES = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


@dataclass(frozen=True)
class Record:
    """An example as it is in a file, and where: `train.jsonl, line 12`."""

    values: dict[str, Any]
    source: str


class Faults:
    """Collects bad records, so that a single line can say how many there are."""

    def __init__(self) -> None:
        self._first = ""
        self.number = 0

    def add(self, source: str, what: str) -> None:
        """Add the record at `source`; `what` says what is wrong with it."""
        self.number += 1
        self._first = self._first or f"{source}: {what}"

    def check(self) -> None:
        """Raise `RequestError` with the first fault and the number of others, if there is any fault."""
        if self.number:
            more = self.number - 1
            others = f" ({more} more bad {'entries' if more > 1 else 'entry'} after it)" if more else ""
            raise RequestError(f"{self._first.rstrip('.')}{others}.")


def columns_to_read(names: Sequence[str], kinds: Sequence[Kind] = KINDS) -> list[str]:
    """The columns of a table that its possible kinds use, in their order; an empty list if it fits no kind."""
    possible = [kind for kind in kinds if set(kind.keys) <= set(names)]
    if any(kind.keeps_others for kind in possible):
        return list(names)
    wanted = {key for kind in possible for key in (*kind.keys, *kind.optional, *kind.refused)}
    return [name for name in names if name in wanted]


def recognize(records: Sequence[Record], kinds: Sequence[Kind] = KINDS) -> Kind:
    """The kind of `records`, one of `kinds`; they must all be of the same one.

    Raises:
        RequestError: no records; or a record that is of no kind, of another kind than the first, or has a value that is
            not text or not a conversation. The message names its source and the number of other bad records.
    """
    if not records:
        raise RequestError("There are no examples.")
    faults = Faults()
    first = next((record for record in records if _kind_of(record.values, kinds) is not None), None)
    kind = None if first is None else _kind_of(first.values, kinds)
    for record in records:
        if kind is None or first is None or not kind.fits(record.values):
            faults.add(record.source, _explain_keys(record.values, kind, first, kinds))
        elif (fault := _fault_in_values(record.values, kind)) is not None:
            faults.add(record.source, fault)
    faults.check()
    assert kind is not None
    return kind


def _kind_of(values: dict[str, Any], kinds: Sequence[Kind]) -> Kind | None:
    return next((kind for kind in kinds if kind.fits(values)), None)


def _explain_keys(values: dict[str, Any], kind: Kind | None, first: Record | None, kinds: Sequence[Kind]) -> str:
    """Why the keys of a record do not fit `kind`, the kind of `first`."""
    if kind is not None and first is not None:
        if (other := _kind_of(values, kinds)) is not None:
            return f"holds {other.name}, but {first.source} holds {kind.name}; one file is of one kind"
        missing = next(key for key in kind.keys if values.get(key) is None)
        return _null(missing) if missing in values else f"has no {quote(missing)}"
    if kinds is KINDS and (key := next((key for key in _OTHERS if key in values), None)) is not None:
        return f"holds {_OTHERS[key]}"
    nulls = [[key for key in kind.keys if values[key] is None] for kind in kinds if set(kind.keys) <= set(values)]
    if fewest := min(filter(None, nulls), key=len, default=None):
        return _null(fewest[0])
    found = ", ".join(quote(key) for key in list(values)[:6]) or "no keys"
    known = _KNOWN if kinds is KINDS else "; ".join(", ".join(kind.keys) for kind in kinds)
    return f"has none of the known sets of keys ({known}): it has {found}"


def _null(key: str) -> str:
    return f"{quote(key)} is null; give it a value, or leave the record out"


def _fault_in_values(values: dict[str, Any], kind: Kind) -> str | None:
    if (key := next((key for key in kind.refused if values.get(key)), None)) is not None:
        return f"{quote(key)} is not offered; remove it, or put what it says into messages"
    if kind.fault is not None:
        return kind.fault(values)
    if kind in (TURNS, CHAT, SHAREGPT):
        try:
            conversation_of(values, kind)
        except RequestError as error:
            return str(error)
        return None
    for key in (*kind.keys, *kind.optional):
        value = values.get(key)
        # For an instruction without input, the key has "" or null, or is missing.
        if key != "tools" and not isinstance(value, str) and not (key in kind.optional and value is None):
            return f"{quote(key)} is {TYPES.get(type(value), type(value).__name__)}, not text"
    return None


def conversation_of(values: dict[str, Any], kind: Kind) -> Conversation:
    """The conversation of a record of any kind but text.

    Raises:
        RequestError: invalid messages, or content that is not supported.
    """
    tools, system = values.get("tools"), system_of(values)
    if kind in (CHAT, SHAREGPT):
        return conversation(with_system(system, read_turns(values[kind.keys[0]])), tools)
    if kind is TURNS:
        before, after = read_turns(values["prompt"]), read_turns(values["completion"])
        turns = with_system(system, [*before, *after])
        return conversation(turns, tools, len(turns) - len(after))
    if kind is INSTRUCTION:
        prompt, answer = instruction_of(values), values["output"]
    else:
        prompt, answer = values["prompt"], values["completion"]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return conversation(with_system(system, turns), tools)


def instruction_of(values: Mapping[str, Any]) -> str:
    """An instruction with its input, as one text."""
    return "\n\n".join(part for part in (values.get("instruction"), values.get("input")) if part)
