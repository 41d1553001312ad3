"""From texts to the tokens that are scored, cut to the positions that the model was trained on.

The rules are those of lm-eval's model for Hugging Face checkpoints, except that BOS stays when a prompt is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..errors import RequestError
from ..evaluation.likelihoods import Request
from ..text.tokenizer import Tokenizer


class Encoder:
    """Encodes contexts and continuations.

    Args:
        max_length: the most tokens that the model reads.
        keep_bos: whether a context that is cut keeps its BOS; lm-eval's Hugging Face model drops it.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, *, keep_bos: bool = True):
        self.tokenizer, self.max_length, self.keep_bos = tokenizer, max_length, keep_bos
        self.cut = 0  # contexts that were cut so far

    def encode(self, text: str) -> list[int]:
        """The ids of a text, BOS first; a text that a chat template wrote begins with BOS and has control tokens."""
        if text.startswith(self.tokenizer.bos_token):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of its continuation, uncut.

        White space at the end of the context belongs to the continuation, since tokens begin with their space. The
        boundary is where the context alone ends. Without a context there is BOS.
        """
        if not context:
            return [self.tokenizer.bos_token_id], self.tokenizer.encode(continuation, add_bos=False)
        end = len(context.rstrip())
        if not end:  # nothing but white space
            return [self.tokenizer.bos_token_id], self.tokenizer.encode(context + continuation, add_bos=False)
        context, continuation = context[:end], context[end:] + continuation
        before = self.encode(context)
        return before, self.encode(context + continuation)[len(before) :]

    def requests(self, context: Sequence[int], continuation: Sequence[int]) -> list[Request]:
        """What to score, so that each token of the continuation is scored once; an empty continuation needs nothing.

        A context that does not fit is cut at its beginning. A continuation that does not fit is scored in windows.
        """
        if not continuation:
            return []
        if len(continuation) > self.max_length:
            return list(self._windows(continuation, context[-1]))
        if len(context) + len(continuation) > self.max_length + 1:  # the last token is not read
            context = self._cut(context, self.max_length + 1 - len(continuation))
        return [Request(tuple(context), tuple(continuation))]

    def rolling(self, text: str) -> list[Request]:
        """Windows that score every token of a text once, the first one after BOS.

        Each window but the first reads as many tokens as there is room for, the last one too, which predicts only
        what is left.
        """
        bos = self.tokenizer.bos_token_id
        ids = self.encode(text)
        return list(self._windows(ids[1:] if ids[:1] == [bos] else ids, bos))

    def prompt(self, text: str, count: int) -> list[int]:
        """The ids of a prompt, cut so that `count` tokens can follow.

        Raises:
            RequestError: there is no room for a prompt.
        """
        if count >= self.max_length:
            raise RequestError(
                f"The task generates up to {count} tokens, and the model was trained on {self.max_length}; "
                "give fewer with --gen-kwargs max_gen_toks=N."
            )
        ids = self.encode(text)
        room = self.max_length - count
        return list(self._cut(ids, room)) if len(ids) > room else ids

    def _cut(self, ids: Sequence[int], room: int) -> Sequence[int]:
        """The last of these ids, after their BOS if that stays."""
        self.cut += 1
        if self.keep_bos and ids[0] == self.tokenizer.bos_token_id and room > 1:
            return [ids[0], *ids[len(ids) - room + 1 :]]
        return ids[len(ids) - room :]

    def _windows(self, ids: Sequence[int], prefix: int) -> Iterator[Request]:
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            # As many tokens as the model reads, of which the last is only predicted.
            context = ids[end - self.max_length - 1 : start] if start else [prefix]
            yield Request(tuple(context), tuple(ids[start:end]))
