"""One text among those that an engine decodes together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..adapters.pool import AdapterHandle
from ..adapters.switching import AdapterPaths
from ..errors import RequestError
from ..text.tokenizer import Tokenizer
from .decoding import Request, failed_draw, warn_past_context
from .output import Output
from .piece import Piece
from .sampling import greedy


class Row:
    """A text that an engine generates; `Engine.submit` makes it.

    Attributes:
        tokens: the ids generated so far.
        logprobs, top_logprobs: their log-probabilities, and the likeliest tokens at their places with theirs.
        text: the text so far; with a stop string, without it.
        finish_reason: "stop", "length" or "cancelled"; None while the text goes on, and if `error` ended it.
        error: what ended the text, if it failed.
        cached_tokens: tokens of the prompt whose keys and values the engine had already.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        adapter: AdapterPaths | None = None,
        on_piece: Callable[[Piece], object] | None = None,
    ):
        self.request, self.adapter, self.on_piece = request, adapter, on_piece
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.cached_tokens = 0
        self.handle: AdapterHandle | None = None  # of the adapter, while the row is decoded
        self.decoder, self.constraint = request.decoder, request.constraint
        self.past = int(self.decoder.cache[0].offset)  # positions in the caches before the prompt
        forced = [] if self.constraint is None else self.constraint.opening[: request.count]
        # Ids to process before the next token is drawn: alone as a prompt, or in a step together with other rows.
        self.prompt: list[int] = [*request.prompt, *forced]
        self.pending: list[int] = []
        self.needs: Any = None  # of memory: `memory.Needs`, once they are known
        self._forced = forced  # drawn without a choice, and not yet in the text
        self._tokenizer = tokenizer
        self._output: Output | None = None
        self._submitted = time.perf_counter()

    def __repr__(self) -> str:
        state = self.finish_reason or ("failed" if self.error is not None else "in progress")
        return f"Row({self.text!r}, {len(self.tokens)} tokens, {state})"

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def key(self) -> str:
        """What keys and values depend on besides the ids."""
        return "" if self.handle is None else self.handle.digest

    @property
    def is_plain(self) -> bool:
        """Whether its next token can be drawn together with other rows': the likeliest, without more to report."""
        return self.request.sampler is greedy and not self.request.options.top_logprobs

    @property
    def draws(self) -> bool:
        """Whether a token is to be drawn once what is pending has been processed."""
        done = self.constraint is not None and self.constraint.done
        return not done and len(self.tokens) + len(self._forced) < self.request.count

    def cancel(self) -> None:
        """End the text where it is; its place is free from the next step on."""
        if not self.is_done:
            self.finish_reason = "cancelled"

    def take_forced(self) -> list[Piece]:
        """The pieces of tokens that the constraint left no choice about."""
        forced, self._forced = self._forced, []
        shown = bool(self.request.options.top_logprobs)
        return self._add([(token, 0.0, [(token, 0.0)] if shown else []) for token in forced])

    def take(
        self, token: int, logprob: float, likeliest: list[tuple[int, float]], row: mx.array, many: int
    ) -> list[Piece]:
        """The piece of a drawn token, and of those that must follow it, which are then pending.

        Args:
            row: the log-probabilities it was drawn from, [1, vocab].
            many: how many forced tokens are processed alone, as in a prompt.

        Raises:
            OpenELMError: the log-probability is not finite, or no token fits the constraint.
        """
        if not abs(logprob) < float("inf"):
            raise failed_draw(self.decoder, len(self.tokens) + 1, self.constraint, row)
        if self.constraint is not None:  # before the piece is made, which may be the last for that reason
            self._forced = self.constraint.advance(token)[: self.request.count - len(self.tokens) - 1]
        pieces = self._add([(token, logprob, likeliest)])
        if self._forced and not self.is_done:
            if self.draws and len(self._forced) < many:
                self.pending = self._forced
            elif self.draws:
                self.prompt = self._forced
            pieces += self.take_forced()
        return pieces

    def _add(self, steps: Sequence[tuple[int, float, list[tuple[int, float]]]]) -> list[Piece]:
        """The pieces of these tokens, up to the end of the text."""
        pieces: list[Piece] = []
        for token, logprob, likeliest in steps:
            if self._output is None:
                seconds = time.perf_counter() - self._submitted
                request = self.request
                self._output = Output(
                    self._tokenizer, request.prompt, request.count, request.options, request.constraint, seconds
                )
            if self.tokens:
                warn_past_context(self.decoder.model, self.past + len(self.request.prompt) + len(self.tokens) - 1)
            piece = self._output.add(token, logprob, likeliest)
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.top_logprobs.append(likeliest)
            self.text += piece.text
            pieces.append(piece)
            if self.on_piece is not None:
                self.on_piece(piece)
            if piece.finish_reason is not None:
                self._output.warn_if_cut()
                self.finish_reason = piece.finish_reason
                break
        return pieces

    def process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, vocab] after the logits processors, once `tokens` [n] have been added to the context."""
        decoder = self.decoder
        if not decoder.logits_processors:
            return logits
        decoder.context = mx.concatenate([decoder.context, tokens])
        try:
            processed = logits
            for process in decoder.logits_processors:
                processed = process(decoder.context, processed)
            if processed.shape != logits.shape:  # would harm the other rows
                raise RequestError(f"A logits processor returned {processed.shape} for logits {logits.shape}.")
            return processed
        except Exception as error:
            self.error = error
        return logits

    def limit(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [1, vocab] to those of the tokens that the constraint allows, if there is one."""
        return logprobs if self.constraint is None else self.constraint.limit(logprobs)

    def start_after(self, count: int, cache: list[Any]) -> None:
        """Leave out the first `count` tokens of the prompt, which `cache` holds."""
        self.decoder.cache = cache
        self.decoder.context = mx.array(self.prompt[:count], mx.int32)
        self.prompt, self.cached_tokens = self.prompt[count:], count

    def processed_ids(self) -> list[int]:
        """The ids whose keys and values the caches hold; the caches were empty before the prompt."""
        return [*self.request.prompt, *self.tokens, *self._forced][: int(self.decoder.cache[0].offset)]
