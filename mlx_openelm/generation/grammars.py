"""llguidance's grammar for each kind of constraint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import RequestError, quote
from ..inputs import check_characters, read_text_source, to_path

# JSON without white space between its parts. A schema can ask for it: {"x-guidance": {"whitespace_flexible": true}}.
_COMPACT: Any = {"whitespace_flexible": False}
_LARK = re.compile(r"^\s*(%llguidance\b|start\s*:(?!:=))", re.MULTILINE)
# GBNF's texts, characters, comments and names.
_GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#.*|[A-Za-z0-9-]+')
# GBNF's escapes for characters, in which llguidance's converter drops digits.
_UNICODE_ESCAPE = re.compile(r"(\\\\)|\\u([0-9a-fA-F]{4})|\\U([0-9a-fA-F]{8})")


def as_grammar(name: str, value: Any) -> str:
    """The grammar of a constraint, by the name and the value of its option; `RequestError` for a bad value."""
    return _KINDS[name](os.fspath(value) if isinstance(value, os.PathLike) else value)


def _json_schema(value: str | Mapping[str, Any]) -> str:
    from llguidance import LLMatcher

    if isinstance(value, str):
        value = _parse_schema(value)
    if not isinstance(value, Mapping):
        raise RequestError(f"--json-schema must be a JSON object, got {quote(value)}.")
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(value), defaults=_COMPACT)
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"--json-schema cannot be used: {error}.") from None


def _parse_schema(text: str) -> Any:
    """The schema in a text, or in the file that it names."""
    source = "--json-schema"
    if not text.lstrip().startswith("{") and not _is_json(text):
        source, text = f"--json-schema {text}", _read(text, "--json-schema", "a JSON schema")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{source} is not JSON: {error}.") from None


def _is_json(text: str) -> bool:
    """Whether a text is JSON, and not the name of a file, which may be a number."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return not to_path(text).is_file()


def _json_object(value: bool) -> str:
    if value is not True:
        raise RequestError(f"--json-object must be True or False, got {quote(value)}.")
    return _json_schema({"type": "object"})


def _regex(value: str) -> str:
    from llguidance import LLMatcher

    if not isinstance(value, str):
        raise RequestError(f"--regex must be text, got {quote(value)}.")
    check_characters("--regex", value)
    if (len(value) - len(value.rstrip("\\"))) % 2:  # llguidance would drop it
        raise RequestError("--regex ends with a backslash that escapes nothing; double it, or leave it out.")
    return LLMatcher.grammar_from_regex(value)


def is_grammar(text: str) -> bool:
    """Whether a text is a grammar itself, rather than the name of a file."""
    return "::=" in text or _LARK.search(text) is not None


def _grammar(value: str) -> str:
    """Lark if it has a `start` rule, else GBNF, which has rules with `::=`; without either, the name of a file."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if not isinstance(value, str):
        raise RequestError(f"--grammar must be text, got {quote(value)}.")
    if not is_grammar(value):
        value = _read(value, "--grammar", "a grammar")
    check_characters("--grammar", value)
    if not _LARK.search(value):
        if "::=" not in value:
            raise RequestError("--grammar is neither Lark, with a rule `start:`, nor GBNF, with a rule `root ::=`.")
        try:
            value = gbnf_to_lark(_UNICODE_ESCAPE.sub(_character, _GBNF.sub(_free_name, value)))
        except Exception as error:  # the converter raises plain ones
            raise RequestError(f"--grammar is not valid GBNF: {error}.") from None
    return LLMatcher.grammar_from_lark(value)


def _free_name(found: re.Match[str]) -> str:
    """A name in GBNF, other than that of Lark's first rule."""
    return "start-of-gbnf" if found[0] == "start" else found[0]


def _character(found: re.Match[str]) -> str:
    """A character in place of its GBNF escape; ASCII ones stay escaped, since they may mean something."""
    backslash, *codes = found.groups()
    if backslash:
        return backslash
    code = int(codes[0] or codes[1], 16)
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        raise RequestError(f"--grammar has {found[0]}, which is not a character.")
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"


def _choice(value: str | Sequence[str]) -> str:
    from llguidance import LLMatcher

    choices = value.split(",") if isinstance(value, str) else value
    if not isinstance(choices, Sequence) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise RequestError(f"--choice must be texts that are not empty, got {quote(value)}.")
    for choice in choices:
        check_characters("--choice", choice)
    return LLMatcher.grammar_from_regex("|".join(map(_literal, dict.fromkeys(choices))))


def _literal(text: str) -> str:
    """A regular expression that matches exactly this text."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _read(name: str, source: str, wanted: str) -> str:
    """The text of a file that a flag names."""
    path = to_path(name)
    if not path.exists() or path.is_dir():
        raise RequestError(f"{source} must be {wanted} or a file with one; there is no file {quote(name)}.")
    try:
        return read_text_source(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not UTF-8 text; {source} needs {wanted}.") from None


_KINDS: dict[str, Callable[[Any], str]] = {
    "json_schema": _json_schema,
    "json_object": _json_object,
    "regex": _regex,
    "grammar": _grammar,
    "choice": _choice,
}
