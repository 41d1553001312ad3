"""Sampling: filters, penalties and draws against brute-force NumPy and mlx-lm; determinism; refusals."""

import dataclasses
import importlib.util
import math
import re
from pathlib import Path

import mlx_openelm  # noqa: F401  (loads BLAS before MLX)

import numpy as np
import pytest

# isort: split
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.sampling import (
    KeyStream,
    SamplingParams,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    apply_xtc,
    greedy,
    make_key,
    make_logits_processors,
    make_sampler,
)

import mlx.core as mx

INF = math.inf


def random_logprobs(seed, batch=5, vocab=60, spread=2.5):
    logits = np.random.default_rng(seed).normal(size=(batch, vocab)) * spread
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def support(filtered, logprobs):
    """Which tokens remain; their values must be unchanged."""
    filtered = np.array(filtered)
    kept = filtered > -INF
    assert not np.isnan(filtered).any()
    np.testing.assert_array_equal(filtered[kept], logprobs[kept])
    return kept


# Each filter as defined in its paper, row by row in float64.
def top_p_support(row, top_p):
    probs, kept, mass = np.exp(row.astype(np.float64)), np.zeros(row.size, bool), 0.0
    for token in np.argsort(-row):
        if mass >= top_p * probs.sum():
            break
        kept[token] = True
        mass += probs[token]
    return kept


def min_p_support(row, min_p, at_least=1):
    kept = np.exp(row) >= min_p * np.exp(row).max()
    kept[np.argsort(-row)[:at_least]] = True
    return kept


def top_k_support(row, k):
    return np.isin(np.arange(row.size), np.argsort(-row)[:k])


def xtc_support(row, threshold, special=()):
    probs = np.exp(row.astype(np.float64))
    probs /= probs.sum()
    above = [t for t in range(row.size) if probs[t] > threshold]
    least = min(above, key=lambda t: probs[t], default=None)
    return np.array([t not in above or t == least or t in special for t in range(row.size)])


def each_row(rule, logprobs, *args):
    return np.array([rule(row, *args) for row in logprobs])


@pytest.mark.covering
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.3, 2.5, 8.0])
def test_filters_keep_the_same_tokens_as_brute_force(seed, spread):
    logprobs = random_logprobs(seed, spread=spread)
    x = mx.array(logprobs)
    for top_p in (1e-60, 1e-9, 0.05, 0.5, 0.9, 0.999):
        np.testing.assert_array_equal(
            support(apply_top_p(x, top_p), logprobs), each_row(top_p_support, logprobs, top_p)
        )
        shifted = np.array(apply_top_p(x - 3, top_p)) > -INF  # a fraction of the row's total probability
        np.testing.assert_array_equal(shifted, each_row(top_p_support, logprobs, top_p))
    for min_p in (1e-9, 0.01, 0.2, 0.9, 1.0):
        for at_least in (1, 3, 59, 60, 1000):
            np.testing.assert_array_equal(
                support(apply_min_p(x, min_p, at_least), logprobs),
                each_row(min_p_support, logprobs, min_p, at_least),
            )
    for k in (1, 2, 17, 59, 60, 61, 10**12):
        np.testing.assert_array_equal(support(apply_top_k(x, k), logprobs), each_row(top_k_support, logprobs, k))
    for threshold in (0.0, 0.02, 0.1, 0.5):
        for special in ((), (3, 7)):
            np.testing.assert_array_equal(
                support(apply_xtc(x, 1.0, threshold, special, make_key(seed)), logprobs),
                each_row(xtc_support, logprobs, threshold, special),
            )


def test_ties_are_kept_as_documented():
    """As in the docstrings."""
    x = mx.array([[0.3, 0.2, 0.2, 0.2, 0.1]])
    x = mx.log(x)

    def kept(y):
        return (np.array(y) > -INF).sum()

    assert kept(apply_top_p(x, 0.4)) == 4  # 0.3, and all tokens as likely as the second
    assert kept(apply_min_p(mx.log(mx.array([[0.5, 0.25, 0.25]])), 0.5)) == 3
    assert kept(apply_top_k(x, 2)) == 2
    assert kept(apply_xtc(x, 1.0, 0.15, (), make_key(0))) == 4  # the least likely three above 0.15 stay
    assert greedy(mx.array([[1.0, 2.0, 2.0]])).item() == 1


def test_filters_run_in_the_stated_order():
    """Draws follow the distribution of top-p, then min-p, then XTC, then top-k, then temperature."""
    logprobs = random_logprobs(11, batch=1, vocab=40, spread=1.3)
    params = SamplingParams(
        temp=1.7, top_p=0.9, min_p=0.1, min_tokens_to_keep=4, xtc_probability=1.0, xtc_threshold=0.1, top_k=6
    )
    row = logprobs[0]
    for keep in (
        lambda r: top_p_support(r, 0.9),
        lambda r: min_p_support(r, 0.1, 4),
        lambda r: xtc_support(r, 0.1),
        lambda r: top_k_support(r, 6),
    ):
        before = (row > -INF).sum()
        row = np.where(keep(row) & (row > -INF), row, -INF)
        assert (row > -INF).sum() < before  # every filter matters here
    expected = np.exp(row.astype(np.float64) / 1.7)
    check_frequencies(params, logprobs, expected / expected.sum())


@pytest.mark.parametrize(
    "changes",
    [
        {"temp": 1.0},
        {"temp": 0.4},
        {"temp": 3.0, "top_p": 0.8},
        {"temp": 0.7, "top_k": 5},
        {"temp": 1.3, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(changes):
    logprobs = random_logprobs(3, batch=1, vocab=30, spread=1.5)
    params = SamplingParams(**changes)
    row = logprobs[0]
    kept = np.ones(row.size, bool)
    if params.top_p < 1:
        kept = top_p_support(row, params.top_p)
    if params.top_k:
        kept = top_k_support(row, params.top_k)
    if params.min_p:
        kept = min_p_support(row, params.min_p)
    expected = np.where(kept, np.exp(row.astype(np.float64) / params.temp), 0)
    check_frequencies(params, logprobs, expected / expected.sum())


def check_frequencies(params, logprobs, expected, draws=40_000):
    sampler = make_sampler(params, key=make_key(17))
    rows = mx.broadcast_to(mx.array(logprobs), (draws // 4, logprobs.shape[-1]))
    tokens = np.concatenate([np.array(sampler(rows)) for _ in range(4)])
    counts = np.bincount(tokens, minlength=expected.size)
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    chi_square = ((counts[seen] - draws * expected[seen]) ** 2 / (draws * expected[seen])).sum()
    freedom = seen.sum() - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_xtc_coin_is_tossed_for_every_row():
    logprobs = mx.broadcast_to(mx.log(mx.array([0.6, 0.3, 0.1])), (20_000, 3))
    untouched = np.array(apply_xtc(logprobs, 0.3, 0.2, (), make_key(5)))[:, 0] > -INF
    assert abs(untouched.mean() - 0.7) < 0.015
    never = SamplingParams(temp=1e-6, xtc_probability=0.0, xtc_threshold=0.2)
    always = SamplingParams(temp=1e-6, xtc_probability=1.0, xtc_threshold=0.2)
    assert (np.array(make_sampler(never, key=make_key(1))(logprobs)) == 0).all()
    assert (np.array(make_sampler(always, key=make_key(1))(logprobs)) == 1).all()
    assert (np.array(make_sampler(always, special_ids={0}, key=make_key(1))(logprobs)) == 0).all()


def test_temperature_zero_gives_the_most_likely_token_whatever_else_is_set():
    logprobs = random_logprobs(4, batch=50)
    params = SamplingParams(temp=0.0, top_k=3, xtc_probability=1.0, xtc_threshold=0.0)
    tokens = make_sampler(params)(mx.array(logprobs))
    assert make_sampler(params) is greedy
    assert tokens.shape == (50,)
    np.testing.assert_array_equal(np.array(tokens), logprobs.argmax(-1))


@pytest.mark.parametrize("temp", [5e-324, 1e-45, 1e-30, 1e-6, 1.0, 1000.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 1e-300}, {"top_k": 2}, {"min_p": 1.0}, {"xtc_probability": 1.0}])
def test_extreme_values_never_sample_a_banned_token(temp, filters):
    vocab = 12
    bias = {t: -INF for t in range(4)} | {4: -1e30, 5: -100.0}
    params = SamplingParams(temp=temp, repetition_penalty=1000, frequency_penalty=1000, logit_bias=bias, **filters)
    params.validate(vocab)
    logits = mx.array(np.random.default_rng(0).normal(size=(200, vocab)).astype(np.float32))
    for process in make_logits_processors(params):
        logits = process(mx.array([0, 1, 4, 7, 7]), logits)
    assert not np.isnan(np.array(logits)).any()
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = np.array(make_sampler(params, key=make_key(0))(logprobs))
    assert tokens.min() >= 4
    if temp <= 1e-6 and "xtc_probability" not in filters:
        best = np.array(logprobs)
        picked = best[np.arange(200), tokens]
        np.testing.assert_allclose(picked, best.max(-1), atol=1e-4)


def test_a_single_remaining_token_is_sampled():
    logprobs = mx.array([[-INF, 0.0, -INF], [-INF, -INF, 0.0]])
    everything = SamplingParams(
        temp=0.5, top_p=0.5, top_k=2, min_p=0.5, min_tokens_to_keep=2, xtc_probability=1.0, xtc_threshold=0.0
    )
    for params in (everything, SamplingParams(temp=1.0), SamplingParams()):
        assert make_sampler(params, key=make_key(0))(logprobs).tolist() == [1, 2]


def penalized(params, tokens, logits):
    """The bias and the penalties as loops."""
    logits = logits.astype(np.float64).copy()

    def last(size):
        return tokens if size is None else tokens[-size:]

    for token, bias in (params.logit_bias or {}).items():
        logits[:, token] += bias
    for token in set(last(params.repetition_context_size)):
        for row in logits:
            penalty = params.repetition_penalty or 1.0
            row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
    for token in set(last(params.presence_context_size)):
        logits[:, token] -= params.presence_penalty
    for token in last(params.frequency_context_size):
        logits[:, token] -= params.frequency_penalty
    return logits


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.2),
        SamplingParams(repetition_penalty=0.7, repetition_context_size=3),
        SamplingParams(presence_penalty=0.5, presence_context_size=1),
        SamplingParams(presence_penalty=-1.5),
        SamplingParams(frequency_penalty=0.3),
        SamplingParams(frequency_penalty=0.3, frequency_context_size=10**30),
        SamplingParams(logit_bias={0: 5.0, 19: -100.0, 7: -INF}),
        SamplingParams(
            repetition_penalty=1.3,
            repetition_context_size=20,
            presence_penalty=0.4,
            presence_context_size=2,
            frequency_penalty=0.9,
            frequency_context_size=5,
            logit_bias={3: 2.0, 5: -8.0},
        ),
    ],
)
def test_penalties_against_a_loop(params):
    params.validate(20)
    generator = np.random.default_rng(1)
    for length in (0, 1, 2, 4, 50):
        for batch in (1, 3):
            tokens = generator.integers(0, 20, size=length).tolist()
            values = generator.normal(size=(batch, 20)).astype(np.float32) * 4
            logits = mx.array(values)
            result = logits
            for process in make_logits_processors(params):
                result = process(mx.array(tokens, dtype=mx.uint32), result)
            np.testing.assert_allclose(np.array(result), penalized(params, tokens, values), rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(np.array(logits), values)  # the caller's logits stay as they are


def test_a_small_penalty_counts_against_half_precision_logits():
    (process,) = make_logits_processors(SamplingParams(frequency_penalty=0.01))
    result = process(mx.array([1] * 7), mx.array([[30.0, 30.0]], dtype=mx.bfloat16))
    assert result.dtype == mx.float32
    np.testing.assert_allclose(np.array(result), [[30.0, 29.93]], rtol=1e-6)


def test_processors_that_change_nothing_are_left_out():
    assert make_logits_processors(SamplingParams()) == []
    assert make_logits_processors(SamplingParams(repetition_penalty=1.0, logit_bias={})) == []


ALL_ON = SamplingParams(
    temp=0.8,
    top_p=0.95,
    top_k=30,
    min_p=0.01,
    xtc_probability=0.5,
    repetition_penalty=1.2,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={1: 1.0},
)


def texts(params, seed, steps=60):
    """Tokens of a loop that feeds every token back into the penalties."""
    sampler, processors = (
        make_sampler(params, special_ids=(2,), key=make_key(seed)),
        make_logits_processors(params),
    )
    logits = mx.array(random_logprobs(9, batch=1, vocab=100))
    tokens = mx.array([5, 6, 7], dtype=mx.uint32)
    for _ in range(steps):
        adjusted = logits
        for process in processors:
            adjusted = process(tokens, adjusted)
        tokens = mx.concatenate([tokens, sampler(adjusted - mx.logsumexp(adjusted, axis=-1, keepdims=True))])
    return tokens.tolist()


def test_same_seed_same_tokens_whatever_happens_to_the_global_state():
    mx.random.seed(0)
    first = texts(ALL_ON, seed=3)
    mx.random.seed(1)
    mx.random.normal((7,))
    state = [np.array(s) for s in mx.random.state]
    assert texts(ALL_ON, seed=3) == first
    for before, after in zip(state, mx.random.state, strict=True):  # nor is the global state changed
        np.testing.assert_array_equal(before, np.array(after))
    assert texts(ALL_ON, seed=4) != first
    plain = SamplingParams(temp=1.0)
    assert texts(plain, seed=0) != texts(plain, seed=2**64 - 1)
    without_key = [make_sampler(plain)(mx.zeros((1, 10**6))).item() for _ in range(2)]
    assert without_key[0] != without_key[1]


def test_keys_differ_and_their_chain_stays_short():
    keys = KeyStream(make_key(1))
    seen = {tuple(keys().tolist()) for _ in range(3000)}
    assert len(seen) == 3000


# Tokens that the version before `TextSampler` drew from `random_logprobs(1, batch=24, vocab=50)` with seed 7.
PINNED: list = [
    ({}, [22, 46, 24, 33, 1, 23, 30, 20, 3, 34, 27, 21, 31, 16, 11, 17, 24, 10, 25, 7, 20, 28, 36, 4]),
    ({"top_p": 0.9}, [22, 44, 24, 33, 1, 23, 30, 20, 3, 34, 24, 21, 28, 16, 11, 20, 24, 10, 25, 9, 20, 28, 36, 4]),
    (
        {"top_k": 10, "min_p": 0.02},
        [22, 44, 24, 33, 1, 23, 29, 20, 3, 34, 24, 21, 28, 16, 11, 20, 21, 10, 25, 9, 20, 28, 36, 4],
    ),
    (
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
        [49, 17, 3, 33, 44, 23, 11, 14, 26, 10, 24, 4, 31, 43, 28, 2, 24, 10, 48, 7, 36, 15, 6, 30],
    ),
]


@pytest.mark.parametrize(("changes", "expected"), PINNED)
def test_a_seed_gives_the_same_tokens_as_ever_in_order_at_once_and_again(changes, expected):
    rows = mx.array(random_logprobs(1, batch=24, vocab=50))
    params = SamplingParams(temp=0.9, **changes)
    sampler = make_sampler(params, special_ids=(2,), key=make_key(7))
    assert [sampler(rows[n : n + 1]).item() for n in range(24)] == expected
    assert sampler.tokens(rows, 0).tolist() == expected
    assert sampler.tokens(rows[11:13], 11).tolist() == expected[11:13]  # one that is rejected is drawn again
    assert make_sampler(params, (2,), make_key(7)).tokens(rows[20:], 20).tolist() == expected[20:]
    draws = [mx.random.categorical(sampler.distributions(rows[n : n + 1], n), key=sampler.key_at(n)) for n in (3, 9)]
    assert [draw.item() for draw in draws] == [expected[3], expected[9]]


@pytest.mark.parametrize("changes", [{}, {"top_p": 0.8}, {"xtc_probability": 0.5, "xtc_threshold": 0.02}])
def test_distributions_are_those_of_the_draws(changes):
    rows = mx.array(random_logprobs(5, batch=3, vocab=20, spread=1.0))
    sampler = make_sampler(SamplingParams(temp=1.4, **changes), key=make_key(2))
    scores, distributions = np.array(sampler.scores(rows, 4)), np.array(sampler.distributions(rows, 4), np.float64)
    np.testing.assert_allclose(np.exp(distributions).sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(scores == -INF, distributions == -INF)
    for mine, row in zip(scores, distributions, strict=True):
        kept = mine > -INF
        assert np.ptp(mine[kept] - row[kept]) < 1e-5
    if changes:
        assert (scores == -INF).any()


def test_keys_can_be_asked_for_again_in_any_order():
    keys = KeyStream(make_key(5))
    expected = [keys().tolist() for _ in range(3 * KeyStream.KEPT)]
    for n in (700, 3, 0, 511, 255, 256, 767, 1):
        assert keys.key_at(n).tolist() == expected[n]
    keys.next = 2
    assert [keys().tolist() for _ in range(2)] == expected[2:4]


@pytest.mark.compiled
def test_sampling_never_waits_for_the_device():
    """MLX refuses to evaluate inside a traced function, so tracing one proves that nothing reads a value."""
    sampler, processors = (
        make_sampler(ALL_ON, special_ids=(2,), key=make_key(0)),
        make_logits_processors(ALL_ON),
    )

    def step(tokens, logits):
        for process in processors:
            logits = process(tokens, logits)
        return sampler(logits)

    # Never evaluated, so nothing is compiled.
    traced = mx.compile(step)(mx.array([1, 2, 2]), mx.zeros((1, 50)))
    assert traced.shape == (1,)
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: mx.array(x.item()))(mx.array(1.0))


@pytest.fixture
def theirs():
    """mlx-lm's samplers, loaded from a single file: importing the whole of mlx-lm takes seconds."""
    package = importlib.util.find_spec("mlx_lm")
    if package is None:
        pytest.skip("mlx-lm is not installed")
    file = Path(package.submodule_search_locations[0]) / "sample_utils.py"
    spec = importlib.util.spec_from_file_location("mlx_lm_sample_utils", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(4))
def test_filters_agree_with_mlx_lm(theirs, seed):
    logprobs = random_logprobs(seed, batch=3, vocab=200, spread=1.5)
    x = mx.array(logprobs)
    pairs = [
        *((apply_top_p(x, p), theirs.apply_top_p(x, p)) for p in (0.1, 0.7, 0.97)),
        *((apply_min_p(x, p, n), theirs.apply_min_p(x, p, n)) for p in (0.05, 0.5) for n in (1, 20)),
        *((apply_top_k(x, k), theirs.apply_top_k(x, k)) for k in (1, 10, 199)),
        *(
            (apply_xtc(x, 1.0, t, special, make_key(0)), theirs.apply_xtc(x, 1.0, t, special))
            for t in (0.01, 0.2)
            for special in ([], [int(logprobs[0].argmax())])
        ),
    ]
    for ours, reference in pairs:
        np.testing.assert_array_equal(np.array(ours), np.array(reference))


def test_samplers_agree_with_mlx_lm_if_one_token_remains(theirs):
    x = mx.array(random_logprobs(2, batch=100))
    for flags in (
        {"temp": 0.0},
        {"temp": 1.0, "top_k": 1},
        {"temp": 2.0, "top_p": 1e-6},
        {"temp": 1.0, "min_p": 1.0},
    ):
        ours = make_sampler(SamplingParams(**flags), key=make_key(0))(x)
        np.testing.assert_array_equal(np.array(ours), np.array(theirs.make_sampler(**flags)(x)))


def test_top_p_zero_is_off_as_in_mlx_lm():
    x = mx.zeros((2000, 8)) - math.log(8)
    assert len(set(make_sampler(SamplingParams(temp=1.0, top_p=0.0), key=make_key(0))(x).tolist())) == 8


def test_processors_agree_with_mlx_lm(theirs):
    flags = {
        "logit_bias": {2: 3.0, 9: -5.0},
        "repetition_penalty": 1.25,
        "repetition_context_size": 6,
        "presence_penalty": 0.6,
        "presence_context_size": 4,
        "frequency_penalty": 0.35,
        "frequency_context_size": 8,
    }
    generator = np.random.default_rng(8)
    for length in (1, 5, 40):
        tokens = mx.array(generator.integers(0, 12, size=length))
        values = generator.normal(size=(1, 12)).astype(np.float32) * 3
        ours, reference = mx.array(values), mx.array(values)
        for process in make_logits_processors(SamplingParams(**flags)):
            ours = process(tokens, ours)
        for process in theirs.make_logits_processors(**flags):
            reference = process(tokens, reference)
        np.testing.assert_allclose(np.array(ours), np.array(reference), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5"),
        ({"top_p": -0.1}, "top_p must be between 0 and 1, got -0.1"),
        ({"top_p": True}, "top_p must be a number between 0 and 1, got True"),
        ({"top_p": None}, "top_p must be a number between 0 and 1, got None"),
        ({"temp": -1}, "temp must be between 0 and 1000, got -1"),
        ({"temp": math.nan}, "temp must be between 0 and 1000, got nan"),
        ({"temp": np.float32(INF)}, "temp must be between 0 and 1000, got inf"),
        ({"temp": "1"}, "temp must be a number between 0 and 1000, got '1'"),
        ({"temp": 10**400}, "temp must be between 0 and 1000, got 1000"),
        ({"top_k": -1}, "top_k must be a whole number, 0 or above, got -1"),
        ({"top_k": 2.5}, "top_k must be a whole number, 0 or above, got 2.5"),
        ({"top_k": False}, "top_k must be a whole number, 0 or above, got False"),
        ({"min_p": 1.01}, "min_p must be between 0 and 1, got 1.01"),
        ({"min_tokens_to_keep": 0}, "min_tokens_to_keep must be a whole number, 1 or above, got 0"),
        ({"xtc_probability": 2}, "xtc_probability must be between 0 and 1, got 2"),
        ({"xtc_threshold": 0.6}, "xtc_threshold must be between 0 and 0.5, got 0.6"),
        (
            {"repetition_penalty": 0},
            "repetition_penalty must be between 0.001 and 1000 (1 changes nothing), got 0",
        ),
        ({"repetition_penalty": -2}, "repetition_penalty must be between"),
        ({"repetition_penalty": INF}, "repetition_penalty must be between"),
        (
            {"presence_penalty": math.nan},
            "presence_penalty must be between -1000 and 1000 (0 changes nothing), got nan",
        ),
        ({"frequency_penalty": -INF}, "frequency_penalty must be between"),
        (
            {"repetition_context_size": 0},
            "repetition_context_size must be a whole number, 1 or above, got 0",
        ),
        ({"presence_context_size": -5}, "presence_context_size must be a whole number, 1 or above, got -5"),
        (
            {"frequency_context_size": 1.0},
            "frequency_context_size must be a whole number, 1 or above, got 1.0",
        ),
        ({"logit_bias": {100: 1.0}}, "logit_bias: the keys must be token ids from 0 to 99, got 100"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: the keys must be token ids from 0 to 99, got -1"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias: the keys must be token ids from 0 to 99, got '3'"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 must be a number, or -inf, got nan"),
        ({"logit_bias": {3: INF}}, "logit_bias of token 3 must be a number, or -inf, got inf"),
        ({"logit_bias": {3: True}}, "logit_bias of token 3 must be a number, or -inf, got True"),
        ({"logit_bias": [3]}, "logit_bias must map token ids to numbers, got [3]"),
        ({"logit_bias": {t: -INF for t in range(100)}}, "logit_bias bans every token of the vocabulary"),
    ],
)
def test_bad_values_are_refused(changes, message):
    with pytest.raises(RequestError, match=re.escape(message)) as error:
        dataclasses.replace(ALL_ON, **changes).validate(vocab_size=100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_p": 0, "top_k": 100, "min_p": 1, "repetition_penalty": None},
        {"top_k": 10**30, "temp": 1000, "min_tokens_to_keep": 10**30},
        {"presence_penalty": -2.0, "frequency_penalty": 2, "logit_bias": {0: -INF, 99: -1e9}},
        {"temp": np.float32(0.5), "top_k": np.int64(3), "logit_bias": None},
    ],
)
def test_good_values_are_accepted_and_work(changes):
    params = dataclasses.replace(ALL_ON, **changes)
    params.validate(vocab_size=100)
    assert len(texts(params, seed=0, steps=3)) == 6


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None, True])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(RequestError, match="seed must be a whole number from 0 to"):
        make_key(seed)
