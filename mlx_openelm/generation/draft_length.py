"""How many tokens to draft, from how often drafts were right and what checking them costs, both as measured so far.

A step of the target checks n positions: one for each row of the batch, and one for each drafted token. It takes t(n)
seconds and gives one token for each row and one for each drafted token that is right. `DraftLengths` drafts as many
tokens as bring the most tokens a second; none where none pay.

A step that checks drafts, and the one after it, begin late: the last tokens must be read first, so that the host's work
does not overlap with the device's. t(n) of a drafting step includes that, and t(n) of a plain step does not.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

MAX_DRAFT_TOKENS = 16


class AcceptanceRates:
    """How often a drafted token was right, by a level that tells good drafts from bad ones; old draws fade.

    The level is the length of the match for lookup, and the place in the draft for a draft model: of a draft that
    begins at some level, the next token has the next level.

    Args:
        expected: the rates to begin with; the last one is that of all higher levels. A level that was never observed is
            as good as the next lower one that was, or better.
    """

    _FADING = 0.97  # so that about 33 tokens count
    _WEIGHT = 2.0  # of what is expected, in tokens

    def __init__(self, expected: Sequence[float]):
        self._expected = expected
        self._right: dict[int, float] = {}
        self._all: dict[int, float] = {}

    def observe(self, level: int, is_right: bool) -> None:
        """Count one token."""
        band = _band(level)
        if band not in self._all:
            self._right[band] = self._WEIGHT * self._rate(band)
            self._all[band] = self._WEIGHT
        self._all[band] = self._FADING * self._all[band] + 1
        self._right[band] = self._FADING * self._right[band] + is_right

    def chances(self, level: int, count: int, least: float = 0.0) -> list[float]:
        """The chances that the first, the first two, ... of `count` drafted tokens are all right.

        Those below `least` are left out.
        """
        chances: list[float] = []
        chance, rates = 1.0, dict[int, float]()
        for n in range(level, level + count):
            band = _band(n)
            if band not in rates:
                rates[band] = self._rate(band)
            chance *= rates[band]
            if chance < least:
                break
            chances.append(chance)
        return chances

    def _rate(self, band: int) -> float:
        if band in self._all:
            return self._right[band] / self._all[band]
        expected = self._expected[min(band, len(self._expected) - 1)]
        lower = max((other for other in self._all if other < band), default=None)
        return expected if lower is None else max(expected, self._right[lower] / self._all[lower])


def _band(level: int) -> int:
    """0 to 4, then one for each power of two."""
    return level if level <= 4 else 2 + level.bit_length()


class StepCosts:
    """The seconds t(n) that a step of n positions takes, as measured.

    Other programs make some steps longer and none shorter, so a lower quartile counts, and no step counts as longer
    than one of more positions.
    """

    _KEPT = 9
    _TRUSTED = 2  # one measurement may be an accident
    _MAX_AGE = 1000  # steps after which a measurement is forgotten

    def __init__(self) -> None:
        self.step = 0
        self.last: dict[int, int] = {}  # the step in which each number of positions was measured last
        self._samples: dict[int, deque[float]] = {}
        self._quartiles: dict[int, float] = {}  # of numbers of positions that were measured often enough
        self._known: dict[int, float] = {}

    def observe(self, positions: int, seconds: float) -> None:
        """Count a step of this many positions."""
        self.skip()
        for old in [n for n, step in self.last.items() if self.step - step > self._MAX_AGE]:
            del self.last[old], self._samples[old]
            self._quartiles.pop(old, None)
        if (samples := self._samples.get(positions)) is None:
            samples = self._samples[positions] = deque(maxlen=self._KEPT)
        samples.append(seconds)
        self.last[positions] = self.step
        if len(samples) >= self._TRUSTED:
            self._quartiles[positions] = sorted(samples)[len(samples) // 4]
        self._known = {}
        least = math.inf
        for n in sorted(self._quartiles, reverse=True):
            self._known[n] = least = min(least, self._quartiles[n])

    def skip(self) -> None:
        """Count a step without its time."""
        self.step += 1

    def known(self) -> dict[int, float]:
        """The seconds of each number of positions that was measured often and lately enough."""
        return self._known


class Plan(NamedTuple):
    """What could be drafted for a row.

    `chances` are those that the first, the first two, ... drafted tokens are all right, as many as can be drafted.
    Drafting takes `start_seconds`, then `token_seconds` for each token; where they are not 0, only drafting shows how
    good the drafts are. `fixed` is the number of tokens to draft, whatever is measured.
    """

    chances: Sequence[float]
    start_seconds: float = 0.0
    token_seconds: float = 0.0
    fixed: int | None = None


class DraftLengths:
    """Chooses the number of drafted tokens for each row of a step, and learns from the steps.

    Step times that are not known are tried where drafting would pay if they were little longer than that of the next
    smaller step; plain steps are measured again now and then. What drafting lost against plain decoding, by the same
    measurements, is booked: it may lose `_START` plain steps, and beyond what it has won `_SHARE` of the time; where
    that is used up, only tokens that are sure are drafted. Where drafts of a draft model do not pay, that credit buys
    trials of one token.

    Args:
        limit: the most tokens drafted for a row.
    """

    _MARGIN = 1.03  # how much faster than plain decoding drafting must look
    _SURE = 0.8  # the chance of tokens that are drafted without credit
    _SLOPE = 0.02  # what a position adds at least to a step whose time is not known
    _PLAIN_EVERY = 256  # steps
    _PLAIN_SAMPLED = 4  # one in so many plain steps is measured once their time is known
    _START = 1.0
    _SHARE = 0.0125
    # In plain steps: the most that can be saved up, the most debt, and the most that one step is charged.
    _MOST, _DEBT, _CHARGE = 8.0, 2.0, 4.0

    def __init__(self, limit: int = MAX_DRAFT_TOKENS):
        self.limit = limit
        self._costs = StepCosts()
        self._late_costs = StepCosts()  # of steps without drafts that began late
        self._credit = self._START  # in plain steps

    def choose(self, plans: Sequence[Plan], is_late: bool = True) -> list[int]:
        """The number of tokens to draft for each row of a step; rows that share a draft model draft together.

        Args:
            is_late: whether the step begins late in any case.
        """
        lengths = [0 if plan.fixed is None else min(plan.fixed, len(plan.chances)) for plan in plans]
        if not any(plan.chances and plan.fixed is None for plan in plans):
            return lengths
        known, base = self._costs.known(), len(plans) + sum(lengths)
        # A step without more drafts is what these are compared with, so its time must be known, and well.
        age = self._costs.step - self._costs.last.get(base, -self._PLAIN_EVERY)
        if base not in known or age >= self._PLAIN_EVERY:
            return lengths
        free = [plan if plan.fixed is None else Plan(()) for plan in plans]
        # If drafts make this step late, the one after them is late too.
        further = 0.0 if is_late else max(0.0, self._late_costs.known().get(base, 0.0) - known[base])
        chosen = self._fastest(free, known, base, further)
        if not chosen and (tried := self._trial(free, known, base, further)) is not None:
            chosen = [tried]
        for row in chosen:
            lengths[row] += 1
        return lengths

    def observe(
        self,
        rows: int,
        positions: int,
        tokens: int,
        seconds: float,
        draft_seconds: float = 0.0,
        is_fixed: bool = False,
        is_late: bool = False,
    ) -> float | None:
        """Learn from a step that gave `tokens` tokens for `rows` rows; returns what it took, in plain steps.

        None if the time of a plain step is not known.

        Args:
            positions: those that the target computed: the rows and the drafted tokens.
            seconds: what that took, including the choice of tokens.
            draft_seconds: what drafting took.
            is_fixed: whether numbers of drafted tokens were fixed; then neither gain nor loss is booked.
            is_late: whether it began late.
        """
        is_plain = positions == rows and not is_late
        if is_plain and rows in self._costs.known() and self._costs.step % self._PLAIN_SAMPLED:
            self._costs.skip()
            spent = 1.0
        else:
            costs = self._late_costs if positions == rows and is_late else self._costs
            costs.observe(positions, seconds)
            plain = self._costs.known().get(rows)
            if plain is None:
                return None
            # What was measured once may be an accident, but n positions never take longer than n steps.
            checking = costs.known().get(positions, min(seconds, plain * positions / rows))
            spent = (checking + draft_seconds) / plain
        if not is_fixed:
            won = 0.0 if is_plain else tokens / rows - min(spent, self._CHARGE + tokens / rows)
            self._credit = max(-self._DEBT, min(self._MOST, self._credit + self._SHARE * spent + won))
        return spent

    def _fastest(self, plans: Sequence[Plan], known: dict[int, float], base: int, further: float) -> list[int]:
        """The row of each token to draft, for the most tokens a second; without them a step has `base` positions.

        Drafting at all takes `further` seconds.
        """
        expected, checking = float(len(plans)), known[base]
        best = self._MARGIN * expected / checking
        # Most texts seldom repeat: if all drafts at the price of one position would not pay, no part of them does.
        gain = sum(chance for plan in plans for chance in plan.chances)
        if expected + gain <= best * (known.get(base + 1, checking) + further):
            return []
        # A row's tokens are ever less likely, so the likeliest of all rows are the first ones of each.
        tokens = [
            (chance, row, plan.start_seconds + n * plan.token_seconds)
            for row, plan in enumerate(plans)
            for n, chance in enumerate(plan.chances[: self.limit], 1)
        ]
        tokens.sort(key=lambda token: -token[0])
        chosen, drafting = 0, 0.0
        # Longer steps than were measured are tried little by little, on credit. Sure tokens need none: n positions
        # never cost more than n steps, so little can be lost.
        limit = 2 * max(known) - base if self._credit > 0 else 0
        sure = sum(chance >= self._SURE for chance, *_ in tokens)
        for count, (chance, _, seconds) in enumerate(tokens[: max(limit, sure)], 1):
            expected += chance
            drafting = max(drafting, further + seconds)
            checking = known.get(base + count, checking * (1 + self._SLOPE))
            if expected / (checking + drafting) > best:
                chosen, best = count, expected / (checking + drafting)
        return [row for _, row, _ in tokens[:chosen]]

    def _trial(self, plans: Sequence[Plan], known: dict[int, float], base: int, further: float) -> int | None:
        """A row to draft one token for although it is not expected to pay, each in turn; None if it costs too much."""
        rows = [row for row, plan in enumerate(plans) if plan.token_seconds > 0 and plan.chances]
        if not rows:
            return None
        row = rows[self._costs.step % len(rows)]
        plain = known[base]
        cost = further + plans[row].start_seconds + plans[row].token_seconds + known.get(base + 1, plain) - plain
        return row if self._credit > 0 and cost <= self._credit * plain else None
