"""Chat templates: from messages to the runs of text and special token ids of a prompt.

Only the template can write special tokens, never a message: a user who types `</s>` has typed four characters. So
rendering gives a list in which a special token is its id (an int) and everything else is text, to be encoded literally.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..inputs import read_text
from .chat_marker import Marker, code
from .chat_messages import Message, check_messages, for_built_in, for_jinja
from .tokenizers_engine import LITERAL

# The format of CoreNet's instruction tuning, without the empty system turn that its code put first.
CORENET_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
# Apple's own examples prompt the instruct models with plain text.
PLAIN_TEMPLATE = "{{ bos_token }}{{ messages | map(attribute='content') | join('\\n') }}"
NAMED_TEMPLATES = {"corenet": CORENET_TEMPLATE, "plain": PLAIN_TEMPLATE}
OWN = "own"  # the template of the model's folder, which a tokenizer knows
# The names of a folder's templates, if it has several; transformers takes the second if there are tools.
DEFAULT, TOOL_USE = "default", "tool_use"
# The longest templates on the hub have 20,000 bytes.
_MAX_BYTES = 1 << 20


def find_template(name: str | Path) -> str:
    """The jinja source of `plain`, `corenet` or a file; `RequestError` for an unknown name or an unreadable file."""
    if str(name) in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[str(name)]
    try:
        return read_text(Path(name), max_bytes=_MAX_BYTES)
    except RequestError as error:
        raise RequestError(
            f"Cannot read the chat template: {str(error).rstrip('.')}; give plain, corenet or the path of a .jinja file"
        ) from None


def read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """A folder's own templates by name: `default` and, for conversations with tools, `tool_use`.

    As in transformers, files go before the `tokenizer_config.json` that was read as `config`.
    Raises `RequestError` for a template that is not text.
    """
    files = {DEFAULT: folder / "chat_template.jinja", TOOL_USE: folder / "additional_chat_templates" / "tool_use.jinja"}
    found = {name: find_template(file) for name, file in files.items() if file.is_file()}
    if DEFAULT in found:
        return found
    return {**_templates_in(config.get("chat_template"), folder / "tokenizer_config.json"), **found}


def _templates_in(value: Any, path: Path) -> dict[str, str]:
    """The templates that a `tokenizer_config.json` holds: one text, or a list or an object of several."""
    if isinstance(value, list):
        entries = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    else:
        entries = list(value.items()) if isinstance(value, dict) else [(DEFAULT, value)]
    found = {name: text for name, text in entries if name in (DEFAULT, TOOL_USE) and text is not None}
    if not all(isinstance(text, str) for text in found.values()):
        raise RequestError(f"chat_template in {path} must be text")
    return found


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens in a `tokenizer_config.json`, by the names that templates use: `pad_token`, `unk_token`, other
    keys that end in `_token`, and the keys of `extra_special_tokens`."""
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    # Older files give a token with its flags.
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in texts.items() if isinstance(value, str)}


def render(
    messages: Sequence[Message],
    source: str,
    special_tokens: Mapping[str, int],
    *,
    named: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
    title: str = "This chat template",
) -> list[str | int]:
    """Render `messages` with the jinja `source` to runs of text (str) and special token ids (int).

    Args:
        special_tokens: the id of every special token by its text.
        named: special tokens by the names that templates use, including `bos_token` and `eos_token`.
        tools: JSON schemas of functions, for templates that render them.
        add_generation_prompt: open the assistant's turn; by default if the last message is not the assistant's.
        continue_final_message: leave the assistant's last message open; turns `add_generation_prompt` off.
        variables: further variables of a jinja template.
        title: what messages call the template.

    Raises:
        RequestError: bad messages, or a template that cannot render them, fails, or takes too much time or memory.
    """
    check_messages(messages, continue_final_message)
    if add_generation_prompt is None:
        add_generation_prompt = messages[-1]["role"] != "assistant"
    add_generation_prompt = add_generation_prompt and not continue_final_message
    marker = _marker(tuple(special_tokens))
    if source == CORENET_TEMPLATE:  # without jinja2, which takes longer to import than to render
        hidden = marker.hide(for_built_in(messages, tools, title))
        text = _render_corenet(hidden, named, add_generation_prompt, continue_final_message)
        return marker.runs(text, special_tokens)
    from .chat_template_process import render as render_jinja

    others = {"documents": None, **(variables or {}), **named, "add_generation_prompt": add_generation_prompt}

    def write(request: dict[str, Any]) -> str:
        if continue_final_message:
            request = {**request, "messages": _mark_end(request["messages"])}
        return render_jinja(source, {**others, **request})

    request = {"messages": for_jinja(messages, source, tools, title), "tools": list(tools) if tools else None}
    text = _render_marked(write, request, marker)
    return marker.runs(_cut_at_end(text) if continue_final_message else text, special_tokens)


def _render_corenet(
    messages: Sequence[Message], named: Mapping[str, str], add_generation_prompt: bool, continue_final_message: bool
) -> str:
    """`CORENET_TEMPLATE` in Python."""
    end = named["eos_token"] + "\n"
    text = named["bos_token"] + end.join(f"<|{message['role']}|>\n{message['content']}" for message in messages)
    if continue_final_message:
        return text
    return text + end + ("<|assistant|>\n" if add_generation_prompt else "")


def _render_marked(write: Callable[[dict[str, Any]], str], request: dict[str, Any], marker: Marker) -> str:
    """The rendering of a request in which every special token is the template's own.

    With the first and last characters of tokens hidden, nothing in a message can become a token. But a template may
    search for such characters (as in `</think>`) or change texts. Then a rendering with fewer hidden characters is used
    if it has the same special tokens.
    """
    text = write(request)
    hidden = marker.hide(request)
    if hidden == request:
        return text
    with_hidden = write(hidden)
    if marker.reveal(with_hidden) == text:
        return with_hidden
    if marker.tokens(text) == marker.tokens(with_hidden):
        return text
    quoted = write(marker.hide_tokens(request))
    if marker.reveal(quoted) == text and marker.tokens(quoted) == marker.tokens(with_hidden):
        return quoted
    raise RequestError(
        "This chat template alters a special token that a message quotes; remove the token from the message"
    )


@lru_cache(maxsize=1)
def _marker(tokens: tuple[str, ...]) -> Marker:
    return Marker(tokens)


def _mark_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with a code at the end of the last one's text. A space follows it, as in transformers: a template that
    trims the space would also have trimmed the message."""
    end = f"{code()}_0_ "
    last = messages[-1]
    if isinstance(last["content"], str):
        return [*messages[:-1], {**last, "content": last["content"] + end}]
    parts = [*last["content"][:-1], {**last["content"][-1], "text": last["content"][-1]["text"] + end}]
    return [*messages[:-1], {**last, "content": parts}]


def _cut_at_end(text: str) -> str:
    """A rendered text up to the code of `_mark_end`; RequestError if it is missing."""
    end = f"{code()}_0_"
    if end not in text:
        raise RequestError("This chat template does not render the last message, so it cannot be continued")
    before, _, after = text.rpartition(end)
    before = before.replace(f"{end} ", "").replace(end, "")
    return before if after.startswith(" ") else before.rstrip()


def join_added_tokens(runs: Iterable[str | int], tokens: Mapping[str, int]) -> list[str | int]:
    """The runs of a rendered template with added special `tokens` as text, so that they affect the text around them as
    in any text; tokens quoted in a message are marked to be encoded as text."""
    texts = {token_id: token for token, token_id in tokens.items()}
    starts = f"(?={'|'.join(map(re.escape, tokens))})."  # one may begin within another
    joined: list[str | int] = []
    for run in runs:
        if isinstance(run, str):
            run = re.sub(starts, lambda found: found[0] + LITERAL, run, flags=re.DOTALL)
        else:
            run = texts.get(run, run)
        if isinstance(run, str) and joined and isinstance(joined[-1], str):
            joined[-1] += run
        else:
            joined.append(run)
    return joined
