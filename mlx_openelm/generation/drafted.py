"""One text with drafts: `stream_generate` with a draft model or with lookup, on an engine of one row."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import backend
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .decoding import Progress
from .draft_length import DraftLengths
from .draft_model import DraftModel
from .engine import Engine
from .lookup import EarlierTexts
from .piece import Piece
from .row import Row
from .sampling import greedy

# What was generated in this process, for lookup.
_earlier: weakref.WeakKeyDictionary[Tokenizer, EarlierTexts] = weakref.WeakKeyDictionary()
# What drafting gained and cost in this process, by models, which cannot be keys themselves, and what else changes the
# time of a step most. Threads that generate at the same time slow each other down, and each has its own.
_lengths: dict[tuple[Any, ...], DraftLengths] = {}


def drafted_pieces(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    draft_model: OpenELM | DraftModel | None,
    progress: Progress | None,
    **arguments: Any,
) -> Iterator[Piece]:
    """The pieces of one text; `arguments` are those of `Engine.submit`, which describes the errors.

    Nothing is computed before the first piece is requested.
    """
    earlier = _earlier.setdefault(tokenizer, EarlierTexts())
    drafts = draft_model.model if isinstance(draft_model, DraftModel) else draft_model
    engine = Engine(model, tokenizer, max_bytes=sys.maxsize, draft_model=drafts, earlier=earlier)
    if isinstance(draft_model, DraftModel):
        engine.speculation.draft_model = draft_model
    row = engine.submit(prompt, **arguments)
    engine.speculation.lengths = _known_lengths(row, drafts)
    row.warns = False
    return _pieces(engine, row, progress)


def _known_lengths(row: Row, draft_model: OpenELM | None) -> DraftLengths:
    """What drafting gained and cost with a row's model so far.

    Without it each text would try anew whether drafting pays, and lose a few steps where it does not.
    """
    request, models = row.request, (row.decoder.model, draft_model)
    key = *map(id, models), threading.get_ident(), request.sampler is greedy, request.options.kv_bits
    if key not in _lengths:
        _lengths[key] = DraftLengths()
        for model in models:
            if model is not None:  # another one may have its id later
                weakref.finalize(model, _lengths.pop, key, None)
    return _lengths[key]


def _pieces(engine: Engine, row: Row, progress: Progress | None) -> Iterator[Piece]:
    total = len(row.prompt)
    try:
        with backend.wired_limit():
            row.start_clock()
            while engine.is_busy:
                if progress is not None and row.prompt and not row.tokens:
                    progress(total - len(row.prompt), total)
                for _, piece in engine.step():
                    if progress is not None and piece.generation_tokens == 1:
                        progress(total, total)
                    yield piece
            if row.error is not None:
                raise row.error
            row.warn_if_cut()
    finally:  # a caller that stops early gets caches without drafted tokens
        row.cancel()
        if engine.is_busy:
            engine.step()
