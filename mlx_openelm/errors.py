"""The two errors that users see: an invalid request, and work that failed.

Messages are written with the command line's flags. In Python, where there are none, they name the arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Longer names and values are cut in messages, since they may come from a damaged file.
QUOTED = 200
# Whether messages name flags, as they are written: only while the command line runs, which sets this.
names_flags = False
# Flags that were typed in another spelling, which messages use too: `--quant-predicate` for `--recipe`.
typed: dict[str, str] = {}
# A flag, but none of a command line, which messages put in backquotes.
_FLAG = re.compile(r"(`[^`]*`)|(?<![\w./-])(?:--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)|-q)(?![\w-])")
# Flags whose arguments are written in another way.
_ARGUMENTS = {
    "-q": "quantize",
    "--no-bias-correction": "bias_correction=False",
    "--overwrite": "overwrite=True",
    "--sample-prompt": "sample_prompts",
}
_LONG_WORD = re.compile(rf"\S{{{QUOTED + 1},}}")


class OpenELMError(Exception):
    """A failure during the work. The message says in one line what is wrong and what to do. Exit code 1.

    It is a sentence that starts with a capital, or with the name of the thing that is wrong. A missing full stop is
    added, unprintable characters become spaces, and words of more than `QUOTED` characters are shortened.

    Attributes:
        written: the message with flags, for those who name options in another way: see `rename_flags`.
    """

    exit_code = 1

    def __init__(self, message: str):
        if not message.isprintable():
            message = "".join(character if character.isprintable() else " " for character in message)
        if not message.endswith((".", "?", "!")):
            message += "."
        self.written = _LONG_WORD.sub(lambda word: _shorten(word[0]), message)
        super().__init__(name_options(self.written))


class RequestError(OpenELMError, ValueError):
    """An invalid flag, name, file or value; no work was started. Exit code 2."""

    exit_code = 2


def name_options(text: str) -> str:
    """A message for the user: `--q-bits` is `q_bits` in Python, and stays on the command line."""
    if not names_flags:
        return _FLAG.sub(_argument, text)
    return _FLAG.sub(lambda found: typed.get(found[0], found[0]), text) if typed else text


def rename_flags(text: str, name: Callable[[str], str]) -> str:
    """A message as it was written, with each of its flags called what `name` says."""
    return _FLAG.sub(lambda found: found[1] or name(found[0]), text)


def command_or_call(command: str, call: str) -> str:
    """Advice for the user: a command line, or in Python the call that does the same, both written for a message."""
    return command if names_flags else call


def _argument(found: re.Match[str]) -> str:
    command, name = found.groups()
    return command or _ARGUMENTS.get(found[0]) or name.replace("-", "_")


def quote(value: object) -> str:
    """`repr(value)` for a message, cut to `QUOTED` characters; never raises."""
    try:
        if isinstance(value, str | bytes | list | tuple):  # the repr of a large one takes time and memory
            value = value[: QUOTED + 1]
        return _cut(repr(value))
    except (ValueError, RecursionError):  # an integer with more digits than Python prints, a list inside itself
        return f"a {type(value).__name__}"


def _shorten(word: str) -> str:
    """A word without its middle; the end is kept because it identifies a path."""
    return f"{word[: QUOTED // 2]}…{word[1 - QUOTED // 2 :]}"


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
