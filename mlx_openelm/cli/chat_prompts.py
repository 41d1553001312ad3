"""The token ids of a prompt that is written as a chat: whole, or in two parts, of which a file holds the first.

Without a template's name it is written with the model's own, else as plain text.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import takewhile

from ..errors import RequestError
from ..inputs import check_characters
from ..text.tokenizer import Tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, args: Namespace) -> list[int]:
    """The token ids of a prompt of `generate`, as its flags say."""
    if args.ignore_chat_template:
        return tokenizer.encode(prompt)
    return encode_chat(tokenizer, prompt, args.system_prompt, args.prefill_response, args.chat_template)


def check_no_chat(args: Namespace) -> None:
    """Refuse flags of chats beside --ignore-chat-template."""
    if (args.system_prompt, args.prefill_response, args.chat_template) != (None, None, None):
        raise RequestError(
            "--ignore-chat-template cannot be combined with --system-prompt, --prefill-response or --chat-template."
        )


def encode_chat(
    tokenizer: Tokenizer, prompt: str, system_prompt: str | None, prefill: str | None, template: str | None
) -> list[int]:
    """The token ids of the conversation, written with a chat template; BOS comes first.

    Raises:
        RequestError: a text is not UTF-8, or the template fails.
    """
    for flag, text in (("--prompt", prompt), ("--system-prompt", system_prompt), ("--prefill-response", prefill)):
        check_characters(flag, text or "")
    messages = [{"role": "user", "content": prompt}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if prefill is not None:
        messages.append({"role": "assistant", "content": prefill})
    template = template or tokenizer.default_template
    return tokenizer.apply_chat_template(messages, template, continue_final_message=prefill is not None)


def chat_opening(tokenizer: Tokenizer, prompt: str, system_prompt: str | None, template: str | None) -> list[int]:
    """The ids of a chat up to a place inside the user's message, after `prompt`."""
    # What two different continuations have in common comes before them.
    return _common(*(encode_chat(tokenizer, prompt + rest, system_prompt, None, template) for rest in "0A"))


def chat_rest(tokenizer: Tokenizer, prompt: str, prefill: str | None, template: str | None) -> list[int]:
    """The ids of a chat from inside the user's message on: the rest of the message, and what the template adds."""
    opening = chat_opening(tokenizer, "", None, template)
    ids = encode_chat(tokenizer, prompt, None, prefill, template)
    return ids[len(_common(ids, opening)) :]


def _common(one: list[int], other: list[int]) -> list[int]:
    """The ids that both begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [token for token, _ in pairs]
