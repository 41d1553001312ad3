"""Generation: the reference's text, stop strings, limits, seeds, penalties, caches, and the order of computation."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.cache import QuantizedKVCache, RotatingKVCache, make_cache
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.generation import decoding
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions, GenerationOptions
from mlx_openelm.generation.piece import Piece
from mlx_openelm.generation.sampling import greedy
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
PROMPTS, IDS, GREEDY, TEXTS = (REFERENCE[name] for name in ("prompts", "ids", "greedy", "decoded"))


@pytest.fixture(scope="module")
def loaded() -> tuple[OpenELM, Tokenizer]:
    return load(FIXTURES / "shakespeare-hf")


@pytest.fixture
def model(loaded: tuple[OpenELM, Tokenizer]) -> OpenELM:
    return loaded[0]


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A fresh tokenizer for each test, since some add EOS tokens."""
    return Tokenizer.from_folder(FIXTURES / "shakespeare-hf")


def pieces(model: OpenELM, tokenizer: Tokenizer, prompt: Any, **options: Any) -> list[Piece]:
    return list(stream_generate(model, tokenizer, prompt, **options))


def full_logprobs(model: OpenELM, ids: list[int]) -> np.ndarray:
    """Log-probabilities of the next token, from one pass over all tokens, in float64."""
    logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


# The reference.


@pytest.mark.parametrize("prompt", range(4))
def test_greedy_text_equals_the_reference(model: OpenELM, tokenizer: Tokenizer, prompt: int) -> None:
    found = pieces(model, tokenizer, PROMPTS[prompt], max_tokens=48)
    assert [piece.token for piece in found] == GREEDY[prompt]
    text = "".join(piece.text for piece in found)
    assert text == tokenizer.decode(GREEDY[prompt])
    # The reference drops the space between the prompt and the continuation; the words are the same.
    assert text.strip() == TEXTS[prompt].strip()
    assert generate(model, tokenizer, PROMPTS[prompt], max_tokens=48) == text


def test_a_prompt_may_be_ids_in_any_form(model: OpenELM, tokenizer: Tokenizer) -> None:
    for ids in (IDS[0], tuple(IDS[0]), mx.array(IDS[0]), np.array(IDS[0])):
        assert [p.token for p in pieces(model, tokenizer, ids, max_tokens=9)] == GREEDY[0][:9]


def test_the_fields_of_pieces(model: OpenELM, tokenizer: Tokenizer) -> None:
    found = pieces(model, tokenizer, PROMPTS[1], max_tokens=12)
    assert [piece.generation_tokens for piece in found] == list(range(1, 13))
    assert {piece.prompt_tokens for piece in found} == {len(IDS[1])}
    assert [piece.finish_reason for piece in found] == [None] * 11 + ["length"]
    assert len({piece.prompt_tps for piece in found}) == 1
    assert 0 < found[0].prompt_tps < 1e7
    assert found[0].generation_tps == 0
    assert all(0 < piece.generation_tps < 1e7 for piece in found[1:])
    assert 0.009 < found[-1].peak_memory < 4


def test_speeds_are_measured_by_the_clock(
    model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 seconds for the prompt and its token, then half a second per token."""
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def pass_a_second(done: int, total: int) -> None:  # at the start and at the end of the prompt
        clock[0] += 1

    stream = stream_generate(model, tokenizer, IDS[0], max_tokens=5, progress=pass_a_second)
    speeds = []
    for piece in stream:
        speeds.append((piece.prompt_tps, piece.generation_tps))
        clock[0] += 0.5
    assert speeds == [(len(IDS[0]) / 2, 0.0)] + [(len(IDS[0]) / 2, 2.0)] * 4


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_join_to_the_decoded_text(model: OpenELM, tokenizer: Tokenizer, seed: int) -> None:
    """A high temperature gives byte tokens, whose characters may stay incomplete."""
    found = pieces(model, tokenizer, PROMPTS[3], max_tokens=120, temp=2.5, seed=seed)
    tokens = [p.token for p in found]
    kept = tokens[:-1] if found[-1].finish_reason == "stop" else tokens
    assert "".join(p.text for p in found) == tokenizer.decode(kept)
    assert len({token for token in tokens if 3 <= token < 259}) > 0


# The end of a text.


def test_eos_ends_the_text_and_is_not_part_of_it(model: OpenELM, tokenizer: Tokenizer) -> None:
    """With `--extra-eos-token`: a token the model gives after six others."""
    tokenizer.add_eos_token(str(GREEDY[0][6]))
    found = pieces(model, tokenizer, PROMPTS[0], max_tokens=48)
    assert [p.token for p in found] == GREEDY[0][:7]
    assert found[-1].finish_reason == "stop"
    assert "".join(p.text for p in found) == tokenizer.decode(GREEDY[0][:6])


def test_eos_is_a_piece_without_text(model: OpenELM, tokenizer: Tokenizer) -> None:
    found = pieces(model, tokenizer, PROMPTS[0], max_tokens=48, logit_bias={2: 1e6})
    assert [(p.token, p.text, p.finish_reason) for p in found] == [(2, "", "stop")]
    assert generate(model, tokenizer, PROMPTS[0], logit_bias={2: 1e6}) == ""
    banned = pieces(model, tokenizer, PROMPTS[0], max_tokens=30, temp=3.0, seed=0, logit_bias={2: -math.inf})
    assert 2 not in [p.token for p in banned]


@pytest.mark.covering
@pytest.mark.parametrize("stop", ["Messenger My", "my lord", "r", "\n\n [", "you!", " accepted with you,\n"])
@pytest.mark.parametrize("form", [str, list, tuple])
def test_stop_strings_may_span_tokens(model: OpenELM, tokenizer: Tokenizer, stop: str, form: Callable) -> None:
    whole = tokenizer.decode(GREEDY[0])
    found = pieces(model, tokenizer, PROMPTS[0], max_tokens=48, stop=stop if form is str else form([stop, "never"]))
    text = "".join(p.text for p in found)
    if stop not in whole:
        assert stop == "my lord"
        assert (text, found[-1].finish_reason) == (whole, "length")
    else:
        assert text == whole[: whole.index(stop)]
        assert found[-1].finish_reason == "stop"
        # Generation ends with the token that completes the stop string.
        decoded = [tokenizer.decode(GREEDY[0][:n]) for n in range(49)]
        assert len(found) == next(n for n in range(49) if stop in decoded[n])


def test_text_held_back_for_a_stop_string_is_emitted_at_the_end(model: OpenELM, tokenizer: Tokenizer) -> None:
    whole = tokenizer.decode(GREEDY[1][:20])
    found = pieces(model, tokenizer, PROMPTS[1], max_tokens=20, stop=whole[-4:] + "never")
    assert "".join(p.text for p in found) == whole
    assert found[-1].finish_reason == "length"
    assert found[-1].text.endswith(whole[-4:])


def test_stop_may_be_none(model: OpenELM, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, PROMPTS[0], max_tokens=5, stop=None) == tokenizer.decode(GREEDY[0][:5])


# Limits.


def small_model(**changes: Any) -> OpenELM:
    values = {
        "num_transformer_layers": 2,
        "model_dim": 32,
        "head_dim": 16,
        "vocab_size": 2048,
        "num_query_heads": 2,
        "ffn_multipliers": 1,
        "ffn_dim_divisor": 32,
        "share_input_output_layers": True,
        "max_context_length": 12,
        "rope_max_length": 20,
    }
    mx.random.seed(0)
    model = OpenELM(ModelConfig.from_dict(values | changes))
    mx.eval(model.parameters())
    return model


NO_EOS = {"logit_bias": {2: -math.inf}}


@pytest.mark.parametrize("max_tokens", [-1, 1000, 16])
def test_generation_ends_at_the_last_position(tokenizer: Tokenizer, max_tokens: int) -> None:
    model = small_model()
    ids = IDS[0][:5]
    found = pieces(model, tokenizer, ids, max_tokens=max_tokens, **NO_EOS)
    # 5 + 15 positions; the 16th token is predicted at the last position and needs none itself.
    assert len(found) == 16
    assert [p.finish_reason for p in found] == [None] * 15 + ["length"]
    assert [p.token for p in found] == [t for t, _ in generate_step(model, ids, max_tokens=16, logits_processors=[ban])]


def ban(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits.at[:, 2].add(-math.inf)


def test_cached_tokens_count_towards_the_limit(tokenizer: Tokenizer) -> None:
    model = small_model()
    cache = make_cache(2)
    model(mx.array([IDS[0][:9]]), cache)
    for max_tokens, following in ((-1, 9), (9, 9), (10, 9), (4, 4)):
        steps = generate_step(model, [5, 6, 7], max_tokens=max_tokens, cache=copy.deepcopy(cache))
        assert len(list(steps)) == following
    found = pieces(model, tokenizer, [5, 6, 7], prompt_cache=cache, max_tokens=-1, **NO_EOS)
    assert (len(found), found[-1].finish_reason, cache[0].offset) == (9, "length", 20)
    with pytest.raises(RequestError, match="21 tokens.*end at 20"):
        stream_generate(model, tokenizer, [5], prompt_cache=cache)


def test_generation_continues_from_a_prompt_cache(model: OpenELM, tokenizer: Tokenizer) -> None:
    cache = make_cache(6)
    first = pieces(model, tokenizer, PROMPTS[2], max_tokens=20, prompt_cache=cache)
    # All tokens but the last were processed.
    assert cache[0].offset == len(IDS[2]) + 19
    second = pieces(model, tokenizer, [first[-1].token], max_tokens=28, prompt_cache=cache)
    assert [p.token for p in first + second] == GREEDY[2]


def test_a_prompt_beyond_the_training_length_warns(tokenizer: Tokenizer) -> None:
    model = small_model()
    with pytest.warns(UserWarning, match="13 tokens, more than the 12") as caught:
        generate(model, tokenizer, IDS[0] + IDS[1][:4], max_tokens=1)
    assert Path(caught[0].filename) == Path(__file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, tokenizer, IDS[0] + IDS[1][:3], max_tokens=1)


def test_a_prompt_beyond_the_last_position_is_an_error(tokenizer: Tokenizer) -> None:
    model = small_model()
    ids = (IDS[0] * 3)[:21]
    with pytest.raises(RequestError, match="too long: 21 tokens.*end at 20"):
        stream_generate(model, tokenizer, ids)
    with pytest.warns(UserWarning):
        found = pieces(model, tokenizer, ids[:20], max_tokens=-1)
    assert len(found) == 1
    assert found[0].finish_reason in ("length", "stop")


# Randomness.


def test_the_seed_decides_the_text(model: OpenELM, tokenizer: Tokenizer) -> None:
    def text(**options: Any) -> str:
        return generate(model, tokenizer, PROMPTS[1], max_tokens=12, temp=1.0, **options)

    texts = [text(seed=seed) for seed in range(5)]
    assert [text(seed=seed) for seed in range(5)] == texts
    assert len(set(texts)) == 5
    assert text(seed=2**64 - 1) == text(seed=2**64 - 1)
    assert len({text() for _ in range(3)}) == 3
    assert text(seed=0, prefill_step_size=3) == texts[0]


def test_generation_neither_uses_nor_disturbs_global_randomness(model: OpenELM, tokenizer: Tokenizer) -> None:
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(7)
    texts = [generate(model, tokenizer, PROMPTS[1], max_tokens=10, temp=1.0, seed=3)]
    assert mx.random.uniform(shape=(4,)).tolist() == expected
    mx.random.seed(8)
    texts.append(generate(model, tokenizer, PROMPTS[1], max_tokens=10, temp=1.0, seed=3))
    assert texts[0] == texts[1]


def test_samples_follow_the_models_probabilities(model: OpenELM, tokenizer: Tokenizer) -> None:
    expected = np.exp(full_logprobs(model, IDS[0]))
    counts = np.zeros(2048)
    n = 150
    for seed in range(n):
        counts[next(iter(stream_generate(model, tokenizer, IDS[0], max_tokens=1, temp=1.0, seed=seed))).token] += 1
    for token in np.argsort(expected)[-4:]:
        p = expected[token]
        assert abs(counts[token] / n - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_top_k_of_one_is_greedy(model: OpenELM, tokenizer: Tokenizer) -> None:
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temp": 1e-9}):
        found = pieces(model, tokenizer, PROMPTS[2], max_tokens=12, seed=0, **({"temp": 1.5} | options))
        assert [p.token for p in found] == GREEDY[2][:12], options


# Penalties, against a loop of full forward passes.


def brute_force(model: OpenELM, prompt: list[int], count: int, change: Callable) -> tuple[list[int], list[float]]:
    ids, logprobs = list(prompt), []
    for _ in range(count):
        logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
        logits = change(logits, ids)
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.max() - np.log(np.exp(logits - logits.max()).sum()) - logits.max()))
    return ids[len(prompt) :], logprobs


def repetition(penalty: float, size: int | None) -> Callable:
    def change(logits: np.ndarray, ids: list[int]) -> np.ndarray:
        logits = logits.copy()
        for token in set(ids if size is None else ids[-size:]):
            logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
        return logits

    return change


def subtract(penalty: float, size: int | None, once: bool) -> Callable:
    def change(logits: np.ndarray, ids: list[int]) -> np.ndarray:
        logits = logits.copy()
        context = ids if size is None else ids[-size:]
        for token in set(context) if once else context:
            logits[token] -= penalty
        return logits

    return change


def bias(values: dict[int, float]) -> Callable:
    def change(logits: np.ndarray, ids: list[int]) -> np.ndarray:
        logits = logits.copy()
        for token, value in values.items():
            logits[token] += value
        return logits

    return change


PENALTIES = {
    "repetition": ({"repetition_penalty": 1.2}, [repetition(1.2, None)]),
    "repetition, short": ({"repetition_penalty": 1.5, "repetition_context_size": 5}, [repetition(1.5, 5)]),
    "presence": ({"presence_penalty": 1.5}, [subtract(1.5, None, True)]),
    "presence, short": ({"presence_penalty": 4.0, "presence_context_size": 7}, [subtract(4.0, 7, True)]),
    "frequency": ({"frequency_penalty": 0.7}, [subtract(0.7, None, False)]),
    "frequency, short": ({"frequency_penalty": 3.0, "frequency_context_size": 6}, [subtract(3.0, 6, False)]),
    "bias": ({"logit_bias": {1996: -5.0, 13: 2.0}}, [bias({1996: -5.0, 13: 2.0})]),
    "all": (
        {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {13: 3.0}},
        [bias({13: 3.0}), repetition(1.1, None), subtract(0.5, None, True), subtract(0.3, None, False)],
    ),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_match_brute_force(model: OpenELM, tokenizer: Tokenizer, name: str) -> None:
    options, changes = PENALTIES[name]

    def change(logits: np.ndarray, ids: list[int]) -> np.ndarray:
        for one in changes:
            logits = one(logits, ids)
        return logits

    tokens, logprobs = brute_force(model, IDS[3], 20, change)
    found = pieces(model, tokenizer, PROMPTS[3], max_tokens=20, **options)
    assert [p.token for p in found] == tokens
    assert tokens != GREEDY[3][:20]
    assert max(abs(p.logprob - q) for p, q in zip(found, logprobs, strict=True)) < 1e-4


# Log-probabilities.


def test_logprobs_are_log_softmax_of_full_logits(model: OpenELM, tokenizer: Tokenizer) -> None:
    for options in ({}, {"temp": 1.3, "seed": 1}, {"temp": 0.7, "top_p": 0.8, "min_p": 0.05, "top_k": 9, "seed": 2}):
        ids = list(IDS[0])
        for piece in stream_generate(model, tokenizer, IDS[0], max_tokens=15, **options):
            # Log-probabilities are taken before temperature and filters.
            assert abs(piece.logprob - full_logprobs(model, ids)[piece.token]) < 1e-4
            ids.append(piece.token)
        assert len(ids) > len(IDS[0])


def test_top_logprobs_are_the_most_likely(model: OpenELM, tokenizer: Tokenizer) -> None:
    """After the penalties and before the filters; the most likely first."""
    options = {"temp": 1.2, "top_k": 2, "seed": 4, "logit_bias": {13: -math.inf, 326: 2.0}}
    for count in (1, 5, 5000):
        ids = list(IDS[0])
        for piece in stream_generate(model, tokenizer, IDS[0], max_tokens=6, top_logprobs=count, **options):
            logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
            logits[13], logits[326] = -np.inf, logits[326] + 2
            expected = logits - np.log(np.exp(logits).sum())
            order = np.argsort(-expected)[: min(count, 2047)]  # the banned token has none
            assert len(piece.top_logprobs) == len(order)
            assert [value for _, value in piece.top_logprobs] == sorted(dict(piece.top_logprobs).values(), reverse=True)
            found = dict(piece.top_logprobs)
            assert found.keys() == set(order.tolist())
            np.testing.assert_allclose([found[token] for token in order], expected[order], atol=1e-4)
            assert found.get(piece.token, piece.logprob) == piece.logprob
            ids.append(piece.token)
    assert all(p.top_logprobs == [] for p in stream_generate(model, tokenizer, IDS[0], max_tokens=3))


def test_top_logprobs_change_nothing_else_and_cost_nothing_when_off(
    model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[int] = []
    async_eval = mx.async_eval
    monkeypatch.setattr(decoding.mx, "async_eval", lambda *x: (submitted.append(len(x)), async_eval(*x))[1])
    plain = pieces(model, tokenizer, PROMPTS[1], max_tokens=8)
    assert submitted == [2] * 8  # the token and its log-probability
    submitted.clear()
    found = pieces(model, tokenizer, PROMPTS[1], max_tokens=8, top_logprobs=3)
    assert submitted == [4] * 8  # with the step
    assert [(p.token, p.logprob, p.text) for p in found] == [(p.token, p.logprob, p.text) for p in plain]
    assert all(p.top_logprobs[0] == (p.token, p.logprob) for p in found)


# Caches.


@pytest.mark.parametrize("size", [1, 2, 4, 8, 9, 100])
def test_prefill_steps_change_nothing(model: OpenELM, tokenizer: Tokenizer, size: int) -> None:
    progress: list[tuple[int, int]] = []
    found = pieces(
        model, tokenizer, PROMPTS[0], max_tokens=20, prefill_step_size=size, progress=lambda *p: progress.append(p)
    )
    assert [p.token for p in found] == GREEDY[0][:20]
    assert progress[0] == (0, 9)
    assert progress[-1] == (9, 9)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    assert len(progress) == math.ceil(9 / size) + 1


def test_quantized_caches(model: OpenELM, tokenizer: Tokenizer) -> None:
    found = pieces(model, tokenizer, PROMPTS[2], max_tokens=20, kv_bits=8)
    assert [p.token for p in found] == GREEDY[2][:20]
    # The first token is computed from the prompt before it is quantized; the second one from the quantized cache.
    expected = full_logprobs(model, IDS[2] + GREEDY[2][:1])
    assert 1e-5 < abs(found[1].logprob - expected[found[1].token]) < 0.05
    coarse = pieces(model, tokenizer, PROMPTS[2], max_tokens=2, kv_bits=2)
    assert coarse[0].token == GREEDY[2][0]
    assert abs(coarse[1].logprob - expected[coarse[1].token]) > 0.05
    # The same as a cache that was quantized from the start.
    cache = [QuantizedKVCache(32, 4) for _ in model.layers]
    by_hand = [t for t, _ in generate_step(model, IDS[2], max_tokens=3, cache=cache)]
    assert [p.token for p in pieces(model, tokenizer, PROMPTS[2], max_tokens=3, kv_bits=4)] == by_hand


@pytest.mark.parametrize("start", [0, 5, 13, 14, 25, 1000])
def test_caches_are_quantized_from_a_position_on(model: OpenELM, start: int) -> None:
    cache = make_cache(6)
    options = CacheOptions(kv_bits=8, quantized_kv_start=start)
    steps = generate_step(model, IDS[2], max_tokens=20, cache=cache, options=options, prefill_step_size=4)
    kinds = []
    for _ in range(20):
        next(steps)
        kinds.append((cache[0].offset, {type(c).__name__ for c in cache}))
    for offset, kind in kinds:
        assert kind == {"QuantizedKVCache" if offset >= start else "KVCache"}
    if start < 1000:
        assert (cache[0].bits, cache[0].group_size) == (8, 32)


def test_a_sliding_cache(model: OpenELM, tokenizer: Tokenizer) -> None:
    """Nothing changes while the text fits; after that it changes and the caches stay small."""
    found = [p.token for p in pieces(model, tokenizer, PROMPTS[1], max_tokens=48, max_kv_size=24)]
    same = next(i for i, (a, b) in enumerate(zip(found, GREEDY[1], strict=True)) if a != b)
    assert 16 <= same < 48
    cache = [RotatingKVCache(24, keep=4) for _ in model.layers]
    assert [t for t, _ in generate_step(model, IDS[1], max_tokens=48, cache=cache)] == found
    assert cache[0].keys.shape[2] == 24
    whole = pieces(model, tokenizer, PROMPTS[1] * 5, max_tokens=12, max_kv_size=16)
    for size in (1, 5):
        again = pieces(model, tokenizer, PROMPTS[1] * 5, max_tokens=12, max_kv_size=16, prefill_step_size=size)
        assert [p.token for p in again] == [p.token for p in whole]


# The order of computation.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The positions of every call of `hidden_states` and the rows of every call of `logits`."""
    calls: dict[str, list[int]] = {"hidden_states": [], "logits": []}
    hidden_states, logits = OpenELM.hidden_states, OpenELM.logits

    def count_hidden(self: OpenELM, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        calls["hidden_states"].append(tokens.size)
        return hidden_states(self, tokens, *args, **kwargs)

    def count_logits(self: OpenELM, states: mx.array) -> mx.array:
        calls["logits"].append(states.size // states.shape[-1])
        return logits(self, states)

    monkeypatch.setattr(OpenELM, "hidden_states", count_hidden)
    monkeypatch.setattr(OpenELM, "logits", count_logits)
    return calls


def test_the_next_step_is_submitted_before_the_last_token_is_delivered(
    model: OpenELM, tokenizer: Tokenizer, counted: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[int] = []
    async_eval = mx.async_eval
    monkeypatch.setattr(decoding.mx, "async_eval", lambda *x: (submitted.append(1), async_eval(*x))[1])
    stream = stream_generate(model, tokenizer, PROMPTS[0], max_tokens=6)
    assert counted == {"hidden_states": [], "logits": []}  # nothing before the first piece is requested
    for n in range(1, 7):
        assert next(stream).token == GREEDY[0][n - 1]
        ahead = min(n + 1, 6)  # and nothing after the last token
        assert len(counted["logits"]) == len(submitted) == ahead
    assert list(stream) == []
    assert counted["hidden_states"] == [9, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("size", [1, 4, 256])
def test_no_logits_are_computed_for_the_prompt(model: OpenELM, tokenizer: Tokenizer, counted: dict, size: int) -> None:
    generate(model, tokenizer, PROMPTS[2], max_tokens=5, prefill_step_size=size)
    assert counted["logits"] == [1] * 5
    assert sum(counted["hidden_states"]) == len(IDS[2]) + 4
    assert max(counted["hidden_states"]) <= size


def test_nothing_is_computed_for_a_bad_request(model: OpenELM, tokenizer: Tokenizer, counted: dict) -> None:
    with pytest.raises(RequestError):
        stream_generate(model, tokenizer, PROMPTS[0], temp=-1)
    assert counted == {"hidden_states": [], "logits": []}


def test_a_stream_may_be_closed_early(model: OpenELM, tokenizer: Tokenizer) -> None:
    stream = stream_generate(model, tokenizer, PROMPTS[0], max_tokens=48)
    tokens = [next(stream).token for _ in range(3)]
    stream.close()
    assert tokens == GREEDY[0][:3]
    assert list(stream) == []
    untouched = stream_generate(model, tokenizer, PROMPTS[0])
    untouched.close()
    del untouched
    assert generate(model, tokenizer, PROMPTS[0], max_tokens=5) == tokenizer.decode(GREEDY[0][:5])


def test_an_interrupted_stream_leaves_a_usable_cache(model: OpenELM, tokenizer: Tokenizer) -> None:
    cache = make_cache(6)
    stream = stream_generate(model, tokenizer, PROMPTS[0], max_tokens=48, prompt_cache=cache)
    tokens = [next(stream).token for _ in range(4)]
    stream.close()
    # The cache also has the token of the step computed ahead.
    assert cache[0].offset == len(IDS[0]) + 4
    rest = pieces(model, tokenizer, GREEDY[0][4:5], max_tokens=5, prompt_cache=cache)
    assert tokens + [GREEDY[0][4]] + [p.token for p in rest] == GREEDY[0][:10]


def test_two_streams_at_once(model: OpenELM, tokenizer: Tokenizer) -> None:
    streams = [stream_generate(model, tokenizer, prompt, max_tokens=12) for prompt in PROMPTS[:3]]
    rounds = list(zip(*streams, strict=True))
    assert [[p.token for p in row] for row in zip(*rounds, strict=True)] == [tokens[:12] for tokens in GREEDY[:3]]


def test_memory_stays_bounded_over_a_long_text(tokenizer: Tokenizer) -> None:
    model = small_model(rope_max_length=4096, max_context_length=4096)
    steps = generate_step(model, IDS[0], max_tokens=530, sampler=greedy)
    for _ in range(270):
        next(steps)
    gc.collect()
    early = mx.get_active_memory()
    for _ in range(250):
        next(steps)
    gc.collect()
    # Two layers' keys and values grow by a step of 256 positions, 2 heads of 16.
    assert mx.get_active_memory() - early <= 2 * 2 * 256 * 2 * 16 * 4 + 80_000


def test_unused_buffers_are_freed_every_256_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(rope_max_length=1024, max_context_length=1024)
    freed: list[int] = []
    clear_cache = mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: (freed.append(1), clear_cache())[1])
    counts = []
    for _ in generate_step(model, IDS[0], max_tokens=515):
        counts.append(len(freed))
    assert counts == [0] * 256 + [1] * 256 + [2] * 3


# Bad requests.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_logprobs": -1}, "top_logprobs must be a whole number, 0 or above, got -1"),
        ({"top_logprobs": 2.5}, "top_logprobs must be a whole number, 0 or above, got 2.5"),
        ({"max_token": 5}, "max_token"),
        ({"temperature": 1.0, "beams": 2}, "no option temperature; did you mean temp"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temp": -0.1}, "temp"),
        ({"temp": math.nan}, "temp"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"xtc_probability": -1}, "xtc_probability"),
        ({"xtc_threshold": 0.6}, "xtc_threshold"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1.2, "repetition_context_size": 0}, "repetition_context_size"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty"),
        ({"logit_bias": {2048: 1.0}}, "logit_bias"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"prefill_step_size": 0}, "prefill_step_size"),
        ({"prefill_step_size": -5}, "prefill_step_size"),
        ({"prefill_step_size": 2.5}, "prefill_step_size"),
        ({"kv_bits": 7}, "kv_bits"),
        ({"kv_bits": 0}, "kv_bits"),
        ({"kv_group_size": 32}, "kv_group_size needs kv_bits"),
        ({"kv_bits": 4, "kv_group_size": 64}, "kv_group_size"),
        ({"kv_bits": 4, "kv_group_size": 16}, "kv_group_size"),
        ({"kv_bits": 4, "kv_group_size": 0}, "kv_group_size"),
        ({"kv_bits": 4, "max_kv_size": 64}, "max_kv_size"),
        ({"quantized_kv_start": -1}, "quantized_kv_start"),
        ({"max_kv_size": 7}, "max_kv_size"),
        ({"max_kv_size": 0}, "max_kv_size"),
        ({"max_kv_size": -1}, "max_kv_size"),
        ({"max_kv_size": 16.5}, "max_kv_size"),
    ],
    ids=str,
)
def test_bad_options_are_refused(model: OpenELM, tokenizer: Tokenizer, options: dict, words: str) -> None:
    """At the call, not when the first piece is requested."""
    with pytest.raises(RequestError, match=words):
        stream_generate(model, tokenizer, PROMPTS[0], **options)
    with pytest.raises(RequestError, match=words):
        generate(model, tokenizer, PROMPTS[0], **options)


@pytest.mark.parametrize("prompt", ["", [], (), mx.array([], mx.int32)], ids=repr)
def test_empty_prompts_are_refused(model: OpenELM, tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(RequestError, match="empty"):
        stream_generate(model, tokenizer, prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        *[
            [2048],
            [1, -1],
            [1, 1 << 40],
            mx.array([5000]),
            [1.5],
            [1, None],
            ["a"],
            [[1, 2]],
            mx.array([[1, 2]]),
            [True],
            [False],
        ],
        *[5, None, {"a": 1}, mx.array(5), mx.array([1.0, 2.0])],
    ],
    ids=repr,
)
def test_bad_ids_are_refused(model: OpenELM, tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        stream_generate(model, tokenizer, prompt)


def test_a_single_space_and_odd_characters_are_prompts(model: OpenELM, tokenizer: Tokenizer) -> None:
    for prompt in (" ", "\n", "\x00", "😀", "</s>"):
        assert len(pieces(model, tokenizer, prompt, max_tokens=2)) >= 1


def test_options_have_the_names_of_the_flags() -> None:
    names = {field.name for field in dataclasses.fields(GenerationOptions)}
    expected = "temp top_p top_k min_p xtc_probability xtc_threshold repetition_penalty repetition_context_size"
    expected += " presence_penalty frequency_penalty logit_bias seed stop max_tokens prefill_step_size max_kv_size"
    expected += " kv_bits kv_group_size quantized_kv_start min_tokens_to_keep"
    assert set(expected.split()) <= names


def test_leaving_the_trained_context_warns_once(tokenizer: Tokenizer) -> None:
    model, _ = load(FIXTURES / "shakespeare-hf")
    model.config = dataclasses.replace(model.config, max_context_length=20)
    options = {"max_tokens": 15, "logit_bias": {token: -math.inf for token in tokenizer.eos_token_ids}}
    prompt = [1, *range(100, 105)]  # 6 tokens, so the 16th that follows is beyond
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(pieces(model, tokenizer, prompt, **options)) == 15
    with pytest.warns(UserWarning, match="now longer than the 20 tokens the model was trained on") as caught:
        assert pieces(model, tokenizer, prompt, **options | {"max_tokens": 30})[-1].finish_reason == "length"
    assert len(caught) == 1
    cache = make_cache(len(model.layers))
    pieces(model, tokenizer, prompt, **options | {"max_tokens": 9}, prompt_cache=cache)  # which holds 14 tokens now
    with pytest.warns(UserWarning, match="now longer than the 20 tokens") as caught:
        pieces(model, tokenizer, [200, 201], **options | {"max_tokens": 6}, prompt_cache=cache)
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="The prompt has 21 tokens") as caught:  # and nothing more
        pieces(model, tokenizer, [1, *range(100, 120)], **options)
    assert len(caught) == 1


def test_echo_begins_with_the_prompt(model: OpenELM, tokenizer: Tokenizer) -> None:
    for prompt in ("To be, or not", "ROMEO.\n\n", "é"):
        ids = tokenizer.encode(prompt)
        plain = pieces(model, tokenizer, prompt, max_tokens=12)
        echoed = pieces(model, tokenizer, prompt, max_tokens=12, echo=True)
        tokens = [piece.token for piece in plain]
        assert [piece.token for piece in echoed] == tokens
        assert "".join(piece.text for piece in echoed) == tokenizer.decode([*ids, *tokens])
        assert echoed[0].text.startswith(prompt)


def test_stop_strings_are_not_searched_in_the_echoed_prompt(model: OpenELM, tokenizer: Tokenizer) -> None:
    text = generate(model, tokenizer, PROMPTS[0], max_tokens=12)
    word = text.split()[1]
    prompt = f"{word} {PROMPTS[0]}"
    echoed = generate(model, tokenizer, prompt, max_tokens=12, echo=True, stop=word)
    assert echoed.startswith(prompt) and word not in echoed.removeprefix(prompt)
