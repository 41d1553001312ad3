"""The two errors a person can meet: a request that cannot be right, and work that failed."""

from __future__ import annotations

import re

# A message repeats at most this many characters of a name or value, which may come from a damaged file.
QUOTED = 200
_LONG_WORD = re.compile(rf"\S{{{QUOTED + 1},}}")


class OpenELMError(Exception):
    """Something failed while working; one line that says what is wrong and what to do. Exit code 1.

    Whatever a message was made of, it has only printable characters and no word of more than `QUOTED` of them.
    """

    exit_code = 1

    def __init__(self, message: str):
        if not message.isprintable():
            message = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(_LONG_WORD.sub(lambda word: _shorten(word[0]), message))


class RequestError(OpenELMError, ValueError):
    """A bad flag, name, file or value; nothing was started. Exit code 2."""

    exit_code = 2


def quote(value: object) -> str:
    """`repr(value)` for a message, cut to `QUOTED` characters; never raises."""
    try:
        if isinstance(value, str | bytes | list | tuple):  # the repr of a large one takes time and memory
            value = value[: QUOTED + 1]
        return _cut(repr(value))
    except (ValueError, RecursionError):  # an integer with more digits than Python prints, a list in itself
        return f"a {type(value).__name__}"


def _shorten(word: str) -> str:
    """A word without its middle: of a path, the file's name is what helps."""
    return f"{word[: QUOTED // 2]}…{word[1 - QUOTED // 2 :]}"


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
