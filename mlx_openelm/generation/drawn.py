"""Tokens that the device is drawing for the rows of an engine: `Draws` starts them, `read` waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

from .acceptance import accept_drawn
from .drafting import CheckedDraft, certain
from .drawing import draw, listed
from .piece import Piece
from .row import Choice, Row, part
from .sampling import Sampler, TextSampler, greedy


@dataclass
class Drawn:
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


class Draws:
    """What is being drawn and was not taken yet."""

    def __init__(self) -> None:
        self._groups: list[Drawn] = []

    def take(self) -> list[Drawn]:
        """All that was started since the last call."""
        groups, self._groups = self._groups, []
        return groups

    def start_plain(self, rows: list[Row], counts: list[int], logprobs: mx.array) -> None:
        """Start drawing the likeliest tokens of each row from log-probabilities [sum(counts), vocab]."""
        tokens = greedy(logprobs)
        likelihoods = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        mx.async_eval(tokens, likelihoods)
        self._groups.append(Drawn(rows, counts, tokens, likelihoods, logprobs))

    def start(self, row: Row, logprobs: mx.array) -> None:
        """Start drawing a row's next tokens from log-probabilities [L, vocab], limited by its constraint.

        What fails ends this row alone.
        """
        if row.is_done:
            return
        try:
            if row.draft is not None and row.draft.logprobs is not None:
                self._groups.append(_draw_after_drawn(row, logprobs))
            else:
                self._groups.append(_draw(row, logprobs))
        except Exception as error:
            row.error = error


def read(groups: Sequence[Drawn]) -> list[tuple[Row, Piece]]:
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
                taken = row.take(choices, part(drawn.source, end - count, end), accepted)
                pieces += [(row, piece) for piece in taken]
            except Exception as error:
                row.error = error
    return pieces


def _draw(row: Row, logprobs: mx.array) -> Drawn:
    """Start drawing the next token, or one at each place of the draft where there is a choice."""
    if row.draft is not None and len(row.draft.choices) < logprobs.shape[0]:
        logprobs = logprobs[mx.array(row.draft.choices)]
    limited = _limited(row, logprobs)
    sampler, place, count = row.request.sampler, row.place, logprobs.shape[0]
    tokens, likelihoods, likeliest, _ = draw(
        limited, lambda logprobs: _tokens(sampler, logprobs, place), int(row.request.options.top_logprobs)
    )
    row.place += count
    return Drawn([row], [count], tokens, likelihoods, logprobs, likeliest)


def _draw_after_drawn(row: Row, logprobs: mx.array) -> Drawn:
    """Decide how many drawn drafted tokens stay, and draw what follows, from log-probabilities [L + 1, vocab]."""
    draft, place, sampler = row.draft, row.place, row.request.sampler
    assert draft is not None and draft.logprobs is not None and isinstance(sampler, TextSampler)
    limited, drafts = _limited_everywhere(row, draft, logprobs), draft.logprobs_of_all()
    drafted = mx.array(draft.tokens)
    accepted, token = accept_drawn(limited, drafts, drafted, sampler, place)
    count = len(draft.tokens) + 1
    row.place += count
    found = mx.where(mx.arange(count) == accepted, token, mx.concatenate([drafted, drafted[:1]]))
    tokens, likelihoods, likeliest, _ = draw(limited, lambda _: found, int(row.request.options.top_logprobs))
    mx.async_eval(accepted)
    return Drawn([row], [count], tokens, likelihoods, logprobs, likeliest, accepted)


def _limited(row: Row, logprobs: mx.array) -> mx.array:
    """Log-probabilities [L, vocab] at the places of the draft, or the only place, to what the constraint allows."""
    if row.constraint is None:
        return logprobs
    if row.draft is None:
        return row.constraint.limit(logprobs)
    return row.constraint.limit_each(logprobs, [mask for mask in row.draft.masks if mask is not None])


def _limited_everywhere(row: Row, draft: CheckedDraft, logprobs: mx.array) -> mx.array:
    """Log-probabilities [L + 1, vocab] at all places of the draft to what the constraint allows.

    A token that must be there has a log-probability of 0.
    """
    if row.constraint is None:
        return logprobs
    size = logprobs.shape[1]
    every = bytes([255]) * (size // 8 + 1)
    limited = row.constraint.limit_each(logprobs, [mask or every for mask in draft.masks])
    return mx.where(mx.array([*draft.forced, False])[:, None], certain([*draft.tokens, 0], size), limited)


def _tokens(sampler: Sampler, logprobs: mx.array, place: int) -> mx.array:
    """Tokens [L] from log-probabilities [L, vocab], the first of which is drawn token `place` of a text."""
    if sampler is greedy:
        return greedy(logprobs)
    if isinstance(sampler, TextSampler):
        return sampler.tokens(logprobs, place)
    return mx.concatenate([sampler(logprobs[i : i + 1]) for i in range(logprobs.shape[0])])
