"""The calls in mlx-lm's README, with our import: the same arguments, and what mlx-lm makes passed to our functions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from mlx_openelm import convert, generate, load, stream_generate
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format

import mlx.core as mx
import pytest
from fake_hub import FakeHub

mlx_lm = pytest.importorskip("mlx_lm")
their_cache = pytest.importorskip("mlx_lm.models.cache")
sample_utils = pytest.importorskip("mlx_lm.sample_utils")

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
PROMPT, IDS, GREEDY = REFERENCE["prompts"][0], REFERENCE["ids"][0], REFERENCE["greedy"][0]
CHAT = [{"role": "user", "content": "Write a story about Einstein"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def ours() -> Any:
    return load(FOLDER, dtype="fp32")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model and tokenizer, loaded by mlx-lm."""
    folder = tmp_path_factory.mktemp("converted") / "mlx"
    convert(FOLDER, folder, dtype="float32")
    return mlx_lm.load(str(folder))


def tokens_of(pieces: Any) -> list[int]:
    return [piece.token for piece in pieces]


# generate and stream_generate.


def test_generate_with_verbose_prints_what_mlx_lm_prints(ours: Any, theirs: Any, capsys: Any) -> None:
    text = generate(*ours, prompt=PROMPT, max_tokens=48, verbose=True)
    printed = capsys.readouterr()
    mlx_lm.generate(*theirs, prompt=PROMPT, max_tokens=48, verbose=True)
    expected = capsys.readouterr().out

    def without_numbers(output: str) -> str:
        return re.sub(r"\d+\.\d{3}", "N", output)

    assert without_numbers(printed.out) == without_numbers(expected)
    assert f"=\n{text}\n=" in printed.out and printed.err == ""
    speeds = [float(number) for number in re.findall(r"(\d+\.\d{3}) tokens-per-sec", printed.out)]
    assert len(speeds) == 2 and min(speeds) > 1


def test_generate_is_silent_by_default_and_positional_verbose_works(ours: Any, capsys: Any) -> None:
    text = generate(*ours, PROMPT, max_tokens=3)
    assert capsys.readouterr().out == ""
    assert generate(*ours, PROMPT, True, max_tokens=3) == text
    assert text in capsys.readouterr().out


def test_verbose_says_when_nothing_was_generated(ours: Any, capsys: Any) -> None:
    model, tokenizer = ours
    ends = tokenizer.with_config({"eos_token": tokenizer.id_to_token(GREEDY[0])})
    assert generate(model, ends, PROMPT, verbose=True) == ""
    assert capsys.readouterr().out == "==========\n\n==========\nNo text generated for this prompt\n"


def test_the_chat_example(ours: Any) -> None:
    model, tokenizer = ours
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert prompt.count(tokenizer.bos_token_id) == 1
    text = generate(model, tokenizer, prompt=prompt, max_tokens=8)
    assert "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=8)) == text
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert generate(model, tokenizer, prompt=rendered, max_tokens=8) == text


@pytest.mark.parametrize("kind", [list, tuple, mx.array])
def test_prompts_of_tokens(ours: Any, kind: Any) -> None:
    assert tokens_of(stream_generate(*ours, kind(IDS), max_tokens=48)) == GREEDY


def test_the_fields_of_a_response(ours: Any) -> None:
    *_, last = stream_generate(*ours, PROMPT, max_tokens=4)
    *_, their_last = mlx_lm.stream_generate(*ours, PROMPT, max_tokens=4)
    for name in ("token", "prompt_tokens", "generation_tokens", "finish_reason"):
        assert getattr(last, name) == getattr(their_last, name)
    assert last.logprob == pytest.approx(their_last.logprobs[last.token].item(), abs=1e-4)


# sampler and logits_processors.


def test_samplers_of_mlx_lm(ours: Any) -> None:
    assert tokens_of(stream_generate(*ours, PROMPT, max_tokens=48, sampler=sample_utils.make_sampler(0.0))) == GREEDY
    sampler = sample_utils.make_sampler(0.9, top_p=0.95, min_p=0.02, top_k=50)
    mx.random.seed(3)
    expected = tokens_of(mlx_lm.stream_generate(*ours, PROMPT, max_tokens=24, sampler=sampler))
    mx.random.seed(3)
    assert tokens_of(stream_generate(*ours, PROMPT, max_tokens=24, sampler=sampler)) == expected
    assert expected != GREEDY[:24]


def test_logits_processors_of_mlx_lm(ours: Any) -> None:
    processors = sample_utils.make_logits_processors({GREEDY[3]: -5.0}, 1.3, 20, presence_penalty=0.5)
    expected = tokens_of(mlx_lm.stream_generate(*ours, PROMPT, max_tokens=32, logits_processors=processors))
    got = tokens_of(stream_generate(*ours, PROMPT, max_tokens=32, logits_processors=processors))
    assert got == expected != GREEDY[:32]


def test_logits_processors_come_after_our_penalties(ours: Any) -> None:
    seen = []

    def only(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append((tokens.tolist(), logits[0, 5].item()))
        return mx.where(mx.arange(logits.shape[-1]) == 7, logits, -mx.inf)

    pieces = list(stream_generate(*ours, IDS, max_tokens=2, logits_processors=[only], logit_bias={5: 1e6}))
    assert tokens_of(pieces) == [7, 7]
    assert [tokens for tokens, _ in seen] == [IDS, [*IDS, 7]] and all(logit > 9e5 for _, logit in seen)


@pytest.mark.parametrize("options", [{"temp": 0.5}, {"top_k": 4, "seed": 1}])
def test_a_sampler_and_what_it_replaces(ours: Any, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"sampler replaces {', '.join(options)}; give one or the other"):
        stream_generate(*ours, PROMPT, sampler=sample_utils.make_sampler(0.0), **options)


# The guide.


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("index", [0, 1])
def test_the_python_of_the_guide_runs_as_written(index: int, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "tests").symlink_to(FIXTURES.parent)
    guide = (FIXTURES.parents[1] / "docs" / "coming-from-mlx-lm.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)[index], {})
    assert len(capsys.readouterr().out) > 50
    assert (tmp_path / "shakespeare-4bit").exists() == (index == 0)


# Prompt caches.


def test_prompt_caches_of_mlx_lm(ours: Any, tmp_path: Path) -> None:
    model, tokenizer = ours
    cache = their_cache.make_prompt_cache(model)
    assert tokens_of(stream_generate(model, tokenizer, IDS, max_tokens=10, prompt_cache=cache)) == GREEDY[:10]
    their_cache.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    again = their_cache.load_prompt_cache(str(tmp_path / "cache.safetensors"))
    rest = [GREEDY[9]]
    assert tokens_of(stream_generate(model, tokenizer, rest, max_tokens=10, prompt_cache=again)) == GREEDY[10:20]
    assert their_cache.trim_prompt_cache(again, 10) == 10
    assert tokens_of(stream_generate(model, tokenizer, rest, max_tokens=10, prompt_cache=again)) == GREEDY[10:20]


def test_a_sliding_cache_of_mlx_lm(ours: Any) -> None:
    model, tokenizer = ours
    cache = their_cache.make_prompt_cache(model, max_kv_size=16)
    expected = tokens_of(mlx_lm.stream_generate(model, tokenizer, IDS, max_tokens=24, max_kv_size=16))
    assert tokens_of(stream_generate(model, tokenizer, IDS, max_tokens=24, prompt_cache=cache)) == expected


# load.


def test_load_with_a_tokenizer_config(theirs: Any) -> None:
    stop = load(FOLDER)[1].id_to_token(GREEDY[5])
    config = {"eos_token": stop, "trust_remote_code": True, "chat_template": TEMPLATE}
    model, tokenizer = load(FOLDER, dtype="fp32", tokenizer_config=config)
    assert (tokenizer.eos_token, tokenizer.eos_token_ids) == (stop, {2, GREEDY[5]})
    pieces = list(stream_generate(model, tokenizer, IDS, max_tokens=48))
    assert tokens_of(pieces) == GREEDY[: GREEDY.index(GREEDY[5]) + 1]
    assert pieces[-1].finish_reason == "stop"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == f"<s>[user] {CHAT[0]['content']}{stop}"


def test_load_with_the_tokenizer_config_that_mlx_lm_takes(theirs: Any, tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "mlx")
    config = {"eos_token": "<unk>", "bos_token": "</s>"}
    _, own = load(tmp_path / "mlx", tokenizer_config=config)
    _, their = mlx_lm.load(str(tmp_path / "mlx"), tokenizer_config=config)
    assert own.eos_token_ids == their.eos_token_ids == {0, 2}
    assert (own.bos_token, own.bos_token_id) == (their.bos_token, their.bos_token_id) == ("</s>", 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<|endoftext|>"}, r"eos_token in tokenizer_config is '<\|endoftext\|>', which is not a token"),
        ({"padding_side": "left"}, "tokenizer_config has 'padding_side'; it can have bos_token, eos_token"),
        ({"bos_token": 1}, "bos_token in tokenizer_config must be text, got 1"),
    ],
)
def test_an_invalid_tokenizer_config_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load("tiny", tokenizer_config=config)


# convert.


def test_convert_with_mlx_lms_arguments(tmp_path: Path) -> None:
    convert(hf_path=str(FOLDER), mlx_path=str(tmp_path / "named"), quantize=True, q_bits=4, q_group_size=32)
    convert(str(FOLDER), str(tmp_path / "positional"), quantize=True, q_group_size=32, dtype="bf16")
    read = [mlx_format.read(tmp_path / name) for name in ("named", "positional")]
    assert read[0].quantization == read[1].quantization and read[0].quantization
    for arguments, message in (({}, "There is no model to convert"), ({"hf_path": "b", "model": "a"}, "two names")):
        with pytest.raises(RequestError, match=message):
            convert(mlx_path=tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_an_empty_folder")
def test_convert_and_upload(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's call, from a repository to a repository: the folder is `mlx_model`."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    original = Path(shutil.copytree(FOLDER, tmp_path / "original"))
    hub.add("owner/Shakespeare", original)
    repo = "owner/Shakespeare"
    upload_repo = "me/My-Shakespeare-4bit"

    done = convert(repo, quantize=True, upload_repo=upload_repo)

    assert done.path.name == "mlx_model" and Path("mlx_model/model.safetensors").is_file()
    assert done.upload is not None and done.upload.url == f"{hub.url}/{upload_repo}"
    names = {path.name for path in hub.repos[upload_repo].folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}


def test_convert_asks_for_a_token_first(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(Exception, match="Uploading needs a token that may write"):
        convert(FOLDER, tmp_path / "out", upload_repo="me/name")
    assert not (tmp_path / "out").exists()
