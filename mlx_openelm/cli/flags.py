"""The parser of a command (argparse, with errors in one line), and the flags that commands share."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shlex
import sys
from argparse import BooleanOptionalAction
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from .. import errors
from ..console import columns
from ..errors import RequestError, quote
from ..hub import catalog
from .option_values import PARSERS
from .terminal import show

# The values that a switch may be given, as in mlx-lm's `--verbose False`.
_ON = ("true", "t", "yes", "y", "on", "1")
_OFF = ("false", "f", "no", "n", "off", "0")

# The headings of every command's `--help`, in their order; one without flags is not shown.
_GROUPS = (
    *("Flags", "Arguments", "Common flags"),
    *(
        "Training",
        "Rewards",
        "Generation",
        "Loss",
        "Data",
        "Adapter",
        "Optimizer",
        "Memory",
        "Validation and test",
        "Checkpoints",
        "Reports",
    ),
    *("Prompt", "Sampling", "Penalties", "Constraints", "Drafts", "Windows", "Tasks", "Measuring", "Load"),
    *("Quantization", "Calibration", "Report"),
    *("Network", "Requests", "Limits"),
    *("Model", "Source", "Key-value cache", "Output", "Upload", "Other flags"),
)


class Parser(argparse.ArgumentParser):
    """The flags of one command, in groups.

    Args:
        prog: how the command is called, like `mlx-openelm generate`.
        description: the text below the usage; empty lines separate paragraphs.
        examples: command lines, one a line.
        main_flags: those that `--help` lists first.
        commands: names and texts that `--help` lists before the flags.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        examples: str,
        main_flags: Sequence[str] = (),
        commands: Mapping[str, str] | None = None,
    ):
        super().__init__(
            prog,
            f"{prog} [flags]",
            inspect.cleandoc(description),
            examples,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.flags = self._option_string_actions  # every spelling of every flag
        self.groups = {title: self.add_argument_group(title) for title in _GROUPS}
        self.main_flags, self.commands = main_flags, commands or {}
        self.defaults: dict[str, Any] = {}  # of the fields of dataclasses, for `--help`
        self._before = ""  # the flag whose value came just before the first argument

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The values on a command line.

        Raises:
            RequestError: an unknown flag, a missing or wrong value, an argument too many.
        """
        try:
            values, rest = self.parse_known_args(self._normalized(args))
        except argparse.ArgumentError as error:
            if error.argument_name is None:
                self.error(error.message)
            names = error.argument_name.split("/")
            name = next((name for name in names if name.startswith("--")), names[0])
            is_extra = error.message.startswith("ignored explicit argument")  # -q4
            raise RequestError(f"{name} {'takes no value' if is_extra else error.message}.") from None
        for word in rest:
            if word != "--":
                self._refuse_argument(word, args)
        values.before_words = self._before
        return values

    def format_help(self) -> str:
        """The help, as wide as the terminal."""
        from .help_text import render

        return render(self, columns(sys.stdout) or 80)

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
        """One word for each flag: `--flag value` as `--flag=value`, `--switch False` as `--no-switch`; arguments last.

        argparse takes a separate `-inf` or `--x` for a flag, and arguments between flags for several lists. A word
        that cannot be right is refused here, before argparse complains of flags that are missing.
        """
        result: list[str] = []
        arguments: list[str] = []
        flag = value = ""
        words = deque(args)
        takes_arguments = any(not action.option_strings for action in self._actions)
        switch_values = ("true", "false") if takes_arguments else _ON + _OFF
        while words:
            word = words.popleft()
            if word == "--":
                arguments += words
                break
            if not word.startswith("-") or word == "-":
                if not arguments:
                    self._before, before_value = flag, value
                arguments.append(word)
                continue
            flag, equals, value = word.partition("=")
            action = self.flags.get(flag)
            if action is not None and flag.startswith("--") and flag != action.option_strings[0]:
                errors.typed[action.option_strings[0]] = flag
            if action is None:
                if (flag.startswith("--") or flag[:2] not in self.flags) and self._is_refused(flag):
                    continue
            elif isinstance(action, BooleanOptionalAction):
                if words and not equals and words[0].lower() in switch_values:
                    equals, value = "=", words.popleft()
                if equals:
                    word = self._switch(action, flag, value)
            elif action.nargs == 0 and equals:
                self.error(f"{flag} takes no value")
            elif action.nargs is None and not equals:
                if not words or words[0].partition("=")[0] in self.flags:  # a flag is no value: that was forgotten
                    self._refuse_value(flag, *list(words)[:1])
                value = words.popleft()
                word = f"{flag}={value}"
            elif action.nargs == "?" and not equals and words and not words[0].startswith("-"):
                word = f"{flag}={words.popleft()}"
            result.append(word)
        if self._before:
            self._check_list(before_value, arguments, result)
        if arguments and not takes_arguments:
            self._refuse_argument(arguments[0], args)
        return [*result, "--", *arguments] if arguments else result

    def _check_list(self, value: str, arguments: list[str], flags: list[str]) -> None:
        """Refuse `--stop A B`, mlx-lm's way to write lists, where B is not an argument that is lacking."""
        has_prompt = any(word.partition("=")[0] in ("--prompt", "-p", "--prompt-file") for word in flags)
        is_one_prompt = "--prompt" in self.flags and len(arguments) + has_prompt == 1
        takes_many = any(not action.option_strings for action in self._actions) and "--prompt" not in self.flags
        if isinstance(self.flags.get(self._before), argparse._AppendAction) and not is_one_prompt and not takes_many:
            each = " ".join(f"{self._before} {shlex.quote(word)}" for word in (value, arguments[0]))
            raise RequestError(f"{self._before} takes one value at a time; repeat it: {each}.")

    def _refuse_argument(self, word: str, args: Sequence[str]) -> NoReturn:
        """Say that an argument needs a flag: the first of the main ones, if it is not given and takes a value."""
        flag = self.main_flags[0] if self.main_flags else ""
        given = {arg.partition("=")[0] for arg in args}
        fits = flag in self.flags and self.flags[flag].nargs is None and not given & {*self.flags[flag].option_strings}
        hint = f" (did you mean {flag} {shlex.quote(word)}?)" if fits and not word.isdecimal() else ""
        self.error(f"Unexpected argument {quote(word)}{hint}")

    def _refuse_value(self, flag: str, word: str | None = None) -> NoReturn:
        """Say that a flag needs a value: `word`, the next, is a flag, or there is none."""
        hint = "" if word is None else f", and {word} is a flag; if it is the value, write {flag}={word}"
        self.error(f"{flag} needs a value{hint}")

    def _is_refused(self, flag: str) -> bool:
        """Explain an unknown flag: raise an error, or return True after a warning if it can be left out."""
        from .. import suggestions

        reason = suggestions.not_needed(flag)
        if reason is None:
            raise RequestError(suggestions.unknown_flag(self.prog, flag, self.flags))
        show(f"warning: {flag} is not needed: {reason}.")
        return True

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


def memory_size(text: str) -> int:
    """A flag's value as a number of bytes: 4GB, 512 MB, 2GiB, 1000000."""
    amount = text.strip().lower().removesuffix("b").rstrip()
    base = 1024 if amount.endswith("i") else 1000
    amount = amount.removesuffix("i")
    power = "kmgt".find(amount[-1:]) + 1 if amount else 0
    try:
        count = int(float(amount[:-1] if power else amount) * base**power)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 4GB or 512MB, got {quote(text)}")
    return count


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
DTYPES = "float32|float16|bfloat16"  # fp32, fp16 and bf16 too
CHAT_TEMPLATES = "own|plain|corenet|FILE"
_SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODEL",
        "default": catalog.TINY,
        "help": "Model: a name (tiny, 270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file.  "
        f"[default: {catalog.TINY}]",
    },
    "--adapter-path": {
        "action": "append",
        "metavar": "PATH",
        "help": "Adapter to use: a folder, a file, a hub repository, or corenet:270M/lora. To mix several, repeat it "
        "as PATH=WEIGHT.",
    },
    "--draft-model": {
        "metavar": "auto|MODEL",
        "help": "Smaller model that drafts tokens, which the model checks several at a time: a name, a folder, or "
        "auto, which is 270m for 1.1b and 3b, and tiny-draft for tiny.",
    },
    "--extra-eos-token": {
        "action": "append",
        "metavar": "TOKEN",
        "help": "Token, or its id, that also ends the text; repeatable.",
    },
    "--tokenizer": {"metavar": "PATH", "help": "Tokenizer file or folder, or tiny.  [default: the model's own]"},
    "--config-yaml": {
        "metavar": "FILE",
        "help": "Training configuration of a CoreNet checkpoint; the four published sizes need none.",
    },
    "--revision": {"metavar": "NAME", "help": "Branch, tag or commit of the model's hub repository.  [default: main]"},
    "--dtype": {"metavar": DTYPES, "help": "Type to compute in.  [default: what suits the device]"},
    "--expand": {
        "action": BooleanOptionalAction,
        "help": "Unpack quantized weights at load, or keep them packed.  [default: unpack if packed is slow]",
    },
    "--exact-activations": {
        **SWITCH,
        "help": "Do not round activations. On a CPU they are otherwise rounded to 8 bits where they meet weights of 6 "
        "bits or less, which is faster.",
    },
    "--mlx-path": {
        "metavar": "FOLDER",
        "default": "mlx_model",
        "help": "Folder to write.  [default: mlx_model]",
    },
    "--overwrite": {**SWITCH, "help": "Replace the output if it exists already."},
    "--json": {**SWITCH, "help": "Print the result as one JSON object."},
    "--debug": {**SWITCH, "help": "Show the Python traceback of an error."},
    "--help": {"action": "help", "help": "Show this help and exit."},
}


def add_shared(group: Any, *names: str) -> None:
    """Add these of the flags that commands share."""
    for name in names:
        group.add_argument(name, *(["-h"] if name == "--help" else []), **_SHARED[name])


def add_fields(parser: Parser, options: type, without: Collection[str] = ()) -> None:
    """A flag for each field of a dataclass that has an `Option`, named after the field; none for those in `without`.

    A flag that is not given leaves no value behind, so that the dataclass, or a configuration file, supplies it.
    """
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        kind = hints[field.name]
        if get_origin(kind) is not Annotated or field.name in without:
            continue
        kind, option = get_args(kind)
        if get_origin(kind) in (Union, UnionType):  # int | None
            kind, *others = (part for part in get_args(kind) if part is not NoneType)
            kind = None if any(get_origin(part) is Sequence for part in others) else kind
        settings = dict(_TYPES.get(kind, _REPEATABLE))
        if option.metavar:
            settings["metavar"] = option.metavar
        parser.defaults[field.name] = option.default or field.default
        parser.groups[option.group].add_argument(
            f"--{field.name.replace('_', '-')}",
            *option.flags,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=option.help,
            **settings,
        )


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The values of the dataclass's fields whose flags were given; lists as tuples, texts that need it parsed."""
    values = vars(args)
    found = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return found | {name: parse(found[name]) for name, parse in PARSERS.items() if name in found}
