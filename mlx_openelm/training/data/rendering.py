"""The tokens of a prompt with its completion, or of a conversation, and which of them are learned.

The boundary is found on tokens: the whole text is encoded, and its common prefix with the encoded prompt is the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...errors import RequestError
from ...text.chat_messages import Message
from ...text.tokenizer import Tokenizer
from .conversations import Conversation

# [start, end) of tokens whose prediction counts.
Spans = tuple[tuple[int, int], ...]


def render_text(prompt: str, completion: str, tokenizer: Tokenizer, *, mask_prompt: bool) -> tuple[list[int], Spans]:
    """BOS, the ids of prompt and completion as one text, EOS; with `mask_prompt` the prompt is not learned."""
    tokens = tokenizer.encode(prompt + completion)
    start = common_prefix(tokens, tokenizer.encode(prompt)) if mask_prompt else 1
    tokens.append(tokenizer.eos_token_id)
    return tokens, ((start, len(tokens)),)


def render_chat(
    conversation: Conversation,
    tokenizer: Tokenizer,
    template: str | Path | None,
    *,
    mask_prompt: bool,
    limit: int | None = None,
) -> tuple[list[int], Spans]:
    """A conversation through the chat template; messages with weight 0 are not learned.

    With `mask_prompt` only the assistant's turns after the prompt are learned, each from where generation would begin
    to the token that ends it. What follows the last of them is left out, as nothing in it is learned.

    Args:
        limit: where the example will be cut. Spans from there on may be missing: each takes the time to render the
            whole conversation before it.

    Raises:
        RequestError: a template that fails, or that renders the start of a conversation differently on its own.
    """
    turns = _Turns(conversation, tokenizer, template)
    tokens = turns.tokens
    limit = len(tokens) if limit is None else limit
    if mask_prompt:
        spans = _assistants_spans(conversation, turns, limit)
        return tokens[: spans[-1][1]] if spans else tokens, spans
    without: list[tuple[int, int]] = []
    for index, weighted in enumerate(conversation.weighted):
        if not weighted and not (without and without[-1][1] >= limit):
            without.append(turns.span(index))
    return tokens, _cut_out(_all_but(tokenizer.bos_token_id, tokens), without)


def _assistants_spans(conversation: Conversation, turns: _Turns, limit: int) -> Spans:
    """The assistant's turns that are learned: all that begin before `limit`, and the last, where the example ends."""
    indices = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    learned = {index for index in indices if index >= conversation.prompt and conversation.weighted[index]}
    if not learned:
        return ()
    # Two turns in a row may overlap by the token between them, so the one before the first is needed as well.
    first, last = max(0, indices.index(min(learned)) - 1), max(learned)
    spans: list[tuple[int, int]] = []
    end = 0
    for index in indices[first:]:
        if end >= limit and index != last:
            continue
        start, stop = turns.span(index)
        start, end = max(start, end), stop
        if index in learned and start < stop:
            spans.append((start, stop))
    return tuple(spans)


class _Turns:
    """A conversation's tokens, and the span of each turn in them."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, template: str | Path | None):
        self._messages = conversation.messages
        self._tools = conversation.tools
        self._tokenizer, self._template = tokenizer, template
        self.tokens = self._render(self._messages)
        self._appends_eos = self._messages[-1]["role"] == "assistant" and not _ends_closed(self.tokens, tokenizer)
        if self._appends_eos:
            self.tokens.append(tokenizer.eos_token_id)

    def _render(self, messages: Sequence[Message], **options: bool) -> list[int]:
        options = {"add_generation_prompt": False, **options}
        return self._tokenizer.apply_chat_template(messages, self._template, tools=self._tools, **options)

    def span(self, index: int) -> tuple[int, int]:
        """The tokens [start, end) of a turn, with what the template writes around it.

        An assistant's turn begins where generation would begin.
        """
        message, tokens = self._messages[index], self.tokens
        if index:
            before = self._render(self._messages[:index], add_generation_prompt=message["role"] == "assistant")
        elif message["role"] == "assistant":  # it opens the conversation: up to where its content would begin
            before = self._render([{"role": "assistant", "content": ""}], continue_final_message=True)
        else:
            before = []
        start = _covered(before, tokens, self._tokenizer)
        end = _covered(self._render(self._messages[: index + 1]), tokens, self._tokenizer)
        if start is None or end is None:
            raise RequestError(
                "The chat template renders the beginning of a conversation differently from the whole, so "
                "--mask-prompt, or a weight of 0, cannot tell who says what; use --chat-template corenet"
            )
        if self._appends_eos and index == len(self._messages) - 1:
            return max(start, 1), len(tokens)
        # The line break after the token that ends a turn is written by the template, not by the assistant.
        closing = _without_space(tokens[:end], self._tokenizer)
        return max(start, 1), closing if tokens[closing - 1] in self._tokenizer.eos_token_ids else end


def _cut_out(spans: Spans, without: Sequence[tuple[int, int]]) -> Spans:
    """`spans` without the parts that other spans cover."""
    for start, end in without:
        parts = [part for one, other in spans for part in ((one, min(other, start)), (max(one, end), other))]
        spans = tuple((one, other) for one, other in parts if one < other)
    return spans


def _covered(prefix: list[int], tokens: list[int], tokenizer: Tokenizer) -> int | None:
    """The number of `tokens` that `prefix` covers; None if it is not a prefix of them.

    The end of its text may be encoded differently when more text follows, so the tokens after the common prefix are
    compared as text.
    """
    count = common_prefix(tokens, prefix)
    left = prefix[count:]
    if not left:
        return count
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, *tokenizer.eos_token_ids}
    if not ends.isdisjoint(left):
        return None
    after = tokens[:count]
    decoder = tokenizer.streaming_decoder(after)
    text = "".join([*map(decoder.add, left), decoder.finish()])
    decoder = tokenizer.streaming_decoder(after)
    whole = ""
    for token in tokens[count:]:
        if len(whole) >= len(text) or token in ends:
            break
        whole += decoder.add(token)
    return count if (whole + decoder.finish()).startswith(text) else None


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _ends_closed(tokens: list[int], tokenizer: Tokenizer) -> bool:
    """Whether a rendered conversation ends with an end-of-text token, apart from white space."""
    return tokens[_without_space(tokens, tokenizer) - 1] in tokenizer.eos_token_ids


def _without_space(tokens: list[int], tokenizer: Tokenizer) -> int:
    """The number of tokens up to the last one that is not white space."""
    end = len(tokens)
    # Decoded twice in a row, because the decoder may strip a leading space.
    while tokenizer.decode([tokens[end - 1]] * 2).isspace():
        end -= 1
    return end


def _all_but(bos: int, tokens: list[int]) -> Spans:
    """All tokens are learned except BOS, which some templates repeat at each turn."""
    starts = [index for index, token in enumerate(tokens) if token == bos]
    ends = [*starts[1:], len(tokens)]
    return tuple((start + 1, end) for start, end in zip(starts, ends, strict=True) if start + 1 < end)
