"""Values computed from parameters and kept until a parameter is replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import mlx.core as mx

Value = TypeVar("Value")


class Derived(threading.local, Generic[Value]):
    """A cache of values derived from parameters, which are compared by identity: to change one, assign another array.

    Nothing is evaluated here, so it also works inside a traced function. There the parameters are the trace's own
    arrays, so entries made in a trace are not reused after it. Each thread has its own entries, since two threads that
    evaluate the same graph wait for each other.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[tuple[mx.array, ...], Value]] = {}

    def get(self, key: Hashable, make: Callable[..., Value], *parameters: mx.array) -> Value:
        """`make(*parameters)`, cached by key."""
        if (entry := self._entries.get(key)) is not None:
            for known, parameter in zip(entry[0], parameters, strict=True):
                if known is not parameter:
                    break
            else:
                return entry[1]
        value = make(*parameters)
        self._entries[key] = parameters, value
        return value

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy has other parameters
