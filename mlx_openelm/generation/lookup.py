"""Earlier occurrences of the end of a text, in the text itself and in earlier ones, by suffix automata.

A suffix automaton (Blumer et al., 1985) has a state for each set of strings that end at the same places of a text, and
transitions to the states of the strings that are one token longer. Built token by token, it takes amortized constant
time a token.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

# Tokens of earlier texts that are kept by default; an automaton takes about 420 bytes a token, so these take 14 MB.
MAX_EARLIER_TOKENS = 32_768


class Match(NamedTuple):
    """The last `length` tokens of a text also stand in `tokens` before place `end`, and others follow there.

    It is where they stand last, which needs no counts, and which predicts the next token as well as the most frequent
    continuation does from 3 tokens on (Shakespeare, source code); shorter matches seldom pay.
    """

    length: int
    tokens: Sequence[int]
    end: int
    in_text_itself: bool

    @property
    def next(self) -> int | None:
        """The first token that follows; None where another text begins."""
        token = self.tokens[self.end] if self.end < len(self.tokens) else -1
        return None if token < 0 else token

    def following(self, count: int) -> list[int]:
        """At most `count` tokens that follow; a match in the text itself goes on into its own continuation."""
        found = list(self.tokens[self.end : self.end + count])
        if self.in_text_itself:
            period = len(self.tokens) - self.end
            while len(found) < count:
                found.append(found[len(found) - period])
        elif found and min(found) < 0:  # where another text begins
            del found[next(n for n, token in enumerate(found) if token < 0) :]
        return found


class SuffixAutomaton:
    """All strings of tokens within a text, which `extend` makes longer."""

    # A new occurrence of a string is one of its suffixes too, and this many of them learn of it. More would only help
    # short suffixes of long repetitions.
    _SUFFIXES = 16

    def __init__(self) -> None:
        self.tokens: list[int] = []
        # For each state: the states after each token, the length of its longest string, the state of the longest
        # suffix that also ends elsewhere, and the place where its strings ended last.
        self.following: list[dict[int, int]] = [{}]
        self.lengths = [0]
        self.suffixes = [-1]
        self.ends = [0]
        self.match_length = 0  # of the longest suffix of the text that occurred before
        self.match_end = 0  # where it did last
        self._whole = 0  # the state of the whole text

    def extend(self, token: int) -> None:
        """Append a token."""
        following, suffixes, ends = self.following, self.suffixes, self.ends
        self.tokens.append(token)
        end, state = len(self.tokens), self._whole
        self._whole = new = self._add({}, end, 0, end)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = suffixes[state]
        if state < 0:
            self.match_length = 0
            return
        suffix = following[state][token]
        length = self.lengths[state] + 1
        if self.lengths[suffix] != length:
            suffix = self._split(state, token, suffix, length)
        suffixes[new] = suffix
        self.match_length, self.match_end = length, ends[suffix]
        for _ in range(self._SUFFIXES):
            ends[suffix] = end
            suffix = suffixes[suffix]
            if suffix <= 0:
                break

    def _split(self, state: int, token: int, old: int, length: int) -> int:
        """A new state for the strings in `old` of up to `length` tokens, which end at more places from now on."""
        following, suffixes = self.following, self.suffixes
        new = self._add(following[old].copy(), length, suffixes[old], self.ends[old])
        suffixes[old] = new
        while state >= 0 and following[state].get(token) == old:
            following[state][token] = new
            state = suffixes[state]
        return new

    def _add(self, following: dict[int, int], length: int, suffix: int, end: int) -> int:
        """Add a state."""
        self.following.append(following)
        self.lengths.append(length)
        self.suffixes.append(suffix)
        self.ends.append(end)
        return len(self.lengths) - 1


class Follower:
    """The longest suffix of one text that occurs in another, whose automaton may grow meanwhile."""

    def __init__(self, automaton: SuffixAutomaton):
        self.automaton = automaton
        self.match_length = 0
        self._state = 0

    def extend(self, token: int) -> None:
        """Append a token to the text that is followed."""
        automaton, state, length = self.automaton, self._state, self.match_length
        while state and length <= automaton.lengths[automaton.suffixes[state]]:  # it was split since
            state = automaton.suffixes[state]
        while (target := automaton.following[state].get(token)) is None and state:
            state = automaton.suffixes[state]
            length = automaton.lengths[state]
        self._state, self.match_length = (0, 0) if target is None else (target, length + 1)

    @property
    def match_end(self) -> int:
        """Where that suffix last occurs."""
        return self.automaton.ends[self._state]


class EarlierTexts:
    """Texts that later ones may repeat, `max_tokens` tokens at most in total; the oldest are dropped first.

    They are held in two automata, and dropped with the older one when the younger one is full. Several threads may add
    and read them.
    """

    def __init__(self, max_tokens: int = MAX_EARLIER_TOKENS):
        self._half = max(1, max_tokens // 2)
        self._breaks = 0
        self._adding = threading.Lock()
        self.automata: tuple[SuffixAutomaton, ...] = ()  # from the youngest

    def add(self, tokens: Sequence[int]) -> None:
        """Keep a text, or the end of one that is too long."""
        tokens = tokens[-(self._half - 1) :] if self._half > 1 else ()
        if tokens:
            with self._adding:
                self._add(tokens)

    def _add(self, tokens: Sequence[int]) -> None:
        if not self.automata or len(self.automata[0].tokens) + 1 + len(tokens) > self._half:
            self.automata = (SuffixAutomaton(), *self.automata[:1])
        self._breaks += 1
        youngest = self.automata[0]
        youngest.extend(-self._breaks)  # a token of its own before each text, so that no match crosses it
        for token in tokens:
            youngest.extend(token)


class Lookup:
    """The end of one text, looked up in the text so far and in earlier texts."""

    def __init__(self, earlier: EarlierTexts | None = None):
        self._text = SuffixAutomaton()
        self._earlier = EarlierTexts() if earlier is None else earlier
        self._automata: tuple[SuffixAutomaton, ...] = ()
        self._followers: list[Follower] = []

    def extend(self, token: int) -> None:
        """Append a token to the text."""
        self._text.extend(token)
        if self._automata is not self._earlier.automata:
            self._automata = self._earlier.automata
            known = {id(follower.automaton): follower for follower in self._followers}
            self._followers = [known.get(id(one)) or Follower(one) for one in self._automata]
        for follower in self._followers:
            follower.extend(token)

    def match(self) -> Match:
        """The longest match; of equals, the one in the text itself, then the one in the younger texts."""
        length, best = self._text.match_length, None
        for follower in self._followers:
            if follower.match_length > length:
                length, best = follower.match_length, follower
        if best is None:
            return Match(length, self._text.tokens, self._text.match_end, length > 0)
        return Match(length, best.automaton.tokens, best.match_end, False)
