"""A `tokenizer.json` written by another program or by hand: what is ignored, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.formats import gguf_tokenizer
from mlx_openelm.hub import catalog
from mlx_openelm.text.sentencepiece import read_model
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from tokenizer_texts import random_texts

FIXTURES = Path(__file__).parent / "fixtures"
TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("original")
    Tokenizer.from_folder(FIXTURES / "tied-vocabulary").save(folder)
    (folder / "tokenizer.model").unlink()
    return Tokenizer.from_folder(folder)


@pytest.fixture
def edited(original: Tokenizer, tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder whose tokenizer.json is changed by `edit(spec)` or has these keys."""

    def make(edit: Callable[[Any], Any] = lambda spec: None, **keys: Any) -> Path:
        original.save(tmp_path / "edited")
        path = tmp_path / "edited" / "tokenizer.json"
        spec = json.loads(path.read_text()) | keys
        edit(spec)
        path.write_text(json.dumps(spec))
        return path.parent

    return make


def model(**values: Any) -> Callable[[Any], None]:
    return lambda spec: spec["model"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        {"post_processor": TEMPLATE},
        {"post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}},
        {"post_processor": {"type": "nobody knows"}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"decoder": None},
        {"edit": model(dropout=0.9)},
        {"edit": model(dropout=1.0)},
        {"edit": lambda spec: spec["added_tokens"].clear()},
        {"edit": lambda spec: spec["model"].pop("type")},
        {"edit": lambda spec: spec["model"].update(merges=[m.split(" ") for m in spec["model"]["merges"]])},
        {"normalizer": {"type": "Sequence", "normalizers": [REPLACE, PREPEND]}},
        {"normalizer": REPLACE, "pre_tokenizer": METASPACE},
        {"normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE]}},
        {
            "normalizer": None,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "split": False},
        },
    ],
)
def test_irrelevant_settings_are_ignored(original, edited, change) -> None:
    tokenizer = Tokenizer.from_folder(edited(**change))
    for text in ["To be", "", "  ", "a</s>b", "</s>", *random_texts(60)]:
        assert tokenizer.encode(text) == original.encode(text)
    assert len(tokenizer.encode("a prompt of some words")) > 5


def test_folders_saved_by_transformers_5(original, tmp_path) -> None:
    """With a tokenizer that it converted from a tokenizer.model."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(FIXTURES / "tied-vocabulary" / "tokenizer.model", folder)
    for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / name)
        assert not (tmp_path / name / "tokenizer.model").exists()
        tokenizer = Tokenizer.from_folder(tmp_path / name)
        # `LlamaTokenizer` derives merges from ids, so it splits runs of spaces differently.
        texts = [text for text in random_texts(100) if name != "LlamaTokenizer" or "  " not in f" {text}"]
        assert [tokenizer.encode(t) for t in ("To be", *texts)] == [original.encode(t) for t in ("To be", *texts)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "rewrites characters"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "no base64!"}}, "rewrites characters"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [REPLACE, {"type": "Precompiled"}]}},
            "rewrites characters",
        ),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE, {"type": "NFC"}]}},
            "{'type': 'NFC'} in",
        ),
        ({"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE, {"type": "Lowercase"}]}}, "rewrites"),
        ({"normalizer": {"type": "NFC"}, "pre_tokenizer": METASPACE}, "rewrites characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "▁"}}, "rewrites characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "▁"}}, "rewrites characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "▁"}}, "rewrites characters"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"}}, "rewrites characters"),
        ({"normalizer": None}, "rewrites characters"),
        ({"normalizer": [REPLACE]}, "is damaged"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}, "not a SentencePiece-style tokenizer"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}}, "not a SentencePiece-style tokenizer"),
        ({"pre_tokenizer": {**METASPACE, "replacement": "_"}}, "not a SentencePiece-style tokenizer"),
        ({"edit": model(type="WordPiece")}, "not a SentencePiece-style tokenizer"),
        ({"edit": model(ignore_merges=1)}, "ignore_merges must be true or false"),
        ({"pre_tokenizer": {**METASPACE, "split": None}}, "split must be true or false"),
        ({"edit": model(end_of_word_suffix="</w>")}, "it has a end_of_word_suffix"),
        (
            {"edit": lambda spec: spec["model"]["vocab"].update(unknown=spec["model"]["vocab"].pop("<unk>"))},
            "is not a piece",
        ),
        ({"edit": model(unk_token="no such")}, "is not a piece"),
        ({"edit": model(merges=[["▁", "no such"]])}, "is damaged"),
        ({"edit": model(merges=["▁ t x"])}, "a merge is not a pair"),
        ({"edit": model(merges=[["▁", 5]])}, "a merge is not a pair"),
        ({"edit": model(merges=5)}, "must be a list"),
        ({"edit": model(vocab={})}, "its vocabulary must have"),
        ({"edit": lambda spec: spec["model"]["vocab"].update(more=2**31)}, "must have the ids from 0"),
        ({"edit": lambda spec: spec["model"]["vocab"].update(more=-1)}, "must have the ids from 0"),
        ({"edit": lambda spec: spec["model"]["vocab"].update(more=1.5)}, "must have the ids from 0"),
        ({"edit": lambda spec: spec["model"]["vocab"].update(more=True)}, "must have the ids from 0"),
        ({"edit": lambda spec: spec["model"]["vocab"].update(more=10**400)}, "must have the ids from 0"),
        ({"edit": lambda spec: spec["model"]["vocab"].update({"x" * 5000: 773})}, "1 to 1000 characters"),
        ({"edit": lambda spec: spec["model"]["vocab"].update({"\ud800": 773})}, "is damaged"),
        ({"edit": lambda spec: spec["added_tokens"].append({"id": 2**31, "content": "x"})}, "not a token id"),
        (
            {"edit": lambda spec: spec["added_tokens"].append({"id": 900, "content": "<|x|>"})},
            "the next is 773: give it",
        ),
        ({"edit": lambda spec: spec["added_tokens"].append({"id": 7, "content": "<|x|>"})}, "the id 7 of another one"),
        ({"edit": lambda spec: spec["added_tokens"].append({"id": 5, "content": "</s>"})}, "adds a token twice"),
        ({"edit": lambda spec: spec["added_tokens"][1].update(id=7)}, "has two ids"),
        ({"added_tokens": {"a": 1}}, "must be a list"),
        ({"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 60_000}}, "more than 100 normalizers"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [METASPACE] * 101}}, "more than 100 pretokenizers"),
        ({"added_tokens": ["<s>"]}, "is not an added token"),
        ({"model": None}, "it has no model"),
    ],
)
def test_invalid_files_are_refused(edited, capfd, change, message) -> None:
    folder, started = edited(**change), time.process_time()
    json.loads((folder / "tokenizer.json").read_text())
    reading = time.process_time() - started
    started = time.process_time()
    with pytest.raises(RequestError) as caught:
        Tokenizer.from_folder(folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    # Little more than reading the JSON, which takes most of it for the longest of these files.
    assert time.process_time() - started < 1 + 2 * reading
    assert capfd.readouterr() == ("", "")  # a panic in Rust writes to stderr


def drop_merges(spec: Any) -> None:
    """Without half of the merges, many pieces are only found whole."""
    del spec["model"]["merges"][::2]
    spec["model"]["ignore_merges"] = True


SPLIT: dict[str, Any] = {key: value for key, value in METASPACE.items() if key != "split"}
NEVER = {"prepend_scheme": "never"}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": SPLIT},
        {"pre_tokenizer": SPLIT | {"split": True}},
        {"pre_tokenizer": SPLIT | NEVER},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}},
        {"pre_tokenizer": METASPACE, "edit": drop_merges},
        {"pre_tokenizer": SPLIT, "edit": drop_merges},
        {"pre_tokenizer": SPLIT | NEVER, "edit": drop_merges},
    ],
)
def test_ids_equal_the_tokenizers_packages(original, edited, tmp_path, change) -> None:
    """With text split at spaces, and with pieces matched whole."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = edited(normalizer=None, **change)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_folder(folder)
    ours.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    # Before a text that starts with a space `Metaspace` adds none, but SentencePiece does.
    texts = ["To be", "x    y", "be", *(f"x{text}" for text in random_texts(300, typed=False))]
    ids = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ours.encode(text, add_bos=False) for text in texts] == ids
    assert [again.encode(text, add_bos=False) for text in texts] == ids
    assert [ours.decode(line) for line in ids] == [text.replace("▁", " ") for text in texts]
    assert ids != [original.encode(text, add_bos=False) for text in texts]
    with pytest.raises(RequestError, match="which llama.cpp does not support"):
        gguf_tokenizer.vocabulary(ours)
    for text in ("</s>", "<0x41>", "<unk>", "a</s>b"):  # typed, so text
        assert ours.decode(ours.encode(text)) == text
        assert not {0, 2} & {*ours.encode(text)}


def test_splitting_at_spaces_may_make_no_difference(original, edited) -> None:
    """As in most files: no piece spans two words."""

    def edit(spec: Any) -> None:
        merges = spec["model"]["merges"]
        merges[:] = [merge for merge in merges if "▁" not in merge.replace(" ", "")[1:]]

    ours = Tokenizer.from_folder(edited(edit, normalizer=None, pre_tokenizer=SPLIT))
    assert not ours.spec.splits


def test_a_large_file_is_read(edited) -> None:
    path = edited() / "tokenizer.json"
    path.write_text(path.read_text() + " " * (1 << 25))  # the largest published files have 35 MB
    assert Tokenizer.from_folder(path.parent).vocab_size == 773


def test_a_template_with_an_invalid_name_is_ignored(edited) -> None:
    folder = edited()
    config = {"chat_template": [{"name": ["x"], "template": "y"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.from_folder(folder).chat_template is None


def test_deep_nesting_is_refused(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"normalizer": ' + "[" * 200_000)
    with pytest.raises(RequestError, match="nested too deeply"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_of_the_package_is_a_one_line_error(original, edited, monkeypatch) -> None:
    import tokenizers

    class PanicException(BaseException):
        """As raised by pyo3: not an Exception."""

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("called `Option::unwrap()`\non a `None` value")

    folder = edited()
    monkeypatch.setattr(tokenizers.models, "BPE", panic)
    with pytest.raises(RequestError, match=r"is damaged .*unwrap\(\)` on a"):
        Tokenizer.from_folder(folder)


def test_typed_bytes_are_text_whatever_merges_there_are(original, edited) -> None:
    """transformers 5 makes merges of all pieces, including those of bytes and control tokens."""

    def edit(spec: Any) -> None:
        vocab = spec["model"]["vocab"]
        missing = [piece for piece in ("4", "<0", "<0x", "<0x4", "<0x41") if piece not in vocab]
        for number, piece in enumerate(missing, 0xF8):  # in place of bytes that this text does not use
            vocab[piece] = vocab.pop(f"<0x{number:X}>")
        merges = [["<", "0"], ["<0", "x"], ["<0x", "4"], ["<0x4", "1"], ["<0x41", ">"]]
        spec["model"]["merges"] = merges + [merge.split(" ") for merge in spec["model"]["merges"]]

    tokenizer = Tokenizer.from_folder(edited(edit))
    assert tokenizer.decode(tokenizer.encode("a<0x41>b")) == "a<0x41>b"
    assert tokenizer.token_to_id("<0x41>") not in tokenizer.encode("a<0x41>b")


def test_two_tokenizers_in_a_folder(original, tmp_path) -> None:
    """A tokenizer.json is made from a tokenizer.model, so where they contradict each other the latter is used."""
    original.save(tmp_path)
    shutil.copy(FIXTURES / "shakespeare-hf" / "tokenizer.model", tmp_path)
    with pytest.warns(UserWarning, match="are different tokenizers .*Remove the one that is not the model's"):
        tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("To be") == Tokenizer.from_folder(FIXTURES / "shakespeare-hf").encode("To be")
    named = Tokenizer.from_file(tmp_path / "tokenizer.json")  # this file was requested
    assert named.encode("To be") == original.encode("To be")
    named.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "tokenizer.model").exists()
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    assert Tokenizer.from_folder(tmp_path).encode("To be") == original.encode("To be")


def test_unigram(tmp_path) -> None:
    """Another model type of SentencePiece: loads and saves if it is complete."""
    vocab = [["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["▁", -3.0], ["▁a", -2.0], ["b", -2.5], ["▁ab", -6.0]]
    spec = {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}}
    spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ab a c") == [1, 4, 5, 4, 3, 0]
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.from_folder(tmp_path / "saved").encode("ab a c") == [1, 4, 5, 4, 3, 0]
    for damage in ({"unk_id": None}, {"unk_id": 99}, {"vocab": [["a"]]}, {"vocab": [["<unk>", float("nan")]]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"model": {**spec["model"], **damage}}))
        with pytest.raises(RequestError, match="is damaged"):
            Tokenizer.from_folder(tmp_path)


def test_the_packaged_tokenizers_agree():
    """`open_engine` does not compare these two files when the packaged model is loaded."""
    vocab = json.loads((catalog.TINY_FOLDER / "tokenizer.json").read_text())["model"]["vocab"]
    assert [*vocab] == read_model(catalog.TINY_FOLDER / "tokenizer.model").pieces
    assert [*vocab.values()] == list(range(len(vocab)))
