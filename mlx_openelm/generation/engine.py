"""Many texts decoded together with one model. They join and leave at any step, and each has its own options.

    engine = Engine(model, tokenizer)
    row = engine.submit("ROMEO.", max_tokens=32, temp=0.8, seed=7)
    while engine.is_busy:
        for row, piece in engine.step():
            ...

A prompt is processed alone, in the pieces of a lone run, between steps in which all rows that have their prompt behind
them advance by a token. On the CPU kernels the arithmetic of a step does not depend on the number of rows, so each
row's tokens and log-probabilities are, bit for bit, those of `stream_generate`.
"""

from __future__ import annotations

import math
from collections import deque
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
from ..ops.attention import MANY_LAYER_ROWS as MANY_POSITIONS
from ..ops.layers import log_softmax
from ..text.tokenizer import Tokenizer
from .decoding import CLEAR_EVERY, make_request
from .drawing import draw, listed
from .keywords import GenerationKeywords
from .memory import Budget, held_bytes, model_bytes
from .options import GenerationOptions, check_number
from .piece import Piece
from .prefix_tree import PrefixTree
from .row import Row
from .sampling import LogitsProcessor, Sampler, greedy

MAX_ROWS = 32


@dataclass
class _Drawn:
    """Tokens that the device is computing: one per row, with its log-probability, from log-probabilities `source`.

    `tokens` and `logprobs` are [R], `source` [R, vocab]; `likeliest` holds the ids and log-probabilities [1, top] of
    the only row, if it reports any.
    """

    rows: list[Row]
    tokens: mx.array
    logprobs: mx.array
    source: mx.array
    likeliest: tuple[mx.array, mx.array] | None = None


class Engine:
    """Decodes texts together; see the module. One thread at a time may use it.

    Args:
        max_rows: the number of texts that advance together; others wait.
        max_bytes: the most memory that these rows may take: keys and values, and what a step and a piece of a prompt
            need; rows wait until theirs is free. By default a share of what is free (`memory.FREE_SHARE`).
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
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # in the order in which they joined
        self._drawn: list[_Drawn] = []
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
        row = Row(request, self.tokenizer, adapter, on_piece)
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
        self._admit()
        drawn, self._drawn = self._drawn, []
        following = self._launch(drawn)
        pieces = [(row, piece) for group in drawn for row, piece in self._read(group)]
        for row, logprobs in following:
            # Forced tokens are pending if the constraint had no choice to offer; then this row's turn comes later.
            if not row.is_done and not row.prompt and not row.pending:
                self._draw(row, logprobs)
        pieces += self._process_prompts()
        self._retire()
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
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
            self.budget.release(row)
            if self.adapters is not None and row.handle is not None:
                self.adapters.release(row.handle)
            if not self.exact_prefixes and row.error is None:
                self._keep(row)
            row.decoder.cache = []  # the caller may keep the row

    def _launch(self, drawn: Sequence[_Drawn]) -> list[tuple[Row, mx.array]]:
        """Process the drawn and the pending tokens of all rows in one call of the model.

        The drawn tokens may still be on the device: nothing here waits for them.

        Returns:
            The rows whose constraint must see a token first, with their next log-probabilities [1, vocab].
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
        tokens = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        logprobs = self._forward(rows, tokens, lengths)
        free, limited = [], []
        for i, row in enumerate(rows):
            if row.constraint is None:
                free.append(i)
            elif row.pending:
                row.pending = []
                self._draw(row, logprobs[i : i + 1])
            else:
                limited.append((row, logprobs[i : i + 1]))
        plain = [i for i in free if rows[i].is_plain]
        if plain:
            source = logprobs if len(plain) == len(rows) else logprobs[mx.array(plain)]
            self._draw_plain([rows[i] for i in plain], source)
        for i in free:
            if not rows[i].is_plain:
                self._draw(rows[i], logprobs[i : i + 1])
        mx.async_eval(*(row_logprobs for _, row_logprobs in limited))
        return limited

    def _forward(self, rows: Sequence[Row], tokens: mx.array, lengths: Sequence[int]) -> mx.array:
        """The log-probabilities [R, vocab] after `lengths` more tokens of each row, `tokens` [sum(lengths)]."""
        caches = step_caches([row.decoder.cache for row in rows], lengths)
        ends = [end - 1 for end in accumulate(lengths)]
        with self._adapters_of([row for row, length in zip(rows, lengths, strict=True) for _ in range(length)]):
            hidden_states = self.model.hidden_states(tokens[:, None], caches)  # [N, 1, model_dim]
        if len(ends) < tokens.size:
            hidden_states = hidden_states[mx.array(ends)]
        with self._adapters_of(rows):
            logits = self.model.logits(hidden_states)[:, 0].astype(mx.float32)
        for row in rows:
            if row.decoder.options.kv_bits is not None:
                row.decoder.quantize_cache()
        if any(row.decoder.logits_processors for row in rows):
            parts = zip(rows, lengths, ends, mx.split(logits, len(rows)), strict=True)
            logits = mx.concatenate([row.process(tokens[end + 1 - n : end + 1], part) for row, n, end, part in parts])
        return log_softmax(logits)

    def _draw_plain(self, rows: list[Row], logprobs: mx.array) -> None:
        """Start drawing the likeliest token of each row from log-probabilities [R, vocab]."""
        tokens = greedy(logprobs)
        likelihoods = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        mx.async_eval(tokens, likelihoods)
        self._drawn.append(_Drawn(rows, tokens, likelihoods, logprobs))

    def _draw(self, row: Row, logprobs: mx.array) -> None:
        """Start drawing a row's next token from log-probabilities [1, vocab], limited by its constraint."""
        if row.is_done:
            return
        try:
            limited = row.limit(logprobs)
            top = int(row.request.options.top_logprobs)
            token, likelihood, likeliest, _ = draw(limited, row.request.sampler, top)
        except Exception as error:
            row.error = error
            return
        self._drawn.append(_Drawn([row], token, likelihood[:, 0], logprobs, likeliest))

    def _read(self, drawn: _Drawn) -> list[tuple[Row, Piece]]:
        """The pieces of drawn tokens; waits for the device."""
        tokens: Any = drawn.tokens.tolist()
        likelihoods: Any = drawn.logprobs.tolist()
        likeliest = listed(drawn.likeliest)
        pieces = []
        for i, row in enumerate(drawn.rows):
            if row.is_done:
                continue
            try:
                taken = row.take(tokens[i], likelihoods[i], likeliest, drawn.source[i : i + 1], MANY_POSITIONS)
                pieces += [(row, piece) for piece in taken]
            except Exception as error:
                row.error = error
        return pieces

    def _process_prompts(self) -> list[tuple[Row, Piece]]:
        """Process a piece of the first prompt, or with `prompts_first` of all rows' prompts."""
        pieces: list[tuple[Row, Piece]] = []
        for row in [row for row in self.rows if row.prompt and not row.is_done]:
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
