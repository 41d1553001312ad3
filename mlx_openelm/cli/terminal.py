"""Errors and warnings on a terminal: broken between words, with commands to copy on lines of their own."""

from __future__ import annotations

import re
import sys

from ..console import columns, say, wrap

# A command of more than this many characters gets its own line.
_LONG = 30
_COMMAND = re.compile(rf"(?:^|(?<= ))`([^`]{{{_LONG + 1},}})`(?=[ .,;:?!]|$)")
# What stays on one line: text in backquotes, our commands, a flag with its value.
_UNBROKEN = re.compile(r"`[^`]*`|\bmlx-openelm \S+(?: --help)?|(?<!\S)--[a-z-]+ [\w./~-]+")

_line_is_open = False


def write(text: str) -> None:
    """Print a part of a line on standard output; `show` then begins a new line, if both streams are terminals."""
    global _line_is_open
    sys.stdout.write(text)
    sys.stdout.flush()
    if text:
        _line_is_open = not text.endswith("\n")


def show(message: str) -> None:
    """Print an error or a warning on standard error: one line, but folded to the width of a terminal."""
    message = " ".join(message.split())
    if not sys.stderr.isatty():
        say(message)
        return
    if _line_is_open and sys.stdout.isatty():
        write("\n")
    width = columns(sys.stderr)
    say(message if width is None else folded(message, width))


def folded(message: str, width: int) -> str:
    """The lines of a message. Long commands lose their backquotes, `&&` and the punctuation after them."""
    if len(message) <= width:
        return message
    from .help_text import command_lines

    lines = []
    for index, part in enumerate(_COMMAND.split(message)):
        if index % 2:
            lines += [command_lines(command, width) for command in part.split(" && ")]
        elif text := (part.lstrip(" .,;:?!") if index else part).strip():
            joined = _UNBROKEN.sub(lambda found: found[0].replace(" ", "\xa0"), text)
            lines.append(wrap(joined, width).replace("\xa0", " "))
    return "\n".join(lines)
