"""A record's tokens and which of them are learned: a prompt with its completion, or the turns of a conversation.

What is learned is told apart on tokens: a text is encoded as a whole, and what it has in common with the encoding of
the prompt alone is the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..chat_template import Message
from ..errors import RequestError
from ..tokenizer import Tokenizer

# [start, end) of tokens whose prediction counts.
Spans = tuple[tuple[int, int], ...]


def render_text(prompt: str, completion: str, tokenizer: Tokenizer, *, mask_prompt: bool) -> tuple[list[int], Spans]:
    """BOS, the ids of the prompt and the completion joined, EOS; with `mask_prompt` the prompt is not learned."""
    tokens = tokenizer.encode(prompt + completion)
    start = common_prefix(tokens, tokenizer.encode(prompt)) if mask_prompt else 1
    tokens.append(tokenizer.eos_token_id)
    return tokens, ((start, len(tokens)),)


def render_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: str | Path | None,
    *,
    mask_prompt: bool,
    source: str,
) -> tuple[list[int], Spans]:
    """A conversation through the chat template.

    With `mask_prompt` each assistant's turn is learned, from where generation would begin to the token that closes it,
    and what follows the last of them is left out: nothing in it is learned.

    Raises:
        RequestError: a template that renders the beginning of a conversation otherwise than the whole.
    """
    tokens = tokenizer.apply_chat_template(messages, template, add_generation_prompt=False)
    appends_eos = messages[-1]["role"] == "assistant" and not _ends_closed(tokens, tokenizer)
    if appends_eos:
        tokens.append(tokenizer.eos_token_id)
    if not mask_prompt:
        return tokens, _all_but(tokenizer.bos_token_id, tokens)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start, end = _turn(messages, index, tokens, tokenizer, template, source)
            # Of two turns in a row, one may end where the other begins.
            spans.append((max(start, spans[-1][1]) if spans else start, end))
    if appends_eos:
        spans[-1] = (spans[-1][0], len(tokens))
    return tokens[: spans[-1][1]] if spans else tokens, tuple(span for span in spans if span[0] < span[1])


def _turn(
    messages: Sequence[Message],
    index: int,
    tokens: list[int],
    tokenizer: Tokenizer,
    template: str | Path | None,
    source: str,
) -> tuple[int, int]:
    """Where in `tokens`, which are the whole conversation's, the assistant's turn `index` is learned."""
    if index:
        before = tokenizer.apply_chat_template(messages[:index], template)
    else:  # a conversation that the assistant opens: up to where the content would begin
        empty = [{**messages[0], "content": ""}]
        before = tokenizer.apply_chat_template(
            empty, template, add_generation_prompt=False, continue_final_message=True
        )
    closed = tokenizer.apply_chat_template(messages[: index + 1], template, add_generation_prompt=False)
    start, end = _place(before, tokens, tokenizer), _place(closed, tokens, tokenizer)
    if start is None or end is None:
        raise RequestError(
            f"{source}: the chat template renders the beginning of a conversation otherwise than the whole, so "
            "--mask-prompt cannot tell what the assistant says; use --chat-template corenet."
        )
    # The line break after the token that closes a turn is the template's, not the assistant's.
    closing = _without_space(tokens[:end], tokenizer)
    return max(start, 1), closing if tokens[closing - 1] in tokenizer.eos_token_ids else end


def _place(prefix: list[int], tokens: list[int], tokenizer: Tokenizer) -> int | None:
    """How many of `tokens` belong to `prefix`, None if it is no prefix of theirs.

    The last of its text may be encoded otherwise where more follows; so what is left on both sides must be one text,
    as far as `prefix` goes.
    """
    place = common_prefix(tokens, prefix)
    left = prefix[place:]
    if not left:
        return place
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.eos_token_ids}
    if not ends.isdisjoint(left):
        return None
    after = tokens[:place]
    decoder = tokenizer.streaming_decoder(after)
    text = "".join([*map(decoder.add, left), decoder.finish()])
    decoder = tokenizer.streaming_decoder(after)
    whole = ""
    for token in tokens[place:]:
        if len(whole) >= len(text) or token in ends:
            break
        whole += decoder.add(token)
    return place if (whole + decoder.finish()).startswith(text) else None


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two sequences have in common at their beginning."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _ends_closed(tokens: list[int], tokenizer: Tokenizer) -> bool:
    """Whether a rendered conversation ends with a token that ends a generation, but for white space."""
    return tokens[_without_space(tokens, tokenizer) - 1] in tokenizer.eos_token_ids


def _without_space(tokens: list[int], tokenizer: Tokenizer) -> int:
    """How many tokens there are up to the last that is not white space; BOS is none."""
    end = len(tokens)
    # Twice, because of the first a space in front may be removed.
    while tokenizer.decode([tokens[end - 1]] * 2).isspace():
        end -= 1
    return end


def _all_but(bos: int, tokens: list[int]) -> Spans:
    """Everything is learned but BOS, which some templates repeat at each turn."""
    starts = [index for index, token in enumerate(tokens) if token == bos]
    ends = [*starts[1:], len(tokens)]
    return tuple((start + 1, end) for start, end in zip(starts, ends, strict=True) if start + 1 < end)
