"""Text that must be JSON, match an expression or a grammar, or be one of several texts."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import random
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.cache import make_cache
from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.generation import decoding
from mlx_openelm.generation.options import GenerationOptions
from mlx_openelm.generation.piece import Piece
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("llguidance")
from mlx_openelm.generation.constraints import Constraint, make_constraint
from mlx_openelm.generation.vocabulary import Vocabulary

from processes import environment

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
LLAMA = Path(__file__).parents[2] / "shared" / "reference" / "llama2-tokenizer"
NEEDS_LLAMA = pytest.mark.skipif(not LLAMA.is_dir(), reason="Llama 2's tokenizer is not here")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "a_long_property_name": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue", "ré d"]}, "minItems": 1, "maxItems": 3},
        "kind": {"const": "a constant that is always the same"},
    },
    "required": ["name", "a_long_property_name", "tags", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def loaded() -> tuple[OpenELM, Tokenizer]:
    return load(FIXTURES / "shakespeare-hf")


@pytest.fixture
def model(loaded: tuple[OpenELM, Tokenizer]) -> OpenELM:
    return loaded[0]


@pytest.fixture
def tokenizer(loaded: tuple[OpenELM, Tokenizer]) -> Tokenizer:
    return loaded[1]


@pytest.fixture(
    scope="module", params=["shakespeare-hf", "tied-vocabulary", pytest.param("Llama 2", marks=NEEDS_LLAMA)]
)
def vocabulary(request: pytest.FixtureRequest) -> Tokenizer:
    folder = LLAMA if request.param == "Llama 2" else FIXTURES / request.param
    file = next(path for name in ("tokenizer.model", "tokenizer.json") if (path := folder / name).is_file())
    return Tokenizer.from_file(file)


def run(model: OpenELM, tokenizer: Tokenizer, prompt: Any = "ROMEO.", **options: Any) -> tuple[str, list[Piece]]:
    pieces = list(stream_generate(model, tokenizer, prompt, **options))
    return "".join(piece.text for piece in pieces), pieces


def constraint(tokenizer: Tokenizer, rows: int | None = None, **options: Any) -> Constraint:
    return make_constraint(GenerationOptions(**options), tokenizer, rows or tokenizer.vocab_size)


def allowed(one: Constraint, rows: int) -> set[int]:
    """The tokens that a constraint leaves in a row of equal log-probabilities."""
    row = np.array(one.limit(mx.zeros((1, rows))))[0]
    assert np.isclose(np.exp(row).sum(), 1, atol=1e-5)
    return set(np.flatnonzero(np.isfinite(row)).tolist())


# Masks.

CHOICES = [
    "yes",
    "yes, my lord",
    " yes",
    "  two spaces",
    "no\n",
    "ROMEO: no",
    "café",
    "😀 smile",
    "日本",
    'a"b\\c{}',
    "\t\x01",
]


def writable(tokenizer: Tokenizer, text: str) -> bool:
    pieces = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
    return all(bytes([byte]) in pieces for byte in text.encode()) or all(c.encode() in pieces for c in text)


def test_masks_are_those_of_the_bytes(vocabulary: Tokenizer) -> None:
    """Walks through a finite language at random; each mask against every token's bytes."""
    choices = [text.encode() for text in CHOICES if writable(vocabulary, text)]
    assert len(choices) >= 3
    rows = vocabulary.vocab_size + 5  # rows that the tokenizer lacks
    content = {token: vocabulary.token_bytes(token) for token in range(rows)}
    ends = vocabulary.eos_token_ids
    rng = random.Random(0)
    finished = set()
    for _ in range(25):
        one = constraint(vocabulary, rows, choice=[text.decode() for text in choices])
        so_far = b"".join(content[token] for token in one.opening)
        while not one.done:
            expected = {
                token
                for token, piece in content.items()
                if piece and token not in ends and any(text.startswith(so_far + piece) for text in choices)
            }
            expected |= ends if so_far in choices else set()
            assert allowed(one, rows) == expected
            token = rng.choice(sorted(expected))
            forced = one.advance(token)
            if token in ends:
                break
            so_far += b"".join(content[item] for item in (token, *forced))
        assert so_far in choices
        finished.add(so_far)
    assert len(finished) > 3


def test_forced_text_is_split_as_sentencepiece_splits_it(vocabulary: Tokenizer) -> None:
    """After a line break, which is a token of its own, so that nothing is put in front."""
    split = Vocabulary(vocabulary, vocabulary.vocab_size)
    for text in ("hello world", " my lord", '{"name":"', ',"a_long_property_name":', "  ROMEO", "é日", "x"):
        ids = split(text)
        expected = text.encode()
        if writable(vocabulary, text):
            assert b"".join(vocabulary.token_bytes(token) or b"" for token in ids) == expected
        line = vocabulary.token_to_id("<0x0A>")
        whole = vocabulary.encode("\n" + text, add_bos=False)
        if line in whole and vocabulary.token_to_id("<0x02>") is not None:
            assert ids == whole[whole.index(line) + 1 :]
    incomplete = "é".encode()[:1]
    if writable(vocabulary, "é"):
        assert b"".join(vocabulary.token_bytes(token) or b"" for token in split(incomplete)) in (b"", incomplete)


@NEEDS_LLAMA
def test_leading_spaces_of_llamas_vocabulary() -> None:
    llama = Tokenizer.from_file(LLAMA / "tokenizer.model")
    ids = llama.token_to_id
    first = allowed(constraint(llama, choice=["yes", "no"]), 32000)
    assert {ids("yes"), ids("y"), ids("no"), ids("n"), ids("<0x79>")} <= first
    assert not first & {ids("▁yes"), ids("▁no"), ids("▁"), ids("</s>"), ids("<s>"), ids("<unk>")}
    spaced = allowed(constraint(llama, choice=[" yes", "no"]), 32000)
    assert {ids("▁yes"), ids("▁"), ids("<0x20>"), ids("no")} <= spaced
    assert ids("yes") not in spaced
    accented = constraint(llama, regex="[é]x")
    assert allowed(accented, 32000) == {ids("é"), ids("<0xC3>")} or accented.opening
    word = constraint(llama, regex="[ -~]*")
    assert all(
        (token in allowed_) == bool(re.fullmatch(rb"[ -~]+", piece))
        for allowed_ in [allowed(word, 32000)]
        for token in range(3, 32000)
        if (piece := llama.token_bytes(token)) is not None
    )


def test_the_distribution_is_the_models_within_the_mask(model: OpenELM, tokenizer: Tokenizer) -> None:
    """Log-probabilities, chosen and top, are the model's, renormalized over the tokens that fit."""
    ids = tokenizer.encode("ROMEO.")
    fits = [re.fullmatch(rb"[a-z ]+", tokenizer.token_bytes(t) or b"") is not None for t in range(2048)]
    _, pieces = run(model, tokenizer, ids, regex="[a-z ]{200,400}", max_tokens=12, temp=0.9, seed=5, top_logprobs=4)
    for piece in pieces:
        logits = np.array(model(mx.array([ids]))[0, -1]).astype(np.float64)
        logits[~np.array(fits)] = -np.inf
        expected = logits - np.log(np.exp(logits).sum())
        assert math.isclose(piece.logprob, expected[piece.token], abs_tol=1e-4)
        order = np.argsort(-expected)[:4]
        assert [token for token, _ in piece.top_logprobs] == order.tolist()
        np.testing.assert_allclose([value for _, value in piece.top_logprobs], expected[order], atol=1e-4)
        ids.append(piece.token)


# Documents.


def check_document(text: str) -> None:
    """By hand: valid for `SCHEMA`, and compact."""
    value = json.loads(text)
    assert list(value) == SCHEMA["required"]
    assert isinstance(value["name"], str) and len(value["name"]) <= 12
    assert type(value["a_long_property_name"]) is int and 1 <= value["a_long_property_name"] <= 99
    assert 1 <= len(value["tags"]) <= 3 and set(value["tags"]) <= {"red", "blue", "ré d"}
    assert value["kind"] == SCHEMA["properties"]["kind"]["const"]
    assert not re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', '""', text))


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))])
def test_json_of_a_schema(model: OpenELM, tokenizer: Tokenizer, seed: int) -> None:
    options: dict[str, Any] = {"json_schema": SCHEMA, "max_tokens": 400, "temp": 1.5, "seed": seed}
    text, pieces = run(model, tokenizer, **options)
    assert pieces[-1].finish_reason == "stop"
    check_document(text)
    assert run(model, tokenizer, **options)[0] == text
    jsonschema = sys.modules.get("jsonschema")
    if jsonschema is not None:
        jsonschema.validate(json.loads(text), SCHEMA)


@NEEDS_LLAMA
@pytest.mark.parametrize("seed", range(6))
def test_json_in_llamas_vocabulary(model: OpenELM, seed: int) -> None:
    """Random weights choose any token that fits: rare pieces, single bytes, long runs of spaces."""
    llama = Tokenizer.from_file(LLAMA / "tokenizer.model")
    mx.random.seed(seed)
    wide = OpenELM(dataclasses.replace(model.config, vocab_size=32000))
    text, pieces = run(wide, llama, json_schema=SCHEMA, temp=1.0, seed=seed, max_tokens=300)
    assert pieces[-1].finish_reason == "stop"
    check_document(text)
    pattern = r"(?:[^\x00-\x20]| ){5,9}!"
    text, pieces = run(wide, llama, regex=pattern, temp=1.0, seed=seed, max_tokens=300)
    assert pieces[-1].finish_reason == "stop" and re.fullmatch(pattern, text)


def test_a_schema_as_text_and_in_a_file(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    texts = {generate(model, tokenizer, "x", json_schema=form) for form in (SCHEMA, json.dumps(SCHEMA), str(file))}
    assert len(texts) == 1
    check_document(texts.pop())


def test_white_space_if_a_schema_asks_for_it(tokenizer: Tokenizer) -> None:
    spaces = {token for token in range(2048) if (tokenizer.token_bytes(token) or b"x").isspace()}
    compact = constraint(tokenizer, json_schema=SCHEMA)
    assert b"".join(tokenizer.token_bytes(token) or b"" for token in compact.opening) == b'{"name":"'
    asking = constraint(tokenizer, json_schema={**SCHEMA, "x-guidance": {"whitespace_flexible": True}})
    assert [tokenizer.token_bytes(token) for token in asking.opening] == [b"{"]
    quotes = {token for token in range(2048) if tokenizer.token_bytes(token) == b'"'}
    found = allowed(asking, 2048)
    assert found <= spaces | quotes and len(found & spaces) > 4


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_any_json_object(model: OpenELM, tokenizer: Tokenizer, seed: int) -> None:
    """Whole, or with an ending where it was cut off: in a key, in a value, or between them."""
    text, pieces = run(model, tokenizer, json_object=True, temp=1.0, seed=seed, max_tokens=80)
    endings = ("",) if pieces[-1].finish_reason == "stop" else ('":0}', '"}', ":0}", "0}", "}")
    assert any(is_object(text + ending) for ending in endings), text


LARK = 'start: "(" start ")" | WORD\nWORD: /[a-z]{2,5}/'
GBNF = 'root ::= "(" root ")" | word # nested\nword ::= [a-z\\u00e9]{2,5} "\\u0021"?'


@pytest.mark.covering
@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"regex": r"[A-Z][a-z]{3,8}, \d{4}\."}, r"[A-Z][a-z]{3,8}, \d{4}\."),
        ({"regex": "^ (a|bc)é+$"}, " (a|bc)é+"),
        ({"regex": "😀|日本"}, "😀|日本"),
        ({"grammar": LARK}, r"\(*[a-z]{2,5}\)*"),
        ({"grammar": GBNF}, r"\(*[a-zé]{2,5}!?\)*"),
        ({"grammar": 'root ::= start "start" [start] # start\nstart ::= "a"'}, "astart[start]"),
        ({"choice": ["yes", "no", " maybe, so"]}, "yes|no| maybe, so"),
        ({"choice": "yes,no"}, "yes|no"),
        ({"choice": ("a.c",)}, r"a\.c"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_the_text_matches(
    model: OpenELM, tokenizer: Tokenizer, options: dict, pattern: str, seed: int, recwarn: pytest.WarningsRecorder
) -> None:
    text, pieces = run(model, tokenizer, **options, temp=1.2, seed=seed, max_tokens=150)
    if pieces[-1].finish_reason == "stop":
        assert re.fullmatch(pattern, text), text
        assert text.count("(") == text.count(")")
    else:
        assert len(recwarn) == 1
    assert "grammar" in options or "é+" in pattern or pieces[-1].finish_reason == "stop"


def test_a_grammar_in_a_file(model: OpenELM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, text in (("a.lark", LARK), ("a.gbnf", GBNF)):
        (tmp_path / name).write_text(text)
        options = {"temp": 1.0, "seed": 3, "max_tokens": 100}
        expected = generate(model, tokenizer, "x", grammar=text, **options)
        assert generate(model, tokenizer, "x", grammar=str(tmp_path / name), **options) == expected


def test_echo_keeps_the_space_between_prompt_and_text(model: OpenELM, tokenizer: Tokenizer) -> None:
    assert generate(model, tokenizer, "Say", choice=[" yes"], echo=True) == "Say yes"
    assert generate(model, tokenizer, [1], choice=[" yes"]) == " yes"


# Forced tokens, and the order of computation.


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens in each call of the model."""
    sizes: list[int] = []
    hidden_states = OpenELM.hidden_states

    def count(self: OpenELM, tokens: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        sizes.append(tokens.size)
        return hidden_states(self, tokens, *args, **kwargs)

    monkeypatch.setattr(OpenELM, "hidden_states", count)
    return sizes


def test_a_text_without_a_choice_takes_no_step(model: OpenELM, tokenizer: Tokenizer, calls: list[int]) -> None:
    text, pieces = run(model, tokenizer, choice=["A long sentence, all of it forced."], top_logprobs=2)
    assert text == "A long sentence, all of it forced."
    assert calls == [len(tokenizer.encode("ROMEO.")) + len(pieces)]
    assert all(piece.logprob == 0 and piece.top_logprobs == [(piece.token, 0.0)] for piece in pieces)
    assert pieces[-1].finish_reason == "stop" and all(piece.finish_reason is None for piece in pieces[:-1])


def test_a_forced_stretch_is_one_call(model: OpenELM, tokenizer: Tokenizer, calls: list[int]) -> None:
    """A call of one token for each that is chosen, and one call for each stretch between them, of all its tokens."""
    prompt = tokenizer.encode("ROMEO.")
    text, pieces = run(model, tokenizer, prompt, json_schema=SCHEMA, temp=1.0, seed=2, max_tokens=400)
    check_document(text)
    one = constraint(tokenizer, 2048, json_schema=SCHEMA)
    expected, position = [len(prompt) + len(one.opening)], len(one.opening)
    while not one.done:
        forced = one.advance(pieces[position].token)
        position += 1 + len(forced)
        expected += [1, len(forced)] if forced and not one.done else [1]
    assert calls == expected
    assert len(calls) < 0.5 * len(pieces) and max(calls[1:]) > 10


def test_forced_tokens_change_no_later_probability(model: OpenELM, tokenizer: Tokenizer) -> None:
    """What is computed after a stretch is what the whole text gives, in every kind of cache."""
    for options in ({}, {"prefill_step_size": 3}, {"max_kv_size": 512}):
        ids = tokenizer.encode("ROMEO.")
        _, pieces = run(model, tokenizer, ids, json_schema=SCHEMA, temp=1.0, seed=4, max_tokens=400, **options)
        one = constraint(tokenizer, 2048, json_schema=SCHEMA)
        queue = list(one.opening)
        checked = 0
        for piece in pieces:
            if queue:
                assert piece.token == queue.pop(0)
            else:
                row = np.array(one.limit(model(mx.array([ids]))[:, -1]))[0]
                assert math.isclose(piece.logprob, row[piece.token], abs_tol=2e-4)
                queue = one.advance(piece.token)
                checked += 1
            ids = [*ids, piece.token]
        assert checked > 5


def test_quantized_caches_and_prompt_caches(model: OpenELM, tokenizer: Tokenizer) -> None:
    check_document(generate(model, tokenizer, "ROMEO.", json_schema=SCHEMA, kv_bits=8, kv_group_size=32))
    ids = tokenizer.encode("ROMEO. Speak, my lord.")
    expected, _ = run(model, tokenizer, ids, json_schema=SCHEMA, repetition_penalty=1.3)
    cache = make_cache(len(model.layers))
    model.hidden_states(mx.array([ids[:4]]), cache)
    options = {"prompt_cache": cache, "prompt_cache_tokens": ids[:4], "repetition_penalty": 1.3}
    found, pieces = run(model, tokenizer, ids[4:], json_schema=SCHEMA, **options)
    assert found == expected
    assert len(ids) < cache[0].offset <= len(ids) + len(pieces)


def test_masks_are_computed_while_the_device_works(
    model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step is submitted, then the token is read and the mask computed."""
    events: list[str] = []

    def logged(name: str, function: Callable) -> Callable:
        return lambda *args: (events.append(name), function(*args))[1]

    monkeypatch.setattr(decoding.mx, "async_eval", logged("submit", mx.async_eval))
    monkeypatch.setattr(Constraint, "advance", logged("advance", Constraint.advance))
    monkeypatch.setattr(Constraint, "limit", logged("mask", Constraint.limit))
    list(stream_generate(model, tokenizer, "ROMEO.", regex="[a-z ]{50,60}", max_tokens=4))
    # The token of a step, then the logits after it.
    assert events == ["mask", "submit", *["submit", "advance", "mask", "submit"] * 3, "advance"]


# With other options.


def test_penalties_bias_and_stop_strings(model: OpenELM, tokenizer: Tokenizer) -> None:
    plain, _ = run(model, tokenizer, regex="[a-z ]{60,80}", max_tokens=-1)
    other, _ = run(model, tokenizer, regex="[a-z ]{60,80}", max_tokens=-1, repetition_penalty=1.5)
    assert plain != other
    assert all(re.fullmatch("[a-z ]{60,80}", text) for text in (plain, other))
    assert (
        run(model, tokenizer, choice=["yes", "no"], logit_bias={t: -math.inf for t in starting(tokenizer, b"y")})[0]
        == "no"
    )
    assert (
        run(model, tokenizer, choice=["yes", "no"], logit_bias={t: -math.inf for t in starting(tokenizer, b"n")})[0]
        == "yes"
    )
    text, pieces = run(model, tokenizer, choice=["first; second"], stop=";")
    assert (text, pieces[-1].finish_reason) == ("first", "stop")


def test_a_banned_token_is_not_forced(model: OpenELM, tokenizer: Tokenizer) -> None:
    text, pieces = run(model, tokenizer, choice=["my lord, my lord"])
    for token in {piece.token for piece in pieces}:
        with pytest.raises(OpenELMError, match=r"^Every token that choice allows here is banned by logit_bias"):
            run(model, tokenizer, choice=[text], logit_bias={token: -math.inf})
        assert run(model, tokenizer, choice=[text], logit_bias={token: -100.0})[0] == text


def test_a_tokenizer_is_freed(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_folder(FIXTURES / "shakespeare-hf")
    assert constraint(other, choice=["yes", "no"])
    alive = weakref.ref(other)
    del other
    gc.collect()
    assert alive() is None


def starting(tokenizer: Tokenizer, start: bytes) -> list[int]:
    return [token for token in range(tokenizer.vocab_size) if (tokenizer.token_bytes(token) or b"").startswith(start)]


def test_no_token_with_a_probability(model: OpenELM, tokenizer: Tokenizer) -> None:
    banned = {token: -math.inf for token in starting(tokenizer, b"")}
    with pytest.raises(OpenELMError, match=r"^Every token that choice allows here is banned by logit_bias or a logits"):
        run(model, tokenizer, choice=["yes", "no"], logit_bias={**banned, 2: 0.0})
    with pytest.raises(OpenELMError, match="not finite"):
        nan = [lambda tokens, logits: logits * math.nan]
        run(model, tokenizer, choice=["yes", "no"], logits_processors=nan)


def test_a_sampler_that_ignores_the_constraint(model: OpenELM, tokenizer: Tokenizer) -> None:
    with pytest.raises(OpenELMError, match="choice"):
        run(model, tokenizer, choice=["yes", "no"], sampler=lambda logprobs: mx.array([500]), max_tokens=5)


def test_a_character_that_the_vocabulary_cannot_write(tokenizer: Tokenizer) -> None:
    rows = (tokenizer.token_to_id("<0x60>") or 0) + 1  # bytes up to a backquote, and nothing else
    assert constraint(tokenizer, rows, choice=["YES", "NO"])
    with pytest.raises(RequestError, match=r"^choice leaves no token of this model's vocabulary to go on with"):
        constraint(tokenizer, rows, choice=["yes", "no"])
    later = constraint(tokenizer, rows, regex="[A-C]y")
    with pytest.raises(OpenELMError, match=r"^regex leaves no token of this model's vocabulary to go on with"):
        later.advance(tokenizer.token_to_id("<0x41>") or 0)
        later.limit(mx.zeros((1, rows)))


# The end.


@pytest.mark.parametrize("count", [1, 5, 30])
def test_a_document_that_is_cut_off(model: OpenELM, tokenizer: Tokenizer, count: int) -> None:
    with pytest.warns(UserWarning, match=rf"^The text was cut off after {count} tokens?, at max_tokens; it may be "):
        text, pieces = run(model, tokenizer, json_schema=SCHEMA, max_tokens=count)
    assert (len(pieces), pieces[-1].finish_reason) == (count, "length")
    assert text == run(model, tokenizer, json_schema=SCHEMA)[0][: len(text)]


def test_the_last_token_may_complete_the_text(model: OpenELM, tokenizer: Tokenizer) -> None:
    _, whole = run(model, tokenizer, json_schema=SCHEMA)
    text, pieces = run(model, tokenizer, json_schema=SCHEMA, max_tokens=len(whole))
    assert pieces[-1].finish_reason == "stop"
    check_document(text)


# Errors.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regex": "(a"}, "regex cannot be used: unclosed group."),
        ({"regex": r"(a)\1"}, "regex cannot be used: backreferences are not supported."),
        ({"regex": ""}, "regex leaves no text but the empty one"),
        ({"regex": "\ud800"}, "regex has half of a surrogate pair"),
        ({"regex": 3}, "regex must be text, got 3."),
        ({"json_schema": {"type": "strange"}}, "json_schema cannot be used: Invalid type: strange."),
        ({"json_schema": {"not": {}}}, 'json_schema cannot be used: Unimplemented keys: ["not"].'),
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "Unsatisfiable schema"),
        ({"json_schema": {"a": {1}}}, "json_schema cannot be used: "),
        ({"json_schema": "{"}, "json_schema is not JSON: "),
        ({"json_schema": "[]"}, "json_schema must be a JSON object, got []."),
        ({"json_schema": "5"}, "json_schema must be a JSON object, got 5."),
        ({"regex": "a\\"}, "regex ends with a backslash that escapes nothing; double it, or leave it out."),
        ({"regex": "(a\\)\\"}, "regex ends with a backslash that escapes nothing"),
        (
            {"json_schema": {"type": "string", "minLength": 5, "maxLength": 3}},
            "minLength (5) is greater than maxLength",
        ),
        ({"json_schema": "x" * 5000}, "its name is too long"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema cannot be used: "),
        ({"json_schema": "tests"}, "there is no file"),
        ({"json_schema": True}, "json_schema must be a JSON object, got True."),
        ({"json_object": 2}, "json_object must be True or False, got 2."),
        ({"grammar": "root ::= nosuch"}, "grammar is not valid GBNF: Rule 'nosuch' not found."),
        ({"grammar": 'root ::= "\\uD800"'}, "grammar has \\uD800, which is not a character."),
        ({"grammar": "start: nosuch"}, "grammar cannot be used: "),
        ({"grammar": "nosuch.lark"}, "grammar must be a grammar or a file with one; there is no file 'nosuch.lark'."),
        ({"choice": []}, "choice must be texts that are not empty, got []."),
        ({"choice": ["a", ""]}, "choice must be texts that are not empty"),
        ({"choice": 3}, "choice must be texts that are not empty, got 3."),
        ({"regex": "a", "choice": ["a"]}, "regex and choice cannot be combined; give one."),
        ({"json_object": True, "json_schema": {}}, "json_schema and json_object cannot be combined; give one."),
    ],
)
def test_bad_constraints(model: OpenELM, tokenizer: Tokenizer, options: dict, words: str, calls: list[int]) -> None:
    with pytest.raises(RequestError) as caught:
        stream_generate(model, tokenizer, "x", **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert calls == []


def test_llguidance_is_missing(model: OpenELM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"^regex needs the package llguidance: pip install '\.\[constraints\]'"):
        stream_generate(model, tokenizer, "x", regex="a+")


# The guide.


def test_the_python_of_the_guide() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "constraints.md").read_text(), re.DOTALL)
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(ROMEO|JULIET)\n(not )?to be\n", done.stdout)


# The command.


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--prompt", "ROMEO.", *words])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_only_the_document_goes_to_standard_output(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    code, out, err = command(capsys, "--json-schema", str(file), "--temp", "1", "--seed", "3")
    assert code == 0 and out.endswith("}\n") and "finish reason: stop" in err
    check_document(out.removesuffix("\n"))
    assert command(capsys, "--json-schema", json.dumps(SCHEMA), "--temp", "1", "--seed", "3")[1] == out


def test_the_command_says_that_a_document_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, "--json-schema", json.dumps(SCHEMA), "-m", "9", "--no-verbose")
    assert code == 0 and out.endswith("\n")
    assert err == "warning: The text was cut off after 9 tokens, at --max-tokens; it may be incomplete.\n"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--choice", "yes,no"], "yes|no"),
        (["--choice", "a", "--choice", "b,c"], "[abc]"),
        (["--choice", '["a,b", " c"]'], "a,b| c"),
        (["--regex", "[a-z]{3}"], "[a-z]{3}"),
        (["--grammar", LARK, "--temp", "1", "--seed", "1"], r"\(*[a-z]+\)*"),
        (["--json-object", "-m", "100", "--temp", "1", "--seed", "1"], r"\{.*\}?"),
    ],
)
def test_flags(capsys: pytest.CaptureFixture[str], words: list[str], pattern: str) -> None:
    code, out, _ = command(capsys, *words)
    assert code == 0 and re.fullmatch(pattern, out.removesuffix("\n"), re.DOTALL)


@pytest.mark.parametrize("value", ["[a", "[1]", ",", "[" * 100_000])
def test_bad_choices(capsys: pytest.CaptureFixture[str], value: str) -> None:
    code, out, err = command(capsys, "--choice", value)
    assert (code, out) == (2, "") and err.startswith("error: --choice must be ") and err.count("\n") == 1
