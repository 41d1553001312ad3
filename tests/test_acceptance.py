"""Drafted tokens that stay: the text's distribution and the share of accepted tokens, against NumPy in float64."""

from __future__ import annotations

import math
from itertools import takewhile

import mlx_openelm  # noqa: F401  (loads BLAS before MLX)

import numpy as np
import pytest

# isort: split
from mlx_openelm.generation.acceptance import accept_drawn, draft_key
from mlx_openelm.generation.sampling import SamplingParams, make_key, make_logits_processors, make_sampler

import mlx.core as mx

VOCAB = 12
FILTERS = {
    "temperature": {"temp": 0.7},
    "high temperature": {"temp": 1.8},
    "top-p": {"temp": 1.0, "top_p": 0.7},
    "top-k": {"temp": 1.0, "top_k": 3},
    "min-p": {"temp": 1.3, "min_p": 0.3},
    "xtc": {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.1},
    "all": {"temp": 0.9, "top_p": 0.95, "min_p": 0.02, "xtc_probability": 0.3, "xtc_threshold": 0.2, "top_k": 6},
}
PENALTIES = {
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 1.0},
    "frequency": {"frequency_penalty": 0.8},
    "bias": {"logit_bias": {0: 1.5, 3: -math.inf}},
}
# Next-token logits after each token, of a target and of a draft model that is like it.
RNG = np.random.default_rng(4)
TARGET = (RNG.normal(size=(VOCAB, VOCAB)) * 1.2).astype(np.float32)
DRAFT = (TARGET + RNG.normal(size=(VOCAB, VOCAB)) * 0.8).astype(np.float32)
MASK = RNG.random((VOCAB, VOCAB)) < 0.6  # which token a constraint allows after which
MASK[:, 5] = True


def cases(options, quick):
    """As parameters, all but those named `quick` with --run-slow."""
    return [
        pytest.param(changes, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, changes in options.items()
    ]


def logprobs(table, context, params, mask=False):
    """What a model would give after each token of `context`, [1, vocab], after penalties and a constraint's mask."""
    logits = mx.array(table[context[-1]])[None]
    for process in make_logits_processors(params):
        logits = process(mx.array(context), logits)
    logits = mx.where(mx.array(MASK[context[-1]]), logits, -mx.inf) if mask else logits
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def exact(table, context, params, heads, mask=False):
    """The distribution [vocab] after `context`, by loops in float64, with XTC's coin given."""
    logits = table[context[-1]].astype(np.float64)
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    for token in set(context):
        penalty = params.repetition_penalty or 1
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
        logits[token] -= params.presence_penalty + params.frequency_penalty * context.count(token)
    if mask:
        logits[~MASK[context[-1]]] = -np.inf
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order, kept, mass = np.argsort(-p), p > 0, 0.0
    if 0 < params.top_p < 1:
        for token in order:
            kept[token] &= mass < params.top_p
            mass += p[token]
    if params.min_p:
        kept &= p >= params.min_p * p.max()
    if heads:
        rest = np.where(kept, p, 0) / p[kept].sum()
        above = [t for t in range(VOCAB) if rest[t] > params.xtc_threshold]
        for token in sorted(above, key=lambda t: rest[t])[1:]:
            kept[token] = False
    if params.top_k:
        ranked = [t for t in order if kept[t]]
        kept[ranked[params.top_k :]] = False
    q = np.where(kept, p, 0) ** (1 / params.temp)
    return q / q.sum()


def chi_square_bound(freedom):
    """The 0.9999 quantile of chi-square, by Wilson and Hilferty's approximation."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


def assert_follows(counts, expected):
    counts, total = np.asarray(counts, float), np.sum(counts)
    assert counts[expected == 0].sum() == 0
    often = total * expected >= 5  # the rest is one class
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(total * expected[often], total * expected[~often].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert ((observed - wanted) ** 2 / wanted).sum() < chi_square_bound(max(1, len(wanted) - 1))


def draft(params, sampler, context, start, length, mask=False):
    """Tokens drawn from the draft model, and the log-probabilities they were drawn with."""
    drafted, rows = [], []
    for place in range(start, start + length):
        row = sampler.distributions(logprobs(DRAFT, [*context, *drafted], params, mask), place)
        drafted.append(mx.random.categorical(row, key=draft_key(sampler, place)).item())
        rows.append(row)
    return drafted, mx.concatenate(rows)


def speculate(params, sampler, context, start, length):
    """One round of drafting and checking: the text's new tokens."""
    drafted, drafts = draft(params, sampler, context, start, length)
    target = mx.concatenate([logprobs(TARGET, [*context, *drafted[:n]], params) for n in range(length + 1)])
    accepted, token = accept_drawn(target, drafts, mx.array(drafted), sampler, start)
    return [*drafted[: accepted.item()], token.item()]


@pytest.mark.parametrize("changes", cases(FILTERS, ("temperature", "all")))
def test_one_drafted_token_follows_the_target_and_is_accepted_as_often_as_possible(changes):
    check_one_token(SamplingParams(**changes))


def test_one_drafted_token_with_a_constraint():
    check_one_token(SamplingParams(**FILTERS["all"]), mask=True)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True], ids=["", "constraint"])
@pytest.mark.parametrize("changes", [*FILTERS.values()], ids=[*FILTERS])
def test_many_drafted_tokens_with_every_filter(changes, mask):
    check_one_token(SamplingParams(**changes), mask, rounds=10_000)


@pytest.mark.parametrize("changes", cases(PENALTIES, ("frequency",)))
def test_one_drafted_token_with_penalties(changes):
    check_one_token(SamplingParams(temp=0.9, top_p=0.9, **changes))


def check_one_token(params, mask=False, rounds=300):
    context = [1, 5, 5, 4]
    chance = params.xtc_probability
    pairs = [
        (weight, exact(TARGET, context, params, heads, mask), exact(DRAFT, context, params, heads, mask))
        for weight, heads in ((1 - chance, False), (chance, True))
        if weight
    ]
    expected = sum(weight * p for weight, p, _ in pairs)
    best = sum(weight * np.minimum(p, q).sum() for weight, p, q in pairs)
    target = mx.broadcast_to(logprobs(TARGET, context, params, mask), (2, VOCAB))  # the second row is not looked at
    mine = logprobs(DRAFT, context, params, mask)
    results = []
    for seed in range(rounds):  # not evaluated before the end, which is faster
        sampler = make_sampler(params, special_ids=(2,), key=make_key(seed))
        row = sampler.distributions(mine, 0)
        drafted = mx.random.categorical(row, key=draft_key(sampler, 0))
        accepted, token = accept_drawn(target, row, drafted, sampler, start=0)
        results.append(mx.stack([accepted, mx.where(accepted == 1, drafted[0], token)]))
    accepted, tokens = np.array(mx.stack(results)).T
    assert_follows(np.bincount(tokens, minlength=VOCAB), expected)
    assert abs(accepted.mean() - best) < 4 * math.sqrt(best * (1 - best) / rounds) + 1e-9


@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_several_drafted_tokens_follow_the_joint_distribution(length):
    """Two tokens of a text in rounds of `length` drafted ones; places refused at first are drafted again."""
    params, context = SamplingParams(temp=1.1, top_k=6, frequency_penalty=1.0), [1, 5, 4]
    expected = np.zeros((VOCAB, VOCAB))
    first = exact(TARGET, context, params, False)
    for token in np.flatnonzero(first):
        expected[token] = first[token] * exact(TARGET, [*context, int(token)], params, False)
    counts = np.zeros((VOCAB, VOCAB))
    for seed in range(160):
        sampler, text = make_sampler(params, key=make_key(seed)), []
        while len(text) < 2:
            text += speculate(params, sampler, [*context, *text], len(text), length)
        counts[text[0], text[1]] += 1
    assert_follows(counts.ravel(), expected.ravel())


def test_a_seed_and_a_number_of_drafted_tokens_give_the_same_text():
    params = SamplingParams(temp=1.0, xtc_probability=0.5)

    def text(seed, length):
        sampler, tokens = make_sampler(params, key=make_key(seed)), [3]
        while len(tokens) < 20:
            tokens += speculate(params, sampler, tokens, len(tokens) - 1, length)
        return tokens[:20]

    assert text(1, 4) == text(1, 4)
    assert text(1, 4) != text(2, 4)


def test_a_draft_like_the_target_is_accepted_whole_and_the_next_token_is_that_of_plain_decoding():
    params = SamplingParams(temp=0.8, top_p=0.9)
    row = mx.array(TARGET[:4] - np.log(np.exp(TARGET[:4]).sum(-1, keepdims=True)))
    for seed in range(10):
        sampler = make_sampler(params, key=make_key(seed))
        drafts = sampler.distributions(row[:3], 7)
        drafted = mx.concatenate(
            [mx.random.categorical(drafts[n : n + 1], key=draft_key(sampler, 7 + n)) for n in range(3)]
        )
        accepted, token = accept_drawn(row, drafts, drafted, sampler, 7)
        assert accepted.item() == 3
        assert token.item() == sampler.tokens(row, 7)[3].item()


@pytest.mark.compiled
def test_nothing_waits_for_the_device():
    sampler = make_sampler(SamplingParams(temp=1.0, top_p=0.5), key=make_key(0))

    def check(target, drafts, drafted):
        return accept_drawn(target, drafts, drafted, sampler, 0)

    accepted, token = mx.compile(check)(mx.zeros((4, 9)), mx.zeros((3, 9)), mx.zeros(3, mx.int32))
    assert accepted.shape == token.shape == ()


@pytest.mark.parametrize("changes", [*FILTERS.values()], ids=[*FILTERS])
def test_certain_drafts_leave_the_text_as_it_is(changes):
    """Drawn several at a time after whatever drafts, tokens are those of one call each."""
    params = SamplingParams(**changes)
    table = mx.array(TARGET - np.log(np.exp(TARGET).sum(-1, keepdims=True)))
    for seed in range(2):
        plain, token = [], 3
        sampler = make_sampler(params, special_ids=(2,), key=make_key(seed))
        for _ in range(30):
            token = sampler(table[token][None]).item()
            plain.append(token)
        rng = np.random.default_rng(seed)
        sampler, text = make_sampler(params, special_ids=(2,), key=make_key(seed)), [3]
        while len(text) <= 30:
            length = int(rng.integers(0, 6))
            drafted = [int(t) for t in rng.integers(0, VOCAB, length)]
            right = int(rng.integers(0, length + 1))
            drafted[:right] = plain[len(text) - 1 :][:right]
            tokens = sampler.tokens(table[mx.array([text[-1], *drafted])], len(text) - 1).tolist()
            pairs = zip(drafted, tokens, strict=False)
            accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            assert accepted >= min(right, 30 - len(text) + 1)
            text += tokens[: accepted + 1]
        assert text[1:31] == plain
