"""Commands as typer declares them, their values read without pydantic.

typer converts values with pydantic, whose import takes longer than loading a small model. Numbers, texts and
lists of them need no such help.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from ..errors import RequestError, quote

_ON = ("true", "t", "yes", "y", "on", "1")
_OFF = ("false", "f", "no", "n", "off", "0")
_KINDS = {int: "a whole number", float: "a number"}


class QuickHelp:
    """A `--help` that is False where it is absent: for None typer would load pydantic."""

    def get_help_option(self, ctx: typer.Context) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.default = False
        return option


class Command(QuickHelp, TyperCommand):  # type: ignore[misc]
    """A command whose flags are int, float, str, bool, or lists of these, None where they may be absent.

    What a command takes without a flag is a list too. A flag that has a `--no-` form also takes a word, as mlx-lm's
    `--verbose False` does.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Fill `ctx.params` from the command line; a `RequestError` names the flag that is wrong."""
        if ctx.resilient_parsing:  # shell completion
            return super().parse_args(ctx, args)  # type: ignore[arg-type]
        values, rest, _ = self.make_parser(ctx).parse_args(args=self._with_switches(args))  # type: ignore[arg-type]
        params = self.get_params(ctx)  # type: ignore[arg-type]
        for param in params:
            if param.is_eager:  # --help, --debug
                param.handle_parse_result(ctx, values, rest)  # type: ignore[arg-type]
        if rest:
            raise RequestError(f"{ctx.command_path} has no use for {' '.join(map(repr, rest))}; see its --help.")
        declared = inspect.signature(self.callback, eval_str=True).parameters  # type: ignore[arg-type]
        for param in params:
            if not param.is_eager and param.name is not None:
                ctx.params[param.name] = _value(param, values.get(param.name), declared[param.name])
        ctx.args = []
        return []

    def _with_switches(self, args: Sequence[str]) -> list[str]:
        """`--verbose False` and `--verbose=False` as `--no-verbose`; values of other flags stay untouched."""
        result: list[str] = []
        flags = {flag: param for param in self.params for flag in param.opts if flag.startswith("-")}
        rest = list(args)
        while rest:
            arg = rest.pop(0)
            name, equals, word = arg.partition("=")
            param: Any = flags.get(name)
            is_switch = getattr(param, "is_flag", False)
            if arg == "--":
                return [*result, arg, *rest]
            if is_switch and param.secondary_opts and (equals or (rest and rest[0].lower() in _ON + _OFF)):
                word = word if equals else rest.pop(0)
                if word.lower() not in _ON + _OFF:
                    raise RequestError(f"{name} must be True or False, got {quote(word)}.")
                result.append(name if word.lower() in _ON else param.secondary_opts[0])
                continue
            result.append(arg)
            if param is not None and not is_switch and not equals and rest:
                result.append(rest.pop(0))
        return result


def _value(param: Any, given: Any, declared: inspect.Parameter) -> Any:
    """The value of one flag: what was typed, converted, else its default."""
    flag = next((flag for flag in param.opts if flag.startswith("--")), param.name)
    if not isinstance(given, str | bool | list | tuple):  # absent
        if declared.default is inspect.Parameter.empty:
            raise RequestError(f"{flag} is missing: {param.help}")
        return declared.default
    kind = _kind(declared.annotation)
    if isinstance(given, list | tuple):
        return [_convert(flag, text, kind) for text in given]
    return given if isinstance(given, bool) else _convert(flag, given, kind)


def _kind(annotation: Any) -> type:
    """int, float or str, from under Annotated, optional and list."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(arg for arg in get_args(annotation) if arg is not NoneType)
    return get_args(annotation)[0] if get_origin(annotation) is list else annotation


def _convert(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise RequestError(f"{flag} must be {_KINDS[kind]}, got {quote(text)}.") from None
