"""One text among those that an engine decodes together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..adapters.pool import AdapterHandle
from ..adapters.switching import AdapterPaths
from ..backend import MANY_POSITIONS
from ..cache import rewind
from ..errors import OpenELMError
from ..text.tokenizer import Tokenizer
from .decoding import Request
from .draft_length import MAX_DRAFT_TOKENS
from .drafting import MAX_CHECKED_TOKENS, CheckedDraft, Draft, DraftCounts, Drafter
from .drawing import failed_draw, warn_past_context
from .output import Output
from .piece import Piece
from .sampling import greedy

# A chosen token, its log-probability, and the likeliest tokens with theirs.
Choice = tuple[int, float, list[tuple[int, float]]]


class Row:
    """A text that an engine generates; `Engine.submit` makes it.

    Attributes:
        tokens: the ids generated so far.
        logprobs, top_logprobs: their log-probabilities, and the likeliest tokens at their places with theirs.
        text: the text so far; with a stop string, without it.
        finish_reason: "stop", "length" or "cancelled"; None while the text goes on, and if `error` ended it.
        error: what ended the text, if it failed.
        cached_tokens: tokens of the prompt whose keys and values the engine had already.
        drafts: how well drafting went; None for a text without drafts.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        adapter: AdapterPaths | None = None,
        on_piece: Callable[[Piece], object] | None = None,
        drafter: Drafter | None = None,
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
        # Ids to process before the next token is drawn: in a step together with other rows, then alone as a prompt.
        self.pending: list[int] = []
        self.needs: Any = None  # of memory: `memory.Needs`, once they are known
        self.prompt: list[int] = [*request.prompt, *forced]
        self.drafter = drafter
        self.drafts = None if drafter is None else DraftCounts()
        self.draft: CheckedDraft | None = None  # what the device checks
        self.kept = 0  # drafted tokens of the last step that stayed
        self.place = 0  # tokens drawn, those that the device is drawing included
        self._unheard: list[int] = []  # what the drafter was not told yet
        self._drafter_began = self._is_prepared = drafter is None
        self._forced = forced  # drawn without a choice, and not yet in the text
        self._tokenizer = tokenizer
        self._output: Output | None = None
        self.warns = True  # else the caller does, when it has shown the last piece
        self.continues = False  # set before the first token: as in `Output`
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
        is_free = self.constraint is None and not self.request.options.top_logprobs
        return is_free and self.request.sampler is greedy

    @property
    def draws(self) -> bool:
        """Whether a token is to be drawn once what is pending has been processed."""
        done = self.constraint is not None and self.constraint.done
        return not done and len(self.tokens) + len(self._forced) < self.request.count

    def cancel(self) -> None:
        """End the text where it is; its place is free from the next step on."""
        if not self.is_done:
            self.finish_reason = "cancelled"

    def start_clock(self) -> None:
        """Count the time of the prompt from now on."""
        self._submitted = time.perf_counter()

    def warn_if_cut(self, place: str = "") -> None:
        """Warn if the text ended before its constraint did; `place` says where its prompt is from."""
        if self._output is not None:
            self._output.warn_if_cut(place)

    def take_forced(self) -> list[Piece]:
        """The pieces of tokens that the constraint left no choice about."""
        forced, self._forced = self._forced, []
        shown = bool(self.request.options.top_logprobs)
        return [piece for token in forced for piece in self._add((token, 0.0, [(token, 0.0)] if shown else []))]

    def take(self, choices: Sequence[Choice], source: mx.array, accepted: int | None = None) -> list[Piece]:
        """The pieces of drawn tokens, and of those that must follow them; what is not processed yet is then pending.

        Args:
            choices: the tokens at the places of `draft` where there is a choice, or of the only place. The first one
                that is not drafted ends the text so far, and the rest of the draft is taken back.
            source: the log-probabilities that they were drawn from, [L, vocab].
            accepted: how many tokens of a drawn draft stay. By default those that equal the choices.

        Raises:
            OpenELMError: a log-probability is not finite, or no token fits the constraint.
        """
        draft, self.draft = self.draft, None
        drafted = [] if draft is None else draft.tokens
        pieces: list[Piece] = []
        place, used, right, forced = 0, 0, 0, 0
        try:
            for token, logprob, likeliest in choices:
                if not abs(logprob) < float("inf"):
                    raise self._failed(source[used : used + 1])
                is_right = place < len(drafted) and (token == drafted[place] if accepted is None else place < accepted)
                used, right = used + 1, right + is_right
                if self.constraint is not None:
                    self._forced = self.constraint.advance(token)[: self.request.count - len(self.tokens) - 1]
                    forced = len(self._forced)
                pieces += self._add((token, logprob, likeliest), is_right)
                pieces += self.take_forced()
                if not is_right:
                    break
                place += 1
                while draft is not None and place < len(drafted) and draft.forced[place]:
                    place += 1
                if self.is_done:
                    break
        finally:
            self.kept = min(place, len(pieces))
            self._take_back(len(drafted) - self.kept)
        # A drawn draft has a key for each of its tokens, another text for each choice.
        self.place -= len(choices) - used if accepted is None else max(0, len(drafted) - place)
        if self.drafter is not None and self.drafts is not None:
            self.drafts.drafted += 0 if draft is None else draft.forced.count(False)
            self.drafts.accepted += right
            self.drafter.observe(min(place, len(drafted)), len(drafted))
        if not self.is_done:
            self._queue(forced)
        return pieces

    def drop_draft(self) -> None:
        """Take back a draft that the device checks."""
        if self.draft is not None:
            self._take_back(len(self.draft.tokens))
            self.draft = None

    def _take_back(self, count: int) -> None:
        if count:
            for layer in self.decoder.cache:
                rewind(layer, count)
            if self.decoder.logits_processors:
                self.decoder.context = self.decoder.context[:-count]

    def _queue(self, forced: int) -> None:
        """Note which tokens of the text are to be processed: the last ones, `forced` of which had to follow."""
        start = self._position - self.past - len(self.request.prompt)
        rest = self.tokens[start:]
        first = len(rest) - forced
        # As in plain decoding: many are processed as a prompt is, and a cache is quantized as soon as it can be.
        if forced >= MANY_POSITIONS or (first and self._position < self._quantized_from <= self._position + first):
            self.pending, self.prompt = rest[:first], rest[first:]
        else:
            self.pending = rest

    def _failed(self, logprobs: mx.array) -> OpenELMError:
        """The error of a next token that log-probabilities [1, vocab] do not give."""
        processed = bool(self.decoder.logits_processors)
        return failed_draw(self.decoder.model, len(self.tokens) + 1, logprobs, self.constraint, processed)

    @property
    def _position(self) -> int:
        """The number of tokens that the caches hold."""
        return int(self.decoder.cache[0].offset)

    @property
    def _quantized_from(self) -> int:
        """The number of tokens from which on the caches are quantized; 0 if they never are."""
        options = self.decoder.options
        return 0 if options.kv_bits is None else options.quantized_kv_start

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that it holds now, those of a draft model included."""
        drafts = 0 if self.drafter is None else self.drafter.nbytes
        return sum(layer.nbytes for layer in self.decoder.cache) + drafts

    def drop_caches(self) -> None:
        """Free what only decoding needs; the caller may keep the row."""
        self.decoder.cache, self.drafter = [], None

    def prepare_draft(self, size: int) -> bool:
        """Let the drafter read a piece of the prompt, of `size` tokens at most; False if it has read all of it."""
        if self.drafter is not None and not self._drafter_began:
            past = _ids_of(self.decoder.context) if self.past else []
            self.drafter.begin([*past, *self.request.prompt], len(past) + self.cached_tokens)
            self._drafter_began = True
        self._is_prepared = self._is_prepared or self.drafter is None or not self.drafter.prepare(size)
        return not self._is_prepared

    @property
    def most_drafted(self) -> int:
        """The most tokens that a draft may ever have, with those that the constraint puts between them."""
        if self.drafter is None:
            return 0
        fixed = self.request.options.num_draft_tokens
        most = MAX_DRAFT_TOKENS if fixed is None else fixed
        if self.constraint is not None:
            most = max(most, MAX_CHECKED_TOKENS)
        return min(most, self.request.count - 1)

    def room_for_draft(self, unread: int = 0) -> int:
        """The most tokens that a draft may have after the pending ones.

        Args:
            unread: drawn tokens that will come before it.
        """
        room = self.request.count - len(self.tokens) - unread - 1
        position = self._position + len(self.pending) + unread
        if self._position < self._quantized_from:  # drafted tokens that are taken back must not quantize it
            room = min(room, self._quantized_from - position - 1)
        return max(0, room)

    def tell_drafter(self) -> None:
        """Tell the drafter what is new in the text."""
        assert self.drafter is not None
        self.drafter.extend(self._unheard)
        self._unheard.clear()

    def set_draft(self, draft: Draft) -> None:
        """Let the next step check a draft after the pending tokens, as far as it fits the constraint."""
        tokens = draft.tokens
        end = next((n for n, token in enumerate(tokens, 1) if token in self._tokenizer.eos_token_ids), len(tokens))
        if self.constraint is None:
            checked = CheckedDraft(tokens[:end], [False] * end)
        else:
            limit = min(self.room_for_draft(), self.most_drafted)
            checked = self.constraint.check_draft(tokens[:end], limit, MANY_POSITIONS)
        checked.logprobs = draft.logprobs
        self.draft = checked if checked.tokens else None

    def _add(self, choice: Choice, from_draft: bool = False) -> list[Piece]:
        """The piece of the next token; nothing if the text has ended."""
        if self.is_done:
            return []
        token, logprob, likeliest = choice
        if self._output is None:
            seconds, request = time.perf_counter() - self._submitted, self.request
            self._output = Output(
                self._tokenizer,
                request.prompt,
                request.count,
                request.options,
                request.constraint,
                seconds,
                self.continues,
            )
        if self.tokens:
            warn_past_context(self.decoder.model, self.past + len(self.request.prompt) + len(self.tokens) - 1)
        piece = self._output.add(token, logprob, likeliest, from_draft, self.drafts)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.top_logprobs.append(likeliest)
        self.text += piece.text
        if self.drafter is not None:
            self._unheard.append(token)
        if self.on_piece is not None:
            self.on_piece(piece)
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason
            if self.warns:
                self.warn_if_cut()
        return [piece]

    def see(self, tokens: mx.array, start: int, end: int) -> None:
        """Add tokens[start:end] to what the logits processors are given, if there are any."""
        if self.decoder.logits_processors:
            self.decoder.context = mx.concatenate([self.decoder.context, tokens[start:end]])

    def start_after(self, count: int, cache: list[Any]) -> None:
        """Leave out the first `count` tokens of the prompt, which `cache` holds."""
        self.decoder.cache = cache
        self.decoder.context = mx.array(self.prompt[:count], mx.int32)
        self.prompt, self.cached_tokens = self.prompt[count:], count

    def processed_ids(self) -> list[int]:
        """The ids that the caches have seen, as far as they are known; the caches were empty before the prompt."""
        return [*self.request.prompt, *self.tokens, *self._forced][: int(self.decoder.cache[0].offset)]


def part(array: mx.array, start: int, end: int) -> mx.array:
    """array[start:end], which is the array itself if it has no others: MLX takes time to cut off nothing."""
    return array if end - start == len(array) else array[start:end]


def _ids_of(context: mx.array) -> list[int]:
    return context.tolist()  # type: ignore[return-value]
