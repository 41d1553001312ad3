"""mlx-lm's own functions with our model and our tokenizer, and our tokenizer's names beside transformers'."""

from __future__ import annotations

import json
import threading
import urllib.request
from argparse import Namespace
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, stream_generate
from mlx_openelm.errors import RequestError
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest

mlx_lm = pytest.importorskip("mlx_lm")
server = pytest.importorskip("mlx_lm.server")
tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils")
datasets = pytest.importorskip("mlx_lm.tuner.datasets")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).parent / "fixtures"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
PROMPTS, IDS, GREEDY = REFERENCE["prompts"], REFERENCE["ids"], REFERENCE["greedy"]
SOME_PROMPTS = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)), 3]
TALK = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "Nay, answer me."}]
TEXTS = ["Hi", "<s>Hi", "<s> Hi", "Hi</s>", "<s><s>Hi", "a</s>b <unk> c", "</s>", "", "<s>", "x <s", "naïve\n 漢字"]


@pytest.fixture(scope="module")
def ours() -> Any:
    return load(FIXTURES / "shakespeare-hf", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(ours: Any) -> Tokenizer:
    return ours[1]


@pytest.fixture(scope="module")
def wrapped(tokenizer: Tokenizer) -> Any:
    """As docs/coming-from-mlx-lm.md says to wrap the tokenizer."""
    wrapper, detokenizer = tokenizer_utils.TokenizerWrapper, tokenizer_utils.SPMStreamingDetokenizer
    return wrapper(tokenizer, detokenizer, eos_token_ids=tokenizer.eos_token_ids)


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same tokenizer, read by transformers."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


# Their generators.


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_their_generators_give_our_greedy_tokens(ours: Any, prompt: int) -> None:
    for given in (PROMPTS[prompt], f"<s>{PROMPTS[prompt]}", IDS[prompt]):
        pieces = list(mlx_lm.stream_generate(*ours, given, max_tokens=24))
        assert [piece.token for piece in pieces] == GREEDY[prompt][:24]
        assert pieces[0].prompt_tokens == len(IDS[prompt])
    bos_only = [piece.token for piece in mlx_lm.stream_generate(*ours, IDS[prompt][1:], max_tokens=24)]
    assert bos_only != GREEDY[prompt][:24]  # so a missing BOS would be noticed


@pytest.mark.parametrize("prompt", SOME_PROMPTS)
def test_the_wrapped_tokenizer_gives_our_text(ours: Any, wrapped: Any, prompt: int) -> None:
    expected = generate(*ours, PROMPTS[prompt], max_tokens=60)
    assert mlx_lm.generate(ours[0], wrapped, PROMPTS[prompt], max_tokens=60) == expected
    # Without the wrapper, their detokenizer starts a new text after each line break, which has no space in front.
    plain = mlx_lm.generate(*ours, PROMPTS[prompt], max_tokens=60)
    assert plain.replace("\n ", "\n") == expected.replace("\n ", "\n")


def test_their_batches(ours: Any, wrapped: Any) -> None:
    for tokenizer in (ours[1], wrapped):
        done = mlx_lm.batch_generate(ours[0], tokenizer, IDS, max_tokens=30, return_token_ids=True)
        assert done.token_ids == [tokens[:30] for tokens in GREEDY]
        assert done.texts == [ours[1].decode(tokens[:30]) for tokens in GREEDY]


def test_their_batches_stop_at_every_token_that_ends_a_text(ours: Any) -> None:
    ending = ours[1].with_config({"eos_token": ours[1].id_to_token(GREEDY[0][5])})
    done = mlx_lm.batch_generate(ours[0], ending, IDS[:1], max_tokens=30, return_token_ids=True)
    assert done.token_ids == [GREEDY[0][: GREEDY[0].index(GREEDY[0][5])]]


@pytest.mark.parametrize("drafted", [1, 3])
def test_their_speculative_decoding(ours: Any, drafted: int) -> None:
    """Our 4-bit model drafts for the full one."""
    model, tokenizer = ours
    draft, _ = load("tiny")
    pieces = mlx_lm.stream_generate(
        model, tokenizer, IDS[0], max_tokens=24, draft_model=draft, num_draft_tokens=drafted
    )
    pieces = list(pieces)
    assert [piece.token for piece in pieces] == GREEDY[0][:24]
    assert 0 < sum(piece.from_draft for piece in pieces) < 24


@pytest.fixture
def address(ours: Any, wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """mlx-lm's server, on loopback, with our model and tokenizer."""
    options = {"temp": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 20, "num_draft_tokens": 3}
    sizes = {"prompt_cache_size": 4, "decode_concurrency": 4, "prompt_concurrency": 2, "prefill_step_size": 64}
    unset = ("model", "adapter_path", "draft_model", "chat_template", "kv_bits", "prompt_cache_bytes", "pipeline")
    arguments = Namespace(
        **options, **sizes, **dict.fromkeys(unset), allowed_origins=["*"], trust_remote_code=False,
        chat_template_args={}, use_default_chat_template=False, kv_group_size=64, quantized_kv_start=0,
    )  # fmt: skip
    provider = server.ModelProvider(arguments)
    provider.model, provider.tokenizer, provider.is_batchable = ours[0], wrapped, True
    monkeypatch.setattr(provider, "load", lambda *_: (ours[0], wrapped))
    provider.model_key = ("ours", None, None)
    responses = server.ResponseGenerator(provider, server.LRUPromptCache(4))

    def handle(*args: Any) -> Any:
        return server.APIHandler(responses, *args, system_fingerprint="test")

    http = ThreadingHTTPServer(("127.0.0.1", 0), handle)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}"
    http.shutdown()
    http.server_close()
    thread.join()
    responses.stop_and_join()


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_their_server(ours: Any, address: str) -> None:
    done = post(f"{address}/v1/completions", {"prompt": PROMPTS[0], "max_tokens": 20})
    assert done["choices"][0]["text"] == generate(*ours, PROMPTS[0], max_tokens=20)
    assert done["usage"]["prompt_tokens"] == len(IDS[0])
    ids = ours[1].apply_chat_template(TALK[:1])
    done = post(
        f"{address}/v1/chat/completions", {"messages": TALK[:1], "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    )
    assert done["choices"][0]["message"]["content"] == generate(*ours, ids, max_tokens=20)
    assert done["usage"]["prompt_tokens"] == len(ids)


# Their data sets.


@pytest.mark.parametrize("mask", [False, True])
def test_their_data_sets(tokenizer: Tokenizer, mask: bool) -> None:
    config = Namespace(mask_prompt=mask)
    whole = tokenizer.apply_chat_template(TALK, add_generation_prompt=False)
    start = len(tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)) if mask else 0
    pair = {"prompt": TALK[0]["content"], "completion": TALK[1]["content"]}
    for record in ({"messages": TALK}, pair):
        assert datasets.create_dataset([record], tokenizer, config).process(record) == (whole, start)
    if not mask:
        text = datasets.create_dataset([{"text": PROMPTS[0]}], tokenizer, config).process({"text": PROMPTS[0]})
        assert text == ([*IDS[0], 2], 0)


# Beside transformers.


@pytest.mark.parametrize("text", [*TEXTS, *PROMPTS])
def test_encoding_with_control_tokens(tokenizer: Tokenizer, theirs: Any, text: str) -> None:
    expected = theirs.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    once = expected if expected[:1] == [1] else [1, *expected]
    assert tokenizer.encode(text, add_special_tokens=True) == once


def test_a_rendered_chat_has_the_ids_of_the_chat(tokenizer: Tokenizer, theirs: Any) -> None:
    for options in ({}, {"add_generation_prompt": False}, {"template": "plain"}, {"continue_final_message": True}):
        ids = tokenizer.apply_chat_template(TALK, **options)
        text = tokenizer.apply_chat_template(TALK, tokenize=False, **options)
        assert text.startswith("<s>") and ids.count(1) == 1
        assert tokenizer.encode(text, add_special_tokens=False) == ids == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.apply_chat_template(TALK, return_dict=True, **options) == {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
        }


def test_a_rendered_chat_of_a_template_without_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "q.jinja").write_text("{% for m in messages %}{{ mark }} {{ m.content }}{{ eos_token }}{% endfor %}")
    given = {"template": tmp_path / "q.jinja", "mark": "Q:", "enable_thinking": False}
    text = tokenizer.apply_chat_template(TALK[:1], tokenize=False, **given)
    assert text == "<s>Q: Who is there?</s>"
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.apply_chat_template(TALK[:1], **given)


def test_the_turn_that_is_opened_by_default(tokenizer: Tokenizer) -> None:
    for messages, opens in ((TALK[:1], True), (TALK, False)):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=opens)
        other = tokenizer.apply_chat_template(messages, add_generation_prompt=not opens)
        assert tokenizer.apply_chat_template(messages) == expected != other


def test_options_that_are_not_variables_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="apply_chat_template has no option padding, return_tensors"):
        tokenizer.apply_chat_template(TALK, return_tensors="np", padding=True)


def test_names_and_values_of_transformers(tokenizer: Tokenizer, theirs: Any) -> None:
    names = ["bos_token", "eos_token", "unk_token", "pad_token", "vocab_size", "chat_template"]
    names += [f"{name}_token_id" for name in ("bos", "eos", "unk", "pad")]
    for name in names:
        assert getattr(tokenizer, name) == getattr(theirs, name), name
    assert tokenizer.all_special_ids == sorted(theirs.all_special_ids)
    assert sorted(tokenizer.all_special_tokens) == sorted(theirs.all_special_tokens)
    assert len(tokenizer) == len(theirs) and tokenizer.get_vocab() == theirs.get_vocab()
    ids = IDS[3]
    assert tokenizer.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    assert tokenizer.convert_ids_to_tokens(2) == theirs.convert_ids_to_tokens(2) == "</s>"
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokenizer.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens) == ids
    assert tokenizer.convert_tokens_to_ids("</s>") == 2 and tokenizer.convert_tokens_to_ids("no such token") is None


def test_a_padding_token(tokenizer: Tokenizer) -> None:
    padded = tokenizer.with_config({"pad_token": "<unk>"})
    assert (padded.pad_token, padded.pad_token_id) == ("<unk>", 0)
    assert padded.encode("Hi") == tokenizer.encode("Hi")


def test_decoding_lists_arrays_and_single_ids(tokenizer: Tokenizer, theirs: Any) -> None:
    ids = [*IDS[3], 2]
    text = theirs.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    for given in (tuple(ids), mx.array(ids), np.array(ids), iter(ids)):
        assert tokenizer.decode(given) == text
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<s>{text}</s>"
    for given in (ids[1], mx.array(ids[1]), np.int64(ids[1])):
        assert tokenizer.decode(given) == theirs.decode([ids[1]])


def test_control_tokens_in_a_prompt_stay_text_unless_it_begins_with_bos(ours: Any) -> None:
    model, tokenizer = ours
    pieces = {text: next(stream_generate(model, tokenizer, text)).prompt_tokens for text in ("a</s>b", "<s>a</s>b")}
    assert pieces["a</s>b"] == len(tokenizer.encode("a</s>b")) > 5
    assert pieces["<s>a</s>b"] == len(tokenizer.encode("<s>a</s>b", add_special_tokens=False)) == 4
