"""`mlx-openelm chat`: reads messages and shows answers as they are generated, until the input ends."""

from __future__ import annotations

import signal
import sys
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import FrameType

from .. import backend, console
from ..errors import OpenELMError
from ..generation.chat import Conversation, StopAnswerError
from ..generation.options import GenerationOptions
from ..hub import catalog
from ..loading import load
from ..wording import counted
from . import flags
from .chat_commands import WITHOUT, Session, complete, is_command, obey, say_stats
from .chat_input import PipedInput, TerminalInput, history_file
from .terminal import show, write

MAIN_FLAGS = (
    *("--model", "--system-prompt", "--chat-template", "--max-tokens", "--temp", "--top-p", "--seed", "--stop"),
    "--adapter-path",
)
EXAMPLES = """\
  mlx-openelm chat
  mlx-openelm chat --model 1.1b-instruct --chat-template corenet --temp 0.7 --repetition-penalty 1.2
  mlx-openelm chat --system-prompt "Answer in one sentence." --max-kv-size 512
  echo "Who art thou?" | mlx-openelm chat"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `chat` to its parser."""
    common, chat, model, output = (parser.groups[title] for title in ("Common flags", "Prompt", "Model", "Output"))
    common.add_argument(
        "--model",
        metavar="MODEL",
        default=catalog.TINY_CHAT,
        help="Model: a name (tiny-instruct, 270m-instruct), a hub repository, a folder, a .pt or .gguf file.  "
        f"[default: {catalog.TINY_CHAT}]",
    )
    flags.add_fields(parser, GenerationOptions, WITHOUT)
    chat.add_argument(
        "--chat-template",
        metavar=flags.CHAT_TEMPLATES,
        help="How to write the conversation.  [default: the model's own, else plain]",
    )
    chat.add_argument("--system-prompt", metavar="TEXT", help="Instructions that come before the first message.")
    flags.add_shared(chat, "--extra-eos-token")
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(model, "--exact-activations")
    flags.add_shared(parser.groups["Drafts"], "--draft-model")
    output.add_argument("--verbose", **flags.SWITCH, help="Show what /stats shows after every answer.")
    output.add_argument(
        "--history",
        action=BooleanOptionalAction,
        default=True,
        help="Keep what is typed on a terminal for the next session, in a file.  [default: on]",
    )


def run(args: Namespace) -> int:
    """Chat with a model.

    The model sees the whole conversation, and only what is new is processed. A message may have several lines: paste
    them, press Alt-Enter, end a line with a backslash, or put them between lines of three double quotes. Ctrl-C stops
    an answer, Ctrl-D ends the chat, /help lists the commands.

    If standard input is not a terminal, each line is a message. Answers go to standard output, everything else to
    standard error.
    """
    options = GenerationOptions(**flags.given(args, GenerationOptions))
    options.validate()
    model, tokenizer = load(
        args.model,
        None,
        args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        expand=args.expand,
        exact_activations=args.exact_activations,
    )
    draft_model = None
    if args.draft_model is not None:
        from .drafts import load_draft_model

        draft_model = load_draft_model(args, model, tokenizer)
    for token in args.extra_eos_token or ():
        tokenizer.add_eos_token(token)
    conversation = Conversation(
        model,
        tokenizer,
        template=args.chat_template,
        system=args.system_prompt,
        draft_model=draft_model,
        options=options,
    )
    session = Session(conversation, args.model)
    if args.adapter_path is not None:
        session.use_adapter(args.adapter_path)
    if not sys.stdin.isatty():
        return _talk(session, PipedInput(), args)
    source = TerminalInput(history_file() if args.history else None, complete)
    count = f"{model.config.num_parameters / 1e6:,.0f} million parameters"
    console.say(f"{args.model}, {count}, chat template: {conversation.template}. /help lists the commands.")
    return _talk(session, source, args)


def _talk(session: Session, source: PipedInput | TerminalInput, args: Namespace) -> int:
    """Answer messages and obey commands until the input ends; returns the exit code.

    What goes wrong with one of them is shown, and the next one is read. On a terminal Ctrl-C stops what is going on;
    a program whose input is piped ends.
    """
    code = 0
    while not session.is_over:
        try:
            text = source.read()
            if text is None:
                if source.is_terminal:
                    write("\n")
                break
            if is_command(text):
                obey(session, text, partial(_answer, session, source.is_terminal, args.verbose))
            elif text.strip():
                text = text.removeprefix("/") if text.startswith("//") else text
                _answer(session, source.is_terminal, args.verbose, text)
        except KeyboardInterrupt:
            if not source.is_terminal:
                raise
            write("\n")
            show("Press Ctrl-D or type /exit to leave.")
        except BrokenPipeError:
            raise
        except Exception as error:
            line = str(error) if isinstance(error, OpenELMError) else f"{type(error).__name__}: {error}"
            if args.debug:
                import traceback

                traceback.print_exception(error)
            show(f"error: {line}")
            code = 0 if source.is_terminal else 1
    return code


def _answer(session: Session, on_terminal: bool, verbose: bool, text: str | None) -> None:
    """Show the answer to a message as it is generated; None tries the last one again."""
    chat = session.conversation
    left_out, seen = chat.left_out, False
    with _stopping() if on_terminal else nullcontext(lambda: False) as is_stopped:
        progress = _Reading(is_stopped)
        pieces = chat.retry(progress) if text is None else chat.say(text, progress)
        try:
            with progress.bar:
                for piece in pieces:
                    if not seen and chat.left_out > left_out:
                        _say_left_out(chat.left_out)
                    seen = True
                    write(piece.text)
                    if is_stopped():
                        break
        except StopAnswerError:
            pass
        except KeyboardInterrupt:  # the second one
            if not on_terminal:
                raise
            seen = False
            write("\n")
        finally:
            if seen:
                write("\n")
            pieces.close()
    if not seen:
        show("Stopped; the message was taken back.")
        return
    _say_end(session, verbose)
    if on_terminal:
        write("\n")


def _say_left_out(count: int) -> None:
    show(
        "note: the conversation is longer than the model's context; from now on the model does not see its first "
        f"{counted(count, 'message')}."
    )


def _say_end(session: Session, verbose: bool) -> None:
    stats, options = session.conversation.stats, session.conversation.options
    if stats is None:
        return
    if stats.stopped:
        show("Stopped; the conversation goes on from here.")
    elif stats.last.finish_reason == "length" and stats.last.generation_tokens == options.max_tokens:
        show(f"note: the answer was cut off after {counted(options.max_tokens, 'token')}; see /set max-tokens.")
    if verbose:
        say_stats(session)


class _Reading:
    """Progress through a long prompt, with a bar that can be stopped."""

    def __init__(self, is_stopped: Callable[[], bool]):
        self._is_stopped = is_stopped
        self.bar = console.Progress("Reading the prompt", unit="tokens", lines=False)

    def __call__(self, done: int, total: int) -> None:
        if self._is_stopped() and done < total:
            raise StopAnswerError
        if backend.prefill_step_size(total) < total:
            self.bar(done, total)


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """While an answer is generated, Ctrl-C asks to stop it, between two tokens; a second one interrupts at once."""
    asked = False

    def ask(signal_number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)
