"""Log-likelihoods against plain forward passes of whole sequences: no cache, no batch, NumPy's logarithms."""

from __future__ import annotations

import random

from mlx_openelm import load, native
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.evaluation import likelihoods
from mlx_openelm.evaluation.likelihoods import Likelihood, Request, log_likelihoods

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture(scope="module")
def packed():
    return load("tiny", exact_activations=True)


@pytest.fixture(scope="module")
def unpacked():
    return load("tiny", expand=True)


@pytest.fixture
def tiny(request, packed, unpacked):
    """Where a test runs in plain MLX, which is slow with packed weights, unpacked ones."""
    if "either_way" in request.fixturenames:
        request.getfixturevalue("either_way")
    return unpacked if native.kernels is None else packed


def plain(model, request: Request) -> tuple[float, bool]:
    """The sum and greediness from one forward pass of the whole sequence."""
    ids = [*request.context, *request.continuation]
    logits = np.array(model(mx.array([ids[:-1]]))[0, len(request.context) - 1 :], dtype=np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    targets = np.array(request.continuation)
    return logprobs[np.arange(len(targets)), targets].sum(), bool((logprobs.argmax(-1) == targets).all())


def drawn(count: int, seed: int = 0) -> list[Request]:
    """Questions with one to five continuations, of the lengths at which the arithmetic changes."""
    rng, requests = random.Random(seed), []
    while len(requests) < count:
        context = (1, *(rng.randrange(3, 2048) for _ in range(rng.choice([0, 3, 10, 11, 12, 40, 150]))))
        for _ in range(rng.choice([1, 2, 5])):
            length = rng.choice([1, 1, 2, 5, 11, 12, 13, 30])
            requests.append(Request(context, tuple(rng.randrange(3, 2048) for _ in range(length))))
    return requests


def test_likelihoods_equal_plain_forward_passes(tiny, either_way):
    model, requests = tiny[0], drawn(5)
    greedy = [1, *tiny[1].encode("To be, or not", add_bos=False)]
    for _ in range(3):
        greedy.append(int(mx.argmax(model(mx.array([greedy]))[0, -1]).item()))
    requests.append(Request(tuple(greedy[:-3]), tuple(greedy[-3:])))
    for request, found in zip(requests, log_likelihoods(model, requests, batch_size=4), strict=True):
        logprob, is_greedy = plain(model, request)
        assert found.logprob == pytest.approx(logprob, abs=2e-4)
        assert found.is_greedy == is_greedy
    assert found.is_greedy  # the last one, which is what greedy decoding gives


def test_batch_size_order_and_other_questions_change_no_bit_on_the_kernels(tiny):
    if native.kernels is None:
        pytest.skip(f"the kernels are not used: {native.status.detail}")
    model, requests = tiny[0], drawn(30)
    expected = log_likelihoods(model, requests, batch_size=1)
    order = list(range(len(requests)))
    for batch_size in (3, 16, 100):
        random.Random(batch_size).shuffle(order)
        found = log_likelihoods(model, [requests[index] for index in order], batch_size=batch_size)
        assert found == [expected[index] for index in order]
    own = [index for index, request in enumerate(requests) if request.context == requests[12].context]
    assert log_likelihoods(model, [requests[index] for index in own]) == [expected[index] for index in own]


def test_a_context_is_processed_once_for_all_its_continuations(tiny, monkeypatch, either_way):
    model, seen = tiny[0], []
    run = type(model).hidden_states
    monkeypatch.setattr(
        type(model), "hidden_states", lambda self, tokens, *rest: seen.append(tokens.size) or run(self, tokens, *rest)
    )
    context = tuple(range(10, 60))
    log_likelihoods(model, [Request(context, (token, token + 1)) for token in range(20, 28)])
    assert sum(seen) == 50 + 8
    seen.clear()  # and so are the tokens that they all begin with
    log_likelihoods(model, [Request(context, (5, 6, 7, token)) for token in range(20, 28)])
    assert sum(seen) == 50 + 3
    seen.clear()
    log_likelihoods(model, [Request(context, (5, 6, 7))])
    assert sum(seen) == 50 + 2


def test_equal_and_nested_continuations(tiny, either_way):
    """One may be the beginning of another, or the same."""
    context = tuple(range(10, 30))
    requests = [Request(context, tokens) for tokens in ((5,), (5, 6), (5, 6), (5, 6, 7, 8), (5, 6, 7, 9), (5, 6, 7, 8))]
    for some in (requests, requests[1:3], requests[:1], requests[3:5]):
        found = log_likelihoods(tiny[0], some)
        assert [one.logprob for one in found] == pytest.approx([plain(tiny[0], one)[0] for one in some], abs=2e-4)


def test_logits_exist_for_a_few_positions_at_a_time(tiny, monkeypatch):
    model, seen = tiny[0], []
    logits = type(model).logits
    monkeypatch.setattr(likelihoods, "LOGIT_ROWS", 32)
    monkeypatch.setattr(
        type(model), "logits", lambda self, rows: seen.append(rows.size // rows.shape[-1]) or logits(self, rows)
    )
    request = Request((1,), tuple(range(10, 210)))
    assert log_likelihoods(model, [request])[0].logprob == pytest.approx(plain(model, request)[0], abs=1e-3)
    assert max(seen[:-1]) <= 32


def test_answers_come_as_they_are_known_longest_first(tiny):
    requests = [Request((1, *range(3, 3 + length)), (9,)) for length in (2, 30, 10)]
    order: list[int] = []
    found = log_likelihoods(tiny[0], requests, batch_size=1, answered=order.extend)
    assert order == [1, 2, 0]
    assert all(isinstance(one, Likelihood) for one in found)


def test_bad_requests_and_bad_models_are_refused(tiny):
    with pytest.raises(RequestError, match="batch_size must be 1 or more"):
        log_likelihoods(tiny[0], [], batch_size=0)
    for request in (Request((), (1,)), Request((1,), ())):
        with pytest.raises(RequestError, match="at least one token"):
            log_likelihoods(tiny[0], [request])
    model = load("tiny", dtype="float32")[0]
    model.transformer.norm.weight = model.transformer.norm.weight * float("nan")
    with pytest.raises(OpenELMError, match="not finite"):
        log_likelihoods(model, [Request((1,), (5,))])


def test_few_copies_of_a_long_context_are_in_memory(tiny, monkeypatch):
    if native.kernels is None:
        pytest.skip(f"the kernels are not used: {native.status.detail}")
    model, context = tiny[0], tuple(range(3, 1027))
    requests = [Request(context, (token, token + 1, token + 2)) for token in range(20, 36)]
    log_likelihoods(model, requests[:1])
    cache = 1024 * sum(2 * heads * model.config.head_dim * 4 for heads in model.config.num_kv_heads)
    peaks = {}
    for most in (1, 8 * cache):
        monkeypatch.setattr(likelihoods, "_MOST_COPIED", most)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        found = log_likelihoods(model, requests)
        peaks[most] = (mx.get_peak_memory() - before) / cache, found
    one, several = peaks.values()
    assert one[0] < 4 < 6 < several[0] < 11
    assert one[1] == several[1]
