"""Prompt cache files: what mlx-lm reads and writes, what they say of themselves, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import generate, load, load_prompt_cache, make_prompt_cache, save_prompt_cache, stream_generate
from mlx_openelm.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_openelm.cli.main import main
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import prompt_cache as file_format
from mlx_openelm.generation.cache_origin import Origin, fingerprint
from mlx_openelm.model import OpenELM

import mlx.core as mx
import pytest
from processes import environment

ROOT = Path(__file__).parents[1]
TEXT = "To be, or not to be, that is the question: whether it is nobler in the mind to suffer"
MAKERS: dict[str, Callable[[], Any]] = {
    "growing": KVCache,
    "sliding": lambda: RotatingKVCache(12, keep=4),
    "wide": lambda: RotatingKVCache(64, keep=4),
    "quantized": lambda: QuantizedKVCache(32, 8),
    "4 bits": lambda: QuantizedKVCache(32, 4),
}


@pytest.fixture(scope="module")
def tiny() -> Any:
    return load("tiny", dtype="float32")


@pytest.fixture(scope="module")
def ids(tiny: Any) -> list[int]:
    return tiny[1].encode(TEXT)


def fill(model: Any, cache: list[Any], ids: list[int], steps: int = 0) -> list[Any]:
    """Process all but the last `steps` ids at once, and these one by one, as decoding does."""
    split = len(ids) - steps
    for piece in [ids[:split], *([token] for token in ids[split:])]:
        if piece:
            mx.eval(model(mx.array([piece]), cache))
    return cache


def continued(model: Any, cache: list[Any], ids: list[int]) -> list[Any]:
    """The logits after each of the ids, one at a time."""
    return [model(mx.array([[token]]), cache)[0, -1] for token in ids]


def assert_equal_logits(one: list[Any], other: list[Any]) -> None:
    for a, b in zip(one, other, strict=True):
        assert mx.array_equal(a, b)


# mlx-lm reads what we write, and we read what it writes.


@pytest.mark.covering
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_mlx_lm_reads_our_files_to_the_same_logits(tiny: Any, ids: list[int], tmp_path: Path, kind: str, steps: int):
    theirs = pytest.importorskip("mlx_lm.models.cache")
    model = tiny[0]
    cache = fill(model, [MAKERS[kind]() for _ in model.layers], ids, steps)
    path = save_prompt_cache(tmp_path / "cache", cache, {"model": "tiny", "prompt_cache_tokens": ids})
    assert path == tmp_path / "cache.safetensors"
    read, metadata = theirs.load_prompt_cache(str(path), return_metadata=True)
    assert {type(layer).__name__ for layer in read} == {type(cache[0]).__name__}
    assert type(read[0]).__module__.startswith("mlx_lm")
    assert metadata == {"model": "tiny", "prompt_cache_tokens": json.dumps(ids)}
    ours = load_prompt_cache(path)
    expected = continued(model, cache, ids[:10])
    assert_equal_logits(continued(model, ours, ids[:10]), expected)
    assert_equal_logits(continued(model, read, ids[:10]), expected)


@pytest.mark.covering
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_we_read_mlx_lms_files_to_the_same_logits(tiny: Any, ids: list[int], tmp_path: Path, kind: str, steps: int):
    theirs = pytest.importorskip("mlx_lm.models.cache")
    make = {
        "growing": theirs.KVCache,
        "sliding": lambda: theirs.RotatingKVCache(12, keep=4),
        "wide": lambda: theirs.RotatingKVCache(64, keep=4),
        "quantized": lambda: theirs.QuantizedKVCache(32, 8),
        "4 bits": lambda: theirs.QuantizedKVCache(32, 4),
    }[kind]
    model = tiny[0]
    cache = fill(model, [make() for _ in model.layers], ids, steps)
    theirs.save_prompt_cache(str(tmp_path / "cache.safetensors"), cache, {"model": "tiny"})
    ours, metadata = load_prompt_cache(tmp_path / "cache", return_metadata=True)
    assert type(ours[0]).__module__.startswith("mlx_openelm") and metadata == {"model": "tiny"}
    assert ours[0].offset == len(ids)
    again = load_prompt_cache(save_prompt_cache(tmp_path / "again", cache))  # ours writes their caches too
    expected = continued(model, cache, ids[:10])
    assert_equal_logits(continued(model, ours, ids[:10]), expected)
    assert_equal_logits(continued(model, again, ids[:10]), expected)


def test_empty_caches_and_no_metadata(tiny: Any, ids: list[int], tmp_path: Path):
    theirs = pytest.importorskip("mlx_lm.models.cache")
    model = tiny[0]
    for number, make in enumerate((lambda: make_prompt_cache(model), lambda: make_prompt_cache(model, 12))):
        path = save_prompt_cache(tmp_path / f"{number}", make())
        for cache in (load_prompt_cache(path), theirs.load_prompt_cache(str(path))):
            assert cache[0].empty() and cache[0].offset == 0
            assert_equal_logits(continued(model, cache, ids[:5]), continued(model, make(), ids[:5]))
    assert load_prompt_cache(tmp_path / "0", return_metadata=True)[1] == {}


def test_make_prompt_cache_is_what_mlx_lm_makes(tiny: Any):
    assert [type(layer) for layer in make_prompt_cache(tiny[0])] == [KVCache] * 6
    sliding = make_prompt_cache(tiny[0], max_kv_size=32)
    assert [(layer.max_size, layer.keep) for layer in sliding] == [(32, 4)] * 6


def test_mlx_lms_generate_goes_on_from_our_file(tiny: Any, ids: list[int], tmp_path: Path):
    mlx_lm = pytest.importorskip("mlx_lm")
    theirs = pytest.importorskip("mlx_lm.models.cache")
    model, tokenizer = tiny
    expected = [piece.token for piece in stream_generate(model, tokenizer, ids, max_tokens=16)]
    path = save_prompt_cache(tmp_path / "cache", fill(model, make_prompt_cache(model), ids[:-4]))
    read = theirs.load_prompt_cache(str(path))
    pieces = mlx_lm.stream_generate(model, tokenizer, ids[-4:], max_tokens=16, prompt_cache=read)
    assert [piece.token for piece in pieces] == expected


# The file.


def test_only_what_is_held_is_written_and_the_cache_goes_on(tiny: Any, ids: list[int], tmp_path: Path):
    model = tiny[0]
    for kind, make in MAKERS.items():
        cache = fill(model, [make() for _ in model.layers], ids)
        path = save_prompt_cache(tmp_path / kind, cache)
        loaded = load_prompt_cache(path)
        held = min(len(ids), loaded[0].keys[0].shape[2] if "b" in kind else 1 << 30)
        assert sum(layer.nbytes for layer in loaded) <= sum(layer.nbytes for layer in cache)
        assert path.stat().st_size < sum(layer.nbytes for layer in loaded) + 20_000
        assert loaded[0].offset == len(ids) and held
        assert_equal_logits(continued(model, cache, [7]), continued(model, loaded, [7]))


def test_the_ids_are_what_penalties_need(tiny: Any, ids: list[int], tmp_path: Path, recwarn: pytest.WarningsRecorder):
    model, tokenizer = tiny
    penalty = {"repetition_penalty": 1.5, "frequency_penalty": 1.0, "max_tokens": 24}
    save_prompt_cache(
        tmp_path / "c", fill(model, make_prompt_cache(model), ids[:-3]), {"prompt_cache_tokens": ids[:-3]}
    )
    cache, metadata = load_prompt_cache(tmp_path / "c", return_metadata=True)
    assert metadata == {"prompt_cache_tokens": ids[:-3]}
    text = generate(model, tokenizer, ids[-3:], prompt_cache=cache, **metadata, **penalty)
    assert text == generate(model, tokenizer, ids, **penalty)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"repetition_penalty": 1.2}, "Penalties see only new tokens, not the 6 in the prompt cache"),
        ({"repetition_penalty": 1.2, "repetition_context_size": 3}, "Penalties see only new tokens"),
        ({"repetition_penalty": 1.2, "repetition_context_size": 2}, None),  # as many as the prompt has
        ({"logit_bias": {5: 1.0}}, None),
        ({"logits_processors": [lambda ids, logits: logits]}, "Logits processors are given only new tokens, not the 6"),
    ],
)
def test_a_warning_where_ids_are_missing(tiny: Any, options: dict[str, Any], warning: str | None, recwarn: Any):
    model, tokenizer = tiny
    cache = fill(model, make_prompt_cache(model), tokenizer.encode("To be, or not"))
    generate(model, tokenizer, [20, 30], prompt_cache=cache, max_tokens=1, **options)
    shown = [str(one.message) for one in recwarn]
    assert shown == [] if warning is None else warning in shown[0]


def test_a_file_is_replaced_only_if_asked(tiny: Any, ids: list[int], tmp_path: Path):
    model = tiny[0]
    path = save_prompt_cache(tmp_path / "c", fill(model, make_prompt_cache(model), ids[:5]))
    longer = fill(model, make_prompt_cache(model), ids)
    with pytest.raises(RequestError, match=r"c\.safetensors exists; .* overwrite=True"):
        save_prompt_cache(tmp_path / "c", longer)
    assert load_prompt_cache(path)[0].offset == 5
    save_prompt_cache(path, longer, overwrite=True)
    assert load_prompt_cache(path)[0].offset == len(ids)


def test_a_failure_leaves_nothing(tiny: Any, ids: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that fills up: the file that was there stays, and nothing is beside it."""
    model = tiny[0]
    path = save_prompt_cache(tmp_path / "c", fill(model, make_prompt_cache(model), ids[:5]))
    save = mx.save_safetensors

    def cut(name: str, *rest: Any) -> None:
        save(name, *rest)
        os.truncate(name, 1000)

    for broken in (cut, lambda *_: (_ for _ in ()).throw(RuntimeError("[write] Unable to write"))):
        monkeypatch.setattr(mx, "save_safetensors", broken)
        with pytest.raises(OpenELMError, match="Writing .*c.safetensors failed.*disk may be full"):
            save_prompt_cache(path, fill(model, make_prompt_cache(model), ids), overwrite=True)
    assert list(tmp_path.iterdir()) == [path] and load_prompt_cache(path)[0].offset == 5


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"prompt_cache_tokens": [1, 2]}, "prompt_cache_tokens has 2 ids, and the prompt cache has seen 5 tokens"),
        ({"prompt_cache_tokens": "12345"}, "prompt_cache_tokens must be a list of token ids"),
        ({"a": 1}, "metadata must be strings by name; 'a' is 1"),
        ({1: "a"}, "metadata must be strings"),
    ],
)
def test_metadata_that_cannot_be_written(tiny: Any, ids: list[int], tmp_path: Path, metadata: Any, words: str):
    with pytest.raises(RequestError, match=words):
        save_prompt_cache(tmp_path / "c", fill(tiny[0], make_prompt_cache(tiny[0]), ids[:5]), metadata)
    assert not list(tmp_path.iterdir())


def test_caches_that_cannot_be_written(tiny: Any, ids: list[int], tmp_path: Path):
    with pytest.raises(RequestError, match="has a BatchKVCache; a file can hold KVCache"):
        save_prompt_cache(tmp_path / "c", fill(tiny[0], [BatchKVCache([0]) for _ in range(6)], ids))
    with pytest.raises(RequestError, match="holds no keys and values"):
        save_prompt_cache(tmp_path / "c", [object()])
    with pytest.raises(RequestError, match="no layers"):
        save_prompt_cache(tmp_path / "c", [])
    with pytest.raises(RequestError, match="is a folder"):
        (tmp_path / "d.safetensors").mkdir()
        save_prompt_cache(tmp_path / "d", make_prompt_cache(tiny[0]))


# Files that are refused.


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture
def written(tiny: Any, ids: list[int], tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str = "growing") -> Path:
        cache = fill(tiny[0], [MAKERS[kind]() for _ in range(6)], ids)
        path = save_prompt_cache(tmp_path / kind, cache, {"prompt_cache_tokens": ids}, overwrite=True)
        assert load_prompt_cache(path)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(RequestError) as caught:
        load_prompt_cache(path, return_metadata=True)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and text.endswith(".") and "download" not in text
    return text


@pytest.mark.parametrize("kind", ["growing", "sliding", "quantized"])
def test_a_truncated_file_is_refused_wherever_it_is_cut(written: Callable[..., Path], kind: str):
    path = written(kind)
    data = path.read_bytes()
    for length in [0, 4, 8, 100, *range(200, len(data), len(data) // 9), len(data) - 1]:
        path.write_bytes(data[:length])
        assert "is damaged" in refusal(path) and "cache-prompt" in refusal(path)
    path.write_bytes(data + b"\0")
    assert "is damaged" in refusal(path)


@pytest.mark.parametrize("name", ["ArraysCache", "CacheList", "BatchKVCache", "__import__", "os", ""])
def test_foreign_classes_are_refused_by_name(written: Callable[..., Path], name: str):
    path = written()
    rewrite(path, lambda header: header["__metadata__"].__setitem__("1.2", name))
    assert f"holds a {name!r} in layer 2; of caches, KVCache, RotatingKVCache, QuantizedKVCache" in refusal(path)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("growing", lambda meta: meta.__setitem__("1.3", "RotatingKVCache"), "KVCache of layer 3 is incomplete"),
        ("growing", lambda meta: meta.__setitem__("1.3", "QuantizedKVCache"), "layer 3 is incomplete"),
        ("quantized", lambda meta: meta.__setitem__("1.3", "KVCache"), "layer 3 is incomplete"),
        ("sliding", lambda meta: meta.__setitem__("1.0", "KVCache"), "layer 0 is incomplete"),
        ("growing", lambda meta: [meta.pop(f"1.{n}") for n in range(6)], "does not name its kinds of caches"),
        ("growing", lambda meta: meta.__setitem__("2.1.1", "none"), "layer 0 is incomplete"),
        ("growing", lambda meta: meta.__setitem__("2.1.0", "0.0"), "layer 0 is incomplete"),
        ("growing", lambda meta: meta.__setitem__("0.prompt_cache_tokens", "[1, 2]"), "lists 2 ids and has seen"),
        ("growing", lambda meta: meta.__setitem__("0.prompt_cache_tokens", "[1, "), "is damaged"),
        ("growing", lambda meta: meta.__setitem__("0.prompt_cache_tokens", '{"a": 1}'), "is damaged"),
        ("growing", lambda meta: meta.__setitem__("0.prompt_cache_tokens", "7"), "is damaged"),
        ("growing", lambda meta: meta.__setitem__("0.prompt_cache_tokens", "[" * 100_000), "is damaged"),
    ],
)  # fmt: skip
def test_metadata_that_contradict_the_tensors(written: Callable[..., Path], kind: str, change: Callable, words: str):
    path = written(kind)
    rewrite(path, lambda header: change(header["__metadata__"]))
    assert words in refusal(path)


def with_numbers(path: Path, **numbers: int) -> None:
    """Write the file again with other numbers in the state of its first layer."""
    tensors, metadata = mx.load(str(path), return_metadata=True)  # type: ignore[misc]
    tensors |= {f"0.{name[1:]}": mx.array(value) for name, value in numbers.items()}  # type: ignore[operator]
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, metadata)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("growing", {"_2": 100}),
        ("growing", {"_2": -1}),
        ("sliding", {"_2": 5}),
        ("sliding", {"_3": 12}),
        ("sliding", {"_4": 0}),
        ("sliding", {"_5": 0}),
        ("sliding", {"_5": 99}),
        ("wide", {"_5": 3}),
        ("quantized", {"_2": 100}),
        ("quantized", {"_3": 64}),
        ("quantized", {"_3": 0}),
        ("quantized", {"_4": 4}),
        ("quantized", {"_4": 7}),
    ],
)
def test_numbers_that_no_cache_can_have(written: Callable[..., Path], kind: str, numbers: dict[str, int]):
    path = written(kind)
    with_numbers(path, **numbers)
    assert "layer 0 is incomplete or contradicts itself" in refusal(path)


def test_caches_whose_layers_or_rows_differ(tiny: Any, ids: list[int], tmp_path: Path):
    cache = fill(tiny[0], make_prompt_cache(tiny[0]), ids)
    with pytest.raises(RequestError, match="have seen"):
        cache[2].trim(1)
        save_prompt_cache(tmp_path / "c", cache)
    rows = make_prompt_cache(tiny[0])
    mx.eval(tiny[0](mx.array([ids[:5], ids[:5]]), rows))
    file_format.write(tmp_path / "rows.safetensors", rows, {})
    assert "incomplete" in refusal(tmp_path / "rows.safetensors")


def test_other_files(tmp_path: Path, tiny: Any):
    with pytest.raises(RequestError, match=r"nothing\.safetensors does not exist"):
        load_prompt_cache(tmp_path / "nothing")
    weights = Path(load.__code__.co_filename).parent / "assets" / "tiny" / "model.safetensors"
    assert "is no prompt cache" in refusal(weights)
    (tmp_path / "text.safetensors").write_text("To be, or not to be")
    assert "is damaged" in refusal(tmp_path / "text.safetensors")


def test_a_cache_of_other_sizes_is_refused_before_it_is_used(tiny: Any, ids: list[int]):
    model, tokenizer = tiny
    config = model.config
    other = OpenELM(
        ModelConfig.from_dict(config.to_dict() | {"head_dim": 64, "num_query_heads": [4] * 6, "num_kv_heads": [1] * 6})
    )
    for make in (KVCache, lambda: QuantizedKVCache(32, 8)):
        cache = fill(other, [make() for _ in model.layers], ids[:5])
        with pytest.raises(RequestError, match="is of another model: layer 0 has . key-value heads of 64 there"):
            stream_generate(model, tokenizer, ids[5:], prompt_cache=cache)


# Where a cache comes from.


def test_the_fingerprint_sees_weights_and_adapters_but_not_types(tiny: Any):
    model = tiny[0]
    prints = {fingerprint(model)}
    assert prints == {fingerprint(load("tiny")[0])}
    assert Origin.of(load("tiny", dtype="bfloat16")[0]).dtype == "bfloat16"
    changed = load("tiny", dtype="float32")[0]
    changed.transformer.layers[3].attn.out_proj.weight = changed.transformer.layers[3].attn.out_proj.weight * 1.01
    prints.add(fingerprint(changed))
    prints.add(fingerprint(load(ROOT / "tests" / "fixtures" / "shakespeare-hf", dtype="float32")[0]))
    assert len(prints) == 3


def test_origins_survive_a_file(tiny: Any):
    for origin in (Origin(), Origin("tiny", "main", ("a", "b=0.5"), "float32", "00ff"), Origin("x", None, (), "f")):
        assert Origin.from_notes(origin.notes()) == origin
    assert Origin.from_notes({"adapter": "["}) == Origin.from_notes({"adapter": "3"}) == Origin()


@pytest.mark.parametrize(
    ("held", "given", "words"),
    [
        (Origin("a", dtype="float32"), Origin("a", dtype="bfloat16"), "computed in float32.* in bfloat16; give dtype"),
        (Origin("a", fingerprint="1"), Origin("b", fingerprint="2"), "made with a, not with b; give the same"),
        (Origin("a", fingerprint="1"), Origin("a", fingerprint="2"), "made with a, not with what now has this name"),
        (Origin("a", "v1", fingerprint="1"), Origin("a", fingerprint="2"), "with a, revision v1, not with a;"),
        (Origin("a", None, ("x",), fingerprint="1"), Origin("a", fingerprint="2"), "adapter x, not with a, no adapter"),
        (Origin("a", None, ("x",), fingerprint="1"), Origin("a", None, ("y", "z"), fingerprint="2"), "adapter y and z"),
        (Origin("a"), Origin("b", fingerprint="2"), "made with a, not with b"),
    ],
)  # fmt: skip
def test_another_model_is_named(held: Origin, given: Origin, words: str):
    with pytest.raises(RequestError, match=f"^c {'was'} .*{words}"):
        held.check(given, "c")


@pytest.mark.parametrize(
    ("held", "given"),
    [
        (Origin("a", fingerprint="1"), Origin("b", "main", fingerprint="1")),
        (Origin("a"), Origin("a", fingerprint="1")),
        (Origin("apple/OpenELM-270M"), Origin("270m")),
        (Origin("./tests"), Origin("tests")),
        (Origin(), Origin("tests")),
    ],
)
def test_other_names_of_the_same_model_pass(held: Origin, given: Origin):
    held.check(given, "c")


# The command line.


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    shown = capsys.readouterr()
    return int(stop.value.code or 0), shown.out, shown.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


MORE = ["--max-tokens", "12", "--json"]


@pytest.mark.covering
@pytest.mark.parametrize("options", [[], ["--kv-bits", "8"], ["--max-kv-size", "64"]], ids=str)
@pytest.mark.parametrize("rest", [", that", " to have", "\nHAMLET.", "\n\nWhat"])
def test_the_text_goes_on_as_from_the_whole_prompt(capsys: Any, here: Path, options: list[str], rest: str):
    code, out, err = cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c", *options)
    assert code == 0 and out.startswith("c.safetensors: 6 tokens, ") and err.startswith("Prompt: 6 tokens, ")
    _, whole, _ = cli(capsys, "generate", f"To be, or not{rest}", *MORE, "--repetition-penalty", "1.4", *options)
    code, out, err = cli(
        capsys, "generate", "--prompt-cache-file", "c", "--prompt", rest, *MORE, "--repetition-penalty", "1.4"
    )
    assert code == 0 and "warning" not in err
    result, expected = json.loads(out), json.loads(whole)
    assert result["text"] == expected["text"]
    assert result["prompt_cache_tokens"] == 6
    assert result["prompt_tokens"] + 6 == expected["prompt_tokens"]


def test_what_is_shown(capsys: Any, here: Path):
    cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c")
    before = (here / "c.safetensors").read_bytes()
    code, out, err = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " to be", "--max-tokens", "4")
    assert code == 0 and "Prompt: 2 tokens after 6 in the cache, " in err and "Model: tiny\n" in err
    assert (here / "c.safetensors").read_bytes() == before  # it can be gone on from again
    code, out, _ = cli(capsys, "cache-prompt", "Hi", "--prompt-cache-file", "d", "--json", "--kv-bits", "4")
    values = json.loads(out)
    assert values["kind"] == "QuantizedKVCache" and values["prompt_cache_file"] == "d.safetensors"
    assert values["prompt_tokens"] > 1 and values["bytes"] == (here / "d.safetensors").stat().st_size


def test_the_prompt_from_a_file_and_from_standard_input(here: Path):
    (here / "text.txt").write_text("To be, or not\n")
    run = [sys.executable, "-m", "mlx_openelm", "cache-prompt", "--prompt-cache-file"]
    for name, words, text in (("a", ["--prompt-file", "text.txt"], ""), ("b", ["--prompt", "-"], "To be, or not\n")):
        subprocess.run([*run, name, *words], input=text, text=True, env=environment(), check=True, capture_output=True)
    files = [load_prompt_cache(name, return_metadata=True)[1] for name in "ab"]
    assert files[0] == files[1] and files[0]["model"] == "tiny" and files[0]["dtype"] == "float32"


@pytest.mark.parametrize("system", [None, "Speak as in a play."])
def test_a_chat_is_joined_inside_the_users_message(capsys: Any, here: Path, tiny: Any, system: str | None):
    chat = ["--chat-template", "corenet"]
    said = [] if system is None else ["--system-prompt", system]
    assert cli(capsys, "cache-prompt", "Here is a text.", "--prompt-cache-file", "c", *chat, *said)[0] == 0
    _, out, _ = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " What now?", *chat, *MORE)
    _, whole, _ = cli(capsys, "generate", "Here is a text. What now?", *chat, *said, *MORE)
    result, expected = json.loads(out), json.loads(whole)
    assert result["text"] == expected["text"]
    assert result["prompt_tokens"] + result["prompt_cache_tokens"] == expected["prompt_tokens"]


def test_a_model_with_a_template_writes_both_parts_with_it(capsys: Any, here: Path):
    model = ["--model", "tiny-instruct"]
    cli(capsys, "cache-prompt", "Good", "--prompt-cache-file", "c", *model)
    _, out, _ = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " morrow!", *MORE)
    _, whole, _ = cli(capsys, "generate", "Good morrow!", "--chat-template", "own", *model, *MORE)
    assert json.loads(out)["text"] == json.loads(whole)["text"]
    (here / "lines.txt").write_text("Good morrow!\n")
    _, out, _ = cli(capsys, "generate", "--batch", "lines.txt", *model, *MORE)
    assert json.loads(out)["text"] == json.loads(whole)["text"]


def test_a_system_prompt_alone_is_cached(capsys: Any, here: Path):
    system = ["--system-prompt", "Speak as in a play.", "--chat-template", "corenet"]
    assert cli(capsys, "cache-prompt", "--prompt-cache-file", "c", *system)[0] == 0
    _, out, _ = cli(
        capsys, "generate", "--prompt-cache-file", "c", "--prompt", "Who?", "--chat-template", "corenet", *MORE
    )
    _, whole, _ = cli(capsys, "generate", "Who?", *system, *MORE)
    assert json.loads(out)["text"] == json.loads(whole)["text"]


def test_the_model_is_that_of_the_file(capsys: Any, here: Path):
    shutil.copytree(ROOT / "tests" / "fixtures" / "shakespeare-hf", here / "play")
    cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c", "--model", "play")
    _, out, _ = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " to be", *MORE)
    assert json.loads(out)["model"] == "play"
    code, out, err = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " to be", "--model", "tiny")
    assert (code, out) == (2, "")
    assert err.startswith("error: c was made with play, not with tiny; give the same") and err.count("\n") == 1


def test_the_adapter_is_that_of_the_file_or_is_refused(capsys: Any, here: Path):
    fixtures = ROOT / "tests" / "fixtures"
    for name in ("shakespeare-hf", "peft-lora"):
        shutil.copytree(fixtures / name, here / name)
    model, adapter = ["--model", "shakespeare-hf"], ["--adapter-path", "peft-lora"]
    cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c", *model, *adapter)
    go_on = ["generate", "--prompt-cache-file", "c", "--prompt", " to be", *MORE]
    _, whole, _ = cli(capsys, "generate", "To be, or not to be", *MORE, *model, *adapter)
    for given in ([], [*model, *adapter], ["--model", "./shakespeare-hf", "--adapter-path", "./peft-lora"]):
        code, out, _ = cli(capsys, *go_on, *given)
        assert code == 0 and json.loads(out)["text"] == json.loads(whole)["text"]
    for given, words in ((model, "not with shakespeare-hf, no adapter"), ([*model, *adapter], "peft-lora=0.5; give")):
        code, out, err = cli(capsys, *go_on, *(word.replace("peft-lora", "peft-lora=0.5") for word in given))
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "c was made with shakespeare-hf, adapter peft-lora, not with" in err and words in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--prompt-cache-file", "c", "--prompt", "x", "--dtype", "bfloat16"], "c was computed in float32"),
        (["generate", "--prompt-cache-file", "c", "--prompt", "x", "--kv-bits", "9"], "--kv-bits must be 2, 3"),
        (["generate", "--prompt-cache-file", "c", "--prompt", "x", "--max-kv-size", "16"], "16 is for new caches"),
        (["generate", "--prompt-cache-file", "c", "--prompt", "x", "--system-prompt", "y"], "comes before"),
        (["generate", "--prompt-cache-file", "d", "--prompt", "x"], "d.safetensors does not exist"),
        (["cache-prompt", "x", "--prompt-cache-file", "c"], "c.safetensors exists; .* --overwrite"),
        (["cache-prompt", "x", "--prompt-cache-file", ""], "--prompt-cache-file is empty"),
        (["cache-prompt", "x"], "--prompt-cache-file is missing"),
        (["cache-prompt", "", "--prompt-cache-file", "d"], "The prompt is empty"),
        (["cache-prompt", "x", "y", "--prompt-cache-file", "d"], "needs quotes: mlx-openelm cache-prompt 'x y'"),
        (["cache-prompt", "x", "--prompt-cache-file", "d", "--kv-bits", "4", "--max-kv-size", "16"], "be combined"),
        (["cache-prompt", "to be " * 5000, "--prompt-cache-file", "d"], "The prompt is too long"),
        (["cache-prompt", "x", "--prompt-cache-file", "d", "--eos-token", "x"], "--eos-token is not offered: no text"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(capsys: Any, here: Path, words: list[str], message: str):
    cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c")
    code, out, err = cli(capsys, *words)
    assert (code, out) == (2, "")
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
    assert [path.name for path in here.iterdir()] == ["c.safetensors"]


def test_without_the_flag_the_default_model_is_still_tiny(capsys: Any, here: Path):
    _, out, _ = cli(capsys, "generate", "To be", *MORE)
    assert json.loads(out)["model"] == "tiny" and "prompt_cache_tokens" not in json.loads(out)


def test_mlx_lms_generate_command_takes_the_metadata(capsys: Any, here: Path):
    theirs = pytest.importorskip("mlx_lm.models.cache")
    cli(capsys, "cache-prompt", "To be, or not", "--prompt-cache-file", "c")
    _, metadata = theirs.load_prompt_cache("c.safetensors", return_metadata=True)
    assert metadata["model"] == "tiny" and json.loads(metadata["tokenizer_config"]) == {}


def test_a_file_of_mlx_lm_on_the_command_line(capsys: Any, here: Path, tiny: Any):
    """It does not list its ids, so that penalties warn; its model is compared by name."""
    theirs = pytest.importorskip("mlx_lm.models.cache")
    model, tokenizer = tiny
    cache = fill(model, theirs.make_prompt_cache(model), tokenizer.encode("To be, or not"))
    theirs.save_prompt_cache("c.safetensors", cache, {"model": "tiny", "tokenizer_config": "{}"})
    _, whole, _ = cli(capsys, "generate", "To be, or not to be", *MORE)
    code, out, err = cli(capsys, "generate", "--prompt-cache-file", "c", "--prompt", " to be", *MORE)
    assert code == 0 and json.loads(out)["text"] == json.loads(whole)["text"] and err == ""
    _, _, err = cli(
        capsys, "generate", "--prompt-cache-file", "c", "--prompt", "x", *MORE, "--repetition-penalty", "1.2"
    )
    assert "warning: Penalties see only new tokens, not the 6 in the prompt cache" in err


# The guide.


def test_the_python_of_the_guide_runs_as_written(capsys: Any, here: Path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "generation.md").read_text(), flags=re.DOTALL)
    assert blocks
    (here / "tests").symlink_to(ROOT / "tests")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
        assert len(capsys.readouterr().out) > 20
