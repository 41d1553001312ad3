"""Chat templates: from messages to the runs of text and special token ids that a model is prompted with.

A template decides where special tokens go. What a message says never does: a user who types `</s>` has typed four
characters. So rendering gives a list in which a special token is its id (an int) and everything else is text, to be
encoded literally.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from .errors import RequestError

ROLES = ("system", "user", "assistant")
Message = Mapping[str, Any]

# What CoreNet's instruction tuning rendered, without the empty system turn its code put first.
CORENET_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Apple's own examples prompt the instruct models with plain text.
PLAIN_TEMPLATE = "{{ bos_token }}{{ messages | map(attribute='content') | join('\\n') }}"
NAMED_TEMPLATES = {"corenet": CORENET_TEMPLATE, "plain": PLAIN_TEMPLATE}


def find_template(name: str | Path) -> str:
    """The jinja source of `plain`, `corenet` or a file; `RequestError` when it is none of them or unreadable."""
    if str(name) in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[str(name)]
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RequestError(
            f"cannot read the chat template {str(name)!r} ({reason}): give plain, corenet or the path of a .jinja file"
        ) from None


def check_messages(messages: Sequence[Message], continue_final_message: bool = False) -> None:
    """Raise `RequestError` unless `messages` is a filled list of `{"role": ..., "content": text}`."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError('messages must be a list with at least one {"role": ..., "content": ...}')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RequestError(f'message {index} must be an object with "role" and "content"')
        if message["role"] not in ROLES:
            raise RequestError(f"message {index} has role {message['role']!r}: use one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise RequestError(f"the content of message {index} must be text")
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise RequestError("only an assistant's message can be continued, and the last message is not one")


def render(
    messages: Sequence[Message],
    source: str,
    special_tokens: Mapping[str, int],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[str | int]:
    """Render `messages` with the jinja `source` to runs of text (str) and special token ids (int).

    `special_tokens` gives the id of every special token by its text, `bos_token` and `eos_token` among them.
    `continue_final_message` leaves the last, assistant's, message open and turns `add_generation_prompt` off.
    Raises `RequestError` for messages or a template that cannot be right.
    """
    check_messages(messages, continue_final_message)
    add_generation_prompt = add_generation_prompt and not continue_final_message
    # These two need no jinja2, whose import costs more than the rendering.
    if source == PLAIN_TEMPLATE:
        return [special_tokens[bos_token], "\n".join(message["content"] for message in messages)]
    if source == CORENET_TEMPLATE:
        runs = _render_corenet(messages, special_tokens[eos_token], add_generation_prompt, continue_final_message)
        return [special_tokens[bos_token], *runs]
    # A mark nobody can have typed stands for each special token the template writes, and for the point where the
    # last message ends, so that both are found in the rendered text whatever the messages say. No text that comes
    # out holds it, so one a process serves, and a template is compiled once.
    mark = _mark()
    copies = [dict(message) for message in messages]
    variables = {
        "messages": copies,
        "bos_token": f"{mark}{special_tokens[bos_token]};",
        "eos_token": f"{mark}{special_tokens[eos_token]};",
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    end = f"{mark}end;"
    if continue_final_message:
        copies[-1]["content"] += end
    text = _render_jinja(_mark_special_tokens(source, tuple(special_tokens.items()), mark), variables)
    if continue_final_message:
        if end not in text:
            raise RequestError("this chat template does not show the last message, so it cannot be continued")
        text = text[: text.rindex(end)].replace(end, "")
    parts = re.split(f"{mark}(\\d+);", text)  # text, id, text, id, ..., text
    return [int(part) if index % 2 else part for index, part in enumerate(parts) if index % 2 or part]


def _render_corenet(
    messages: Sequence[Message], eos_token_id: int, add_generation_prompt: bool, continue_final_message: bool
) -> list[str | int]:
    """`CORENET_TEMPLATE` in Python, without BOS."""
    runs: list[str | int] = []
    text = ""
    for message in messages:
        runs += [f"{text}<|{message['role']}|>\n{message['content']}", eos_token_id]
        text = "\n"
    if continue_final_message:
        return runs[:-1]
    return [*runs, text + ("<|assistant|>\n" if add_generation_prompt else "")]


@lru_cache(maxsize=1)
def _mark() -> str:
    return "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(12))


@lru_cache(maxsize=8)
def _mark_special_tokens(source: str, special_tokens: tuple[tuple[str, int], ...], mark: str) -> str:
    """Replace the special tokens written out in a template (`</s>` instead of `eos_token`) by their marks."""
    ids = dict(special_tokens)
    longest_first = sorted(ids, key=len, reverse=True)
    pattern = "|".join(re.escape(token) for token in longest_first)
    return re.sub(pattern, lambda found: f"{mark}{ids[found[0]]};", source)


def _render_jinja(source: str, variables: Mapping[str, Any]) -> str:
    import jinja2

    try:
        return _compile(source).render(**variables)
    # A template is a program of the user's: it can raise anything, from a syntax error to a division by zero.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise RequestError(
            f"the chat template failed{line}: {reason}; correct it, or use --chat-template plain or corenet"
        ) from None


@lru_cache(maxsize=8)
def _compile(source: str) -> Any:
    """A template as transformers has them: a sandbox, blocks trimmed, and the functions those on the hub rely on."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment.from_string(source)
