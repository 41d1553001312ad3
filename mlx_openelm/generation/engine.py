"""Many texts decoded together with one model. They join and leave at any step, and each has its own options.

    engine = Engine(model, tokenizer)
    row = engine.submit("ROMEO.", max_tokens=32, temp=0.8, seed=7)
    while engine.is_busy:
        for row, piece in engine.step():
            ...

A prompt is processed alone, in the pieces of a lone run, before steps in which all rows that have their prompt behind
them advance by a token; short prompts share the time of a piece. On the CPU kernels the arithmetic of a step does not
depend on the number of rows, so each row's tokens and log-probabilities are, bit for bit, those of `stream_generate`.

A step builds on tokens that the device is still drawing, so that Python and the device work at the same time. Where
rows draft, the tokens are read first, and a step checks each row's token and its drafted ones as so many positions.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from numbers import Integral
from typing import TYPE_CHECKING, Any, Unpack

import mlx.core as mx

from ..adapters.pool import AdapterPool, PoolFullError
from ..adapters.switching import AdapterPaths
from ..errors import RequestError
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .batch_step import BatchStep
from .decoding import CLEAR_EVERY, make_request
from .draft_model import check_draft_model
from .drawn import Draws, read
from .keywords import GenerationKeywords
from .lookup import EarlierTexts
from .memory import Budget, held_bytes, model_bytes
from .options import GenerationOptions, check_number
from .piece import Piece
from .prefix_tree import PrefixTree
from .row import Row
from .sampling import LogitsProcessor, Sampler
from .shared_prefixes import SharedPrefixes, next_piece, usual_piece
from .speculation import Speculation

if TYPE_CHECKING:
    from .constraints import Constraint

MAX_ROWS = 32
# The most prompts that are processed between two steps: even the shortest one reads all of the model's weights.
_MOST_PROMPTS = 8


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
        exact_prefixes: use them only where they are bit for bit what processing the prompt would give, as far as
            `SharedPrefixes` knows. Otherwise what was generated counts too, whose arithmetic is that of single tokens.
        prompts_first: process the prompts of all rows before the next step, which is faster as a whole; otherwise one
            piece of a prompt before each step, or a few short prompts, so that other rows keep flowing.
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
        self.adapters, self.prefixes, self.prompts_first = adapters, prefixes, prompts_first
        if draft_model is not None:
            check_draft_model(model, draft_model)
        self.budget = Budget(model, max_bytes, draft_model)
        self.speculation = Speculation(draft_model, earlier)
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []  # in the order in which they joined
        self._shared = None if prefixes is None else SharedPrefixes(prefixes, exact_prefixes)
        self._draws = Draws()
        self._calls = BatchStep(model, adapters, self._draws, self.speculation)
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
        constraint: Constraint | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> Row:
        """Add a text; it starts as soon as there is room.

        Args:
            adapter: of this row alone: what `AdapterPool.acquire` takes.
            on_piece: called with each `Piece` of this row.
            constraint: what `make_constraint` makes of the options, for this row alone, where that takes too long for
                the thread that computes; by default it is made here.
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
            constraint=constraint,
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

    def held_tokens(self, row: Row) -> int:
        """How many tokens of a row's prompt a longer one that begins with it finds in `prefixes`."""
        return 0 if self._shared is None else self._shared.held(row)

    def step(self) -> list[tuple[Row, Piece]]:
        """Advance every row by about a token; returns the new pieces in order.

        A row that fails has its `error` set and leaves; the others go on.
        """
        speculation = self.speculation
        speculation.entered()
        self._admit()
        step = speculation.take_step()
        # First, so that the first token of a text is drawn now, and read before the step that it is part of.
        pieces = self._process_prompts()
        drawn = self._draws.take()
        # Whether the step needs to know the drawn tokens.
        reads_first = any(row.draft is not None for row in self.rows) or speculation.wants(self.rows, unread=1)
        following = [] if reads_first else self._calls.after_drawn(self.rows, drawn)
        pieces += read(drawn)
        speculation.ended(step, Counter(row for row, _ in pieces))
        if reads_first:
            self._calls.after_known(self.rows)
        for row, logprobs in following:
            # Forced tokens are pending if the constraint had no choice to offer; then this row's turn comes later.
            if not row.is_done and not row.prompt and not row.pending:
                self._draws.start(row, logprobs)
        self._retire()
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        speculation.left()
        self.budget.clear_unused()
        return pieces

    def _admit(self) -> None:
        """Let waiting rows join, in order, while there is room."""
        if self.waiting:
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
            if self._shared is not None and row.error is None:
                self._shared.after_prompt(row)
            row.drop_caches()

    def _process_prompts(self) -> list[tuple[Row, Piece]]:
        """Process prompts one after the other: with `prompts_first` all, otherwise as many positions as a piece has."""
        pieces: list[tuple[Row, Piece]] = []
        taken = 0
        for row in [row for row in self.rows if row.prompt and not row.is_done]:
            self.speculation.disturbed()
            if self._shared is not None:
                self._shared.reuse(row)
            while row.prompt and not row.is_done:
                most = usual_piece(row)
                count = max(next_piece(row), most // _MOST_PROMPTS)
                if taken and taken + count > most and not self.prompts_first:
                    return pieces
                taken += count
                try:
                    pieces += [(row, piece) for piece in self._process_piece(row)]
                except Exception as error:
                    row.error = error
        return pieces

    def _process_piece(self, row: Row) -> list[Piece]:
        """Process a piece of a row's prompt, the draft model's first; after the last one, draw the next token."""
        # In pieces that do not depend on what the target need not process, so that drawn drafts do not either.
        if row.prepare_draft(usual_piece(row)):
            return []
        if self._shared is not None:
            self._shared.before_piece(row)
        logprobs = self._calls.prompt_piece(row, next_piece(row))
        if logprobs is None:
            return []
        if self._shared is not None:
            self._shared.after_prompt(row)
        if row.draws:
            self._draws.start(row, logprobs)
        return row.take_forced()
