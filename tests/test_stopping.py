"""Stop strings: against a search through the whole text, for any division into pieces."""

import time

from mlx_openelm.errors import RequestError
from mlx_openelm.generation.stopping import StopStrings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

# Two or three letters only, so that stop strings overlap, nest and nearly match all the time.
LETTERS = st.text("ab", max_size=12) | st.text("abc", max_size=30) | st.text("aé🙂\n", max_size=12)
PIECES = st.lists(LETTERS, max_size=10)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5) | st.text("abcé🙂\n", min_size=1, max_size=4), max_size=4)


def stream(stops, pieces):
    """The printed text, and whether a stop string ended it."""
    stopping, printed = StopStrings(stops), ""
    for piece in pieces:
        text, stopped = stopping.add(piece)
        printed += text
        if stopped:
            assert stopping.finish() == ""
            return printed, True
    return printed + stopping.finish(), False


def cut(text, stops):
    """By definition: the stop string that ends first, and of those the one that begins first."""
    for end in range(1, len(text) + 1):
        found = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(found)], True
    return text, False


@settings(max_examples=150, deadline=None)
@given(PIECES, STOPS)
def test_pieces_join_to_the_text_before_the_first_stop_string(pieces, stops):
    assert stream(stops, pieces) == cut("".join(pieces), stops)


@settings(max_examples=100, deadline=None)
@given(PIECES, STOPS)
def test_the_earliest_occurrence_wins_unless_stop_strings_nest(pieces, stops):
    stops = [s for s in stops if not any(other in s[1:-1] for other in stops)]
    text = "".join(pieces)
    starts = [text.find(s) for s in stops if s in text]
    assert stream(stops, pieces) == ((text[: min(starts)], True) if starts else (text, False))


@settings(max_examples=150, deadline=None)
@given(LETTERS, STOPS)
@example("a", ["aba", "b"])  # "aba" can never be completed first
@example("aab", ["abc", "bac"])
def test_no_more_text_is_held_back_than_necessary(text, stops):
    """A character is held back exactly if some continuation completes a stop string that contains it."""
    if cut(text, stops)[1]:
        return
    stopping = StopStrings(stops)
    printed, stopped = stopping.add(text)
    endings = [stop[i:] for stop in stops for i in range(len(stop))]
    results = [cut(text + ending, stops) for ending in endings]
    shortest = min((len(kept) for kept, ended in results if ended), default=len(text))
    assert not stopped
    assert printed == text[: min(shortest, len(text))]
    assert printed + stopping.finish() == text


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["</s>"], ["Hello", " <", "/s", "> and more"], ("Hello ", True)),
        (["\n\n"], ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (["ab", "abc", "bc"], ["x", "a", "bc"], ("x", True)),
        (["abc", "bc"], ["xabc"], ("x", True)),
        (["abc", "bc"], ["xbbc"], ("xb", True)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["ababac"], ["ababab", "ac"], ("ab", True)),
        (["bcd", "c"], ["ab", "cd"], ("ab", True)),
        (["stop"], ["a sto", "ry"], ("a story", False)),
        (["stop"], ["a sto"], ("a sto", False)),
        (["🙂"], ["é", "🙂", "x"], ("é", True)),
        ([], ["any", "thing"], ("anything", False)),
        ("END", ["the E", "ND", "x"], ("the ", True)),
    ],
)
def test_examples(stops, pieces, expected):
    assert stream(stops, pieces) == expected


def test_text_is_printed_at_once_if_no_stop_string_has_begun():
    stopping = StopStrings(["###"])
    assert stopping.add("text") == ("text", False)
    assert stopping.add("a #") == ("a ", False)
    assert stopping.add("#") == ("", False)
    assert stopping.add("b") == ("##b", False)
    assert stopping.add("") == ("", False)
    assert stopping.add("###") == ("", True)
    assert stopping.add("after") == ("", True)
    assert stopping.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "", [None], [3]])
def test_empty_stop_strings_are_refused(stops):
    with pytest.raises(RequestError, match="stop must be text that is not empty"):
        StopStrings(stops)


def test_cost_is_linear_if_every_character_nearly_matches():
    begin = time.perf_counter()
    stopping, printed = StopStrings(["a" * 500 + "b"]), 0
    for _ in range(100_000):
        printed += len(stopping.add("a")[0])
    assert printed == 100_000 - 500
    assert time.perf_counter() - begin < 5  # 0.1 s here; comparing every suffix would take minutes
