"""Many texts decoded together with one model. They join and leave at any step, and each has its own options.

    engine = Engine(model, tokenizer)
    row = engine.submit("ROMEO.", max_tokens=32, temp=0.8, seed=7)
    while engine.is_busy:
        for row, piece in engine.step():
            ...

A prompt is processed alone, in the pieces of a lone run, between steps in which all rows that have their prompt behind
them advance by a token. On the CPU kernels the arithmetic of a step does not depend on the number of rows, so each
row's tokens and log-probabilities are, bit for bit, those of `stream_generate`.

A step builds on tokens that the device is still drawing, so that Python and the device work at the same time. Where
rows draft, the tokens are read first, and a step checks each row's token and its drafted ones as so many positions.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from typing import Any, Unpack

import mlx.core as mx

from .. import backend
from ..adapters.pool import AdapterPool, PoolFullError
from ..adapters.switching import AdapterPaths
from ..cache import step_caches
from ..errors import RequestError
from ..model import OpenELM
from ..ops.layers import log_softmax
from ..text.tokenizer import Tokenizer
from .acceptance import accept_drawn
from .decoding import CLEAR_EVERY, make_request
from .draft_model import check_draft_model
from .drawing import draw, listed
from .keywords import GenerationKeywords
from .lookup import EarlierTexts
from .memory import Budget, held_bytes, model_bytes
from .options import GenerationOptions, check_number
from .piece import Piece
from .prefix_tree import PrefixTree
from .row import Choice, Row
from .sampling import LogitsProcessor, Sampler, TextSampler, greedy
from .speculation import Speculation

MAX_ROWS = 32


@dataclass
class _Drawn:
    """Tokens that the device is computing, with their log-probabilities, from log-probabilities `source`.

    `counts` are those of each row: one, or one for each place of its draft where there is a choice. `tokens` and
    `logprobs` are [N], `source` [N, vocab]. Of a single row, `likeliest` holds the ids and log-probabilities [N, top],
    if it reports any, and `accepted` the number of drawn drafted tokens that stay.
    """

    rows: list[Row]
    counts: list[int]
    tokens: mx.array
    logprobs: mx.array
    source: mx.array
    likeliest: tuple[mx.array, mx.array] | None = None
    accepted: mx.array | None = None


class Engine:
    """Decodes texts together; see the module. One thread at a time may use it.

    Args:
        max_rows: the number of texts that advance together; others wait.
        max_bytes: the most memory that these rows may take: keys and values, and what a step and a piece of a prompt
            need; rows wait until theirs is free. By default a share of what is free (`memory.FREE_SHARE`).
        draft_model: a smaller model with the same tokens, which drafts for all rows but those with
            `num_draft_tokens=0`; it runs without the rows' adapters.
        earlier: texts in which `prompt_lookup` finds what a row repeats; the engine adds those that it generates. By
            default only these.
        adapters: what rows may name as their `adapter`.
        prefixes: where rows find and leave the keys and values of prompts.
        exact_prefixes: use them only where they are bit for bit what processing the prompt would give: whole pieces of
            prompts. Otherwise what was generated counts too, whose arithmetic is that of single tokens.
        prompts_first: process the prompts of all rows before the next step, which is faster as a whole; otherwise one
            piece of a prompt between two steps, so that other rows keep flowing.
    """

    def __init__(
        self,
        model: OpenELM,
        tokenizer: Tokenizer,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int | None = None,
        draft_model: OpenELM | None = None,
        earlier: EarlierTexts | None = None,
        adapters: AdapterPool | None = None,
        prefixes: PrefixTree | None = None,
        exact_prefixes: bool = False,
        prompts_first: bool = False,
    ):
        check_number("--max-rows", max_rows, 1, math.inf, "a whole number, 1 or above", kind=Integral)
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        self.adapters, self.prefixes = adapters, prefixes
        self.exact_prefixes, self.prompts_first = exact_prefixes, prompts_first
        self.budget = Budget(model, max_bytes)
        if draft_model is not None:
            check_draft_model(model, draft_model)
        self.speculation = Speculation(draft_model, earlier)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # in the order in which they joined
        self._drawn: list[_Drawn] = []
        self._reads_first = False  # whether the next step needs to know the drawn tokens
        self._steps = 0

    @property
    def is_busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.rows)

    @property
    def expected_memory(self) -> int:
        """The most bytes that MLX will hold at once until the rows submitted so far have ended.

        They count what MLX holds already, such as the model's weights, and what `prefixes` and `adapters` may come to
        hold: `mx.get_peak_memory()` stays below, unless there is other work.
        """
        rows = [*self.rows, *(row for row in self.waiting if not row.is_done)]
        others = max(mx.get_active_memory() - held_bytes(rows), model_bytes(self.model))
        total = others + self.budget.most(rows, self.max_rows)
        if self.prefixes is not None:
            total += self.prefixes.room_needed([self.budget.needs(row).held for row in rows])
        return total if self.adapters is None else total + self.adapters.room_needed

    def submit(
        self,
        prompt: str | Sequence[int] | mx.array,
        *,
        adapter: AdapterPaths | None = None,
        prompt_cache: list[Any] | None = None,
        prompt_cache_tokens: Sequence[int] | mx.array | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] | None = None,
        on_piece: Callable[[Piece], object] | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Row:
        """Add a text; it starts as soon as there is room.

        Args:
            adapter: of this row alone: what `AdapterPool.acquire` takes.
            on_piece: called with each `Piece` of this row.
            prompt, prompt_cache, prompt_cache_tokens, sampler, logits_processors, options: as in `stream_generate`.

        Raises:
            RequestError: as `stream_generate` and `AdapterPool.acquire`; or the text needs more memory than the engine
                may use.
        """
        request = make_request(
            self.model,
            self.tokenizer,
            prompt,
            GenerationOptions(**options),
            prompt_cache=prompt_cache,
            prompt_cache_tokens=prompt_cache_tokens,
            sampler=sampler,
            logits_processors=logits_processors,
        )
        self.speculation.check(request.options)
        row = Row(request, self.tokenizer, adapter, on_piece, self.speculation.drafter(request))
        self.budget.check(row)
        if adapter is not None:
            if self.adapters is None:
                raise RequestError("This engine has no adapters; make it with adapters=AdapterPool(model).")
            with suppress(PoolFullError):  # it waits for its turn, and for room
                self.adapters.release(self.adapters.acquire(adapter))
        self.waiting.append(row)
        return row

    def step(self) -> list[tuple[Row, Piece]]:
        """Advance every row by about a token; returns the new pieces in order.

        A row that fails has its `error` set and leaves; the others go on.
        """
        speculation = self.speculation
        speculation.entered()
        self._admit()
        drawn, self._drawn = self._drawn, []
        step = speculation.take_step()
        if self._reads_first:
            pieces = self._read(drawn)
            speculation.ended(step, Counter(row for row, _ in pieces))
            self._launch_known()
        else:
            following = self._launch(drawn)
            pieces = self._read(drawn)
            speculation.ended(step, Counter(row for row, _ in pieces))
            for row, logprobs in following:
                # Forced tokens are pending if the constraint had no choice to offer; then this row's turn comes later.
                if not row.is_done and not row.prompt and not row.pending:
                    self._draw(row, logprobs)
        pieces += self._process_prompts()
        self._retire()
        drafting = any(row.draft is not None for row in self.rows)
        self._reads_first = drafting or speculation.wants(self.rows, unread=1)
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        speculation.left()
        self.budget.clear_unused()
        return pieces

    def _admit(self) -> None:
        """Let waiting rows join, in order, while there is room."""
        self.waiting = deque(row for row in self.waiting if not row.is_done)
        while self.waiting and len(self.rows) < self.max_rows and self.budget.has_room(self.waiting[0]):
            row = self.waiting[0]
            try:
                if self.adapters is not None and row.adapter is not None:
                    row.handle = self.adapters.acquire(row.adapter)
            except PoolFullError as error:
                if self.rows:
                    return
                row.error = error
            except Exception as error:
                row.error = error
            self.waiting.popleft()
            if row.error is None:
                self.budget.take(row)
                self._reuse(row)
                self.rows.append(row)

    def _retire(self) -> None:
        """Let the rows leave that are done."""
        for row in [row for row in self.rows if row.is_done]:
            self.rows.remove(row)
            row.drop_draft()
            self.budget.release(row)
            if row.request.options.prompt_lookup:
                self.speculation.earlier.add(row.tokens)
            if self.adapters is not None and row.handle is not None:
                self.adapters.release(row.handle)
            if not self.exact_prefixes and row.error is None:
                self._keep(row)
            row.decoder.cache = []  # the caller may keep the row

    def _launch(self, drawn: Sequence[_Drawn]) -> list[tuple[Row, mx.array]]:
        """Process the drawn and the pending tokens of all rows in one call of the model.

        The drawn tokens may still be on the device: nothing here waits for them.

        Returns:
            As `_advance`.
        """
        rows, parts = [], []
        for group in drawn:
            kept = [
                i for i, row in enumerate(group.rows) if not row.is_done and len(row.tokens) + 1 < row.request.count
            ]
            rows += [group.rows[i] for i in kept]
            if kept:
                whole = len(kept) == len(group.rows)
                parts.append(group.tokens if whole else group.tokens[mx.array(kept)])
        lengths = [1] * len(rows)
        for row in self.rows:
            if row.pending and not row.is_done:
                rows.append(row)
                parts.append(mx.array(row.pending))
                lengths.append(len(row.pending))
        if not rows:
            return []
        limited = self._advance(rows, parts[0] if len(parts) == 1 else mx.concatenate(parts), lengths)
        mx.async_eval(*(logprobs for _, logprobs in limited))
        return limited

    def _launch_known(self) -> None:
        """Process the pending tokens of all rows, and what they draft after them, in one call of the model."""
        rows = [row for row in self.rows if row.pending and not row.is_done]
        self.speculation.draft(rows)
        rows = [row for row in rows if not row.is_done]
        if rows:
            ids = [[*row.pending, *(() if row.draft is None else row.draft.tokens)] for row in rows]
            self._advance(rows, mx.array([token for each in ids for token in each]), [len(each) for each in ids])

    def _advance(self, rows: list[Row], tokens: mx.array, lengths: list[int]) -> list[tuple[Row, mx.array]]:
        """Process `lengths` more tokens of each row, `tokens` [sum(lengths)], and draw the next ones.

        Returns:
            The rows whose constraint must see a token first, with their next log-probabilities [1, vocab].
        """
        # Nothing is drawn if more tokens are known.
        counts = [0 if row.prompt else 1 if row.draft is None else 1 + len(row.draft.tokens) for row in rows]
        logprobs = self._forward(rows, tokens, lengths, counts)
        self.speculation.began(rows, tokens.size)
        known = {row for row in rows if row.pending}
        for row in rows:
            row.pending = []
        if logprobs is None:
            return []
        plain, limited = [], []
        for row, count, end in zip(rows, counts, accumulate(counts), strict=True):
            places = slice(end - count, end)
            if not count:
                continue
            if row.is_plain and (row.draft is None or row.draft.logprobs is None):
                plain.append((row, places))
            elif row.constraint is not None and row not in known:
                limited.append((row, logprobs[places]))
            else:
                self._draw(row, logprobs[places])
        if plain:
            whole = sum(places.stop - places.start for _, places in plain) == logprobs.shape[0]
            kept = [place for _, places in plain for place in range(places.start, places.stop)]
            self._draw_plain(
                [row for row, _ in plain],
                [places.stop - places.start for _, places in plain],
                logprobs if whole else logprobs[mx.array(kept)],
            )
        return limited

    def _forward(
        self, rows: Sequence[Row], tokens: mx.array, lengths: Sequence[int], counts: Sequence[int]
    ) -> mx.array | None:
        """The log-probabilities [sum(counts), vocab] after the last `counts` of each row's new tokens.

        Args:
            tokens: [sum(lengths)], `lengths` of each row.
        """
        # One position of one row is what a lone run processes, in fewer operations.
        caches = rows[0].decoder.cache if tokens.size == 1 else step_caches([r.decoder.cache for r in rows], lengths)
        with self._adapters_of(_repeated(rows, lengths)):
            hidden_states = self.model.hidden_states(tokens[:, None], caches)  # [N, 1, model_dim]
        for row in rows:
            if row.decoder.options.kv_bits is not None:
                row.decoder.quantize_cache()
        ends = list(accumulate(lengths))
        places = [place for end, count in zip(ends, counts, strict=True) for place in range(end - count, end)]
        if places and len(places) < tokens.size:
            hidden_states = hidden_states[mx.array(places)]
        if not places:
            for row, length, end in zip(rows, lengths, ends, strict=True):
                row.see(tokens[end - length : end])
            return None
        with self._adapters_of(_repeated(rows, counts)):
            logits = self.model.logits(hidden_states)[:, 0].astype(mx.float32)
        first = 0
        for row, length, count, end in zip(rows, lengths, counts, ends, strict=True):
            if row.decoder.logits_processors:
                row.see(tokens[end - length : end])
                logits[first : first + count] = row.process(logits[first : first + count])
            first += count
        return log_softmax(logits)

    def _draw_plain(self, rows: list[Row], counts: list[int], logprobs: mx.array) -> None:
        """Start drawing the likeliest tokens of each row from log-probabilities [sum(counts), vocab]."""
        tokens = greedy(logprobs)
        likelihoods = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        mx.async_eval(tokens, likelihoods)
        self._drawn.append(_Drawn(rows, counts, tokens, likelihoods, logprobs))

    def _draw(self, row: Row, logprobs: mx.array) -> None:
        """Start drawing a row's next tokens from log-probabilities [L, vocab], limited by its constraint."""
        if row.is_done:
            return
        draft, place = row.draft, row.place
        try:
            if draft is not None and draft.logprobs is not None:
                self._draw_after_drawn(row, logprobs)
                return
            if draft is not None and len(draft.choices) < logprobs.shape[0]:
                logprobs = logprobs[mx.array(draft.choices)]
            limited = row.limit(logprobs)
            sampler, count = row.request.sampler, logprobs.shape[0]
            top = int(row.request.options.top_logprobs)
            tokens, likelihoods, likeliest, _ = draw(
                limited, lambda logprobs: _drawn_tokens(sampler, logprobs, place), top
            )
        except Exception as error:
            row.error = error
            return
        row.place += count
        self._drawn.append(_Drawn([row], [count], tokens, likelihoods[:, 0], logprobs, likeliest))

    def _draw_after_drawn(self, row: Row, logprobs: mx.array) -> None:
        """Decide how many drawn drafted tokens stay, and draw what follows, from log-probabilities [L + 1, vocab]."""
        draft, place, sampler = row.draft, row.place, row.request.sampler
        assert draft is not None and draft.logprobs is not None and isinstance(sampler, TextSampler)
        limited, drafts = row.limit_all(logprobs), draft.logprobs_of_all()
        drafted = mx.array(draft.tokens)
        accepted, token = accept_drawn(limited, drafts, drafted, sampler, place)
        row.place += len(draft.tokens) + 1
        places = mx.arange(len(draft.tokens) + 1)
        found = mx.where(places == accepted, token, mx.concatenate([drafted, drafted[:1]]))
        top = int(row.request.options.top_logprobs)
        tokens, likelihoods, likeliest, _ = draw(limited, lambda _: found, top)
        mx.async_eval(accepted)
        counts = [len(draft.tokens) + 1]
        self._drawn.append(_Drawn([row], counts, tokens, likelihoods[:, 0], logprobs, likeliest, accepted))

    def _read(self, groups: Sequence[_Drawn]) -> list[tuple[Row, Piece]]:
        """The pieces of drawn tokens; waits for the device."""
        pieces = []
        for drawn in groups:
            tokens: Any = drawn.tokens.tolist()
            likelihoods: Any = drawn.logprobs.tolist()
            for row, count, end in zip(drawn.rows, drawn.counts, accumulate(drawn.counts), strict=True):
                if row.is_done:
                    continue
                places: Sequence[int] = range(end - count, end)
                accepted = None
                if drawn.accepted is not None and row.draft is not None:
                    accepted, places = int(drawn.accepted.item()), row.draft.choices  # type: ignore[arg-type]
                choices: list[Choice] = [(tokens[i], likelihoods[i], listed(drawn.likeliest, i)) for i in places]
                try:
                    taken = row.take(choices, drawn.source[end - count : end], accepted)
                    pieces += [(row, piece) for piece in taken]
                except Exception as error:
                    row.error = error
        return pieces

    def _process_prompts(self) -> list[tuple[Row, Piece]]:
        """Process a piece of the first prompt, or with `prompts_first` of all rows' prompts."""
        pieces: list[tuple[Row, Piece]] = []
        for row in [row for row in self.rows if row.prompt and not row.is_done]:
            self.speculation.disturbed()
            while row.prompt and not row.is_done:
                try:
                    pieces += [(row, piece) for piece in self._process_piece(row)]
                except Exception as error:
                    row.error = error
                if not self.prompts_first:
                    return pieces
        return pieces

    def _process_piece(self, row: Row) -> list[Piece]:
        """Process a piece of a row's prompt; after the last one, draw the next token."""
        size = row.request.options.prefill_step_size or backend.prefill_step_size()
        if self.exact_prefixes and len(row.prompt) <= size:
            self._keep(row)
        piece, row.prompt = row.prompt[:size], row.prompt[size:]
        with self._adapters_of([row]):
            hidden_states = row.decoder.extend(mx.array([piece]))
            if row.prompt:
                mx.eval([layer.state[:2] for layer in row.decoder.cache])
                mx.clear_cache()
                return []
            logprobs = row.decoder.logprobs(hidden_states)
        if row.request.options.kv_bits is not None:  # otherwise they stay as they were until the next step
            mx.async_eval([layer.state[:2] for layer in row.decoder.cache])
        if not self.exact_prefixes:
            self._keep(row)
        if row.draws:
            self._draw(row, logprobs)
        return row.take_forced()

    def _adapters_of(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """Inside, each row of the model's calls has the adapter of the text in that place."""
        if self.adapters is None:
            return nullcontext()
        return self.adapters.rows([row.handle for row in rows])

    def _reuse(self, row: Row) -> None:
        """Take from `prefixes` what a row's prompt begins with."""
        if self.prefixes is None or row.past:
            return
        ids, options = row.prompt, row.request.options
        size = options.prefill_step_size or backend.prefill_step_size()
        if self.exact_prefixes:
            ids = ids[: (len(ids) - 1) // size * size + 1]
        cache, count = self.prefixes.fetch(ids, options, key=self._key(row))
        excess = count % size if self.exact_prefixes else 0
        if count > excess:
            for layer in cache:
                layer.trim(excess)
            row.start_after(count - excess, cache)

    def _keep(self, row: Row) -> None:
        """Leave what a row has processed so far in `prefixes`, if it is all the row's own."""
        if self.prefixes is not None and row.past == 0:
            ids = row.processed_ids()
            if ids:
                self.prefixes.insert(ids, row.decoder.cache, key=self._key(row))

    def _key(self, row: Row) -> str:
        """What keys and values depend on besides the ids: bit for bit on pieces, and on when they are packed, too."""
        options = row.request.options
        if not self.exact_prefixes:
            return row.key
        start = 0 if options.kv_bits is None else options.quantized_kv_start
        return f"{row.key}, {options.prefill_step_size}, {start}"


def _repeated(rows: Sequence[Row], counts: Sequence[int]) -> list[Row]:
    """Each row as many times as its count says."""
    return [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]


def _drawn_tokens(sampler: Sampler, logprobs: mx.array, place: int) -> mx.array:
    """Tokens [L] from log-probabilities [L, vocab], the first of which is drawn token `place` of a text."""
    if sampler is greedy:
        return greedy(logprobs)
    if isinstance(sampler, TextSampler):
        return sampler.tokens(logprobs, place)
    return mx.concatenate([sampler(logprobs[i : i + 1]) for i in range(logprobs.shape[0])])
