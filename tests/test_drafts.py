"""Drafts in the engine: each text must be what it is without them, whatever is drafted and whatever else is on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_openelm import Engine, load
from mlx_openelm.generation.draft_length import Plan
from mlx_openelm.generation.drafting import LEAST_CHANCE, Draft
from mlx_openelm.generation.row import Row
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from test_engine import CONSTRAINED, PLAY, alone, assert_equal, finish, result_of

FIXTURES = Path(__file__).parent / "fixtures"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_logprobs": 3},
    {"kv_bits": 8, "kv_group_size": 32},
    {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 30},
    {"max_kv_size": 16},
    {"max_kv_size": 40},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logit_bias": {260: 2.0}},
    {"temp": 0.9, "seed": 3},
    {"temp": 1.2, "seed": 4, "top_p": 0.9, "xtc_probability": 0.5, "repetition_penalty": 1.2},
    {"stop": ["e ", "th"]},
    {"prefill_step_size": 7},
]


@pytest.fixture(scope="module", params=["shakespeare-hf", "tiny"])
def loaded(request: pytest.FixtureRequest) -> tuple[OpenELM, Tokenizer]:
    return load("tiny" if request.param == "tiny" else FIXTURES / request.param)


class Oracle:
    """Drafts the text that will come, with mistakes."""

    def __init__(self, prompt: int, tokens: Sequence[int], mistakes: float, seed: int):
        self.tokens, self.mistakes, self.random = tokens, mistakes, random.Random(seed)
        self.heard: list[int] = []
        self.prompt = prompt
        self.accepted = self.proposed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.heard += tokens

    def plan(self, limit: int, least: float = LEAST_CHANCE) -> Plan:
        return Plan([1.0] * limit)

    def propose(self, count: int, place: int = 0) -> Draft:
        done = len(self.heard) - self.prompt
        assert self.heard[self.prompt :] == list(self.tokens[:done])
        following = list(self.tokens[done : done + self.random.randrange(count + 1)])
        return Draft([token if self.random.random() > self.mistakes else 300 for token in following])

    def observe(self, accepted: int, proposed: int) -> None:
        self.accepted, self.proposed = self.accepted + accepted, self.proposed + proposed


def submit(engine: Engine, expected: Sequence[int], prompt: str, mistakes: float = 0.3, **options: Any) -> Row:
    """A row whose drafts are what a lone run gave, with mistakes."""
    row = engine.submit(prompt, prompt_lookup=True, **options)
    row.drafter = Oracle(len(row.request.prompt), expected, mistakes, seed=len(expected))
    return row


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_text_with_drafts_is_the_text_without(loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any]) -> None:
    for length, count, drafts in ((5, 40, 3), (70, 40, 8)):
        expected = alone(*loaded, PLAY[:length], {"max_tokens": count, **options})
        for mistakes in (0.0, 0.25):
            engine = Engine(*loaded)
            row = submit(
                engine, expected[1], PLAY[:length], mistakes, max_tokens=count, num_draft_tokens=drafts, **options
            )
            finish(engine)
            if row.error is not None:
                raise row.error
            assert_equal(result_of(row), expected)
            assert row.drafts is not None and row.drafts.drafted > 0
            if mistakes == 0 and len(expected[1]) > 20:
                assert row.drafts.acceptance == 1
                assert row.drafts.tokens_per_step > 1.5


@pytest.mark.parametrize("constraint", CONSTRAINED, ids=str)
@pytest.mark.parametrize("options", [{}, {"temp": 0.9, "seed": 5}, {"max_kv_size": 16, "top_logprobs": 2}], ids=str)
def test_drafts_with_constraints(
    loaded: tuple[OpenELM, Tokenizer], constraint: dict[str, Any], options: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    options = {"max_tokens": 30, **constraint, **options}
    for length in (5, 30):
        expected = alone(*loaded, PLAY[:length], options)
        for mistakes in (0.0, 0.2):
            engine = Engine(*loaded)
            row = submit(engine, expected[1], PLAY[:length], mistakes, num_draft_tokens=3, **options)
            finish(engine)
            if row.error is not None:
                raise row.error
            assert_equal(result_of(row), expected)
