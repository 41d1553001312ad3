"""Vocabularies whose pieces of spaces have tied scores, like Llama 2's: every format keeps SentencePiece's ids."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import gguf_tokenizer
from mlx_openelm.jobs.export import export
from mlx_openelm.jobs.fuse import fuse
from mlx_openelm.jobs.quantize import quantize
from mlx_openelm.quantization.options import QuantizeOptions
from mlx_openelm.text.saving import write_spec
from mlx_openelm.text.sentencepiece import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePieceModel,
    read_model,
    serialize_model,
    to_spec,
)
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten
from quantization_models import write_tiny
from tokenizer_texts import random_texts

MADE_UP = Path(__file__).parent / "fixtures" / "tied-vocabulary"
LLAMA = Path(__file__).parents[2] / "shared" / "reference" / "llama2-tokenizer"
NEEDS_LLAMA = pytest.mark.skipif(not LLAMA.is_dir(), reason="needs Llama 2's tokenizer")


@pytest.fixture(scope="module", params=["made up", pytest.param("Llama 2", marks=NEEDS_LLAMA)])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only a `tokenizer.model`."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy((MADE_UP if request.param == "made up" else LLAMA) / "tokenizer.model", folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def texts(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    return random_texts(5000 if processor.vocab_size() == 32000 else 1000)


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("saved")
    Tokenizer.from_folder(folder).save(target)
    return target


def json_alone(saved: Path, target: Path, edit: Callable[[Any], None] = lambda spec: None) -> Path:
    spec = json.loads((saved / "tokenizer.json").read_text())
    edit(spec)
    target.mkdir()
    (target / "tokenizer.json").write_text(json.dumps(spec))
    return target


def check_ids(tokenizer: Tokenizer, processor: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    theirs = processor.encode(texts)
    assert [t for t, ids in zip(texts, theirs, strict=True) if tokenizer.encode(t, add_bos=False) != ids] == []


def test_the_vocabulary_has_the_ties() -> None:
    model = read_model(MADE_UP / "tokenizer.model")
    tied = [piece for piece, score in zip(model.pieces, model.scores, strict=True) if score == -1e9]
    assert sorted(map(len, tied)) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert set("".join(tied)) == {"▁"}
    assert model.byte_fallback


def test_a_tokenizer_json_gives_the_same_ids(saved, processor, texts, tmp_path) -> None:
    check_ids(Tokenizer.from_folder(saved), processor, texts)
    check_ids(Tokenizer.from_folder(json_alone(saved, tmp_path / "json")), processor, texts)


@NEEDS_LLAMA
def test_llamas_expected_ids(tmp_path) -> None:
    shutil.copy(LLAMA / "tokenizer.model", tmp_path)
    before = Tokenizer.from_folder(tmp_path)
    before.save(tmp_path)
    for case in json.loads((LLAMA / "expected.json").read_text()):
        for tokenizer in (before, Tokenizer.from_folder(tmp_path)):
            assert tokenizer.encode(case["text"], add_bos=False) == case["ids"]


@NEEDS_LLAMA
def test_scores_of_spaces_that_transformers_5_loses_are_restored(tmp_path) -> None:
    """It ranks merges by id, including those of runs of spaces."""
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(LLAMA / name, tmp_path)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    spec = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    assert spec["model"]["merges"][0] == ["▁", "▁"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    check_ids(Tokenizer.from_folder(tmp_path / "saved"), processor, random_texts(1000, seed=5))


def test_other_programs_give_the_same_ids(saved, processor) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    library = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    theirs = [transformers.AutoTokenizer.from_pretrained(saved), utils.load(saved)._tokenizer]
    texts = random_texts(1000, seed=1, typed=False)
    ids = processor.encode(texts)
    assert [encoding.ids for encoding in library.encode_batch(texts, add_special_tokens=False)] == ids
    for tokenizer in theirs:
        assert tokenizer(texts)["input_ids"] == [[1, *line] for line in ids]


def gguf_values(tokenizer: Tokenizer, path: Path, rows: int | None = None) -> dict[str, Any]:
    """The keys of a GGUF file with this tokenizer, read by the gguf package."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    gguf_tokenizer.write(writer, tokenizer, rows or tokenizer.vocab_size, None)
    # Keys that llama.cpp requires.
    for add in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{add}")(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tensor("token_embd.weight", np.zeros((rows or tokenizer.vocab_size, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def older_merges(model: SentencePieceModel, *, by_length: bool) -> list[str]:
    """Merges as ranked by transformers 4: by score, then by the ids of the parts or (since 4.40) their lengths."""
    ids = {piece: i for i, piece in enumerate(model.pieces)}
    merges = [
        (piece[:cut], piece[cut:], score)
        for piece, score in zip(model.pieces, model.scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: (ids[merge[0]], ids[merge[1]]))
    merges.sort(key=lambda m: (m[2], len(m[0]), len(m[1])) if by_length else m[2], reverse=True)
    return [f"{left} {right}" for left, right, _ in merges]


@pytest.mark.covering
@pytest.mark.parametrize("source", ["model", "json", pytest.param("by length", marks=pytest.mark.slow), "by ids"])
def test_gguf_round_trip(folder, saved, processor, texts, tmp_path, source) -> None:
    def edit(spec: Any) -> None:
        model = read_model(folder / "tokenizer.model")
        if source.startswith("by"):
            spec["model"]["merges"] = older_merges(model, by_length=source == "by length")

    tokenizer = Tokenizer.from_folder(folder if source == "model" else json_alone(saved, tmp_path / "json", edit))
    if source in ("json", "by ids") and processor.vocab_size() == 32000:
        pytest.skip("the small vocabulary covers these ties")
    texts = texts[:1000]
    check_ids(tokenizer, processor, texts)
    values = gguf_values(tokenizer, tmp_path / "a.gguf", tokenizer.vocab_size + 3)
    back = gguf_tokenizer.read(values, tmp_path / "a.gguf")
    check_ids(back, processor, texts)
    back.save(tmp_path / "back")
    check_ids(Tokenizer.from_folder(tmp_path / "back"), processor, texts)
    assert back.vocab_size == tokenizer.vocab_size


def test_llama_cpp_gives_the_same_ids(saved, processor, texts, tmp_path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    gguf_values(Tokenizer.from_folder(json_alone(saved, tmp_path / "json")), tmp_path / "a.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    for text in texts[:500]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == processor.encode(text)
    theirs.close()


@NEEDS_LLAMA
def test_a_published_tokenizer_json_goes_into_gguf(tmp_path) -> None:
    """It has 32,000 pieces, with merges as ranked by transformers 4."""
    before = Tokenizer.from_file(LLAMA / "tokenizer.json")
    back = gguf_tokenizer.read(gguf_values(before, tmp_path / "a.gguf"), tmp_path / "a.gguf")
    for text in random_texts(1000):
        assert back.encode(text) == before.encode(text)


def write_model(folder: Path, target: Path) -> Path:
    """A tiny model with only the tokenizer of `folder`."""
    model = read_model(folder / "tokenizer.model")
    write_tiny(target, vocab_size=len(model.pieces))
    shutil.copy(folder / "tokenizer.model", target)
    (target / "tokenizer_config.json").unlink(missing_ok=True)
    return target


def test_every_command_writes_the_tokenizer(folder, processor, texts, tmp_path) -> None:
    model = write_model(folder, tmp_path / "model")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    full = {name: weight for name, weight in tree_flatten(load(model)[0].parameters()) if "norm" in name}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), full)
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "full", "num_layers": 2}')
    convert(model, tmp_path / "converted")
    quantize(model, tmp_path / "quantized", QuantizeOptions(q_bits=8, q_group_size=32))
    fuse(model, str(adapter), tmp_path / "fused")
    export(model, tmp_path / "exported", format="huggingface")
    export(model, tmp_path / "a.gguf", format="gguf", gguf_type="f32")
    convert(tmp_path / "a.gguf", tmp_path / "from_gguf")
    for name in ("converted", "quantized", "fused", "exported", "a.gguf", "from_gguf"):
        check_ids(load(tmp_path / name)[1], processor, texts[:300])


# Which ties are safe.


def ab_model(scores: dict[str, float]) -> SentencePieceModel:
    """A vocabulary of two characters."""
    pieces = ["<unk>", "<s>", "</s>", *scores, "a", "b"]
    return SentencePieceModel(
        pieces=pieces,
        scores=[0.0, 0.0, 0.0, *scores.values(), -1e3, -1e3],
        types=[UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (len(scores) + 2)],
        model_type="bpe",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )


def test_runs_of_one_character_may_tie_in_any_vocabulary() -> None:
    """Brute force: SentencePiece and the tokenizers package agree on every text of up to eight characters."""
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(0)
    texts = ["".join(text) for length in range(1, 9) for text in itertools.product("ab", repeat=length)]
    for _ in range(60):
        others = {"".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(rng.randint(1, 8))}
        others -= {"a" * length for length in range(2, 6)}
        scores = {piece: -float(i) for i, piece in enumerate(rng.sample(sorted(others), len(others)))}
        tie = rng.choice([-1e9, -0.5, -2.5])
        scores |= {"a" * length: tie for length in range(2, 8) if rng.random() < 0.75}
        model = ab_model(scores)
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(serialize_model(model, bos_piece="<s>", eos_piece="</s>"))
        library = tokenizers.Tokenizer.from_str(json.dumps(write_spec(to_spec(model), 1)))
        for text in texts:
            assert library.encode(text, add_special_tokens=False).ids == processor.encode(text), (scores, text)


@pytest.mark.parametrize("tied", [("ab", "ba"), ("aa", "bb"), ("aa", "ab"), ("aa", "aaa", "bb")])
def test_other_ties_are_refused(tied) -> None:
    with pytest.raises(RequestError, match="two pieces have the same score"):
        to_spec(ab_model(dict.fromkeys(tied, -1.0)))


def test_tied_runs_with_other_merges_are_refused(saved, tmp_path) -> None:
    def edit(spec: Any) -> None:
        merges = spec["model"]["merges"]
        spaces = [merge for merge in merges if set(merge) == {"▁", " "}]
        # Two and two are merged before two and one.
        spaces.sort(key=lambda merge: abs(len(merge.split(" ")[0]) - len(merge.split(" ")[1])))
        spec["model"]["merges"] = [merge for merge in merges if set(merge) != {"▁", " "}] + spaces

    with pytest.raises(RequestError, match="not those of a SentencePiece model"):
        gguf_tokenizer.vocabulary(Tokenizer.from_folder(json_alone(saved, tmp_path / "json", edit)))


def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    model = read_model(MADE_UP / "tokenizer.model")
    model.scores[260] = model.scores[261]  # neither consists of spaces alone
    folder = write_model(MADE_UP, tmp_path / "model")
    data = serialize_model(model, bos_piece="<s>", eos_piece="</s>")
    (folder / "tokenizer.model").write_bytes(data)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr("mlx_openelm.jobs.quantize.read_text", fail)
    for work in (
        lambda: quantize(folder, tmp_path / "out", QuantizeOptions(q_bits=4, method=("gptq",))),
        lambda: convert(folder, tmp_path / "out"),
        lambda: export(folder, tmp_path / "out", format="huggingface"),
        lambda: export(folder, tmp_path / "out.gguf", format="gguf"),
    ):
        with pytest.raises(RequestError, match="two pieces have the same score"):
            work()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
