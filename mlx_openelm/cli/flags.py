"""The parser of a command (argparse, with errors in one line), and the flags that commands share."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from ..errors import RequestError, quote
from ..hub import catalog

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
        self.flags = self._option_string_actions  # every spelling of every flag
        self._groups: dict[str, Any] = {}

    def group(self, title: str) -> Any:
        """The group of flags under this heading; made when first asked for."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """The values on a command line.

        Raises:
            RequestError: an unknown flag, a missing or wrong value, an argument too many.
        """
        words = self._with_values_attached(args)
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
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            message = f"{missing} is missing"
        raise RequestError(f"{message}; see {self.prog} --help.")

    def _with_values_attached(self, args: Sequence[str]) -> list[str]:
        """`--flag value` as `--flag=value`, since argparse takes a separate `-inf` or `--x` for a flag.

        What cannot be right is refused here, before argparse complains of flags that are missing.
        """
        result: list[str] = []
        words = iter(args)
        takes_arguments = any(not action.option_strings for action in self._actions)
        may_be_value = False
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
            if action is None and flag.startswith("-") and flag[:2] not in self.flags and flag[1:2].isalpha():
                self.error(f"{self.prog} has no flag {flag}")
            if not word.startswith("-") and not takes_arguments and not may_be_value:
                self.error(f"unexpected argument {quote(word)}")
            may_be_value = action is not None and action.nargs == "?" and not equals
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


# What argparse converts a value with, and how `--help` writes it.
_TYPES: dict[Any, dict[str, Any]] = {
    bool: {"action": Switch, "metavar": "True|False"},
    int: {"type": integer, "metavar": "N"},
    float: {"type": number, "metavar": "NUMBER"},
    str: {"metavar": "TEXT"},
}
_REPEATABLE: dict[str, Any] = {"action": "append", "metavar": "TEXT"}

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
        "action": Switch,
        "metavar": "True|False",
        "help": "Unpack quantized weights at load, or keep them packed. By default they are unpacked only on a CPU "
        "without our kernels, while memory allows.",
    },
    "--exact-activations": {
        "action": "store_true",
        "help": "On a CPU, do not round the activations that quantized weights are multiplied with; by default they "
        "are rounded to 8 bits if the weights have 6 or less.",
    },
    "--mlx-path": {
        "metavar": "FOLDER",
        "default": "mlx_model",
        "help": "The folder to write.  [default: %(default)s]",
    },
    "--overwrite": {"action": "store_true", "help": "Replace the output if it exists."},
    "--json": {"action": "store_true", "help": "Print one JSON object."},
    "--debug": {"action": "store_true", "help": "Show the traceback of an error."},
    "--help": {"action": "help", "help": "Show this help."},
}


def add_shared(group: Any, *names: str) -> None:
    """Add these of the flags that commands share."""
    for name in names:
        group.add_argument(name, *(["-h"] if name == "--help" else []), **_SHARED[name])


def add_packing(group: Any) -> None:
    """The flags of a command that can also pack or unpack a model."""
    group.add_argument("--quantize", "-q", action="store_true", help="Pack every matrix into few bits.")
    group.add_argument("--q-bits", type=integer, metavar="N", help="Bits per weight; affine: 4 by default.")
    group.add_argument(
        "--q-group-size", type=integer, metavar="N", help="Weights that share a scale; affine: 64 by default."
    )
    group.add_argument(
        "--q-mode", metavar="affine|mxfp4|nvfp4|mxfp8", default="affine", help="The packing.  [default: %(default)s]"
    )
    group.add_argument(
        "--recipe",
        "--quant-predicate",
        metavar="mixed_2_6|mixed_3_4|mixed_3_6|mixed_4_6",
        help="With -q, more bits for the matrices that need them.",
    )
    group.add_argument("--dequantize", "-d", action="store_true", help="Unpack a quantized model.")


def packing(args: argparse.Namespace) -> dict[str, Any]:
    """The values of `add_packing`'s flags."""
    names = ("quantize", "q_bits", "q_group_size", "q_mode", "recipe", "dequantize")
    return {name: getattr(args, name) for name in names}


def add_fields(parser: Parser, options: type) -> None:
    """A flag for each field of a dataclass, named after it, as its `Option` describes.

    A flag that was not typed leaves no value behind, so that the dataclass, or a configuration file, supplies it.
    """
    hints = get_type_hints(options, include_extras=True)
    for field in dataclasses.fields(options):
        annotation = hints[field.name]
        kind, about = annotation.__origin__, annotation.__metadata__[0]
        if get_origin(kind) in (Union, UnionType):  # int | None
            kind, *others = (part for part in get_args(kind) if part is not NoneType)
            kind = None if others else kind
        settings = dict(_TYPES.get(kind, _REPEATABLE))
        if about.metavar:
            settings["metavar"] = about.metavar
        shown = "on" if field.default is True else field.default
        has_default = shown is not None and shown is not False and shown != ()
        parser.group(about.group).add_argument(
            f"--{field.name.replace('_', '-')}",
            *about.flags,
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{about.help}  [default: {shown}]" if has_default else about.help,
            **settings,
        )


def given(args: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of a dataclass whose flags were typed; those that may be repeated as tuples."""
    values = vars(args)
    found = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
