"""The parser of a command (argparse, with errors in one line), and the flags that commands share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from argparse import BooleanOptionalAction
from collections import deque
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import RequestError, quote
from ..hub import catalog
from ..wording import did_you_mean

# The values that a switch may be given, as in mlx-lm's `--verbose False`.
_ON = ("true", "t", "yes", "y", "on", "1")
_OFF = ("false", "f", "no", "n", "off", "0")

# The headings of every command's `--help`, in their order; one without flags is not shown.
_GROUPS = (
    *("Flags", "Arguments", "Common flags"),
    *("Training", "Data", "Adapter", "Optimizer", "Memory", "Validation", "Checkpoints", "Reports"),
    *("Sampling", "Penalties", "Chat", "Windows", "Measuring"),
    *("Quantization", "Calibration", "Report"),
    *("Model", "Source", "Key-value cache", "Output", "Upload", "Other flags"),
)


class Parser(argparse.ArgumentParser):
    """The flags of one command, in groups.

    Args:
        prog: how the command is called, like `mlx-openelm generate`.
        description: the text below the usage; empty lines separate paragraphs.
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
        self.flags = self._option_string_actions  # every spelling of every flag
        self.groups = {title: self.add_argument_group(title) for title in _GROUPS}

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The values on a command line.

        Raises:
            RequestError: an unknown flag, a missing or wrong value, an argument too many.
        """
        words = self._normalized(args)
        # Arguments may stand between flags; argparse allows that only without `--`.
        parse_known = self.parse_known_args if "--" in words else self.parse_known_intermixed_args
        try:
            values, rest = parse_known(words)
        except argparse.ArgumentError as error:
            if error.argument_name is None:
                self.error(error.message)
            names = error.argument_name.split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            is_extra = error.message.startswith("ignored explicit argument")  # -q4
            raise RequestError(f"{name} {'takes no value' if is_extra else error.message}.") from None
        for word in rest:
            if word.startswith("-") and word not in ("-", "--"):
                self.error(f"{self.prog} has no flag {word}")
            if word != "--":
                self.error(f"unexpected argument {quote(word)}")
        return values

    def error(self, message: str) -> NoReturn:
        """Refuse the command line, with a pointer to its help."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} is missing"
        raise RequestError(f"{message}; see {self.prog} --help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or a version. argparse ignores an error in writing, such as a full disk."""
        print(message, end="", file=file or sys.stdout, flush=True)

    def _normalized(self, args: Sequence[str]) -> list[str]:
        """One word for each flag: `--flag value` as `--flag=value`, `--switch False` as `--no-switch`.

        argparse takes a separate `-inf` or `--x` for a flag. A word that cannot be right is refused here, before
        argparse complains of flags that are missing.
        """
        result: list[str] = []
        words = deque(args)
        takes_arguments = any(not action.option_strings for action in self._actions)
        may_be_value = False
        while words:
            word = words.popleft()
            if word == "--":
                return [*result, word, *words]
            flag, equals, value = word.partition("=")
            action = self.flags.get(flag)
            if isinstance(action, BooleanOptionalAction):
                if words and not (equals or takes_arguments) and words[0].lower() in _ON + _OFF:
                    equals, value = "=", words.popleft()
                if equals:
                    word = self._switch(action, flag, value)
            elif action is not None and action.nargs == 0 and equals:
                self.error(f"{flag} takes no value")
            elif action is not None and action.nargs is None and not equals:
                if not words:
                    self.error(f"{flag} needs a value")
                word = f"{flag}={words.popleft()}"
            elif action is None and flag.startswith("--"):
                hint = did_you_mean(flag, self.flags)
                self.error(f"{self.prog} has no flag {flag}{hint and f' ({hint})'}")
            elif action is None and flag.startswith("-") and flag[:2] not in self.flags and flag[1:2].isalpha():
                self.error(f"{self.prog} has no flag {flag}")
            elif not flag.startswith("-") and not takes_arguments and not may_be_value:
                self.error(f"unexpected argument {quote(word)}")
            may_be_value = action is not None and action.nargs == "?" and not equals
            result.append(word)
        return result

    def _switch(self, action: BooleanOptionalAction, flag: str, value: str) -> str:
        """The spelling of a switch, on or off, that means `flag=value`."""
        if flag.startswith("--no-"):
            self.error(f"{flag} takes no value")
        if value.lower() not in _ON + _OFF:
            raise RequestError(f"{flag} must be True or False, got {quote(value)}.")
        on, off, *_ = action.option_strings
        return on if value.lower() in _ON else off


def integer(text: str) -> int:
    """A flag's value as a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {quote(text)}") from None


def number(text: str) -> float:
    """A flag's value as a number."""
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
        if action.nargs == 0:
            return flags
        return f"{flags} [{action.metavar}]" if flags and action.nargs == "?" else f"{flags} {action.metavar}".lstrip()


# How argparse handles a field, by its type; other types are lists, whose flags may be repeated.
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"action": BooleanOptionalAction},
    int: {"type": integer, "metavar": "N"},
    float: {"type": number, "metavar": "NUMBER"},
    str: {"metavar": "TEXT"},
}
_REPEATABLE: dict[str, Any] = {"action": "append", "metavar": "TEXT"}

# A switch that is off by default. Every switch has a --no- form.
SWITCH: dict[str, Any] = {"action": BooleanOptionalAction, "default": False}
DTYPES = "float32|float16|bfloat16"
_SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODEL",
        "default": catalog.TINY,
        "help": "A name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a .pt or .gguf file.  "
        "[default: %(default)s]",
    },
    "--adapter-path": {
        "action": "append",
        "metavar": "PATH",
        "help": "An adapter: a folder, a file, a hub repository, or corenet:270M/lora. Repeat it as PATH=WEIGHT to mix "
        "LoRA adapters.",
    },
    "--tokenizer": {"metavar": "PATH", "help": "A tokenizer file or folder to use instead of the model's own."},
    "--config-yaml": {
        "metavar": "FILE",
        "help": "The training configuration of a CoreNet checkpoint; published sizes need none.",
    },
    "--revision": {"metavar": "NAME", "help": "A branch, tag or commit on the hub."},
    "--dtype": {"metavar": DTYPES, "help": "The type to compute in; by default the one that suits the device."},
    "--expand": {
        "action": BooleanOptionalAction,
        "help": "Unpack quantized weights at load, or keep them packed. By default they are unpacked only on a CPU "
        "without our kernels, while memory allows.",
    },
    "--exact-activations": {
        **SWITCH,
        "help": "On a CPU, do not round the activations that quantized weights are multiplied with; by default they "
        "are rounded to 8 bits if the weights have 6 or less.",
    },
    "--mlx-path": {
        "metavar": "FOLDER",
        "default": "mlx_model",
        "help": "The folder to write.  [default: %(default)s]",
    },
    "--overwrite": {**SWITCH, "help": "Replace the output if it exists."},
    "--json": {**SWITCH, "help": "Print one JSON object."},
    "--debug": {**SWITCH, "help": "Show the traceback of an error."},
    "--help": {"action": "help", "help": "Show this help."},
}


def add_shared(group: Any, *names: str) -> None:
    """Add these of the flags that commands share."""
    for name in names:
        group.add_argument(name, *(["-h"] if name == "--help" else []), **_SHARED[name])


def add_fields(parser: Parser, options: type) -> None:
    """A flag for each field of a dataclass that has an `Option`, named after the field.

    A flag that is not given leaves no value behind, so that the dataclass, or a configuration file, supplies it.
    """
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if get_origin(kind) is not Annotated:
            continue
        kind, option = get_args(kind)
        if get_origin(kind) in (Union, UnionType):  # int | None
            kind, *others = (part for part in get_args(kind) if part is not NoneType)
            kind = None if others else kind
        settings = dict(_TYPES.get(kind, _REPEATABLE))
        if option.metavar:
            settings["metavar"] = option.metavar
        default = "on" if field.default is True else field.default
        has_default = default is not None and default is not False and default != ()
        parser.groups[option.group].add_argument(
            f"--{field.name.replace('_', '-')}",
            *option.flags,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{option.help}  [default: {default}]" if has_default else option.help,
            **settings,
        )


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The values of the dataclass's fields whose flags were given; lists as tuples."""
    values = vars(args)
    found = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
