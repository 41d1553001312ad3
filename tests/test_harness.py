"""OpenELM as a model of lm-eval: beside lm-eval's own model, and without the mistakes of mlx_lm.evaluate."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import mlx_openelm
from mlx_openelm import load
from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation.likelihoods import Request
from mlx_openelm.generation.engine import Engine
from mlx_openelm.harness.answers import Answers
from mlx_openelm.harness.encoding import Encoder
from mlx_openelm.harness.scorer import Scorer
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest
from llama_models import LENGTH, llama, openelm

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from mlx_openelm.harness.lm import OpenELMLM

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

TEXTS = [json.loads(line)["text"] for line in (Path(__file__).parent / "fixtures/valid.jsonl").open()]
RECORDED = json.loads((Path(__file__).parent / "fixtures/evaluation/hugging-face.json").read_text())["answers"]
PAIRS = [
    ("ROMEO. But soft, what", " light"),
    ("To be, or not", "  to be"),
    ("To be, or not ", " to be"),  # white space belongs to the continuation
    ("Two lines\n\n", "and a third"),
    ("", "To be"),  # nothing but BOS before it
    ("Q: Why?\nA:", " no"),
    ("Q: Why?\nA:", " yes, as it were, and so be it"),
]


def instances(method: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(method, {}, one, 0) for one in arguments]


@pytest.fixture(scope="module")
def tokenizer():
    return load("tiny")[1]


@pytest.fixture(scope="module")
def model():
    return openelm()


@pytest.fixture
def lm(model, tokenizer):
    return OpenELMLM.of(Scorer(model, tokenizer, batch_size=3))


class HuggingFace:
    """lm-eval's own model with the same weights; where PyTorch is not installed, what it answered elsewhere.

    Args:
        lm: the model; None takes the answers of the fixture.
    """

    def __init__(self, add_bos_token: bool, lm: Any):
        self._add_bos_token, self._lm = add_bos_token, lm

    def ask(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """The answers to requests. A model that is here must give those of the fixture."""
        text = json.dumps([self._add_bos_token, method, arguments])
        recorded = RECORDED[hashlib.sha256(text.encode()).hexdigest()[:16]]
        if self._lm is not None:
            found = getattr(self._lm, method)(instances(method, arguments), disable_tqdm=True)
            is_same = found == recorded if method == "generate_until" else np.allclose(found, recorded, atol=1e-4)
            assert is_same, found
        return recorded


@pytest.fixture(scope="module")
def theirs(model):
    """lm-eval's model, for a value of `add_bos_token`."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers", "accelerate")):
        return lambda add_bos_token: HuggingFace(add_bos_token, None)
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    file = Path(mlx_openelm.__file__).parent / "assets/tiny/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    network = llama(model)

    def make(add_bos_token: bool) -> HuggingFace:
        lm = HFLM(
            pretrained=network, tokenizer=tokenizer, batch_size=4, max_length=LENGTH, device="cpu",
            add_bos_token=add_bos_token,
        )  # fmt: skip
        return HuggingFace(add_bos_token, lm)

    return make


def test_likelihoods_equal_lm_evals_own_model(lm, theirs, either_way):
    expected = theirs(True).ask("loglikelihood", PAIRS)
    found = lm.loglikelihood(instances("loglikelihood", PAIRS))
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]


def test_without_bos_a_long_prompt_is_cut_as_in_lm_evals_own_model(model, tokenizer, theirs):
    long = [(f"{TEXTS[0][:400]} ", TEXTS[0][400:430])]
    expected = theirs(True).ask("loglikelihood", long)[0][0]
    with pytest.warns(UserWarning, match="1 prompt did not fit into the 64 tokens"):
        found = Scorer(model, tokenizer, keep_bos=False).log_likelihoods(long)[0][0]
        with_bos = Scorer(model, tokenizer).log_likelihoods(long)[0][0]
    assert found == pytest.approx(expected, abs=1e-3)
    assert abs(with_bos - expected) > 1e-3


def test_rolling_likelihoods_equal_lm_evals_own_model(lm, theirs):
    texts = [("a",), ("To be, or not to be",), (TEXTS[0][:900],), (TEXTS[1][:200],)]
    expected = theirs(False).ask("loglikelihood_rolling", texts)  # it puts BOS in front itself
    assert lm.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) == pytest.approx(expected, abs=1e-3)


def test_generated_texts_equal_lm_evals_own_model(lm, theirs):
    arguments = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    prompts = [("To be, or not", arguments), ("ROMEO. But", {**arguments, "until": "o"})]
    assert lm.generate_until(instances("generate_until", prompts)) == theirs(True).ask("generate_until", prompts)


def test_generation_stops_at_until(lm, monkeypatch):
    """The text ends before it, and no token is computed after it."""
    steps: list[int] = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: steps.append(1) or step(self))
    whole = lm.scorer.generate([("ROMEO. But", {"max_gen_toks": 40})])[0]
    stop, all_steps = whole[8:11], len(steps)
    steps.clear()
    assert lm.scorer.generate([("ROMEO. But", {"max_gen_toks": 40, "until": [stop]})]) == [whole[: whole.index(stop)]]
    assert len(steps) < all_steps / 2
    with pytest.raises(RequestError, match="has no argument num_beams"):
        lm.scorer.generate([("ROMEO.", {"num_beams": 4})])
    for wrong, message in (
        ({"max_gen_toks": "many"}, "a number for max_gen_toks, got 'many'"),
        ({"temperature": [1]}, "a number for temperature"),
        ({"until": 3}, "a text, or a list of texts, for until"),
        ({"until": ["a", 3]}, "a text, or a list of texts, for until"),
        ({"until": {"a": 1}}, "a text, or a list of texts, for until"),
    ):
        with pytest.raises(RequestError, match=message):
            lm.scorer.generate([("ROMEO.", wrong)])
    with pytest.raises(RequestError, match="up to 64 tokens"):
        lm.scorer.generate([("ROMEO.", {"max_gen_toks": 64})])


def test_sampled_texts_do_not_depend_on_company(model, tokenizer):
    prompts = [(text[:50], {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}) for text in TEXTS[:1] * 5]
    prompts = [(f"{number} {text}", arguments) for number, (text, arguments) in enumerate(prompts)]
    together = Scorer(model, tokenizer, batch_size=5).generate(prompts)
    assert together == [Scorer(model, tokenizer).generate([one])[0] for one in prompts]
    assert len(set(together)) > 1


def test_repeated_requests_are_samples_of_their_own(model, tokenizer):
    """As tasks that take the most frequent of several answers need them; the seed decides all of them."""
    sampled = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    prompts = [("ROMEO. But", sampled)] * 4 + [("To be, or", sampled)]

    def texts(seed: int, arguments: dict[str, Any] | None = None) -> list[str]:
        wanted = prompts if arguments is None else [(prompt, arguments) for prompt, _ in prompts]
        return Scorer(model, tokenizer, seed=seed, batch_size=3).generate(wanted)

    found = texts(1)
    assert len(set(found[:4])) == 4
    assert texts(1) == found
    assert all(one != other for one, other in zip(texts(2), found, strict=True))
    own = texts(1, {**sampled, "seed": 7})
    assert own == texts(2, {**sampled, "seed": 7}) and len(set(own[:4])) == 4
    assert own[1] == texts(1, {**sampled, "seed": 8})[0]
    greedy = texts(1, {"max_gen_toks": 8})
    assert greedy == texts(2, {"max_gen_toks": 8}) and len(set(greedy[:4])) == 1


def test_answers_that_are_kept_are_those_of_their_seed(model, tokenizer, tmp_path):
    prompts = [("ROMEO. But", {"temperature": 1.0, "max_gen_toks": 8})] * 2
    found = []
    for seed, computed in ((1, 2), (1, 0), (2, 2)):
        setting = Scorer(model, tokenizer).setting
        with Answers(setting, tmp_path / "answers.jsonl") as answers:
            scorer = Scorer(model, tokenizer, seed=seed, answers=answers)
            found.append(scorer.generate(prompts))
            assert scorer.computed == computed
    assert found[0] == found[1] != found[2]


class TestMistakesOfMlxLm:
    """What mlx_lm.evaluate does wrong."""

    def test_prompts_are_cut_to_what_the_model_was_trained_on(self, model, tokenizer, monkeypatch):
        """mlx_lm.evaluate cuts at 8192 tokens, whatever the model."""
        lengths: list[int] = []
        run = type(model).hidden_states
        monkeypatch.setattr(
            type(model), "hidden_states", lambda self, ids, *rest: lengths.append(ids.shape[1]) or run(self, ids, *rest)
        )
        with pytest.warns(UserWarning, match="did not fit"):
            Scorer(model, tokenizer).log_likelihoods([(TEXTS[0][:2000], " so")])
        assert max(lengths) == LENGTH

    def test_bos_stays_when_a_prompt_is_cut(self, tokenizer):
        encoder = Encoder(tokenizer, 8)
        [request] = encoder.requests([1, *range(10, 30)], [40, 41])
        assert request == Request((1, *range(24, 30)), (40, 41))
        assert encoder.prompt(TEXTS[0][:400], 3) == [1, *tokenizer.encode(TEXTS[0][:400])[-4:]]
        assert Encoder(tokenizer, 8, keep_bos=False).requests([1, *range(10, 30)], [40, 41]) == [
            Request(tuple(range(23, 30)), (40, 41))
        ]

    def test_the_first_token_of_a_text_counts(self, model, tokenizer):
        for text in ("a", "To be, or not to be"):
            ids = tokenizer.encode(text)
            logprobs = mx.log(mx.softmax(model(mx.array([ids[:-1]]))[0], axis=-1))
            expected = sum(logprobs[place, token].item() for place, token in enumerate(ids[1:]))
            assert Scorer(model, tokenizer).rolling([text])[0] == pytest.approx(expected, abs=1e-4)

    def test_continuations_are_scored_together_without_copies_of_what_is_known(self, lm, monkeypatch):
        """mlx_lm.evaluate runs the model once for each continuation, after a copy of the whole cache."""
        calls: list[int] = []
        run = type(lm.scorer.model).hidden_states
        monkeypatch.setattr(
            type(lm.scorer.model), "hidden_states", lambda self, *given: calls.append(1) or run(self, *given)
        )
        lm.scorer.batch_size = 8
        lm.loglikelihood(instances("loglikelihood", [("Who goes there?", f" {name} it is") for name in "ABCDEFGH"]))
        assert len(calls) == 2


def test_windows_score_each_token_once_with_full_contexts(tokenizer):
    encoder = Encoder(tokenizer, 16)
    ids = tokenizer.encode(TEXTS[0][:300], add_bos=False)
    windows = encoder.rolling(TEXTS[0][:300])
    assert [token for window in windows for token in window.continuation] == ids
    assert windows[0].context == (1,)
    assert {len(window.context) + len(window.continuation) for window in windows} == {17}
    assert len(ids) % 16  # so that the last window reads more than it predicts
    last = windows[-1]
    assert [*last.context, *last.continuation] == ids[-17:]
    assert encoder.rolling("") == []
    # A continuation that does not fit goes on from the last token of its context.
    assert [part.context[0] for part in encoder.requests([1, 7], list(range(100, 120)))] == [7, 103]


def test_an_answered_request_is_not_asked_again(model, tokenizer, tmp_path):
    from mlx_openelm.harness.answers import Answers

    first = Scorer(model, tokenizer)
    with Answers(first.setting, tmp_path / "a.jsonl") as answers:
        scorer = Scorer(model, tokenizer, answers=answers)
        some = scorer.log_likelihoods(PAIRS[:3])
        drawn = scorer.generate([("a", {"max_gen_toks": 4})] * 2)
    with Answers(first.setting, tmp_path / "a.jsonl") as answers:
        scorer = Scorer(model, tokenizer, answers=answers)
        assert scorer.log_likelihoods(PAIRS)[:3] == some
        assert scorer.computed == len(PAIRS) - 3
        assert scorer.generate([("a", {"max_gen_toks": 4})] * 2) == drawn
        assert scorer.computed == len(PAIRS) - 3
    other = openelm()
    other.transformer.norm.weight = other.transformer.norm.weight * 2
    with Answers(Scorer(other, tokenizer).setting, tmp_path / "a.jsonl") as answers:
        scorer = Scorer(other, tokenizer, answers=answers)
        assert scorer.log_likelihoods(PAIRS)[0] != pytest.approx(some[0], abs=1e-3)
    # The same texts with another tokenizer are other tokens, and another limit ends other texts.
    file = Path(__file__).parent / "fixtures/shakespeare-hf/tokenizer.model"
    settings = [
        Scorer(model, Tokenizer.from_file(file, eos_token_ids=ends), max_gen_toks=count).setting
        for ends, count in (([2], 256), ([5], 256), ([2], 8))
    ]
    assert settings[0] == first.setting
    assert settings[1] != first.setting and settings[2] != first.setting


def test_lm_evals_cache_keeps_models_apart(model, tokenizer, tmp_path):
    pytest.importorskip("sqlitedict")
    from lm_eval.api.model import CachingLM

    other = openelm()
    other.transformer.norm.weight = other.transformer.norm.weight * 2
    requests = instances("loglikelihood", PAIRS)
    answers = []
    for one in (model, other, model):
        lm = OpenELMLM.of(Scorer(one, tokenizer))
        caching = CachingLM(lm, str(tmp_path / "cache.db"))
        answers.append((caching.loglikelihood(requests), lm.scorer.computed))
        caching.dbdict.close()
    assert answers[0][0] == answers[2][0] != answers[1][0]
    assert [computed for _, computed in answers] == [len(PAIRS), len(PAIRS), 0]


def test_chats_are_rendered_and_their_control_tokens_encoded(lm, tokenizer):
    history = [{"role": "user", "content": "Who goes there?"}]
    lm.chat_template("corenet")
    text = lm.apply_chat_template(history)
    assert text.startswith("<s>")
    ids = lm.tok_encode(text)
    assert ids == tokenizer.apply_chat_template(history, "corenet")
    assert ids.count(1) == 1 and 2 in ids
    unfinished = lm.apply_chat_template([*history, {"role": "assistant", "content": "The answer is"}], False)
    assert unfinished.endswith("The answer is")
    assert lm.chat_template(True) == "corenet"
    assert lm.chat_template(False) is None


def test_lm_eval_finds_the_model_by_name():
    assert get_model("openelm") is OpenELMLM
    lm = OpenELMLM.create_from_arg_string("pretrained=tiny,max_length=128", {"batch_size": "4", "device": "cuda:0"})
    assert (lm.batch_size, lm.max_length, lm.prefix_token_id, lm.eot_token_id) == (4, 128, 1, 2)
    assert np.isfinite(lm.loglikelihood(instances("loglikelihood", PAIRS[:1]), disable_tqdm=True)[0][0])
    for wrong, message in (
        ({"batch_size": "many"}, "batch_size must be a whole number or auto"),
        ({"add_bos_token": False}, "add_bos_token must be true"),
        ({"max_length": 5000}, "max_length must be from 2 to 1024"),
    ):
        with pytest.raises(RequestError, match=message):
            OpenELMLM("tiny", **wrong)
