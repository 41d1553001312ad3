"""Telling the special tokens that a chat template writes from those that a message quotes."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from ..errors import RequestError


@lru_cache(maxsize=1)
def code() -> str:
    """A random number that marks hidden characters. A user cannot have typed it, and digits survive what a template may
    do to texts, such as JSON encoding or capitals. It never appears in the result."""
    return "".join(secrets.choice("0123456789") for _ in range(20))


class Marker:
    """Separates the special tokens that a template writes from those that a message quotes.

    In messages, characters that could be part of a token are replaced by a code. So every token in the rendered text is
    the template's, whether written out, named, or assembled from parts. One case is not detected: a template that puts
    a word from a message into angle brackets itself.
    """

    def __init__(self, tokens: tuple[str, ...]):
        tokens = tuple(filter(None, tokens))
        choices = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
        self._tokens = re.compile(f"({choices})")
        self._firsts = re.compile(f"(?={choices}).", re.DOTALL)  # one may begin within another
        edges = _with_cases({edge for token in tokens for edge in (token[0], token[-1])})
        # The filter striptags replaces HTML's `&lt;`.
        self._edges = re.compile(f"[{re.escape(''.join(sorted(edges | {'&'})))}]")
        self._written = "\n".join(tokens).casefold()

    def hide(self, value: Any) -> Any:
        """A copy of JSON values in which no text has a character that special tokens begin or end with.

        Keys, roles and types that are single words stay: templates compare them, and may put a role into a token.
        """
        try:
            return _in_texts(value, self._hide_edges)
        except RecursionError:
            raise RequestError("The messages are nested too deeply") from None

    def hide_tokens(self, value: Any) -> Any:
        """A copy of JSON values in which no text has a special token."""
        return _in_texts(value, lambda text, is_name: self._firsts.sub(_coded, text))

    def _hide_edges(self, text: str, is_name: bool) -> str:
        if is_name and text.isidentifier() and not self._tokens.search(text):
            return text
        stripped = text.strip().casefold()
        # Such as `s`, which a template may put into angle brackets.
        is_part = bool(stripped) and stripped in self._written
        return (_VISIBLE if is_part else self._edges).sub(_coded, text)

    def tokens(self, text: str) -> list[str]:
        """The special tokens in a rendered text."""
        return self._tokens.findall(text)

    def runs(self, text: str, special_tokens: Mapping[str, int]) -> list[str | int]:
        """A rendered text as runs of text and special token ids."""
        parts = self._tokens.split(text)  # text, token, text, token, ..., text
        return [special_tokens[part] if index % 2 else self.reveal(part) for index, part in enumerate(parts) if part]

    def reveal(self, text: str) -> str:
        """A text with the characters that `hide` has hidden."""
        return re.sub(f"{code()}_([1-9][0-9]*)_", lambda found: chr(int(found[1])), text)


_VISIBLE = re.compile(r"\S")


def _coded(character: re.Match[str]) -> str:
    return f"{code()}_{ord(character[0])}_"


def _in_texts(value: Any, change: Callable[[str, bool], str], is_name: bool = False) -> Any:
    """A copy of JSON values with `change` applied to every text; `is_name` is true for keys, roles and types."""
    if isinstance(value, str):
        return change(value, is_name)
    if isinstance(value, Mapping):
        return {
            change(key, True) if isinstance(key, str) else key: _in_texts(item, change, key in ("role", "type"))
            for key, item in value.items()
        }
    return [_in_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _with_cases(characters: set[str]) -> set[str]:
    """Characters, and all others that become one of them in lower or upper case."""
    if all(character.lower() == character.upper() for character in characters):
        return characters
    cased = map(chr, range(0x20000))  # letters beyond have no case
    return characters | {
        c for c in cased if not characters.isdisjoint(c.lower() + c.upper() + c.title() + c.casefold())
    }
