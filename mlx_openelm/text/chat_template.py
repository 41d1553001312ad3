"""Chat templates: from messages to the runs of text and special token ids that a model is prompted with.

A template decides where special tokens go. What a message says never does: a user who types `</s>` has typed four
characters. So rendering gives a list in which a special token is its id (an int) and everything else is text, to be
encoded literally.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..inputs import read_text
from .chat_messages import Message, check_messages, for_a_built_in, for_a_template

# What CoreNet's instruction tuning rendered, without the empty system turn its code put first.
CORENET_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Apple's own examples prompt the instruct models with plain text.
PLAIN_TEMPLATE = "{{ bos_token }}{{ messages | map(attribute='content') | join('\\n') }}"
NAMED_TEMPLATES = {"corenet": CORENET_TEMPLATE, "plain": PLAIN_TEMPLATE}
# The longest on the hub have 20,000.
_MAX_BYTES = 1 << 20


def find_template(name: str | Path) -> str:
    """The jinja source of `plain`, `corenet` or a file; `RequestError` when it is none of them or unreadable."""
    if str(name) in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[str(name)]
    try:
        return read_text(Path(name), max_bytes=_MAX_BYTES)
    except RequestError as error:
        raise RequestError(
            f"cannot read the chat template: {str(error).rstrip('.')}; give plain, corenet or the path of a .jinja file"
        ) from None


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a `tokenizer_config.json` names, by the names that templates know them under:
    `pad_token`, `unk_token`, and whatever else ends so or stands among its `extra_special_tokens`."""
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    # Older files spell a token out with its flags.
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def render(
    messages: Sequence[Message],
    source: str,
    special_tokens: Mapping[str, int],
    *,
    named: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[str | int]:
    """Render `messages` with the jinja `source` to runs of text (str) and special token ids (int).

    Args:
        special_tokens: the id of every special token by its text.
        named: special tokens by the names that templates use, `bos_token` and `eos_token` among them.
        tools: JSON schemas of functions, for templates that show them.
        continue_final_message: leave the last, assistant's, message open; turns `add_generation_prompt` off.

    Raises:
        RequestError: messages or a template that cannot be right, or one that takes too much time or memory.
    """
    check_messages(messages, continue_final_message)
    add_generation_prompt = add_generation_prompt and not continue_final_message
    mark = _mark(tuple(special_tokens))
    # These two need no jinja2, whose import costs more than the rendering.
    if source in (PLAIN_TEMPLATE, CORENET_TEMPLATE):
        plain = mark.hide(for_a_built_in(messages, tools))
        if source == PLAIN_TEMPLATE:
            text = named["bos_token"] + "\n".join(message["content"] for message in plain)
        else:
            text = _render_corenet(plain, named, add_generation_prompt, continue_final_message)
        return mark.runs(text, special_tokens)
    from .chat_template_process import render as render_jinja

    others = {**named, "documents": None, "add_generation_prompt": add_generation_prompt}

    def write(said: dict[str, Any]) -> str:
        said = {**said, "messages": _opened(said["messages"])} if continue_final_message else said
        return render_jinja(source, {**others, **said})

    text = _render_apart(
        write,
        {"messages": for_a_template(messages, source, tools), "tools": list(tools) if tools else None},
        mark,
    )
    return mark.runs(_up_to_the_end(text) if continue_final_message else text, special_tokens)


def _render_corenet(
    messages: Sequence[Message], named: Mapping[str, str], add_generation_prompt: bool, continue_final_message: bool
) -> str:
    """`CORENET_TEMPLATE` in Python."""
    end = named["eos_token"] + "\n"
    text = named["bos_token"] + end.join(f"<|{message['role']}|>\n{message['content']}" for message in messages)
    if continue_final_message:
        return text
    return text + end + ("<|assistant|>\n" if add_generation_prompt else "")


def _render_apart(write: Callable[[dict[str, Any]], str], said: dict[str, Any], mark: _Mark) -> str:
    """What `write` makes of `said`, where the special tokens that are found in it are the template's.

    Nothing of a message can become a token once the characters that tokens begin and end with are hidden. But a
    template may look for them, such as for `</think>`, or alter texts. Then a rendering in which fewer are hidden is
    taken, if it has the same special tokens.
    """
    text = write(said)
    hidden = mark.hide(said)
    if hidden == said:
        return text
    apart = write(hidden)
    if mark.show(apart) == text:
        return apart
    if mark.tokens(text) == mark.tokens(apart):
        return text
    quoting = write(mark.hide_tokens(said))
    if mark.show(quoting) == text and mark.tokens(quoting) == mark.tokens(apart):
        return quoting
    raise RequestError(
        "this chat template alters a special token that a message quotes; remove the token from the message"
    )


@lru_cache(maxsize=1)
def _code() -> str:
    """A number nobody can have typed: it stands before what is hidden in a text, and survives whatever a template
    does with texts, such as writing them as JSON or in capitals. No text that comes out holds it."""
    return "".join(secrets.choice("0123456789") for _ in range(20))


class _Mark:
    """Keeps apart the special tokens that a template writes and those that a message says.

    In messages a code stands for characters that could become a part of one, so that what is found in the rendered text
    is the template's, be it written out, by name, or put together of pieces. Not caught is a template that cuts a word
    out of a message and sets it in angle brackets of its own.
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
        """A copy of JSON values in which no text holds a character that special tokens begin or end with.

        Keys, roles and types that are single words stay: templates ask for them, and may put a role into a token.
        """
        try:
            return _in_texts(value, self._hide_edges)
        except RecursionError:
            raise RequestError("the messages are nested too deeply") from None

    def hide_tokens(self, value: Any) -> Any:
        """A copy of JSON values in which no text holds a special token."""
        return _in_texts(value, lambda text, is_name: self._firsts.sub(_coded, text))

    def _hide_edges(self, text: str, is_name: bool) -> str:
        if is_name and text.isidentifier() and not self._tokens.search(text):
            return text
        stripped = text.strip().casefold()
        # Such as `s`, which a template may set in angle brackets.
        is_part = bool(stripped) and stripped in self._written
        return (_VISIBLE if is_part else self._edges).sub(_coded, text)

    def tokens(self, text: str) -> list[str]:
        """The special tokens in a rendered text."""
        return self._tokens.findall(text)

    def runs(self, text: str, special_tokens: Mapping[str, int]) -> list[str | int]:
        """A rendered text as runs of text and special token ids."""
        parts = self._tokens.split(text)  # text, token, text, token, ..., text
        return [special_tokens[part] if index % 2 else self.show(part) for index, part in enumerate(parts) if part]

    def show(self, text: str) -> str:
        """A text with what `hide` has hidden in it."""
        return re.sub(f"{_code()}_([1-9][0-9]*)_", lambda found: chr(int(found[1])), text)


_VISIBLE = re.compile(r"\S")


def _coded(character: re.Match[str]) -> str:
    return f"{_code()}_{ord(character[0])}_"


def _in_texts(value: Any, change: Callable[[str, bool], str], is_name: bool = False) -> Any:
    """A copy of JSON values with `change` made to every text; it is told which are keys, roles and types."""
    if isinstance(value, str):
        return change(value, is_name)
    if isinstance(value, Mapping):
        return {
            change(key, True) if isinstance(key, str) else key: _in_texts(item, change, key in ("role", "type"))
            for key, item in value.items()
        }
    return [_in_texts(item, change) for item in value] if isinstance(value, list | tuple) else value


def _with_cases(characters: set[str]) -> set[str]:
    """Characters and all that become one of them in small letters or capitals."""
    if all(character.lower() == character.upper() for character in characters):
        return characters
    cased = map(chr, range(0x20000))  # no letter beyond has a case
    return characters | {
        c for c in cased if not characters.isdisjoint(c.lower() + c.upper() + c.title() + c.casefold())
    }


@lru_cache(maxsize=1)
def _mark(tokens: tuple[str, ...]) -> _Mark:
    return _Mark(tokens)


def _opened(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with a code at the end of the last one's text. A space follows it, as in transformers: where the
    template trims that, it trims the message, too."""
    end = f"{_code()}_0_ "
    last = messages[-1]
    if isinstance(last["content"], str):
        return [*messages[:-1], {**last, "content": last["content"] + end}]
    parts = [*last["content"][:-1], {**last["content"][-1], "text": last["content"][-1]["text"] + end}]
    return [*messages[:-1], {**last, "content": parts}]


def _up_to_the_end(text: str) -> str:
    """A rendered text up to where the code of `_opened` stands in it."""
    end = f"{_code()}_0_"
    if end not in text:
        raise RequestError("this chat template does not show the last message, so it cannot be continued")
    before, _, after = text.rpartition(end)
    before = before.replace(f"{end} ", "").replace(end, "")
    return before if after.startswith(" ") else before.rstrip()
