"""`Decoder.prefill` and `Decoder.step` used on their own, against brute force and against `generate`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_openelm import backend, generate, load, stream_generate
from mlx_openelm.cache import BatchKVCache, KVCache, RotatingKVCache
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.decoding import Decoder, decode
from mlx_openelm.generation.options import CacheOptions, GenerationOptions, SamplingParams
from mlx_openelm.generation.sampling import greedy, make_key, make_logits_processors, make_sampler
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
IDS, GREEDY = REFERENCE["ids"], REFERENCE["greedy"]


@pytest.fixture(scope="module")
def loaded() -> tuple[OpenELM, Tokenizer]:
    return load(FIXTURES / "shakespeare-hf", dtype="float32")


@pytest.fixture
def model(loaded: tuple[OpenELM, Tokenizer]) -> OpenELM:
    return loaded[0]


@pytest.fixture
def tokenizer(loaded: tuple[OpenELM, Tokenizer]) -> Tokenizer:
    return loaded[1]


def brute_force(model: OpenELM, ids: list[int]) -> np.ndarray:
    """The next token's log-probabilities [vocab] from one pass over all tokens, in float64."""
    logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


# Loops written by hand.


@pytest.mark.parametrize("step_size", [None, 1, 4, 9])
def test_a_hand_written_loop_gives_tokens_and_whole_rows(model: OpenELM, step_size: int | None) -> None:
    decoder = Decoder(model)
    logprobs = decoder.prefill(mx.array([IDS[0]]), step_size)
    ids = list(IDS[0])
    for _ in range(20):
        assert logprobs.shape == (1, 2048)
        np.testing.assert_allclose(np.array(logprobs[0]), brute_force(model, ids), atol=1e-4)
        token = greedy(logprobs)
        ids.append(token.item())
        logprobs = decoder.step(token)
    assert ids[len(IDS[0]) :] == GREEDY[0][:20]
    assert decoder.cache[0].offset == len(IDS[0]) + 20


SETTINGS = [
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"logit_bias": {13: 2.0}},
    {"kv_bits": 8},
    {"max_kv_size": 16},
    {"presence_penalty": 1.0, "temp": 0.9, "top_p": 0.9, "seed": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_hand_written_loop_gives_what_generate_gives(model: OpenELM, tokenizer: Tokenizer, settings: dict) -> None:
    options = GenerationOptions(**settings)
    key = make_key(options.seed) if options.seed is not None else None
    sampler = make_sampler(options, {tokenizer.bos_token_id, *tokenizer.eos_token_ids}, key)
    decoder = Decoder(model, options=options, logits_processors=make_logits_processors(options))
    logprobs, found = decoder.prefill(mx.array([IDS[2]]), 4), []
    for _ in range(24):
        token = sampler(logprobs)
        found.append((token.item(), logprobs[0, token.item()].item()))
        logprobs = decoder.step(token)
    expected = stream_generate(model, tokenizer, IDS[2], max_tokens=24, prefill_step_size=4, **settings)
    assert found == [(piece.token, piece.logprob) for piece in expected]


def test_decode_gives_each_tokens_row(model: OpenELM) -> None:
    ids = list(IDS[1])
    for token, logprob, _, logprobs in decode(Decoder(model), IDS[1], 12):
        expected = brute_force(model, ids)
        np.testing.assert_allclose(np.array(logprobs), expected, atol=1e-4)
        assert logprob == logprobs[token].item()
        top = np.argsort(np.array(logprobs))[-5:]
        assert set(top) == set(np.argsort(expected)[-5:])
        ids.append(token)
    assert ids[len(IDS[1]) :] == GREEDY[1][:12]


def test_rows_of_a_batch(model: OpenELM) -> None:
    """Rows of equal length share a growing cache; rows of different lengths a batch of caches."""
    rows = [ids[:6] for ids in IDS[:3]]
    decoder = Decoder(model)
    logprobs = decoder.prefill(mx.array(rows), 4)
    for n in range(5):
        for row, ids in enumerate(rows):
            np.testing.assert_allclose(np.array(logprobs[row]), brute_force(model, ids), atol=1e-4)
        tokens = greedy(logprobs)
        rows = [[*ids, token] for ids, token in zip(rows, tokens.tolist(), strict=True)]
        logprobs = decoder.step(tokens)
        assert decoder.cache[0].offset == 7 + n

    singles = []
    for ids in IDS[:3]:
        decoder = Decoder(model)
        decoder.prefill(mx.array([ids]))
        singles.append(decoder.cache)
    assert len({len(ids) for ids in IDS[:3]}) > 1
    merged = Decoder(model, [KVCache.merge(layers) for layers in zip(*singles, strict=True)])
    assert type(merged.cache[0]) is BatchKVCache
    logprobs = merged.step(mx.array([tokens[0] for tokens in GREEDY[:3]]))
    assert greedy(logprobs).tolist() == [tokens[1] for tokens in GREEDY[:3]]


def test_positions_can_be_scored_and_trimmed(model: OpenELM) -> None:
    """As speculation does: several draft tokens in one pass, and those that are rejected are trimmed."""
    decoder = Decoder(model)
    first = greedy(decoder.prefill(mx.array([IDS[0]]))).item()
    draft = [first, *GREEDY[0][1:3], 7]
    hidden_states = decoder.extend(mx.array([draft]))
    assert hidden_states.shape == (1, 4, model.config.model_dim)
    assert greedy(model.logits(hidden_states[0])).tolist()[:3] == GREEDY[0][1:4]
    for layer in decoder.cache:
        layer.trim(1)
    assert greedy(decoder.step(mx.array(GREEDY[0][3:4]))).item() == GREEDY[0][4]


def test_a_given_cache_is_extended_and_processors_see_its_ids(model: OpenELM) -> None:
    cache = [KVCache() for _ in model.layers]
    model(mx.array([IDS[0][:4]]), cache)
    seen: list[list[int]] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    decoder = Decoder(model, cache, logits_processors=[look], context=IDS[0][:4])
    logprobs = decoder.prefill(mx.array([IDS[0][4:]]), 2)
    decoder.step(greedy(logprobs))
    assert decoder.cache is cache
    assert seen == [IDS[0], [*IDS[0], GREEDY[0][0]]]


def test_prefill_evaluates_only_the_cache(model: OpenELM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of logits for a prompt in pieces, and progress before each piece."""
    rows: list[int] = []
    logits = OpenELM.logits
    monkeypatch.setattr(OpenELM, "logits", lambda self, x: rows.append(x.size // x.shape[-1]) or logits(self, x))
    evaluated: list[int] = []  # the length of the cache at each evaluation
    decoder = Decoder(model)
    evaluate = mx.eval
    monkeypatch.setattr(mx, "eval", lambda *x: evaluated.append(decoder.cache[0].offset) or evaluate(*x))
    progress: list[tuple[int, int]] = []
    decoder.prefill(mx.array([IDS[0]]), 4, lambda *numbers: progress.append(numbers))
    assert (rows, progress) == ([1], [(0, 9), (4, 9), (8, 9)])
    assert set(evaluated) == {4, 8}  # the last piece stays lazy


# A rotating cache at exactly its limit: generation with it.


@pytest.mark.covering
@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize("step_size", [1, 7, 8, 16])
def test_a_prompt_around_the_limit_of_a_sliding_cache(model: OpenELM, length: int, step_size: int) -> None:
    """Attention is limited to the window, as in one pass with the window's mask."""
    ids = IDS[0][:length]
    decoder = Decoder(model, options=CacheOptions(max_kv_size=8))
    logprobs = decoder.prefill(mx.array([ids]), step_size)
    for _ in range(4):
        rows, columns = mx.arange(len(ids))[:, None], mx.arange(len(ids))
        mask = (rows >= columns) & ((rows < columns + 4) | (columns < 4))
        logits = model.logits(model.hidden_states(mx.array([ids]), mask=mask)[:, -1])
        np.testing.assert_allclose(
            np.array(logprobs), np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)), atol=1e-4
        )
        token = greedy(logprobs)
        ids = [*ids, token.item()]
        logprobs = decoder.step(token)
    assert {type(layer) for layer in decoder.cache} == {RotatingKVCache}


# The end of a text.


def byte_id(tokenizer: Tokenizer, byte: int) -> int:
    token = tokenizer.token_to_id(f"<0x{byte:02X}>")
    assert token is not None
    return token


@pytest.mark.parametrize("stop", [(), "never", "\ufffd\ufffd\ufffd\ufffd"])
def test_bytes_of_an_incomplete_last_character_are_emitted(
    model: OpenELM, tokenizer: Tokenizer, stop: str | tuple
) -> None:
    first = byte_id(tokenizer, 0xF0)  # the first of four bytes
    pieces = list(stream_generate(model, tokenizer, IDS[0], max_tokens=3, stop=stop, logit_bias={first: 1e6}))
    assert [piece.token for piece in pieces] == [first] * 3
    assert "".join(piece.text for piece in pieces) == tokenizer.decode([first] * 3) == "\ufffd" * 3
    assert pieces[-1].text.endswith("\ufffd")
    assert pieces[-1].finish_reason == "length"


def test_an_incomplete_last_character_can_complete_a_stop_string(model: OpenELM, tokenizer: Tokenizer) -> None:
    first = byte_id(tokenizer, 0xF0)
    text = generate(model, tokenizer, IDS[0], max_tokens=3, stop="\ufffd\ufffd\ufffd", logit_bias={first: 1e6})
    assert text == ""


def test_the_end_of_text_completes_the_last_character(model: OpenELM, tokenizer: Tokenizer) -> None:
    """With EOS after the first byte, the piece of EOS has U+FFFD for that byte."""
    first, eos = byte_id(tokenizer, 0xF0), tokenizer.eos_token_id
    # Once the byte is in the context, the penalty puts EOS ahead of it.
    options: dict[str, Any] = {"logit_bias": {first: 300.0, eos: 200.0}, "presence_penalty": 200.0}
    pieces = list(stream_generate(model, tokenizer, IDS[0], max_tokens=5, **options))
    assert [(piece.token, piece.text) for piece in pieces] == [(first, ""), (eos, "\ufffd")]
    assert pieces[-1].finish_reason == "stop"


# XTC.


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_xtc_never_drops_the_special_tokens(model: OpenELM, tokenizer: Tokenizer, name: str) -> None:
    """The most likely token is kept if it is special, and dropped if it is not."""
    special, other, least = getattr(tokenizer, name), 500, 600
    options = {"temp": 1e-6, "seed": 0, "max_tokens": 1, "xtc_probability": 1.0, "xtc_threshold": 0.05}
    *_, row = next(decode(Decoder(model), IDS[0], 1))
    for top, chosen in ((special, special), (other, least)):
        # Whatever the model's logits are, these two tokens get probabilities of 0.88 and 0.12.
        logit_bias = {top: 1002.0 - row[top].item(), least: 1000.0 - row[least].item()}
        (piece,) = stream_generate(model, tokenizer, IDS[0], logit_bias=logit_bias, **options)
        assert piece.token == chosen


# The wired limit.


@pytest.mark.parametrize("ending", ["exhausted", "closed", "failed"])
def test_the_wired_limit_is_restored_however_a_stream_ends(
    model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    calls: list[str] = []

    @contextmanager
    def wired_limit() -> Iterator[None]:
        calls.append("set")
        try:
            yield
        finally:
            calls.append("restored")

    monkeypatch.setattr(backend, "wired_limit", wired_limit)
    stream = stream_generate(model, tokenizer, IDS[0], max_tokens=3)
    assert calls == []
    next(stream)
    assert calls == ["set"]
    if ending == "exhausted":
        list(stream)
    elif ending == "closed":
        stream.close()
    else:
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError())
    assert calls == ["set", "restored"]


# One validation.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temp": -1}, "temp"),
        ({"logit_bias": [3]}, "logit_bias"),
        ({"kv_bits": 7}, "kv_bits"),
        ({"kv_bits": 4, "kv_group_size": 48}, "kv_group_size"),
        ({"max_kv_size": 3}, "max_kv_size"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prefill_step_size": 0}, "prefill_step_size"),
        ({"seed": -1}, "seed"),
        ({"stop": ["a", ""]}, "stop"),
    ],
    ids=str,
)
def test_validate_checks_every_option(options: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        GenerationOptions(**options).validate()


def test_validate_checks_against_the_model_if_its_sizes_are_given() -> None:
    GenerationOptions(logit_bias={5000: 1.0}, kv_bits=4, kv_group_size=128).validate()
    with pytest.raises(RequestError, match="logit_bias.* from 0 to 2047"):
        GenerationOptions(logit_bias={5000: 1.0}).validate(2048, 32)
    with pytest.raises(RequestError, match="divide head_dim, 32; got 128"):
        GenerationOptions(kv_bits=4, kv_group_size=128).validate(2048, 32)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"repetition_penalty": 1}, {"repetition_penalty": 1.1}, {"presence_penalty": -0.1}),
        *({"frequency_penalty": 0.1}, {"logit_bias": {}}, {"logit_bias": {1: 0.5}}, {"repetition_context_size": 3}),
    ],
    ids=str,
)
def test_changes_logits_says_whether_there_are_processors(options: dict) -> None:
    params = SamplingParams(**options)
    assert params.changes_logits == bool(make_logits_processors(params))
