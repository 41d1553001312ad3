"""Drafters: what they propose, what they learn, and the draft model's caches through acceptance and refusal."""

from __future__ import annotations

import random

import mlx_openelm  # noqa: F401  (loads BLAS before MLX)

import numpy as np
import pytest

# isort: split
from mlx_openelm import load
from mlx_openelm.errors import RequestError
from mlx_openelm.generation import draft_model
from mlx_openelm.generation.draft_model import DraftModel, ModelDrafter, check_draft_model, propose_together
from mlx_openelm.generation.drafting import LookupDrafter
from mlx_openelm.generation.lookup import EarlierTexts
from mlx_openelm.generation.sampling import SamplingParams, make_key, make_logits_processors, make_sampler

import mlx.core as mx
from small_models import small


@pytest.fixture(scope="module")
def model():
    return small(mx.float32)


def greedy_after(model, text, count):
    """Greedy decoding without caches."""
    tokens = list(text)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
    return tokens[len(text) :]


def test_lookup_proposes_what_followed_and_learns_from_the_text_alone():
    drafter = LookupDrafter()
    passage = list(range(50))
    drafter.extend(passage)
    assert drafter.plan(5).chances == []
    drafter.extend(passage[:20])
    plan = drafter.plan(8)
    assert (plan.start_seconds, plan.token_seconds, len(plan.chances)) == (0, 0, 8)
    assert plan.chances[0] > 0.8  # the last tokens were all foreseen
    assert drafter.propose(4).tokens == passage[20:24]
    assert drafter.propose(4).logprobs is None


def test_lookup_counts_on_tokens_that_come_before_the_draft():
    drafter = LookupDrafter()
    drafter.extend([*range(20), *range(5)])
    known = drafter.plan(8).chances
    assert drafter.plan(7, unread=1).chances == known[1:]
    drafter.extend([30])  # nothing is expected after it
    assert drafter.plan(7, unread=1).chances == []


def test_lookup_learns_that_matches_mislead():
    drafter, rng = LookupDrafter(), random.Random(0)
    drafter.extend([rng.randrange(40) for _ in range(3000)])
    while not (chances := drafter.plan(1).chances):
        drafter.extend([rng.randrange(40)])
    assert chances[0] < 0.15


def test_lookup_finds_earlier_texts():
    earlier = EarlierTexts()
    earlier.add([4, 5, 6, 7])
    drafter = LookupDrafter(earlier)
    drafter.extend([1, 4, 5])
    assert drafter.propose(9).tokens == [6, 7]
    assert len(drafter.plan(9).chances) == 2
    assert len(drafter.plan(9, unread=1).chances) == 1
    drafter.extend([6, 7])  # and there the earlier text ends
    assert drafter.plan(9).chances == []


def test_a_draft_model_proposes_its_greedy_tokens_whatever_was_accepted_before(model):
    rng = random.Random(1)
    text = [rng.randrange(200) for _ in range(9)]
    drafter = ModelDrafter(DraftModel(model))
    drafter.extend(text)
    for _ in range(12):
        count = rng.randrange(0, 6)
        draft = drafter.propose(count)
        assert draft.tokens == greedy_after(model, text, count)
        assert draft.logprobs is None
        new = draft.tokens[: rng.randrange(count + 1)]
        new += [rng.randrange(200) for _ in range(rng.randrange(1, 3))]
        drafter.extend(new)
        text += new
    assert drafter.propose(2).tokens == drafter.propose(2).tokens == greedy_after(model, text, 2)
    assert drafter.cache[0].offset == len(text) + 1


def test_drafts_for_several_texts_are_those_of_each_alone(model):
    texts = [[1, 2, 3], [7], [9, 8, 7, 6, 5], [4, 4]]
    shared = DraftModel(model)
    together = [ModelDrafter(shared) for _ in texts]
    for drafter, text in zip(together, texts, strict=True):
        drafter.extend(text)
    drafts = propose_together(together, [3, 1, 0, 5], [0, 0, 0, 0])
    assert [draft.tokens for draft in drafts] == [
        greedy_after(model, text, count) for text, count in zip(texts, [3, 1, 0, 5], strict=True)
    ]


def test_drawn_tokens_come_with_their_distribution_after_penalties_filters_and_constraint(model):
    params = SamplingParams(temp=0.8, top_k=20, repetition_penalty=1.5, presence_penalty=1.0)
    text, allowed = [3, 5, 5, 9], mx.array([token % 2 == 1 for token in range(200)])

    def limit(drafted, logprobs):
        if len(drafted) == 4:
            return None
        logprobs = mx.where(allowed, logprobs, -mx.inf)
        return logprobs - mx.logsumexp(logprobs)

    def drafter():
        sampler = make_sampler(params, key=make_key(3))
        made = ModelDrafter(DraftModel(model), sampler, make_logits_processors(params), limit)
        made.extend(text)
        return made

    draft = drafter().propose(6, place=11)
    assert len(draft.tokens) == 4  # the constraint's end
    assert draft.tokens == drafter().propose(6, place=11).tokens
    assert draft.tokens != drafter().propose(6, place=12).tokens
    for n, token in enumerate(draft.tokens):
        context = text + draft.tokens[:n]
        logits = np.array(model(mx.array([context]))[0, -1], np.float64)
        for seen in set(context):
            logits[seen] = (logits[seen] * 1.5 if logits[seen] < 0 else logits[seen] / 1.5) - 1.0
        logits[::2] = -np.inf
        logits[logits < np.sort(logits)[-20]] = -np.inf
        expected = np.exp(logits / 0.8) / np.exp(logits / 0.8).sum()
        np.testing.assert_allclose(np.exp(np.array(draft.logprobs[n])), expected, atol=1e-5)
        assert expected[token] > 0


def test_after_a_long_pause_the_draft_model_reads_only_the_end(model, monkeypatch):
    monkeypatch.setattr(draft_model, "RESTART_AFTER", 30)
    monkeypatch.setattr(draft_model, "RESTART_WITH", 10)
    drafter, text = ModelDrafter(DraftModel(model)), list(range(40))
    drafter.extend(text)  # a long prompt is read as a whole
    assert drafter.propose(2).tokens == greedy_after(model, text, 2)
    more = list(range(100, 131))
    for token in more:
        drafter.extend([token])
    assert drafter.propose(3).tokens == greedy_after(model, [0, *more[-9:]], 3)
    drafter.extend([5])
    assert drafter.propose(3).tokens == greedy_after(model, [0, *more[-9:], 5], 3)


def test_drafts_end_where_positions_do(model):
    drafter = ModelDrafter(DraftModel(model))
    drafter.extend([1] * 250)
    assert len(drafter.plan(16).chances) == 6  # of 256 positions
    drafter.extend([1] * 6)
    assert drafter.plan(16).chances == []


def test_plans_tell_what_drafting_costs_and_how_good_it_was(model):
    drafter = ModelDrafter(DraftModel(model))
    drafter.extend([1, 2, 3, 4])
    before = drafter.plan(3)
    assert before.token_seconds > 0
    for _ in range(30):
        drafter.observe(accepted=1, proposed=3)
    chances = drafter.plan(3).chances
    assert chances[0] > 0.9
    assert chances[1] < 0.1
    drafter.propose(3)
    assert drafter.plan(3).token_seconds > 1e-6
    drafter.extend([1] * 50)
    assert drafter.plan(3).start_seconds > 0


def test_a_draft_model_with_other_tokens_is_refused(model):
    target, tokenizer = load("tiny")
    check_draft_model(target, target, tokenizer, tokenizer)
    with pytest.raises(RequestError, match="has 200 tokens, and the model has 2,048"):
        check_draft_model(target, model, tokenizer, tokenizer)

    class Other:
        vocab_size = tokenizer.vocab_size

        def id_to_token(self, token):
            return "x" if token == 77 else tokenizer.id_to_token(token)

    with pytest.raises(RequestError, match="differs at token 77"):
        check_draft_model(target, target, tokenizer, Other())
