"""`mlx-openelm`: finds the command, imports its module and no other, and reports every failure in one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import OpenELMError, RequestError, quote
from ..version import __version__
from ..wording import one_of

# Everything else is imported in `main`, so that Ctrl-C during the imports is quiet too.
if TYPE_CHECKING:
    from argparse import Namespace

    from . import flags

PROGRAM = "mlx-openelm"
SHELLS = ("bash", "zsh", "fish")

# Every command with its line in `--help`. Its module has its name, with `_` for `-`; `add_flags` declares its
# flags, `run` does the work.
COMMANDS = {
    "generate": "Print text that follows a prompt.",
    "chat": "Chat with a model on the terminal.",
    "serve": "Serve models over HTTP, with OpenAI's protocol and a chat page.",
    "embed": "Print a vector for each text, for search and comparison.",
    "convert": "Write a model as an MLX folder, quantized if you like.",
    "quantize": "Quantize a model and measure what it costs.",
    "export": "Write a model for transformers (huggingface) or llama.cpp (gguf).",
    "lora": "Fine-tune a model on your examples: LoRA, DoRA, or all weights.",
    "pretrain": "Train a model on text, from random weights or a model's own.",
    "dpo": "Train a model to prefer some answers to others: DPO, ORPO, CPO, SimPO, KTO.",
    "grpo": "Train a model on rewards of its own completions: functions, or regular expressions.",
    "train-tokenizer": "Train a tokenizer on your text, for a model trained from scratch.",
    "fuse": "Fuse adapters into a model, in any precision.",
    "upload": "Publish a model folder on the Hugging Face Hub, with a model card.",
    "average": "Write the mean of several checkpoints, of any format.",
    "cache-prompt": "Process a prompt once and keep it in a file, to go on from.",
    "info": "Show a model's layers, its size, and the memory it needs.",
    "doctor": "Show what this machine offers and what is slow or missing.",
    "perplexity": "Measure how well a model predicts a text.",
    "evaluate": "Measure what a model scores on tasks, beside what Apple published.",
    "leaderboard": "Show saved results of evaluate side by side.",
    "bench": "Measure how fast a model generates, alone or beside mlx-lm.",
}
_HELP = {"help": "Show the help of a command: mlx-openelm help generate."}
_DESCRIPTION = "Apple's OpenELM language models in MLX: generate, convert, measure, on the machine in front of you."
_EXAMPLES = f"""\
  {PROGRAM} generate "To be, or not to be"
  {PROGRAM} convert --model apple/OpenELM-270M -q --mlx-path OpenELM-270M-4bit
  {PROGRAM} help lora"""


def main(args: Sequence[str] | None = None) -> None:
    """Run `mlx-openelm` with these arguments, by default the process's own, and exit."""
    words = sys.argv[1:] if args is None else args
    debug = "--debug" in words  # also while they are parsed
    errors.names_flags = True
    # Otherwise the tokenizers package warns in each process that starts after a long text was encoded.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by the caller
                setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (open as long as the process)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # characters that the terminal does not have
        run, values = parse(words)
        debug = values.debug
        code = run(values)
        sys.stdout.flush()
    except BaseException as error:
        code = _exit_code(error, debug)
    finally:
        errors.names_flags = False
        errors.typed.clear()
    sys.exit(code)


def _show_warning(message: Warning | str, *_: Any) -> None:
    from .terminal import show

    show(f"warning: {message}")


def _exit_code(error: BaseException, debug: bool) -> int:
    """Print an error in one line on standard error, and return the exit code."""
    from .. import backend

    try:
        sys.stdout.flush()
    except OSError:  # closed pipe or full disk: keep Python's exit flush from failing too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    try:
        with backend.naming_the_extra():
            raise error
    except SystemExit as stop:  # from --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except OpenELMError as known:
        code, line = known.exit_code, str(known)
    except Exception as unexpected:
        code, line = 1, f"{type(unexpected).__name__}: {unexpected}"
        if isinstance(unexpected, OSError) and _is_from_printing(unexpected):
            line = f"Standard output cannot be written to: {unexpected.strerror}."
        elif isinstance(unexpected, FileNotFoundError) and not _has_folder():
            line = "The current folder does not exist any more; change to another."
        elif not debug:
            line = f"{line}; run again with --debug for the traceback."
    if debug:
        import traceback

        traceback.print_exception(error)
    from .terminal import show

    show(f"error: {line}")
    return code


def _is_from_printing(error: OSError) -> bool:
    """Whether an error comes from printing, by this package or by `console`: what they write to is what it is about."""
    from traceback import walk_tb

    *_, (frame, _) = walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename)
    return error.filename is None and (file.parent == Path(__file__).parent or file.name == "console.py")


def _has_folder() -> bool:
    """Whether the current folder exists."""
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def parse(args: Sequence[str]) -> tuple[Callable[[Namespace], int], Namespace]:
    """The function that a command line asks for, and its arguments. `--help` and `--version` print and exit."""
    if args and args[0] in _HELP:  # `help lora` is `lora --help`
        args = [*(word for word in args[1:] if word not in _HELP), "--help"]
    # Flags before the command are the program's own.
    own = list(takewhile(lambda word: word.startswith("-") or word in SHELLS, args))
    name, *rest = args[len(own) :] or (None,)
    if name is not None and {"-h", "--help"} & {*own}:  # `-h lora` too
        own, rest = [], ["--help"]
    debug = False
    if own or name is None:
        values = _program().parse(own)
        wants_completion = values.install_completion or values.show_completion
        if name is None:
            return _complete if wants_completion else _print_help, values
        if wants_completion:
            raise RequestError(f"No completion for {quote(name)}; choose {one_of(SHELLS)}.")
        debug = values.debug
    if "--help" in rest or "-h" in rest:
        from . import without_mlx

        without_mlx.stand_in()
    parser, run = command(name)
    values = parser.parse(rest)
    values.debug |= debug
    return run, values


def command(name: str) -> tuple[flags.Parser, Callable[[Namespace], int]]:
    """The parser of a command, and the function that runs it.

    Raises:
        RequestError: there is no such command.
    """
    from . import flags

    if name not in COMMANDS:
        from .. import suggestions

        raise RequestError(suggestions.unknown_command(PROGRAM, name, list(COMMANDS)))
    file = name.replace("-", "_")
    module = import_module(f".{file}", __package__)
    parser = flags.Parser(f"{PROGRAM} {name}", module.run.__doc__ or "", module.EXAMPLES, module.MAIN_FLAGS)
    module.add_flags(parser)
    flags.add_shared(parser.groups["Other flags"], "--debug", "--help")
    return parser, module.run


def _program() -> flags.Parser:
    """The parser of the flags before a command."""
    from . import flags

    parser = flags.Parser(PROGRAM, _DESCRIPTION, _EXAMPLES, commands=COMMANDS | _HELP)
    parser.usage = f"{PROGRAM} COMMAND [flags]"
    group = parser.groups["Flags"]
    version = f"{PROGRAM} {__version__}"
    group.add_argument("--version", "-V", action="version", version=version, help="Print the version.")
    for name, text in (
        ("install", "Install completion of commands and flags for a shell"),
        ("show", "Print the script of --install-completion"),
    ):
        group.add_argument(
            f"--{name}-completion",
            nargs="?",
            const=Path(os.environ.get("SHELL", "")).name or "bash",
            metavar="|".join(SHELLS),
            help=f"{text}.  [default: that of $SHELL]",
        )
    flags.add_shared(group, "--debug", "--help")
    return parser


def _print_help(_: Namespace) -> int:
    _program().print_help()
    return 0


def _complete(values: Namespace) -> int:
    from . import completion, without_mlx

    without_mlx.stand_in()
    commands = {name: (line, command(name)[0]) for name, line in COMMANDS.items()}
    text = completion.script(values.install_completion or values.show_completion, PROGRAM, _program(), commands)
    if values.show_completion:
        print(text)
    else:
        print(completion.install(values.install_completion, PROGRAM, text))
    return 0
