"""Generation from a prompt cache: penalties that count its tokens, and caches that cannot be continued."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache, make_cache
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.generation.options import CacheOptions, GenerationOptions
from mlx_openelm.generation.sampling import SamplingParams, make_logits_processors, make_sampler
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"
TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to be, or not to be"


@pytest.fixture(scope="module")
def loaded() -> tuple[OpenELM, Tokenizer]:
    return load(FOLDER)


@pytest.fixture
def model(loaded: tuple[OpenELM, Tokenizer]) -> OpenELM:
    return loaded[0]


@pytest.fixture
def tokenizer(loaded: tuple[OpenELM, Tokenizer]) -> Tokenizer:
    return loaded[1]


@pytest.fixture
def ids(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(TEXT)


def filled(model: OpenELM, ids: list[int], make: Callable[[], Any] = KVCache) -> list[Any]:
    cache = [make() for _ in model.layers]
    if ids:
        model(mx.array([ids]), cache)
    return cache


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Penalties.

PENALTIES = [
    {"repetition_penalty": 1.6},
    {"presence_penalty": 4.0},
    {"frequency_penalty": 2.0},
    {"frequency_penalty": 2.0, "frequency_context_size": 20},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": {13: 1.0}},
]


@pytest.mark.covering
@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("form", [list, mx.array, np.array], ids=["list", "mlx", "numpy"])
def test_penalties_count_the_tokens_in_the_cache(
    model: OpenELM, tokenizer: Tokenizer, ids: list[int], penalty: dict, form: Callable
) -> None:
    """The same text as from the whole prompt, whatever part of it was in the cache."""
    expected = [piece.token for piece in stream_generate(model, tokenizer, ids, max_tokens=12, **penalty)]
    for held in (1, 9, len(ids) - 1):
        cache, tokens = filled(model, ids[:held]), form(ids[:held])
        options = {"prompt_cache": cache, "prompt_cache_tokens": tokens, "max_tokens": 12} | penalty
        assert [p.token for p in stream_generate(model, tokenizer, ids[held:], **options)] == expected, held
    processors = make_logits_processors(SamplingParams(**penalty))
    cache, tokens = filled(model, ids[:9]), form(ids[:9])
    steps = generate_step(
        model, ids[9:], max_tokens=12, logits_processors=processors, cache=cache, prompt_cache_tokens=tokens
    )
    assert [token for token, _ in steps] == expected
    text = generate(
        model, tokenizer, ids[9:], prompt_cache=filled(model, ids[:9]), prompt_cache_tokens=tokens, max_tokens=12,
        **penalty,
    )  # fmt: skip
    assert text == generate(model, tokenizer, ids, max_tokens=12, **penalty)


def test_without_the_ids_the_text_differs_and_a_warning_says_why(
    model: OpenELM, tokenizer: Tokenizer, ids: list[int]
) -> None:
    penalty = {"frequency_penalty": 2.0, "repetition_penalty": 1.2}
    expected = generate(model, tokenizer, ids, max_tokens=24, **penalty)
    with pytest.warns(UserWarning, match="see only new tokens, not the 20 in .* as prompt_cache_tokens") as caught:
        text = generate(model, tokenizer, ids[20:], prompt_cache=filled(model, ids[:20]), max_tokens=24, **penalty)
    assert text != expected
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]
    with pytest.warns(UserWarning, match="see only new tokens") as caught:
        processors = make_logits_processors(SamplingParams(**penalty))
        generate_step(model, ids[20:], cache=filled(model, ids[:20]), logits_processors=processors)
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


@pytest.mark.usefixtures("no_warnings")
def test_no_warning_if_penalties_miss_no_tokens(model: OpenELM, tokenizer: Tokenizer, ids: list[int]) -> None:
    """No penalty; a bias, which does not depend on the context; an empty cache; known ids."""
    first = [piece.token for piece in stream_generate(model, tokenizer, ids, max_tokens=3)]
    cases: list[dict[str, Any]] = [
        {"prompt_cache": filled(model, ids[:5]), "logit_bias": {first[0]: 1.0}},
        {"prompt_cache": make_cache(6), "frequency_penalty": 0.0},
        {"prompt_cache": make_cache(6), "frequency_penalty": 1e-3},
        {"prompt_cache_tokens": [], "frequency_penalty": 1e-3},
        {"prompt_cache": filled(model, ids[:5]), "prompt_cache_tokens": ids[:5]},
    ]
    for options in cases:
        past = options["prompt_cache"][0].offset if "prompt_cache" in options else 0
        found = stream_generate(model, tokenizer, ids[past:], max_tokens=3, **options)
        assert [piece.token for piece in found] == first, options


def test_penalties_count_tokens_that_a_sliding_cache_dropped(model: OpenELM, ids: list[int]) -> None:
    """Penalties are about the text, not about what attention sees."""
    cache = filled(model, ids, lambda: RotatingKVCache(12, keep=4))
    seen: list[list[int]] = []

    def look(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    steps = generate_step(model, [7], max_tokens=2, cache=cache, prompt_cache_tokens=ids, logits_processors=[look])
    tokens = [token for token, _ in steps]
    assert seen == [[*ids, 7], [*ids, 7, tokens[0]]]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([1, 2, 3, 4], "has 4 ids, but the prompt cache has seen 5 tokens"),
        ([], "has 0 ids"),
        ([1, 2, 3, 4, 2048], "token id 2048; the vocabulary ends at 2047"),
        ([1, 2, 3, 4, -1], "token id -1"),
        ([1, 2, 3, 4, 5.0], "flat list of token ids.*got 5.0"),
        ([[1, 2, 3, 4, 5]], r"flat list of token ids.*got \[1, 2, 3, 4, 5\]"),
        ("12345", "list of token ids, got '12345'"),
        (5, "list of token ids, got 5"),
    ],
    ids=str,
)
def test_ids_that_do_not_match_the_cache(
    model: OpenELM, tokenizer: Tokenizer, ids: list[int], tokens: Any, words: str
) -> None:
    cache = filled(model, ids[:5])
    with pytest.raises(RequestError, match=f"prompt_cache_tokens .*{words}"):
        stream_generate(model, tokenizer, ids[5:], prompt_cache=cache, prompt_cache_tokens=tokens)
    with pytest.raises(RequestError, match=f"prompt_cache_tokens .*{words}"):
        generate_step(model, ids[5:], cache=cache, prompt_cache_tokens=tokens)
    assert cache[0].offset == 5


def test_ids_without_a_cache(model: OpenELM, ids: list[int]) -> None:
    for cache in (None, make_cache(6)):
        with pytest.raises(RequestError, match="has 3 ids, but the prompt cache has seen 0 tokens"):
            generate_step(model, ids, cache=cache, prompt_cache_tokens=[1, 2, 3])


# Arguments of `generate_step`, refused in one line at the call.


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "empty"),
        (mx.array([], mx.int32), "empty"),
        ([2048], "token id 2048; the vocabulary ends at 2047"),
        ([1, -1], "token id -1"),
        ([1 << 70], "token id 1180591620717411303424"),
        ([1.5], "flat list.*got 1.5"),
        ([True], "flat list.*got True"),
        ([None], "flat list.*got None"),
        ([[1, 2]], r"flat list.*got \[1, 2\]"),
        (mx.array([[1, 2]]), r"flat list.*got \[1, 2\]"),
        (np.array([[1, 2]]), "flat list"),
        (mx.array([1.0]), "flat list.*got 1.0"),
        (mx.array(5), "list of token ids, got 5"),
        ("text", "list of token ids, got 'text'"),
        (None, "list of token ids, got None"),
        ([5] * 3000, "too long: 3000 tokens"),
        ([["x" * 5000]], "flat list"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_prompts_that_are_not_token_ids(model: OpenELM, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        generate_step(model, prompt)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 350


def test_prompts_in_any_form(model: OpenELM, ids: list[int]) -> None:
    expected = [token for token, _ in generate_step(model, ids, max_tokens=4)]
    for prompt in (tuple(ids), mx.array(ids), mx.array(ids, mx.uint8 if max(ids) < 256 else mx.uint32), np.array(ids)):
        assert [token for token, _ in generate_step(model, prompt, max_tokens=4)] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_bits": 8}, "options must be CacheOptions or GenerationOptions, got {'kv_bits': 8}"),
        (CacheOptions(kv_bits=7), "kv_bits must be 2, 3, 4, 5, 6 or 8, got 7"),
        (CacheOptions(kv_bits=4.0), "kv_bits.*got 4.0"),  # type: ignore[arg-type]
        (CacheOptions(kv_bits=True), "kv_bits.*got True"),
        (CacheOptions(kv_bits=4, kv_group_size=64), "kv_group_size must .* got 64"),
        (CacheOptions(kv_bits=4, kv_group_size=32.0), "kv_group_size must .* got 32.0"),  # type: ignore[arg-type]
        (CacheOptions(kv_group_size=32), "kv_group_size needs kv_bits"),
        (CacheOptions(kv_bits=4, max_kv_size=64), "cannot be combined"),
        (CacheOptions(max_kv_size=4), "max_kv_size must be 8 or more, got 4"),
        (CacheOptions(max_kv_size="64"), "max_kv_size"),  # type: ignore[arg-type]
        (CacheOptions(quantized_kv_start=-1), "quantized_kv_start must be 0 or more, got -1"),
        (CacheOptions(quantized_kv_start=math.nan), "quantized_kv_start"),  # type: ignore[arg-type]
        (CacheOptions(quantized_kv_start="1"), "quantized_kv_start"),  # type: ignore[arg-type]
        (GenerationOptions(temp=math.nan), "temp"),
        (GenerationOptions(temp=-1), "temp"),
        (GenerationOptions(top_p=1.5), "top_p"),
        (GenerationOptions(kv_bits=7), "kv_bits"),
        (GenerationOptions(max_tokens=0), "max_tokens"),
        (GenerationOptions(seed=-1), "seed"),
        (GenerationOptions(stop=""), "stop"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_options_of_generate_step_are_checked(model: OpenELM, options: CacheOptions, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        generate_step(model, [1, 2], options=options)


@pytest.mark.parametrize("given", [{"max_tokens": n} for n in (0, -2, 1.5, True, None, math.nan)])
def test_the_lengths_of_generate_step_are_checked(model: OpenELM, given: dict) -> None:
    with pytest.raises(RequestError, match="max_tokens must be (a whole number, )?1 or more, or -1 for no limit, got"):
        generate_step(model, [1, 2], **given)
    with pytest.raises(RequestError, match="prefill_step_size must be 1 or more, got 0"):
        generate_step(model, [1, 2], prefill_step_size=0)


@pytest.mark.parametrize("given", [{"temp": -1.0}, {"temp": math.nan}, {"top_p": 2.0}, {"repetition_penalty": 0.0}])
def test_samplers_and_processors_check_their_parameters(given: dict) -> None:
    for make in (make_sampler, make_logits_processors):
        with pytest.raises(RequestError, match=" must be between "):
            make(SamplingParams(**given))


# Caches that cannot be continued, or not with these options.


def sliding() -> RotatingKVCache:
    return RotatingKVCache(16, keep=4)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (sliding, {"kv_bits": 8}, "kv_bits cannot quantize the prompt cache, a RotatingKVCache"),
        (lambda: BatchKVCache([0]), {"kv_bits": 8}, "kv_bits cannot quantize the prompt cache, a BatchKVCache"),
        (lambda: QuantizedKVCache(32, 4), {"kv_bits": 8}, "4 bits in groups of 32.*leave them out"),
        (KVCache, {"max_kv_size": 64}, "max_kv_size 64 is for new caches"),
        (sliding, {"max_kv_size": 64}, "max_kv_size 64 is for new caches"),
    ],
)
@pytest.mark.parametrize("held", [0, 5])
def test_options_that_contradict_a_given_cache_are_refused(
    model: OpenELM, tokenizer: Tokenizer, ids: list[int], make: Callable, options: dict, words: str, held: int
) -> None:
    cache = filled(model, ids[:held], make)
    with pytest.raises(RequestError, match=words):
        generate_step(model, ids[5:], cache=cache, options=CacheOptions(**options))
    with pytest.raises(RequestError, match=words):
        stream_generate(model, tokenizer, ids[5:], prompt_cache=cache, **options)


@pytest.mark.parametrize(
    ("make", "options", "kind"),
    [
        (KVCache, {"kv_bits": 8}, QuantizedKVCache),
        (lambda: QuantizedKVCache(32, 8), {"kv_bits": 8}, QuantizedKVCache),
        (lambda: QuantizedKVCache(32, 8), {"kv_bits": 8, "kv_group_size": 32}, QuantizedKVCache),
        (lambda: QuantizedKVCache(32, 8), {}, QuantizedKVCache),
        (sliding, {"max_kv_size": 16}, RotatingKVCache),
        (sliding, {}, RotatingKVCache),
    ],
)
def test_options_that_match_a_given_cache_are_accepted(
    model: OpenELM, ids: list[int], make: Callable, options: dict, kind: type
) -> None:
    cache = filled(model, ids[:5], make)
    assert len(list(generate_step(model, ids[5:9], max_tokens=3, cache=cache, options=CacheOptions(**options)))) == 3
    assert {type(layer) for layer in cache} == {kind}
    assert cache[0].offset == 11


def test_a_given_cache_with_another_group_size(model: OpenELM, ids: list[int]) -> None:
    cache = [QuantizedKVCache(64, 8) for _ in model.layers]
    with pytest.raises(RequestError, match="8 bits in groups of 64.*leave them out"):
        generate_step(model, ids, cache=cache, options=CacheOptions(kv_bits=8, kv_group_size=32))


def test_caches_of_another_model_or_of_a_batch(model: OpenELM, ids: list[int]) -> None:
    with pytest.raises(RequestError, match="for 5 layers, and the model has 6"):
        generate_step(model, ids, cache=make_cache(5))
    with pytest.raises(RequestError, match="for 0 layers"):
        generate_step(model, ids, cache=[])
    with pytest.raises(RequestError, match="holds 2 sequences"):
        generate_step(model, ids, cache=[BatchKVCache([0, 1]) for _ in model.layers])
    uneven = filled(model, ids[:5])
    uneven[3].trim(2)
    with pytest.raises(RequestError, match="have seen 3 to 5 tokens"):
        generate_step(model, ids, cache=uneven)
    with pytest.raises(RequestError, match="holds no keys and values"):
        generate_step(model, ids, cache=[object()] * 6)
    with pytest.raises(RequestError, match="too long: 1025 tokens"):
        cache = make_cache(6)
        for layer in cache:
            layer.offset = model.config.rope_max_length
        generate_step(model, [5], cache=cache)


def test_a_row_with_pending_padding_counts_as_empty(model: OpenELM, ids: list[int]) -> None:
    """The first tokens fed are that padding, which attention does not see."""
    expected = [token for token, _ in generate_step(model, ids, max_tokens=4)]
    cache = [BatchKVCache([2]) for _ in model.layers]
    steps = generate_step(model, [9, 9, *ids], max_tokens=4, cache=cache, prompt_cache_tokens=[])
    assert [token for token, _ in steps] == expected
