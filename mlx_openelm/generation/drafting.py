"""Where drafts come from: text that repeats, or a smaller model.

A drafter follows one text. It is told of every token that becomes part of the text, prompt included, and proposes
tokens that may come next; what becomes of them is decided elsewhere:

    drafter.extend(prompt)
    plan = drafter.plan(limit)
    draft = drafter.propose(count, place)
    drafter.observe(accepted, len(draft.tokens))
    drafter.extend(new_tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .draft_length import AcceptanceRates, Plan
from .lookup import EarlierTexts, Lookup


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that may come next; with the log-probabilities [L, vocab] that they were drawn with if they were drawn."""

    tokens: list[int]
    logprobs: mx.array | None = None


class Drafter(Protocol):
    """What every drafter does for one text."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that became part of the text."""

    def plan(self, limit: int) -> Plan:
        """What could be drafted next: at most `limit` tokens, their chances, and what they cost."""

    def propose(self, count: int, place: int = 0) -> Draft:
        """At most `count` tokens that may follow the text; `place` counts the tokens drawn for the text so far."""

    def observe(self, accepted: int, proposed: int) -> None:
        """Learn that the first `accepted` of `proposed` tokens were accepted."""


class LookupDrafter:
    """Proposes what followed the longest match of the text's end, in the text itself or in earlier texts.

    How good matches of each length are is seen at every token, drafted or not.
    """

    # For matches of 0 to 4 tokens and longer ones: below what was measured on English prose and source code.
    _EXPECTED = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6)

    def __init__(self, earlier: EarlierTexts | None = None):
        self._lookup = Lookup(earlier)
        self._rates = AcceptanceRates(self._EXPECTED)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that became part of the text."""
        for token in tokens:
            match = self._lookup.match()
            if match.length and (expected := match.following(1)):
                self._rates.observe(match.length, token == expected[0])
            self._lookup.extend(token)

    def plan(self, limit: int) -> Plan:
        """At most `limit` tokens, which cost nothing, and their chances."""
        match = self._lookup.match()
        count = len(match.following(limit)) if match.length else 0
        return Plan(self._rates.chances(match.length, count))

    def propose(self, count: int, place: int = 0) -> Draft:
        """At most `count` tokens that follow the longest match."""
        return Draft(self._lookup.match().following(count))

    def observe(self, accepted: int, proposed: int) -> None:
        """Nothing: `extend` has seen the tokens."""
