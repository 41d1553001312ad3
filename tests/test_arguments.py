"""Arguments of the public functions: paths of every class, and errors for things of another kind."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import mlx_openelm
from mlx_openelm import (
    AdapterSwitch,
    Engine,
    EvaluateOptions,
    FineTuneOptions,
    GRPOOptions,
    Loading,
    PreferenceOptions,
    PretrainOptions,
    QuantizeOptions,
    RequestError,
    average,
    batch_generate,
    convert,
    dpo,
    evaluate,
    finetune,
    generate,
    grpo,
    load,
    load_prompt_cache,
    make_prompt_cache,
    perplexity,
    pretrain,
    quantize,
    save_prompt_cache,
    stream_generate,
    train_tokenizer,
)
from mlx_openelm.cache import KVCache
from mlx_openelm.training.data.corpus import packed

import mlx.core as mx
import pytest
from quantization_models import write_tiny


class AnyPath:
    """A path that is neither text nor a `Path`."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture(scope="module")
def loaded():
    return load("tiny", dtype="float32")


@pytest.fixture
def examples(tmp_path):
    (tmp_path / "data").mkdir()
    lines = [{"text": f"To be, or not to be: {number}"} for number in range(20)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 60)
    return tmp_path


def test_a_path_may_be_of_any_class(examples, monkeypatch):
    monkeypatch.setattr(packed, "WINDOW", 1 << 12)
    kind, source = AnyPath, write_tiny(examples / "tiny")
    full, data, text = kind(examples / "full"), kind(examples / "data"), kind(examples / "text.txt")
    convert(kind(source), full, progress=False)
    adapter = kind(examples / "adapter")
    options = FineTuneOptions(train=True, data=data, iters=1, batch_size=1, rank=2, adapter_path=adapter)
    loading = Loading(tokenizer=full)
    finetune(full, options, loading=loading, progress=False)
    model, tokenizer = load(full, adapter, tokenizer=full)
    load(full, [adapter])
    assert perplexity(model, tokenizer, text, sequence_length=32, progress=False).tokens > 0
    quantize(
        full, kind(examples / "q4"), QuantizeOptions(method="gptq", calibration=text, num_samples=1), progress=False
    )
    average([full, full], kind(examples / "mean"), progress=False)
    train_tokenizer(text, kind(examples / "tokenizer"), vocab_size=280, progress=False)
    cache = make_prompt_cache(model)
    generate(model, tokenizer, "To", prompt_cache=cache, max_tokens=1)
    save_prompt_cache(kind(examples / "cache"), cache)
    assert len(load_prompt_cache(kind(examples / "cache"))) == len(cache)
    run = PretrainOptions(data=text, output=kind(examples / "run"), iters=1, batch_size=1, max_seq_length=16)
    pretrain(full, run, progress=False)
    assert json.loads((examples / "run" / "run.json").read_text())["options"]["data"][0]["path"] == str(
        examples / "text.txt"
    )


@pytest.mark.parametrize("options", [PreferenceOptions, GRPOOptions])
def test_options_hold_the_text_of_a_path(options, tmp_path):
    chosen = options(train=True, data=tmp_path, adapter_path=AnyPath(tmp_path / "adapter"))
    assert (chosen.data, chosen.adapter_path) == (str(tmp_path), str(tmp_path / "adapter"))


def test_an_evaluation_takes_paths(tmp_path):
    chosen = EvaluateOptions(suite="commonsense", data=tmp_path, output=tmp_path / "result.json")
    assert (chosen.data, chosen.output) == (str(tmp_path), str(tmp_path / "result.json"))


@pytest.mark.parametrize("value", [None, 5, ["tiny"], b"q4"])
@pytest.mark.parametrize(
    "call",
    [
        load,
        lambda value: finetune(value, FineTuneOptions()),
        lambda value: dpo(value, PreferenceOptions()),
        lambda value: grpo(value, GRPOOptions()),
        lambda value: evaluate(value, EvaluateOptions(suite="commonsense")),
        lambda value: quantize(value, "x"),
        lambda value: quantize("tiny", value),
        lambda value: convert("tiny", value),
        lambda value: train_tokenizer("x", value),
        lambda value: save_prompt_cache(value, [KVCache()]),
        load_prompt_cache,
    ],
)
def test_what_is_no_path_is_refused(call, value):
    with pytest.raises(RequestError, match=r" must be a name or a path, got "):
        call(value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("tiny", r"not its name: model, tokenizer = load\('tiny'\)"),
        (Path("my/model"), r"not its name: model, tokenizer = load\('my/model'\)"),
        (None, r"not None: model, tokenizer = load\(name\)"),
        (mx.array(1), r"not mlx.core.array: model, tokenizer = load\(name\)"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream_generate, batch_generate, Engine, perplexity])
def test_only_what_load_gives_can_generate(function, value, reason, loaded):
    further = {generate: ["a"], stream_generate: ["a"], batch_generate: [["a"]], perplexity: [["a"]]}.get(function, [])
    with pytest.raises(RequestError, match=rf"^model must be a loaded model, {reason}\.$"):
        function(value, loaded[1], *further)
    with pytest.raises(RequestError, match=rf"^tokenizer must be a loaded tokenizer, {reason}\.$"):
        function(loaded[0], value, *further)


@pytest.mark.parametrize("function", [AdapterSwitch, make_prompt_cache])
def test_a_model_is_needed(function):
    with pytest.raises(RequestError, match=r"^model must be a loaded model, not None"):
        function(None)


def arrays(shape, dtype=mx.int32):
    return lambda logprobs: mx.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: finetune("tiny", {"train": True}), "options must be FineTuneOptions, got {'train': True}."),
        (lambda m, t: finetune(m, FineTuneOptions()), "model must be a name or a path, got "),
        (lambda m, t: pretrain(m, PretrainOptions(data="x")), "model must be a name, a path or sizes, not a loaded"),
        (lambda m, t: quantize("tiny", "x", {"q_bits": 4}), "options must be QuantizeOptions, got {'q_bits': 4}."),
        (lambda m, t: perplexity(m, t, [1]), "data must be the path of a text, or a list of texts, got [1]."),
        (lambda m, t: perplexity(m, t, None), "data must be the path of a text, or a list of texts, got None."),
        (lambda m, t: perplexity(m, t, ["a"], sequence_length="8"), "must be a whole number from 1 to 1024, got '8'."),
        (lambda m, t: t.encode(["a", "b"]), "Text to encode must be a string, got ['a', 'b']; encode several one"),
        (lambda m, t: t.encode(None), "Text to encode must be a string, got None; encode several one by one."),
        (lambda m, t: t.decode("abc"), "Ids to decode must be whole numbers in a flat list, got 'abc'."),
        (lambda m, t: t.decode(None), "Ids to decode must be whole numbers in a flat list, got None."),
        (lambda m, t: train_tokenizer(None, "x"), "data must be a path, or several, got None."),
        (lambda m, t: train_tokenizer("x", "y", vocab_size="9"), "vocab_size must be a whole number, 1 to 1048576,"),
        (lambda m, t: average("real", "av"), "models must be a list of checkpoints, got 'real'."),
        (lambda m, t: save_prompt_cache("z", make_prompt_cache(m), ["a"]), "metadata must be strings by name, got"),
        (lambda m, t: save_prompt_cache("z", 5), "must be a list of caches, one for each layer, got 5."),
        (lambda m, t: convert("tiny", "x", quantize=True, q_bits="4"), "in mode affine, got '4'."),
        (lambda m, t: quantize("tiny", "x", target_bpw="4"), "target_bpw must be a positive number, got '4'."),
    ],
)  # fmt: skip
def test_arguments_of_another_kind_are_refused(call, message, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError) as caught:
        call(*loaded)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_processors": lambda ids, logits: logits}, "logits_processors must be a list of functions, got <func"),
        ({"logits_processors": [5]}, "logits_processors must be a list of functions, got [5]."),
        ({"logits_processors": [lambda ids, logits: None]}, "A logits processor must return the new logits, got None."),
        ({"sampler": 5}, "sampler must be a function, got 5."),
        ({"sampler": lambda logprobs: 5}, "The sampler must return an array of tokens, got 5."),
        ({"sampler": arrays((1, 1))}, "whole numbers of shape (1,), got mlx.core.int32 of shape (1, 1)."),
        ({"sampler": arrays(())}, "whole numbers of shape (1,), got mlx.core.int32 of shape ()."),
        ({"sampler": arrays((1,), mx.float32)}, "whole numbers of shape (1,), got mlx.core.float32 of shape (1,)."),
        ({"prompt_cache": [KVCache()] * 6}, "The prompt cache has the same object for several layers; make one with"),
        ({"prompt_cache": 5}, "The prompt cache must be a list of caches, one for each layer, got 5."),
        ({"max_tokens": "2"}, "max_tokens must be a whole number, 1 or more, or -1 for no limit, got '2'."),
        ({"max_tokens": 2.0}, "max_tokens must be a whole number, 1 or more, or -1 for no limit, got 2.0."),
        ({"max_tokens": True}, "max_tokens must be a whole number, 1 or more, or -1 for no limit, got True."),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, or -1 for no limit, got 0."),
        ({"temp": mx.array(0.5)}, "temp must be a number between 0 and 1000, got array(0.5, dtype=float32)."),
        ({"temp": -1}, "temp must be between 0 and 1000, got -1."),
        ({"kv_bits": "4"}, "kv_bits must be 2, 3, 4, 5, 6 or 8, got '4'."),
        ({"prompt": "caf\udce9"}, "The prompt is not UTF-8 text; give the prompt in UTF-8."),
        ({"stop": "caf\udce9"}, "stop has half of a surrogate pair, which is not a character: 'caf\\udce9'."),
    ],
)  # fmt: skip
def test_arguments_of_generate_of_another_kind_are_refused(arguments, message, loaded):
    with pytest.raises(RequestError) as caught:
        generate(*loaded, **{"prompt": "a", "max_tokens": 2} | arguments)
    assert str(caught.value).startswith(message) or str(caught.value).endswith(message)


def mlx_lm_names():
    pytest.importorskip("mlx_lm")
    from mlx_lm import convert as _  # noqa: F401 (names the modules below)

    module = sys.modules["mlx_lm.generate"]
    return {
        "batch_generate": [module.batch_generate, module.BatchGenerator],
        "generate": [module.generate, module.stream_generate, module.generate_step, module.speculative_generate_step],
        "load": [sys.modules["mlx_lm.utils"].load],
        "convert": [sys.modules["mlx_lm.convert"].convert],
    }


@pytest.mark.parametrize("name", ["batch_generate", "generate", "load", "convert"])
def test_every_argument_of_mlx_lm_works_or_is_answered(name):
    function = getattr(mlx_openelm, name)
    theirs = {word for other in mlx_lm_names()[name] for word in inspect.signature(other).parameters}
    theirs -= {"self", "kwargs", *inspect.signature(function).parameters}
    for word in theirs:
        with pytest.raises(RequestError, match=r"is not offered|is not needed|did you mean") as caught:
            function(**{word: True})
        assert "prefill_step_size" not in str(caught.value)
