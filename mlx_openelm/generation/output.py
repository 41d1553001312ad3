"""From tokens to pieces: text, stop strings, the end, and speeds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import name_options
from ..messages import warn
from ..text.tokenizer import Tokenizer
from .options import GenerationOptions
from .piece import Piece
from .stopping import StopStrings

if TYPE_CHECKING:
    from .constraints import Constraint
    from .drafting import DraftCounts


class Output:
    """Makes the pieces of one text from its tokens, the first of which is there when this object is made.

    Args:
        prompt: its ids.
        count: the number of tokens after which the text ends.
        continues: whether the text is read right after the prompt's, so that a space before its first word counts.
        constraint: says when the text is complete.
        prompt_seconds: the time from the start of the prompt to the first token. The speed of generation counts from
            the second token on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: list[int],
        count: int,
        options: GenerationOptions,
        constraint: Constraint | None,
        prompt_seconds: float,
        continues: bool = False,
    ):
        self.tokenizer, self.prompt, self.count, self.options = tokenizer, prompt, count, options
        self.constraint = constraint
        self.length = 0  # tokens so far
        self._is_cut = False
        self._stops = StopStrings(self.options.stop) if self.options.stop else None
        seen = prompt if self.options.echo or continues else ()
        self._decoder = tokenizer.streaming_decoder(seen, keeps_space=constraint is not None)
        self._prompt_seconds, self._started = prompt_seconds, time.perf_counter()

    def add(
        self,
        token: int,
        logprob: float,
        top_logprobs: list[tuple[int, float]],
        from_draft: bool = False,
        drafts: DraftCounts | None = None,
    ) -> Piece:
        """The piece of the next token."""
        stops, constraint = self._stops, self.constraint
        self.length = n = self.length + 1
        text, stopped = "", token in self.tokenizer.eos_token_ids
        if not stopped:
            text = self._decoder.add(token)
            if stops is not None:
                text, stopped = stops.add(text)
            stopped = stopped or (constraint is not None and constraint.completed_by(n))
        finish_reason = "stop" if stopped else "length" if n == self.count else None
        if finish_reason is not None:
            rest = self._decoder.finish()
            text += rest if stops is None else stops.add(rest)[0] + stops.finish()
        self._is_cut = finish_reason == "length" and constraint is not None
        if n == 1 and self.options.echo:
            text = self.tokenizer.decode(self.prompt) + text
        return Piece(
            text,
            token,
            logprob,
            prompt_tokens=len(self.prompt),
            prompt_tps=len(self.prompt) / max(self._prompt_seconds, 1e-9),
            generation_tokens=n,
            generation_tps=(n - 1) / (time.perf_counter() - self._started) if n > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            top_logprobs=top_logprobs,
            from_draft=from_draft,
            drafts=drafts,
        )

    def warn_if_cut(self, place: str = "") -> None:
        """Warn if the text ended before its constraint did; to be called when the last piece has been shown.

        Args:
            place: where the prompt is from, if there are several.
        """
        if self._is_cut:
            n = self.length
            limit = "--max-tokens" if n == self.options.max_tokens else "the end of the model's context"
            tokens = f"{n:,} token{'' if n == 1 else 's'}"
            before = f"{place}: " if place else ""
            warn(name_options(f"{before}The text was cut off after {tokens}, at {limit}; it may be incomplete."))
