"""Regular expressions from files: the same matches as Python's `re`, in bounded time."""

from __future__ import annotations

import re
import time

from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.name_patterns import Matcher, PatternError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = list(ModelConfig.from_name("OpenELM-3B").matrix_shapes())
ATOMS = ["a", "b", "_", "1", ".", r"\.", r"\d", r"\w", r"\D", r"\s", r"\b", r"\B", "[ab]", "[^a]", r"[^\d.]", "[a-c_1]"]
ATOMS += ["^", "$", r"\Z", "(?=a)", "(?!b)", "(?<=a)", "(?<!a)", "(?s:.)", "[^ab]"]
REPEATS = ["*", "+", "?", "*?", "+?", "??", "{2}", "{0,2}", "{1,3}?", "{2,}"]
# target_modules as written by Unsloth, shortened.
LONG = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)|"
    r"(?:\btransformer\.layers\.[\d]{1,}\.(?:self_attn|attn|mlp|ffn)\.(?:(?:qkv_proj|out_proj|proj_1|proj_2)))"
)


def patterns() -> st.SearchStrategy[str]:
    return st.recursive(
        st.sampled_from(ATOMS),
        lambda inner: st.one_of(
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
            st.tuples(inner, st.sampled_from(REPEATS)).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
            st.tuples(st.sampled_from(["=", "!"]), inner).map(lambda pair: f"(?{pair[0]}{pair[1]})"),
        ),
        max_leaves=8,
    )


@settings(max_examples=200, deadline=None)
@given(patterns(), st.text("ab_1.", min_size=1, max_size=6))
def test_matches_agree_with_re(pattern: str, name: str) -> None:
    assert Matcher().fullmatch(pattern, name) == bool(re.fullmatch(pattern, name))
    assert Matcher().matches_end(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (r"a\b\.b", "a.b"),
        (r"a\bb", "ab"),
        (r"\bab\b", "ab"),
        (r"a\Bb", "ab"),
        (r"ab\B", "ab"),
        (r"ab(?<=$)", "ab"),
        (r"ab(?<=b)", "ab"),
        (r"(?<!^)ab", "ab"),
    ],
)
def test_boundaries_at_both_ends_of_a_name(pattern: str, name: str) -> None:
    assert Matcher().fullmatch(pattern, name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (LONG, 144),
        (r".*\.[0-9]+\.(attn|ffn)\.(qkv_proj|proj_1)", 72),
        (r"^(?!.*embed).*proj.*", 144),
        ("transformer.layers.1.attn.qkv_proj", 1),
        (r".*layers\.(?:[0-3]|1\d)\.ffn\..*", 28),
    ],
)
def test_patterns_of_real_files(pattern: str, count: int) -> None:
    matcher = Matcher()
    assert [matcher.fullmatch(pattern, name) for name in NAMES] == [bool(re.fullmatch(pattern, n)) for n in NAMES]
    assert sum(matcher.fullmatch(pattern, name) for name in NAMES) == count
    ends = re.compile(rf"(.*\.)?({pattern})$")
    assert [matcher.matches_end(pattern, name) for name in NAMES] == [bool(ends.match(name)) for name in NAMES]


@pytest.mark.parametrize(
    "pattern",
    [
        "(.*)*X",
        "(a|a)*b",
        "((((.*)*)*)*)*X",
        "(?:[a-z]?){40}[a-z]{40}",
        ".*" * 60 + "X",
        "(.|.)" * 60 + "X",
        "(?=(.*)*X)" * 9,
        "(?:.?){1,1000000000}X",
        "a{1,1000000000}",
    ],
)
def test_patterns_that_backtrack_end_in_time(pattern: str) -> None:
    started = time.process_time()
    matcher = Matcher()
    assert not any(matcher.matches_end(pattern, name) for name in NAMES[:50])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(" * 9 + ".?" + "){50}" * 9 + "X", "takes too long to match"),
        ("(?:" * 3 + "|" * 9900 + "){45}" * 3, "takes too long to match"),
        ("[", "is not a regular expression"),
        ("a{5000000000}", "is not a regular expression"),
        ("(" * 3000, "is nested too deeply"),
        ("x" * 10_001, "has more than 10000 characters"),
        (r"(t)\1", "has back reference, which is not supported"),
        ("(?>t)", "has atomic group, which"),
        ("t*+", "has possessive repeat, which"),
        ("(?i)T", "has the flag i, which"),
        ("(?i:T)", "has a flag, which"),
    ],
)
def test_unusable_expressions_are_refused_with_a_reason(pattern: str, why: str) -> None:
    matcher = Matcher()
    with pytest.raises(PatternError, match=re.escape(why)):
        for name in NAMES:
            matcher.matches_end(pattern, name)


def test_the_cost_is_counted_over_all_patterns() -> None:
    matcher = Matcher()
    with pytest.raises(PatternError, match="takes too long"):
        for number in range(10_000):
            matcher.fullmatch(f".*.*.*{number}", NAMES[0])
