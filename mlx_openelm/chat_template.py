"""Chat templates: from messages to the runs of text and special token ids that a model is prompted with.

A template decides where special tokens go. What a message says never does: a user who types `</s>` has typed four
characters. So rendering gives a list in which a special token is its id (an int) and everything else is text, to be
encoded literally.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .chat_messages import Message, check_messages, for_a_built_in, for_a_template
from .errors import RequestError
from .inputs import read_text

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
    # These two need no jinja2, whose import costs more than the rendering.
    if source in (PLAIN_TEMPLATE, CORENET_TEMPLATE):
        plain = for_a_built_in(messages, tools)
        bos, eos = (special_tokens[named[name]] for name in ("bos_token", "eos_token"))
        if source == PLAIN_TEMPLATE:
            return [bos, "\n".join(message["content"] for message in plain)]
        return [bos, *_render_corenet(plain, eos, add_generation_prompt, continue_final_message)]
    from .chat_template_process import render as render_jinja

    prepared = for_a_template(messages, source, tools)
    said = {
        "messages": _opened(prepared) if continue_final_message else prepared,
        "tools": list(tools) if tools else None,
    }
    others = {**named, "documents": None, "add_generation_prompt": add_generation_prompt}
    mark = _mark(tuple(special_tokens))
    hidden = mark.hide(said)
    text = render_jinja(source, {**others, **hidden})
    # A template may reverse a text, or look for a token in it.
    if hidden != said and mark.show(text) != render_jinja(source, {**others, **said}):
        raise RequestError(
            "a message holds a special token as text, and this chat template takes it apart, so that text and token "
            "cannot be told apart: leave it out of the message"
        )
    return mark.runs(_up_to_the_end(text) if continue_final_message else text, special_tokens)


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
def _code() -> str:
    """A number nobody can have typed: it stands before what is hidden in a text, and survives whatever a template
    does with texts, such as writing them as JSON or in capitals. No text that comes out holds it."""
    return "".join(secrets.choice("0123456789") for _ in range(30))


class _Mark:
    """Keeps apart the special tokens that a template writes and those that a message says.

    In messages the first character of each is replaced by a code, so that what is found in the rendered text is the
    template's, be it written out, by name, or put together of pieces.
    """

    def __init__(self, tokens: tuple[str, ...]):
        choices = "|".join(re.escape(token) for token in sorted(filter(None, tokens), key=len, reverse=True))
        self._tokens = re.compile(f"({choices})")
        self._starts = re.compile(f"(?={choices})")  # one may begin within another
        # A message may end with the beginning of a token, which what follows it would complete.
        self._beginnings = {token[:end] for token in tokens for end in range(1, len(token))}
        self._longest = max(map(len, tokens))

    def hide(self, value: Any) -> Any:
        """A copy of JSON values in which no text holds or begins a special token."""
        if isinstance(value, str):
            return self._hide_in(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def _hide_in(self, text: str) -> str:
        starts = {found.start() for found in self._starts.finditer(text)} if self._tokens.search(text) else set()
        tail = range(max(0, len(text) - self._longest + 1), len(text))
        starts |= {start for start in tail if text[start:] in self._beginnings}
        if not starts:
            return text
        return "".join(f"{_code()}_{ord(char)}_" if index in starts else char for index, char in enumerate(text))

    def runs(self, text: str, special_tokens: Mapping[str, int]) -> list[str | int]:
        """A rendered text as runs of text and special token ids."""
        parts = self._tokens.split(text)  # text, token, text, token, ..., text
        return [special_tokens[part] if index % 2 else self.show(part) for index, part in enumerate(parts) if part]

    def show(self, text: str) -> str:
        """A text with what `hide` has hidden in it."""
        return re.sub(f"{_code()}_([1-9][0-9]*)_", lambda found: chr(int(found[1])), text)


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
