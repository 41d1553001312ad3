"""What a user says in `mlx-openelm chat`: messages from the terminal, with editing and history, or from a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.atomic import new_file

PROMPT, MORE = "> ", "... "
_QUOTES = '"""'
# So many messages are kept for later sessions.
HISTORY_LENGTH = 1000
# Lines that come within this time, in seconds, were pasted together.
_PASTE_SECONDS = 0.02


class PipedInput:
    """One message a line, or several lines between triple quotes, or with a backslash at their ends."""

    is_terminal = False

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()  # those that were read along with another, which ended with CR

    def read(self) -> str | None:
        """The next message; None at the end.

        Raises:
            RequestError: it is not UTF-8 text.
        """
        return _whole(self._line)

    def _line(self, _: str) -> str | None:
        if not self._lines:
            self._lines.extend(sys.stdin.buffer.readline().splitlines())  # readline only knows LF
        if not self._lines:
            return None
        try:
            return self._lines.popleft().decode()
        except UnicodeDecodeError:
            raise RequestError("This line is not UTF-8 text; give messages in UTF-8.") from None


class TerminalInput:
    """The same on a terminal, where a line can be edited, and pasted text is one message however many lines it has.

    Args:
        history: the file with the messages of earlier sessions; None keeps none.
        complete: what may follow a beginning that is typed, for the tab key.
    """

    is_terminal = True

    def __init__(self, history: Path | None, complete: Callable[[str], Sequence[str]]):
        self._history = history
        try:
            import readline
        except ImportError:  # a Python that was built without it
            self._readline: Any = None
            self._pastes_whole = False
            return
        self._readline = readline
        self._pastes_whole = "libedit" not in (readline.__doc__ or "")
        readline.set_auto_history(False)
        readline.set_completer_delims(" \t\n")
        matches: list[str] = []

        def completer(_: str, state: int) -> str | None:
            if state == 0:
                matches[:] = complete(readline.get_line_buffer())
            return matches[state] if state < len(matches) else None

        readline.set_completer(completer)
        if self._pastes_whole:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")
            readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Enter begins a new line
        else:
            readline.parse_and_bind("bind ^I rl_complete")
        for message in read_history(history):
            readline.add_history(message)

    def read(self) -> str | None:
        """The next message; None at the end of input. Ctrl-C raises `KeyboardInterrupt`."""
        message = _whole(self._lines)
        if message and message.strip():
            self._remember(message)
        return message

    def _lines(self, prompt: str) -> str | None:
        """A line, with those that were pasted after it."""
        lines = [_input(prompt)]
        # GNU readline gives pasted lines as one. Otherwise they come one by one, but at once.
        while not self._pastes_whole and lines[-1] is not None and _more_is_there():
            lines.append(_input(MORE))
        return "\n".join(line for line in lines if line is not None) if lines[0] is not None else None

    def _remember(self, message: str) -> None:
        if self._readline is not None:
            self._readline.add_history(message)
        if self._history is not None:
            append_history(self._history, message)


def _whole(line: Callable[[str], str | None]) -> str | None:
    """A message of one line or several, from a function that reads a line; None at the end of input."""
    first = line(PROMPT)
    if first is None:
        return None
    command, quotes, rest = first.partition(_QUOTES)
    if quotes and "\n" not in first and (not command.strip() or command.startswith("/")):
        return command + _quoted(rest, line)
    parts = [first]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        more = line(MORE)
        if more is None:
            break
        parts.append(more)
    return "\n".join(parts)


def _quoted(rest: str, line: Callable[[str], str | None]) -> str:
    """The text up to a line that ends in quotes, or to the end of input; `rest` is what follows the opening quotes."""
    parts = [rest]
    while not parts[-1].rstrip().endswith(_QUOTES):
        more = line(MORE)
        if more is None:
            break
        parts.append(more)
    return "\n".join(parts).rstrip().removesuffix(_QUOTES).strip("\n")


def _input(prompt: str) -> str | None:
    """A line from the terminal; None at its end, and if the terminal is gone.

    The prompt does not get into a file that the answers go to.
    """
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt)
    except (EOFError, OSError):
        return None


def _more_is_there() -> bool:
    return bool(select.select([sys.stdin], [], [], _PASTE_SECONDS)[0])


def history_file() -> Path:
    """The file of messages typed in earlier sessions."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "mlx-openelm" / "chat-history.jsonl"


def read_history(file: Path | None) -> list[str]:
    """The messages in the file, oldest first; the file is shortened if it has many more than are kept."""
    if file is None:
        return []
    messages = []
    with contextlib.suppress(OSError):  # no file, or one that cannot be read
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, str):
                    messages.append(message)
    kept = messages[-HISTORY_LENGTH:]
    if file is not None and len(messages) > 2 * HISTORY_LENGTH:
        with contextlib.suppress(OSError, RuntimeError), new_file(file) as partial:
            partial.touch(0o600)
            partial.write_text("".join(f"{json.dumps(message)}\n" for message in kept))
    return kept


def append_history(file: Path, message: str) -> None:
    """Add a message, in a file that only its owner can read. Without room or rights there is no history."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            stream.write(f"{json.dumps(message)}\n")
