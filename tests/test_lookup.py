"""Longest matches, against a search through all earlier places."""

from __future__ import annotations

import random

from mlx_openelm.generation.lookup import EarlierTexts, Follower, Lookup, SuffixAutomaton

import pytest


def occurs_at(text, part):
    """The places where `part` ends in `text`, in order."""
    return [end for end in range(len(part), len(text) + 1) if text[end - len(part) : end] == part]


def longest(text, within):
    """The length of the longest suffix of `text` that occurs in `within`, and where it ends."""
    for length in range(len(text), 0, -1):
        if ends := occurs_at(within, text[-length:]):
            return length, ends
    return 0, []


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 30))])
def test_the_longest_suffix_that_occurred_before_is_found_where_it_did_last(seed):
    rng = random.Random(seed)
    automaton, text = SuffixAutomaton(), []
    for _ in range(120):
        token = rng.randrange(1 + seed % 5)
        automaton.extend(token)
        text.append(token)
        length, ends = longest(text, text[:-1])
        assert automaton.match_length == length
        if length and seed % 5 > 1:  # in longer repetitions, not every short suffix learns of every occurrence
            assert automaton.match_end == ends[-1]
        elif length:
            assert automaton.match_end in ends
    assert len(automaton.lengths) <= 2 * len(text)
    assert sum(map(len, automaton.following)) <= 3 * len(text)


@pytest.mark.parametrize("seed", [*range(7), *(pytest.param(n, marks=pytest.mark.slow) for n in range(7, 20))])
def test_a_text_is_followed_in_another_that_grows(seed):
    rng = random.Random(seed)
    automaton, text, other = SuffixAutomaton(), [], []
    follower = Follower(automaton)
    for _ in range(150):
        if rng.random() < 0.5:
            other.append(rng.randrange(3))
            automaton.extend(other[-1])
            grown = True
        else:
            text.append(rng.randrange(3))
            follower.extend(text[-1])
            grown = False
        length, _ = longest(text, other)
        # What was added to the other text since the last token is not looked at before the next.
        if not grown:
            assert follower.match_length <= length
            assert follower.match_length == 0 or follower.match_end in occurs_at(other, text[-follower.match_length :])


def test_a_text_is_followed_in_one_that_stays():
    rng = random.Random(1)
    automaton, text, other = SuffixAutomaton(), [], [rng.randrange(3) for _ in range(200)]
    for token in other:
        automaton.extend(token)
    follower = Follower(automaton)
    for _ in range(200):
        text.append(rng.randrange(4))
        follower.extend(text[-1])
        length, ends = longest(text, other)
        assert follower.match_length == length
        assert not length or follower.match_end in ends


def test_what_follows_a_match_goes_on_into_itself():
    lookup = Lookup()
    assert lookup.match().following(3) == []
    for token in [1, 2, 3, 1, 2]:
        lookup.extend(token)
    assert lookup.match().length == 2
    assert lookup.match().following(8) == [3, 1, 2, 3, 1, 2, 3, 1]
    assert lookup.match().following(0) == []


def test_earlier_texts_are_found_and_the_oldest_dropped_first():
    earlier = EarlierTexts(max_tokens=40)
    for start in (100, 200, 300, 400, 500):
        earlier.add(range(start, start + 9))
        assert sum(len(one.tokens) for one in earlier.automata) <= 40

    def matched(*tokens):
        lookup = Lookup(earlier)
        for token in tokens:
            lookup.extend(token)
        return lookup.match()

    assert matched(101, 102).length == matched(201).length == 0
    assert matched(7, 501, 502).following(20) == [503, 504, 505, 506, 507, 508]
    assert matched(303).following(20) == [304, 305, 306, 307, 308]  # not into the next text
    assert matched(308).following(20) == []
    earlier.add(range(1000))
    assert matched(990, 991).following(3) == [992, 993, 994]
    assert sum(len(one.tokens) for one in earlier.automata) <= 40


def test_a_text_finds_what_is_added_while_it_grows_and_prefers_itself():
    earlier = EarlierTexts()
    lookup = Lookup(earlier)
    for token in (1, 2, 3):
        lookup.extend(token)
    assert lookup.match().length == 0
    earlier.add([1, 2, 8, 9])
    for token in (7, 1, 2):
        lookup.extend(token)
    assert lookup.match().following(2) == [3, 7]
    lookup.extend(8)
    assert lookup.match().length == 3
    assert lookup.match().following(2) == [9]
