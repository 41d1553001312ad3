"""Checks of the values in a request; errors name the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import quote
from ..inputs import kind_of
from ..wording import did_you_mean, one_of
from .failures import APIError

# Takes a key and its value, and returns what to use; raises an `APIError`.
Check = Callable[[str, Any], Any]

_MOST = 2**31 - 1  # whole numbers without a bound of their own
_MAX_TEXT = 1 << 16  # characters of names and other texts that are only passed on


def wrong(name: str, expected: str, value: Any, param: str | None = None) -> APIError:
    """The error of a value that is not what it should be.

    Args:
        param: the key that the error names, if `name` says more.
    """
    if isinstance(value, bool):
        shown = str(value).lower()  # as JSON writes it
    elif isinstance(value, float) and math.isinf(value):
        shown = "a number that is too large"
    else:
        shown = quote(value) if isinstance(value, str | int | float) else kind_of(value)
    return APIError(f"{name} must be {expected}, got {shown}.", param=param or name)


def read_fields(body: Mapping[str, Any], fields: Mapping[str, Check], prefix: str = "") -> dict[str, Any]:
    """The checked values of a JSON object, without nulls: these ask for nothing, and clients send them for any key.

    Args:
        prefix: what names its keys in errors, such as `messages[0].`.
    """
    values = {}
    for key, value in body.items():
        if value is None:
            continue
        if key not in fields:
            hint = did_you_mean(key, fields)
            name = f"{prefix}{quote(key)[1:-1]}"
            message = f"The parameter {name} is not known{hint and f'; {hint}'}{'' if hint else '.'}"
            raise APIError(message, param=name, code="unknown_parameter")
        values[key] = fields[key](f"{prefix}{key}", value)
    return values


def number(low: float, high: float) -> Check:
    """A number between two bounds."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    return check


def _is_whole(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (isinstance(value, int) or value.is_integer())


def integer(low: int, high: int = _MOST) -> Check:
    """A whole number between two bounds; 3.0 is one too."""

    def check(name: str, value: Any) -> int:
        if not _is_whole(value) or not low <= value <= high:
            raise wrong(name, f"a whole number from {low} to {high}", value)
        return int(value)

    return check


def max_tokens(low: int) -> Check:
    """A number of tokens; -1 is up to the end of the context, as for the server itself."""

    def check(name: str, value: Any) -> int:
        if not _is_whole(value) or not (low <= value <= _MOST or value == -1):
            raise wrong(name, f"a whole number from {low} to {_MOST}, or -1", value)
        return int(value)

    return check


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "true or false", value)
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, "a text", value)
    return value


def short_text(name: str, value: Any) -> str:
    """A text that is only passed on."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise wrong(name, f"a text of at most {_MAX_TEXT} characters", value)
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return value


def array(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(name, "a list", value)
    return value


def choice(*options: str) -> Check:
    """One of several texts."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise wrong(name, one_of([quote(option) for option in options]), value)
        return value

    return check


def only(*values: Any) -> Check:
    """Something that is not supported: accepted where it asks for what happens anyway."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(other) and value == other for other in values):
            message = f"{name} is not supported; leave it out."
            raise APIError(message, param=name, code="unsupported_parameter")
        return value

    return check


def check_unused(given: Mapping[str, Any], tools: str, chosen: str) -> None:
    """Refuse tools that the model is to choose from; those that it is told not to use change nothing.

    Args:
        tools, chosen: the keys that list them and that say which is used.
    """
    if given.get(tools) and given.get(chosen) != "none":
        only()(tools, given[tools])


def texts(most: int, longest: int = _MAX_TEXT) -> Check:
    """A text or a list of texts, none of them empty; as a list."""

    def check(name: str, value: Any) -> list[str]:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(one, str) and 0 < len(one) <= longest for one in listed):
            raise wrong(name, "a text or a list of texts that are not empty", value)
        if len(listed) > most:
            raise APIError(f"{name} may have {most} texts at most, got {len(listed)}.", param=name)
        return listed

    return check
