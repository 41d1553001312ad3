"""What `--help` prints: usage, description, commands or flags in two columns, examples. Words are never broken."""

from __future__ import annotations

import re
from argparse import Action, BooleanOptionalAction
from collections.abc import Iterator
from typing import Any

from ..console import wrap

# The text of a flag begins in this column; on a narrow terminal it is on the lines below the flag.
_COLUMN, _INDENT = 26, 6
_NARROW, _WIDEST = 72, 100
# Choices longer than this are listed in the text.
_LONG_CHOICES = 36
_DEFAULT = re.compile(r"  (\[default: [^]]*\])$")


def render(parser: Any, columns: int) -> str:
    """The help of a command, no line longer than `columns` if no word is.

    Args:
        parser: a `flags.Parser`.
    """
    columns = min(columns, _WIDEST)
    blocks = [f"Usage: {parser.usage}"]
    blocks += [wrap(" ".join(part.split()), columns) for part in (parser.description or "").split("\n\n")]
    if parser.commands:
        blocks.append(_section("Commands", list(parser.commands.items()), columns))
    blocks += [
        _section(title, [_entry(action, parser.defaults.get(action.dest)) for action in actions], columns)
        for title, actions in _groups(parser)
    ]
    examples = [command_lines(line.strip(), columns) for line in (parser.epilog or "").splitlines()]
    blocks.append("\n".join(["Examples:", *examples]))
    return "\n\n".join(blocks) + "\n"


def _groups(parser: Any) -> Iterator[tuple[str, list[Action]]]:
    """The headings that have flags; the first of them starts with the flags that matter most."""
    first = [parser.flags[flag] for flag in parser.main_flags]
    for title, group in parser.groups.items():
        actions = [action for action in group._group_actions if action not in first]
        actions = first + actions if title == "Common flags" else actions
        if actions:
            yield title, actions


def _section(title: str, entries: list[tuple[str, str]], columns: int) -> str:
    """A heading and its entries, in two columns."""
    column = _INDENT if columns < _NARROW else _COLUMN
    lines = [f"{title}:"]
    for name, text in entries:
        body = _filled(text, columns - column)
        head = f"  {name}"
        if column == _COLUMN and len(head) <= column - 2 and body:
            head = f"{head:{column}}{body.pop(0)}"
        lines += [head, *(f"{'':{column}}{line}" for line in body)]
    return "\n".join(lines)


def _filled(text: str, width: int) -> list[str]:
    """The lines of a text, whose default stays in one piece if a line can hold it."""
    default = _DEFAULT.search(text)
    text = _DEFAULT.sub(r" \1", text)
    if default is not None and len(default[1]) <= width:
        text = text.replace(default[1], default[1].replace(" ", "\xa0"))
    return wrap(text, width).replace("\xa0", " ").splitlines()


def _entry(action: Action, default: Any) -> tuple[str, str]:
    """A flag as it is typed, `-m, --max-tokens N`, and its text."""
    spellings = sorted(action.option_strings, key=lambda flag: flag.startswith("--"))
    text = (action.help or "").replace("%(default)s", str(action.default))
    if default is not None and default is not False and default != ():
        text += f"  [default: {_shown(default)}]"
    if isinstance(action, BooleanOptionalAction):
        shown = [flag for flag in spellings if not flag.startswith("--no-")]
        if action.default is None or text.endswith("[default: on]"):  # --no-x says something
            shown.append(f"--no-{action.dest.replace('_', '-')}")
        return ", ".join(shown), text
    if action.nargs == 0:
        return ", ".join(spellings), text
    value = str(action.metavar)
    if "|" in value and len(spellings[-1]) + len(value) >= _LONG_CHOICES:
        sentence, space, rest = text.partition("  [default: ")
        text = f"{sentence} Choices: {', '.join(value.split('|'))}.{space}{rest}"
        value = "NAME"
    if not spellings:
        return f"[{value}]" if action.nargs in ("?", "*") else value, text
    return f"{', '.join(spellings)} {f'[{value}]' if action.nargs == '?' else value}", text


def _shown(default: Any) -> str:
    """A default as people write it: `1e-5`, `0`, `on`."""
    if isinstance(default, float):
        return f"{default:g}".replace("e-0", "e-")
    return "on" if default is True else str(default)


def command_lines(line: str, columns: int) -> str:
    """A command to copy, indented; a longer one goes on after a backslash, with a flag if that fits."""
    words = re.findall(r"""(?:"[^"]*"|'[^']*'|\S)+""", line)
    parts = [words[0]]  # what stays on one line
    for word in words[1:]:
        if word.startswith("-") or len(parts[-1]) + len(word) + 9 > columns:
            parts.append(word)
        else:
            parts[-1] += f" {word}"
    lines, current = [], f"  {parts[0]}"
    for part in parts[1:]:
        if len(current) + len(part) + 3 > columns:
            lines.append(f"{current} \\")
            current = f"      {part}"
        else:
            current += f" {part}"
    return "\n".join([*lines, current])
