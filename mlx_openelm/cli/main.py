"""`mlx-openelm`: finds the command, imports its module and no other, and turns every failure into one line."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import backend
from ..errors import OpenELMError, RequestError, quote
from ..version import __version__
from . import console, flags
from .parsing import Command, QuickHelp

PROGRAM = "mlx-openelm"

# Every command with its line in `--help`; the module has its name, the function in it is `run`.
COMMANDS = {
    "generate": "Print text that follows a prompt.",
    "convert": "Write a model as an MLX folder, quantized if you like.",
    "quantize": "Quantize a model, knowing what it costs.",
    "export": "Write a model for transformers (huggingface) or llama.cpp (gguf).",
    "lora": "Fine-tune a model on your examples: LoRA, DoRA, or all weights.",
    "fuse": "Fuse adapters into a model, in any precision.",
    "upload": "Publish a model folder on the Hugging Face Hub, with a model card.",
    "average": "Write the mean of several checkpoints, of any format.",
    "info": "Show a model's layers, its size, and the memory it needs.",
    "doctor": "Show what this machine offers, and what to do about what is slow or missing.",
    "perplexity": "Measure how well a model predicts a text.",
}

# typer carries a copy of click, whose errors about flags and values have no public name of their own.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_APP: dict[str, Any] = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}


class Group(QuickHelp, TyperGroup):  # type: ignore[misc]
    """The commands by name, each imported when it is asked for."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in COMMANDS:
            close = difflib.get_close_matches(cmd_name, COMMANDS, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(COMMANDS)}."
            raise RequestError(f"{PROGRAM} has no command {quote(cmd_name)}; {hint}")
        app = typer.Typer(**_APP)
        app.command(cmd_name, cls=Command)(import_module(f".{cmd_name}", __package__).run)
        return typer.main.get_command(app)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


_app = typer.Typer(cls=Group, **_APP)


@_app.callback(invoke_without_command=True)
def _group(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: flags.Debug = False,
) -> None:
    """Apple's OpenELM language models in MLX: generate, convert, measure, on the machine in front of you."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(args: Sequence[str] | None = None) -> None:
    """Run `mlx-openelm` with these arguments, by default the process's own, and exit."""
    console.prepare_streams()
    code = _run(sys.argv[1:] if args is None else args)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _leave_pipe()
    sys.exit(code)


def _run(args: Sequence[str]) -> int:
    """The exit code of a command line; what goes wrong is told in one line on standard error."""
    try:
        with backend.naming_the_extra():
            group = typer.main.get_command(_app)
            with group.make_context(PROGRAM, list(args)) as context:
                group.invoke(context)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _leave_pipe()
    except UsageError as error:
        console.say_error(_usage_line(error))
        return 2
    except OpenELMError as error:
        if flags.debugging():
            traceback.print_exc()
        console.say_error(str(error))
        return error.exit_code
    # Whatever it is, a person gets a line and a way to the traceback.
    except Exception as error:
        if flags.debugging():
            traceback.print_exc()
            return 1
        reason = " ".join(str(error).split())
        console.say_error(f"{type(error).__name__}: {reason}; run again with --debug for the traceback.")
        return 1


def _usage_line(error: Any) -> str:
    """What is wrong with the flags, and where to look."""
    context = getattr(error, "ctx", None)
    if context is None:
        return f"{error.format_message().rstrip('.')}; see --help."
    command = context.command_path
    if not hasattr(error, "possibilities"):
        return f"{error.format_message().rstrip('.')}; see {command} --help."
    known = [flag for param in context.command.params for flag in (*param.opts, *param.secondary_opts)]
    close = difflib.get_close_matches(error.option_name, known, n=2, cutoff=0.7)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{command} has no flag {error.option_name}{hint}; see {command} --help."


def _leave_pipe() -> int:
    """Whoever read our output has left: write the rest, and Python's last flush, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
