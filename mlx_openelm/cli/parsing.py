"""argparse with errors in one line, grouped help, and values that may begin with a dash."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import RequestError, quote

_ON = ("true", "t", "yes", "y", "on", "1")
_OFF = ("false", "f", "no", "n", "off", "0")


class Parser(argparse.ArgumentParser):
    """The flags of one command, in groups.

    Args:
        prog: what is typed to run it.
        description: the text under the usage; paragraphs are separated by empty lines.
        examples: command lines, one a line.
    """

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(
            prog,
            f"{prog} [flags]",
            inspect.cleandoc(description),
            f"Examples:\n{examples}",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self._groups: dict[str, Any] = {}

    def group(self, title: str) -> Any:
        """The group of flags under this heading; made when first asked for."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every spelling of every flag."""
        return self._option_string_actions

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The values on a command line.

        Raises:
            RequestError: an unknown flag, a missing or wrong value, an argument too many.
        """
        try:
            values, rest = self.parse_known_args(self._with_values_attached(args))
        except argparse.ArgumentError as error:
            names = (error.argument_name or "").split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            raise RequestError(f"{name} {error.message}.".lstrip()) from None
        if rest:
            self.error(f"unexpected argument{'s' if rest[1:] else ''} {', '.join(map(quote, rest))}")
        return values

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} is missing"
        raise RequestError(f"{message}; see {self.prog} --help.")

    def _with_values_attached(self, args: Sequence[str]) -> list[str]:
        """`--flag value` as `--flag=value`, since argparse takes a separate `-inf` or `--x` for a flag."""
        result: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                return [*result, word, *words]
            flag, equals, _ = word.partition("=")
            action = self.flags.get(flag)
            if action is None and flag.startswith("--"):
                close = difflib.get_close_matches(flag, self.flags, n=2, cutoff=0.7)
                hint = f" (did you mean {' or '.join(close)}?)" if close else ""
                self.error(f"{self.prog} has no flag {flag}{hint}")
            if action is not None and action.nargs == 0 and equals:
                self.error(f"{flag} takes no value")
            if action is not None and action.nargs is None and not equals:
                value = next(words, None)
                if value is None:
                    self.error(f"{flag} needs a value")
                word = f"{flag}={value}"
            result.append(word)
        return result


class Switch(argparse.Action):
    """`--x` and `--no-x`; also `--x False`, as mlx-lm's `--verbose False`."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        flags = [spelling for flag in option_strings for spelling in (flag, f"--no-{flag[2:]}")]
        super().__init__(flags, dest, nargs="?", **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        is_no = (option_string or "").startswith("--no-")
        if is_no and values is not None:
            parser.error(f"{option_string} takes no value")
        word = "true" if values is None else values.lower()
        if word not in _ON + _OFF:
            raise argparse.ArgumentError(self, f"must be True or False, got {quote(values)}")
        setattr(namespace, self.dest, word in _ON and not is_no)


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {quote(text)}") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {quote(text)}") from None


class HelpFormatter(argparse.HelpFormatter):
    """Paragraphs are filled; indented lines (examples, lists) stay as they are."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        super().add_usage(usage, actions, groups, "Usage: ")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.split("\n\n")
        return "\n\n".join(part if "\n  " in part else fill(part, width, indent) for part in paragraphs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`--max-tokens, -m N`: the value once, after the last spelling."""
        flags = ", ".join(action.option_strings)
        if action.nargs == 0 or isinstance(action, Switch):
            return flags
        return f"{flags} [{action.metavar}]" if flags and action.nargs == "?" else f"{flags} {action.metavar}".lstrip()
