"""What examples look like in files: the four kinds, recognised by their keys, and what is wrong with a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..chat_template import check_messages
from ..errors import RequestError


@dataclass(frozen=True)
class Kind:
    """A way to write an example down: the keys a record must have, and those it may have."""

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def fits(self, values: dict[str, Any]) -> bool:
        """Whether a record has all the keys; null, as tables hold it for keys that other records have, is none."""
        return all(values.get(key) is not None for key in self.keys)


COMPLETION = Kind("prompt and completion", ("prompt", "completion"))
CHAT = Kind("chat messages", ("messages",))
INSTRUCTION = Kind("instruction, input, output", ("instruction", "output"), ("input",))
TEXT = Kind("text", ("text",))
# In the order mlx-lm asks; `text` last, because many data sets add a rendered copy under that key.
KINDS = (COMPLETION, CHAT, INSTRUCTION, TEXT)
# Everything that is ever read of a record.
KEYS = tuple(key for kind in KINDS for key in (*kind.keys, *kind.optional))

_TYPES = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


@dataclass(frozen=True)
class Record:
    """An example as it was written, and where: `train.jsonl, line 12`."""

    values: dict[str, Any]
    source: str


class Faults:
    """Bad records, gathered so that one line tells how many there are."""

    def __init__(self) -> None:
        self._first = ""
        self.number = 0

    def add(self, source: str, what: str) -> None:
        """Note that the record at `source` is wrong; `what` says how."""
        self.number += 1
        self._first = self._first or f"{source}: {what}"

    def check(self) -> None:
        """Raise `RequestError` with the first fault and the number of others, if there are any."""
        if self.number:
            more = self.number - 1
            others = f" ({more} more bad {'entries' if more > 1 else 'entry'} after it)" if more else ""
            raise RequestError(f"{self._first.rstrip('.')}{others}.")


def recognise(records: Sequence[Record]) -> Kind:
    """The kind of `records`, which must all be of one.

    Raises:
        RequestError: no records; one without the keys of any kind, of another kind than the first, or with a value
            that is no text or no conversation; by its source, with the number of others.
    """
    if not records:
        raise RequestError("There are no examples.")
    faults = Faults()
    first = next((record for record in records if _kind_of(record.values) is not None), None)
    kind = None if first is None else _kind_of(first.values)
    for record in records:
        if kind is None or first is None or not kind.fits(record.values):
            faults.add(record.source, _explain_keys(record.values, kind, first))
        elif (fault := _fault_in_values(record.values, kind)) is not None:
            faults.add(record.source, fault)
    faults.check()
    assert kind is not None
    return kind


def _kind_of(values: dict[str, Any]) -> Kind | None:
    return next((kind for kind in KINDS if kind.fits(values)), None)


def _explain_keys(values: dict[str, Any], kind: Kind | None, first: Record | None) -> str:
    """Why the keys of a record are not those of `kind`, which is that of `first`."""
    if kind is not None and first is not None:
        if (other := _kind_of(values)) is not None:
            return f"holds {other.name}, but {first.source} holds {kind.name}; one file is of one kind"
        missing = next(key for key in kind.keys if values.get(key) is None)
        return f"{missing!r} is null, not text" if missing in values else f"has no {missing!r}"
    found = ", ".join(repr(key) for key in list(values)[:6]) or "nothing"
    return (
        f"has none of the sets of keys that are known (prompt and completion; messages; instruction, input and "
        f"output; text), but {found}"
    )


def _fault_in_values(values: dict[str, Any], kind: Kind) -> str | None:
    if kind is CHAT:
        try:
            check_messages(values["messages"])
        except RequestError as error:
            return str(error)
        return None
    for key in (*kind.keys, *kind.optional):
        value = values.get(key)
        # An instruction without input has "", null or no such key.
        if not isinstance(value, str) and not (key in kind.optional and value is None):
            return f"{key!r} is {_TYPES.get(type(value), type(value).__name__)}, not text"
    return None
