"""The commands of `mlx-openelm chat`, such as `/undo`."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import console
from ..errors import RequestError, quote
from ..generation.chat import Conversation
from ..generation.chat_files import conversation_file, load_messages, save_messages
from ..generation.options import GenerationOptions
from ..wording import counted, did_you_mean, size
from . import flags

if TYPE_CHECKING:
    from ..adapters.switching import AdapterSwitch

# What a chat sets for each answer; the other options of `generate` have no use in it.
WITHOUT = ("echo", "top_logprobs")
_SETTABLE = [field for field in dataclasses.fields(GenerationOptions) if field.name not in WITHOUT]
_NONE = "none"
_DEFAULT = "default"
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL | re.IGNORECASE)

Answer = Callable[[str | None], None]


class Session:
    """A chat and what its commands change.

    Args:
        conversation: of a model without an adapter.
        model: its name.
    """

    def __init__(self, conversation: Conversation, model: str):
        self.conversation, self.model = conversation, model
        self.is_over = False
        self.adapter: list[str] = []  # the paths of those in use
        self.file: Path | None = None  # that the conversation was saved to or loaded from
        self._switch: AdapterSwitch | None = None

    def use_adapter(self, paths: Sequence[str]) -> None:
        """Use an adapter, a mixture (`PATH=WEIGHT`), or with no path the base alone.

        Raises:
            RequestError: as `read_mixture`; the one in use stays.
        """
        from ..adapters.switching import AdapterSwitch, read_mixture

        if self._switch is None:
            self._switch = AdapterSwitch(self.conversation.model)
        before = self._switch.names
        if paths:
            name = " ".join(paths) if before != [" ".join(paths)] else f"{before[0]} "  # it may be a newer file
            self._switch.add(name, read_mixture(list(paths), self.conversation.model.config))
            self._switch.use(name)
        else:
            self._switch.use(None)
        for old in before:
            self._switch.remove(old)
        self.adapter = list(paths)
        self.conversation.forget_caches()


class _Command(NamedTuple):
    run: Callable[[Session, str, Answer], None]
    usage: str
    help: str


def is_command(text: str) -> bool:
    """Whether a message is a command: a slash and a word. `/usr/bin` is none, nor is what begins with two slashes."""
    return _COMMAND.fullmatch(text.strip()) is not None


def obey(session: Session, text: str, answer: Answer) -> None:
    """Run a command.

    Args:
        answer: shows an answer to a message, or with None another one to the last message.

    Raises:
        RequestError: there is no such command, or it cannot do what it is asked; nothing was changed.
    """
    found = _COMMAND.fullmatch(text.strip())
    assert found is not None
    name, argument = found[1].lower(), (found[2] or "").strip()
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        hint = did_you_mean(name, COMMANDS).replace("mean ", "mean /").replace(" or ", " or /")
        raise RequestError(f"There is no command /{name}; {hint or '/help lists them.'} A message may begin with //.")
    if argument and not command.usage:
        raise RequestError(f"/{name} takes no argument, got {quote(argument)}.")
    command.run(session, argument, answer)


def complete(line: str) -> list[str]:
    """What the last word of a command may be, from its beginning."""
    words = line.split(" ")
    if not line.startswith("/"):
        return []
    if len(words) == 1:
        return [f"/{name} " for name in COMMANDS if name.startswith(line[1:])]
    if words[0] == "/set" and len(words) == 2:
        return [f"{name} " for name in map(_dashed, _SETTABLE) if name.startswith(words[1])]
    if words[0] in ("/load", "/save", "/adapter"):
        path = Path(words[-1])
        parent = path if words[-1].endswith("/") or not words[-1] else path.parent
        beginning = "" if parent is path else path.name
        try:
            entries = sorted(entry for entry in parent.expanduser().iterdir() if entry.name.startswith(beginning))
        except OSError:
            return []
        return [f"{parent / entry.name}{'/' if entry.is_dir() else ' '}" for entry in entries]
    return []


def say_stats(session: Session) -> None:
    """Show what the last answer took, and what the conversation takes."""
    chat = session.conversation
    stats = chat.stats
    if stats is not None:
        last, new = stats.last, stats.prompt_tokens - stats.cached_tokens
        cached = f"{counted(new, 'new token')} after {stats.cached_tokens:,} in the cache"
        console.say(f"Prompt: {cached}, {last.prompt_tps:.1f} tokens/s")
        speed = f", {last.generation_tps:.1f} tokens/s" if last.generation_tokens > 1 else ""
        end = "stopped" if stats.stopped else f"finish reason: {last.finish_reason}"
        console.say(f"Answer: {counted(last.generation_tokens, 'token')}{speed}, {end}")
        if last.drafts is not None:
            from .drafts import as_text

            console.say(f"Drafts: {as_text(last.drafts)}")
        if stats.seed is not None:
            console.say(f"Seed: {stats.seed}")
        used, context = stats.prompt_tokens + last.generation_tokens, chat.model.config.max_context_length
        console.say(f"Context: {used:,} of {counted(context, 'token')}, {size(chat.cache_bytes)} of keys and values")
        console.say(f"Peak memory: {last.peak_memory:.3f} GB")
    left_out = f", of which the model no longer sees {chat.left_out}" if chat.left_out else ""
    console.say(f"Conversation: {counted(len(chat.messages), 'message')}{left_out}")
    console.say(f"Model: {session.model}, adapter: {' '.join(session.adapter) or _NONE}, template: {chat.template}")


def _help(session: Session, argument: str, answer: Answer) -> None:
    names = {f"/{name} {command.usage}".rstrip(): command.help for name, command in COMMANDS.items()}
    width = max(map(len, names))
    for name, text in names.items():
        console.say(f"{name:{width}}  {text}")
    console.say('Several lines: paste them, press Alt-Enter, end a line with \\, or put them between """ and """.')
    console.say("Ctrl-C stops an answer, Ctrl-D ends the chat. A message that begins with a slash needs two.")


def _reset(session: Session, argument: str, answer: Answer) -> None:
    session.conversation.reset()
    console.say("The conversation begins again.")


def _undo(session: Session, argument: str, answer: Answer) -> None:
    session.conversation.undo()
    console.say(f"Took back the last exchange; {counted(len(session.conversation.messages), 'message')} left.")


def _retry(session: Session, argument: str, answer: Answer) -> None:
    answer(None)


def _save(session: Session, argument: str, answer: Answer) -> None:
    words = _words(argument)
    overwrite = "--overwrite" in words
    names = [word for word in words if word != "--overwrite"]
    if len(names) > 1 or (not names and session.file is None):
        raise RequestError("Give one file: /save FILE.")
    if not session.conversation.messages:
        raise RequestError("There is nothing to save yet.")
    file = conversation_file(names[0]) if names else session.file
    assert file is not None
    is_ours = session.file is not None and file.absolute() == session.file.absolute()
    session.file = save_messages(file, session.conversation.all_messages(), overwrite=overwrite or is_ours)
    console.say(f"Saved {counted(len(session.conversation.messages), 'message')} to {session.file}.")


def _load(session: Session, argument: str, answer: Answer) -> None:
    words = _words(argument)
    if len(words) != 1:
        raise RequestError("Give one file: /load FILE.")
    messages, file = load_messages(words[0])
    session.conversation.load(messages)
    session.file = file
    end = "; /retry answers the last one" if session.conversation.is_unanswered else ""
    console.say(f"Loaded {counted(len(session.conversation.messages), 'message')} from {file}{end}.")


def _system(session: Session, argument: str, answer: Answer) -> None:
    if argument:
        session.conversation.system = None if argument == _NONE else argument
    console.say(f"System prompt: {session.conversation.system or _NONE}")


def _set(session: Session, argument: str, answer: Answer) -> None:
    chat = session.conversation
    if not argument:
        _say_settings(chat.options)
        return
    name, _, value = re.sub(r"[=\s]+", " ", argument, count=1).partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    field = next((field for field in _SETTABLE if field.name == name), None)
    if field is None:
        hint = did_you_mean(name.replace("_", "-"), map(_dashed, _SETTABLE))
        raise RequestError(f"There is no setting {quote(name)}; {hint or '/set lists them.'}")
    if value == _DEFAULT:
        default: dict[str, Any] = {name: field.default}
        chat.options = dataclasses.replace(chat.options, **default)
    elif value:
        parser = flags.Parser("/set", "", "")
        flags.add_fields(parser, GenerationOptions, WITHOUT)
        given = flags.given(parser.parse([f"--{_dashed(field)}={value}"]), GenerationOptions)
        chat.options = dataclasses.replace(chat.options, **given)
    console.say(f"{_dashed(field)}: {_shown(getattr(chat.options, name))}")


def _say_settings(options: GenerationOptions) -> None:
    shown = ("temp", "top_p", "max_tokens", "seed", "stop")
    listed = [field for field in _SETTABLE if field.name in shown or getattr(options, field.name) != field.default]
    for field in listed:
        console.say(f"{_dashed(field)}: {_shown(getattr(options, field.name))}")
    others = ", ".join(_dashed(field) for field in _SETTABLE if field not in listed)
    console.say(console.wrap(f"As by default: {others}.", console.columns(sys.stderr)))
    console.say("/set NAME VALUE changes one, /set NAME default sets it back.")


def _adapter(session: Session, argument: str, answer: Answer) -> None:
    if argument:
        session.use_adapter([] if argument == _NONE else _words(argument))
    console.say(f"Adapter: {' '.join(session.adapter) or _NONE}")


def _stats(session: Session, argument: str, answer: Answer) -> None:
    say_stats(session)


def _exit(session: Session, argument: str, answer: Answer) -> None:
    session.is_over = True


COMMANDS = {
    "help": _Command(_help, "", "List the commands."),
    "retry": _Command(_retry, "", "Answer the last message again."),
    "undo": _Command(_undo, "", "Take back the last message and its answer."),
    "reset": _Command(_reset, "", "Begin again; system prompt and settings stay."),
    "system": _Command(_system, "[TEXT|none]", "Show or change the system prompt."),
    "set": _Command(_set, "[NAME [VALUE]]", "Show or change a setting of generate, such as temp or max-tokens."),
    "adapter": _Command(_adapter, "[PATH ...|none]", "Show or change the adapter; PATH=WEIGHT mixes several."),
    "save": _Command(_save, "[FILE]", "Write the conversation to a JSON file; --overwrite replaces another one."),
    "load": _Command(_load, "FILE", "Go on with the conversation in a file."),
    "stats": _Command(_stats, "", "Show tokens, speed and memory of the last answer."),
    "exit": _Command(_exit, "", "End the chat."),
}
_ALIASES = {"quit": "exit", "bye": "exit", "q": "exit", "clear": "reset", "new": "reset", "regen": "retry"}


def _words(argument: str) -> list[str]:
    try:
        return shlex.split(argument)
    except ValueError as error:
        raise RequestError(f"The argument {quote(argument)} cannot be read: {error}.") from None


def _dashed(field: Any) -> str:
    return field.name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return _DEFAULT
    return ", ".join(map(repr, value)) if isinstance(value, tuple | list) else str(value)
