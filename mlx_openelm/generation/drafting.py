"""Where drafts come from: text that repeats, or a smaller model.

A drafter follows one text. It is told of every token that becomes part of the text, prompt included, and proposes
tokens that may come next; what becomes of them is decided elsewhere:

    drafter.begin(prompt)
    while drafter.prepare(piece_size):
        ...
    plan = drafter.plan(limit)
    draft = drafter.propose(count, place)
    drafter.observe(accepted, len(draft.tokens))
    drafter.extend(new_tokens)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Protocol

import mlx.core as mx

from .draft_length import AcceptanceRates, Plan
from .lookup import EarlierTexts, Lookup

# A drafted token that is less likely to be accepted is not worth its position.
LEAST_CHANCE = 0.03
# Tokens of a draft that a constraint adds to, unless more are asked for: a step takes memory for each.
MAX_CHECKED_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Draft:
    """Tokens that may come next; with the log-probabilities [L, vocab] that they were drawn with if they were drawn."""

    tokens: list[int]
    logprobs: mx.array | None = None


@dataclass(eq=False)
class CheckedDraft:
    """A draft of L tokens as a step checks it, at L + 1 places: the tokens' and the one after them.

    `forced` says which tokens the constraint leaves no choice about. `masks`, if there is a constraint, holds for each
    place what it allows; None where no token is to be chosen. `logprobs` [L, vocab] are those of drawn tokens.
    """

    tokens: list[int]
    forced: list[bool]
    masks: list[bytes | None] = field(default_factory=list)
    logprobs: mx.array | None = None

    def add(self, token: int, following: Sequence[int], mask: bytes | None) -> None:
        """Append a token, those that must follow it, and what may come after them."""
        self.tokens += [token, *following]
        self.forced += [False, *[True] * len(following)]
        self.masks += [*[None] * len(following), mask]

    @property
    def choices(self) -> list[int]:
        """The places at which a token is to be chosen."""
        if self.masks:
            return [place for place, mask in enumerate(self.masks) if mask is not None]
        return list(range(len(self.tokens) + 1))

    def logprobs_of_all(self) -> mx.array:
        """`logprobs` of all tokens [L, vocab], those included that the constraint has added at the end."""
        assert self.logprobs is not None
        known, count = self.logprobs, len(self.tokens)
        if known.shape[0] >= count:
            return known[:count]
        return mx.concatenate([known, certain(self.tokens[known.shape[0] :], known.shape[1])])


def certain(tokens: Sequence[int], size: int) -> mx.array:
    """Log-probabilities [L, size] of tokens without a choice: 0 for the token, -inf for all others."""
    return mx.where(mx.arange(size) == mx.array(list(tokens))[:, None], 0.0, -mx.inf)


@dataclass
class DraftCounts:
    """How well drafting went for one text, so far.

    Attributes:
        drafted: tokens that were proposed.
        accepted: those of them that are in the text.
        steps: steps of the target after the prompt.
        tokens: tokens that these gave.
        timed_tokens, plain_steps: tokens of the steps whose cost is known, and that cost in plain steps.
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: int = 0
    timed_tokens: int = 0
    plain_steps: float = 0.0

    def count(self, tokens: int, kept: int, plain_steps: float | None) -> None:
        """Count a step that gave so many tokens and kept so many of its draft.

        Args:
            plain_steps: what it took, in plain steps; None if that is not known.
        """
        self.steps += 1
        self.tokens += tokens
        if plain_steps is not None:
            self.timed_tokens += 1 + kept
            self.plain_steps += plain_steps

    @classmethod
    def sum(cls, counts: Iterable[DraftCounts]) -> DraftCounts:
        """Those of several texts together."""
        each = list(counts)
        return cls(*(sum(getattr(one, field.name) for one in each) for field in fields(cls)))

    @property
    def acceptance(self) -> float | None:
        """The share of drafted tokens that were accepted; None if there were none."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        return self.tokens / self.steps if self.steps else None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as plain decoding, by the measured times of steps; None before these are known."""
        return self.timed_tokens / self.plain_steps if self.plain_steps else None


class Drafter(Protocol):
    """What every drafter does for one text."""

    def begin(self, prompt: Sequence[int], known: int = 0) -> None:
        """Take the text's first tokens; the target need not process the first `known` of them."""

    def prepare(self, size: int) -> bool:
        """Do a part of what comes before the first draft, such as reading `size` tokens; False if nothing is left."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that became part of the text."""

    def plan(self, limit: int, least: float = LEAST_CHANCE, unread: int = 0) -> Plan:
        """What could be drafted next: at most `limit` tokens with these chances or better, and what they cost.

        Args:
            unread: tokens that come first and are not known yet.
        """

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
        self._match = self._lookup.match()
        self._rates = AcceptanceRates(self._EXPECTED)

    def begin(self, prompt: Sequence[int], known: int = 0) -> None:
        """Take the text's first tokens."""
        self.extend(prompt)

    def prepare(self, size: int) -> bool:
        """Nothing."""
        return False

    @property
    def nbytes(self) -> int:
        """None: there are no keys and values."""
        return 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that became part of the text."""
        for token in tokens:
            match = self._match
            if match.length and (expected := match.next) is not None:
                self._rates.observe(match.length, token == expected)
            self._lookup.extend(token)
            self._match = self._lookup.match()

    def plan(self, limit: int, least: float = LEAST_CHANCE, unread: int = 0) -> Plan:
        """At most `limit` tokens, which cost nothing, and their chances: the unread ones must be right too."""
        match = self._match
        if not match.length:
            return Plan([])
        count = limit + unread
        if not match.in_text_itself:
            count = min(count, len(match.tokens) - match.end)
        return Plan(self._rates.chances(match.length, count, least)[unread:])

    def propose(self, count: int, place: int = 0) -> Draft:
        """At most `count` tokens that follow the longest match."""
        return Draft(self._match.following(count))

    def observe(self, accepted: int, proposed: int) -> None:
        """Nothing: `extend` has seen the tokens."""


class EitherDrafter:
    """Proposes what the first of two drafters does where it is at least as sure, else what the second one does.

    `chosen` is the one that the last plan is of.
    """

    def __init__(self, first: Drafter, second: Drafter):
        self._both = first, second
        self.chosen = second

    def begin(self, prompt: Sequence[int], known: int = 0) -> None:
        """Tell both."""
        for drafter in self._both:
            drafter.begin(prompt, known)

    def prepare(self, size: int) -> bool:
        """Let one of them do a part."""
        return any(drafter.prepare(size) for drafter in self._both)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of both."""
        return sum(drafter.nbytes for drafter in self._both)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tell both."""
        for drafter in self._both:
            drafter.extend(tokens)

    def plan(self, limit: int, least: float = LEAST_CHANCE, unread: int = 0) -> Plan:
        """The plan of the drafter whose first token is more likely to be right."""
        plans = [drafter.plan(limit, least, unread) for drafter in self._both]
        first, second = (plan.chances[0] if plan.chances else 0.0 for plan in plans)
        number = int(second > first)
        self.chosen = self._both[number]
        return plans[number]

    def propose(self, count: int, place: int = 0) -> Draft:
        """What the chosen one proposes."""
        return self.chosen.propose(count, place)

    def observe(self, accepted: int, proposed: int) -> None:
        """Tell the chosen one."""
        self.chosen.observe(accepted, proposed)
