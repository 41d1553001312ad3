"""The names and types of option values, shared by flags, YAML files and Python arguments."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any


def field_types(options: type) -> dict[str, Any]:
    """The type of every field, by name."""
    hints = typing.get_type_hints(options)
    return {field.name: hints[field.name] for field in fields(options)}


def conform(kind: Any, value: Any) -> Any:
    """`value` converted to the type of a field: 1e3 becomes a whole number, a list a tuple.

    Raises:
        ValueError: it has another type; the message says what was expected.
    """
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        _expect(isinstance(value, bool), "true or false")
        return value
    if kind is int:
        _expect(number and value == value // 1, "a whole number")
        return int(value)
    if kind is float:
        _expect(number and abs(value) < math.inf, "a number")
        return float(value)
    if kind is str:
        _expect(isinstance(value, str), "text")
        return value
    _expect(isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value), "a list of texts")
    return tuple(value)


def _expect(fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(expected)
