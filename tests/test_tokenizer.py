"""The tokenizer against SentencePiece, tokenizers, transformers and mlx-lm: ids, text, streaming, files."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.hub import catalog
from mlx_openelm.text import tokenizers_engine
from mlx_openelm.text.saving import write_spec
from mlx_openelm.text.sentencepiece import read_model, to_spec
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.text.tokenizer_spec import SPACE

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
DOCUMENTS = [json.loads(line)["text"] for line in (FIXTURES / "valid.jsonl").read_text().splitlines()]
ODD_TEXTS = [
    *[
        "",
        " ",
        "  ",
        "   ",
        " a",
        "a ",
        "  a  b  ",
        "\n",
        "\n\n a",
        "\t\r\n",
        "\x00",
        "a\x00b",
        "\x1b[0m",
        "\x7f",
    ],
    *[
        "</s>",
        "<s>",
        "<unk>",
        "a</s>b",
        "<s><s>",
        " </s> ",
        "<0x0A>",
        "<0x41>a",
        "▁",
        "▁a ▁▁ b",
        "\u00a0\u3000x",
    ],
    *[
        "café",
        "cafe\u0301",
        "ﬁ①",
        "漢字",
        "😀",
        "👨‍👩‍👧 🇩🇪",
        "\u202eabc",
        "\ufeffx",
        "\ufdd0",
        "\U0010ffff",
        "\ufffd",
    ],
]

processor = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
from_model = Tokenizer.from_folder(FOLDER)
VOCAB = processor.vocab_size()
# Half of the ids are bytes and control tokens, where decoding can go wrong.
token_ids = st.one_of(st.integers(0, VOCAB - 1), st.integers(0, 260), st.sampled_from([0, 1, 2, 1982, 3 + 32]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The fixture's tokenizer as we save it, with a `tokenizer.json`."""
    folder = tmp_path_factory.mktemp("saved")
    from_model.save(folder)
    return folder


@pytest.fixture(scope="module")
def from_json(saved) -> Tokenizer:
    return Tokenizer.from_folder(saved)


def edited_json(saved: Path, folder: Path, edit) -> Path:
    """A copy of the saved `tokenizer.json`, changed by `edit(spec)`."""
    spec = json.loads((saved / "tokenizer.json").read_text())
    edit(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def joined(tokenizer: Tokenizer, ids: list[int], after=()) -> str:
    decoder = tokenizer.streaming_decoder(after=after)
    return "".join([decoder.add(token) for token in ids] + [decoder.finish()])


# Encoding


def test_reference_ids_and_text(from_json):
    for tokenizer in (from_model, from_json):
        assert [tokenizer.encode(prompt) for prompt in REFERENCE["prompts"]] == REFERENCE["ids"]
        assert [tokenizer.decode(ids) for ids in REFERENCE["greedy"]] == REFERENCE["decoded"]
        assert [joined(tokenizer, ids) for ids in REFERENCE["greedy"]] == REFERENCE["decoded"]


@pytest.mark.parametrize("text", ODD_TEXTS + DOCUMENTS)
def test_odd_texts_encode_as_sentencepiece_does(from_json, text):
    expected = processor.encode(text)
    assert from_model.encode(text) == from_json.encode(text) == [1, *expected]
    assert from_json.encode(text, add_bos=False) == expected
    assert from_model.decode(expected) == from_json.decode(expected) == processor.decode(expected)


@settings(max_examples=200, deadline=None)
@given(
    text=st.one_of(st.text(), st.text(" abehint<s>/\n=", max_size=60), st.sampled_from(" -=ha.").map(lambda c: c * 37))
)
def test_any_text_encodes_as_sentencepiece_does(from_json, text):
    expected = processor.encode(text)
    assert from_model.encode(text, add_bos=False) == from_json.encode(text, add_bos=False) == expected
    assert from_model.decode(expected) == text.replace("▁", " ")  # to SentencePiece they are the same character


def test_surrogates_become_characters_or_replacement_characters(from_json):
    for tokenizer in (from_model, from_json):
        assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
        assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_ids_and_tokens(from_json):
    for tokenizer in (from_model, from_json):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (1, 2, {2})
        assert tokenizer.vocab_size == VOCAB == 2048
        assert [tokenizer.id_to_token(i) for i in (0, 2, 259)] == ["<unk>", "</s>", "▁t"]
        assert [tokenizer.token_to_id(t) for t in ("<unk>", "</s>", "▁t", "no such")] == [0, 2, 259, None]
        for token_id in (-1, VOCAB, 2**40):
            with pytest.raises(RequestError, match=f"no token {token_id}"):
                tokenizer.id_to_token(token_id)


def test_add_eos_token(saved):
    tokenizer = Tokenizer.from_folder(saved)
    tokenizer.add_eos_token("▁t")
    tokenizer.add_eos_token("13")
    assert tokenizer.eos_token_ids == {2, 259, 13}
    for token in ("no such", "2048", "99999999999999", "1" * 5000, "", "-1", "²"):
        with pytest.raises(RequestError, match="is not a token"):
            tokenizer.add_eos_token(token)


# Decoding


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(token_ids, max_size=30))
def test_streaming_equals_decoding_equals_sentencepiece(from_json, ids):
    expected = processor.decode(ids)
    for tokenizer in (from_model, from_json):
        assert tokenizer.decode(ids) == joined(tokenizer, ids) == expected


@settings(max_examples=50, deadline=None)
@given(prompt=st.lists(token_ids, max_size=12), ids=st.lists(token_ids, max_size=12))
def test_streaming_after_a_prompt_continues_its_text(prompt, ids):
    # The decoder holds back incomplete characters, so the prompt's last bytes may come with the rest.
    head = from_model.streaming_decoder()
    before = "".join(head.add(token) for token in prompt)
    assert before + joined(from_model, ids, after=prompt) == from_model.decode(prompt + ids)


def test_a_continuation_keeps_the_space_between_words():
    prompt, word = from_model.encode("To be"), [from_model.token_to_id("▁t")]
    assert (joined(from_model, word), joined(from_model, word, after=prompt)) == ("t", " t")


def test_only_whole_characters_are_streamed():
    decoder = from_model.streaming_decoder()
    pieces = [decoder.add(token) for token in from_model.encode("é😀a")]
    assert [p for p in pieces if p] == ["é", "😀", "a"]
    assert decoder.finish() == ""
    cut = from_model.encode("😀")[:-1]
    assert from_model.decode(cut) == "\ufffd" * 3 == joined(from_model, cut)


def test_finish_gives_one_replacement_for_each_byte_of_an_incomplete_character():
    emoji = from_model.encode("😀", add_bos=False)[-4:]  # four bytes
    for count in (1, 2, 3):
        decoder = from_model.streaming_decoder()
        assert "".join(decoder.add(token) for token in emoji[:count]) == ""
        assert decoder.finish() == "\ufffd" * count
        assert decoder.finish() == ""  # and nothing the second time
        assert "".join(decoder.add(token) for token in emoji) == "😀"
    # A control token ends the character too.
    decoder = from_model.streaming_decoder()
    pieces = [decoder.add(token) for token in (*emoji[:2], from_model.eos_token_id, *emoji[2:])]
    assert pieces == ["", "", "\ufffd\ufffd", "\ufffd", "\ufffd"]
    assert decoder.finish() == ""


def test_ids_without_a_token_have_no_text():
    assert from_model.decode([VOCAB + 5, 262, -3, 10**12, 262]) == "a a"


# Files


def test_saved_files(saved):
    assert sorted(p.name for p in saved.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (saved / "tokenizer.model").read_bytes() == (FOLDER / "tokenizer.model").read_bytes()
    assert json.loads((saved / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def test_saving_again_changes_nothing(saved, from_json, tmp_path):
    from_json.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((saved / name).read_text())
    from_json.save(saved)  # onto itself
    assert Tokenizer.from_folder(saved).encode("  a") == from_json.encode("  a")


def test_transformers_and_mlx_lm_read_the_same_ids(saved):
    transformers = pytest.importorskip("transformers")
    utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    theirs = [transformers.AutoTokenizer.from_pretrained(saved), utils.load(saved)]
    # Only special tokens typed in the text differ: those programs take them for tokens.
    for text in [t for t in ODD_TEXTS if not any(s in t for s in ("<s>", "</s>", "<unk>"))] + DOCUMENTS[0][:3].split():
        ids = from_model.encode(text)
        assert [tokenizer.encode(text) for tokenizer in theirs] == [ids, ids]
        assert theirs[0].decode(ids, skip_special_tokens=True) == from_model.decode(ids)


@pytest.mark.covering(2)
@pytest.mark.parametrize("adds_space", [True, False])
@pytest.mark.parametrize("cls", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("files", ["tokenizer.model", "tokenizer.json", "both"])
def test_add_prefix_space_is_heeded_as_in_transformers(saved, tmp_path, files, cls, adds_space):
    """For Llama's classes it replaces the files' own rule, also where the tokenizer.json has the other one."""
    transformers = pytest.importorskip("transformers")
    if files != "tokenizer.json":
        shutil.copy(saved / "tokenizer.model", tmp_path)
    if files != "tokenizer.model":

        def edit(spec):
            spec["pre_tokenizer"] = None
            prepend = [] if adds_space else [{"type": "Prepend", "prepend": SPACE}]
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
            spec["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]}

        edited_json(saved, tmp_path, edit)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {**names, "tokenizer_class": cls, "add_prefix_space": adds_space}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    texts = ["To be", "\n", "naïve café"]
    ids = [theirs.encode(text, add_special_tokens=False) for text in texts]
    assert [ours.encode(text, add_bos=False) for text in texts] == ids
    assert [ours.decode(line) for line in ids] == texts
    ours.save(tmp_path / "saved")
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert [again.encode(text, add_bos=False) for text in texts] == ids
    plain = [from_model.encode(text, add_bos=False) for text in texts]
    assert (tmp_path / "saved" / "tokenizer.model").exists() == (files != "tokenizer.json" and ids == plain)


@pytest.mark.parametrize("value", [None, "no", [], 7])
def test_an_odd_add_prefix_space_is_ignored(saved, tmp_path, value):
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": value}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(saved / name, tmp_path)
        assert Tokenizer.from_folder(tmp_path).encode("To be") == from_model.encode("To be")


def test_added_tokens_beside_a_model_without_the_space_in_front(tmp_path):
    shutil.copy(FOLDER / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    without = Tokenizer.from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": VOCAB}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("To<|a|>be", add_bos=False) == [
        *without.encode("To", add_bos=False),
        VOCAB,
        *without.encode("be", add_bos=False),
    ]
    assert without.encode("To") != from_model.encode("To")


def test_a_tokenizer_json_with_metaspace_is_corrected(saved, tmp_path):
    def edit(spec):
        spec["normalizer"] = None
        spec["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
        spec["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}

    tokenizer = Tokenizer.from_folder(edited_json(saved, tmp_path, edit))
    for text in ODD_TEXTS:
        assert tokenizer.encode(text) == from_model.encode(text)


def test_typed_special_tokens_are_text_in_any_tokenizer_json(saved, tmp_path):
    def edit(spec):
        for token in spec["added_tokens"]:
            token.update(special=False, normalized=True)
        vocab = spec["model"]["vocab"]
        # "</s>" from its characters: "<" and "/" have no piece in this vocabulary, so two bytes' ids become theirs.
        for character, byte in (
            ("<", "<0x01>"),
            ("/", "<0x02>"),
            ("</", "<0x03>"),
            ("</s", "<0x04>"),
            (">", "<0x05>"),
        ):
            vocab[character] = vocab.pop(byte)
        spec["model"]["merges"] = ["< /", "</ s", "</s >", *spec["model"]["merges"]]

    tokenizer = Tokenizer.from_folder(edited_json(saved, tmp_path, edit))
    assert tokenizer.id_to_token(2) == "</s>"
    assert tokenizer.decode(tokenizer.encode("a</s>b<s>")) == "a</s>b<s>"
    assert not {0, 1, 2} & set(tokenizer.encode("a</s>b<s><unk>", add_bos=False))
    assert tokenizer.decode([1, 262, 2]) == "a"
    tokenizer.save(tmp_path / "saved")
    spec = json.loads((tmp_path / "saved" / "tokenizer.json").read_text())
    flags = [(token["id"], token["special"], token["normalized"]) for token in spec["added_tokens"]]
    assert flags == [(0, True, False), (1, True, False), (2, True, False)]
    assert "</s >" not in spec["model"]["merges"]


def test_where_special_ids_come_from(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((FOLDER / "tokenizer.model").read_bytes())
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {2}
    (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 300}')
    assert Tokenizer.from_folder(tmp_path).eos_token_ids == {2, 300}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [400, 401], "bos_token_id": null}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, {2, 400, 401})
    assert Tokenizer.from_folder(tmp_path, eos_token_ids=[9]).eos_token_ids == {9}
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "</s>"}, "eos_token": "<s>"}')
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.encode("a")) == (2, {1}, [2, 262])
    with pytest.raises(RequestError, match="belongs to another model"):
        Tokenizer.from_folder(tmp_path, eos_token_ids=[5000])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"", "damaged"),
        ("tokenizer.json", b"[]", "damaged"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', "damaged"),
        ("tokenizer.json", b"\xff\xfe", "damaged"),
        ("tokenizer.model", b"", "damaged"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1", "damaged"),
        ("tokenizer.model", (FOLDER / "tokenizer.model").read_bytes()[:20000], "damaged"),
        ("tokenizer_config.json", b"[1]", "must contain a JSON object, not a list"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "must be text"),
        ("config.json", b"{", "damaged"),
        ("config.json", b'{"eos_token_id": "2"}', "must be a token id"),
        ("generation_config.json", b'{"eos_token_id": [2, 99999]}', "belongs to another model"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name, content, message):
    (tmp_path / "tokenizer.model").write_bytes((FOLDER / "tokenizer.model").read_bytes())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_reported(tmp_path):
    with pytest.raises(RequestError, match=r"No tokenizer\.json or tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(RequestError, match="No tokenizer at"):
        Tokenizer.from_file(tmp_path / "nothing.model")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(RequestError, match="is not a tokenizer"):
        Tokenizer.from_file(tmp_path / "notes.txt")
    assert Tokenizer.from_file(FOLDER).encode("a") == Tokenizer.from_file(FOLDER / "tokenizer.model").encode("a")


def test_other_kinds_of_tokenizer_are_refused(saved, tmp_path):
    folder = edited_json(saved, tmp_path, lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"}))
    with pytest.raises(RequestError, match="not a SentencePiece-style tokenizer"):
        Tokenizer.from_folder(folder)
    folder = edited_json(saved, tmp_path, lambda spec: spec["model"].update(continuing_subword_prefix="##"))
    with pytest.raises(RequestError, match="not a SentencePiece-style tokenizer"):  # and does not abort the process
        Tokenizer.from_folder(folder)
    with pytest.raises(RequestError, match="removes spaces or rewrites"):
        Tokenizer.from_folder(edited_json(saved, tmp_path, lambda spec: spec.update(normalizer={"type": "NFKC"})))


# From tokenizer.model to tokenizer.json

LLAMA = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def trained(folder: Path, **options) -> Tokenizer:
    """A small SentencePiece model trained on a scene or two, with Llama's settings unless given."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*DOCUMENTS[0][:40000].splitlines(), "=" * 30, "ha" * 20, " " * 12 + "x"]),
        model_writer=model,
        minloglevel=2,
        **{
            "vocab_size": 600,
            "byte_fallback": True,
            "allow_whitespace_only_pieces": True,
            **LLAMA,
            **options,
        },
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 400},
        {"control_symbols": ["<|im_start|>", "<pad>"]},
        {"unk_id": 3, "bos_id": 0, "eos_id": 1},
    ],
    ids=str,
)
def test_conversion_keeps_ids(tmp_path, options):
    ours = trained(tmp_path, **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours.save(tmp_path / "saved")
    converted = Tokenizer.from_folder(tmp_path / "saved")
    assert converted.bos_token_id == processor.bos_id()
    runs = [unit * length for unit in (" ", "=", "-", "ha", "aha", "= ") for length in range(1, 40)]
    for text in [*ODD_TEXTS, *runs, "<|im_start|>", DOCUMENTS[0][40000:60000]]:
        ids = processor.encode(text)
        assert converted.encode(text, add_bos=False) == ours.encode(text, add_bos=False) == ids
        assert converted.decode(ids) == ours.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 350}, "unigram"),
        ({"user_defined_symbols": ["<|user|>", "▁▁"]}, "user-defined"),
    ],
)
def test_models_that_cannot_be_converted_encode_but_are_not_saved(tmp_path, options, reason):
    tokenizer = trained(tmp_path, **options)
    text = " Enter <|user|> x "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(RequestError, match=reason):
        tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": True}, {"normalization_rule_name": "nmt_nfkc"}])
def test_tokenizers_that_rewrite_text_are_refused(tmp_path, options):
    with pytest.raises(RequestError, match="removes spaces or rewrites"):
        trained(tmp_path, **options)


def test_reading_a_sentencepiece_model():
    model = read_model(FOLDER / "tokenizer.model")
    assert len(model.pieces) == VOCAB
    assert model.pieces == [processor.id_to_piece(i) for i in range(VOCAB)]
    assert model.scores == [processor.get_score(i) for i in range(VOCAB)]
    assert (model.model_type, model.byte_fallback, model.add_dummy_prefix) == ("bpe", True, True)
    assert not (model.remove_extra_whitespaces or model.rewrites_text)
    merges = write_spec(to_spec(model), 1)["model"]["merges"]
    assert merges[0] == "▁ t"
    assert len(merges) == 2577


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 29000), data=st.binary(max_size=200))
def test_a_damaged_sentencepiece_model_is_recognized(tmp_path_factory, cut, data):
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes((FOLDER / "tokenizer.model").read_bytes()[:cut] + data)
    for read in (lambda path: read_model(path).pieces, lambda path: Tokenizer.from_file(path).encode("hi")):
        try:
            result = read(path)
        except RequestError as error:  # nothing else may be raised
            result = str(error)
        assert result


@pytest.mark.parametrize(("name", "other"), [("tokenizer.json", "sentencepiece"), ("tokenizer.model", "tokenizers")])
def test_only_the_needed_package_is_imported(saved, name, other):
    heavy = [other, "transformers", "torch", "mlx_lm", "jinja2"]
    code = f"""
import sys
from mlx_openelm.text.tokenizer import Tokenizer
tokenizer = Tokenizer.from_file({str(saved / name)!r})
tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}])
print(tokenizer.decode(tokenizer.encode("Hi")), [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Hi []"


# What could make a text's tokens depend on more than its words: spaces in a row, line breaks, U+2581, symbols.
MIXED = st.lists(
    st.sampled_from(["to", "be ", "or", " ", "   ", "\n", "\t ", "é", "▁", "日本", "</s>", "1 ", "_ ", "😀"])
)


@pytest.mark.parametrize("first_only", [False, True])
@given(words=MIXED)
@settings(max_examples=12, deadline=None)
def test_a_long_text_in_parts_has_the_ids_of_the_whole(first_only, words):
    tiny = Tokenizer.from_folder(catalog.TINY_FOLDER)
    engine = tokenizers_engine.TokenizersEngine(replace(tiny.spec, first_only=first_only), catalog.TINY_FOLDER)
    engine.build((1, 2))
    text = "".join(words) * 3
    with pytest.MonkeyPatch.context() as patch:
        whole = [engine.encode(text, start=start) for start in (True, False)]
        patch.setattr(tokenizers_engine, "_LONG_TEXT", 8)
        assert [engine.encode(text, start=start) for start in (True, False)] == whole
        assert engine._words_are_apart
