"""`train-tokenizer`: what it writes, read by other programs, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

from mlx_openelm import RequestError, Tokenizer, train_tokenizer
from mlx_openelm.cli.main import main
from mlx_openelm.text.sentencepiece_training import lines_of
from mlx_openelm.training.train_tokenizer import _drawn

import pytest
import sentencepiece
import tokenizers
from processes import environment
from tokenizer_texts import random_texts

ROOT = Path(__file__).parents[1]
PLAY = ROOT / "tests" / "fixtures" / "valid.jsonl"
AWKWARD = [
    *[
        "",
        " ",
        "  two  spaces ",
        " leading",
        "12345 6,789.01",
        "line\nbreak\n\n",
        "\ttab",
        "\r\n",
        "👩‍👩‍👧 😀",
        "日本語中文",
        "e\u0301",
    ],
    *["naïve ½", "a\x00b\x01", "▁x▁", "▅", "⁇", "O Romeo, Romeo!", "\ufeff", "\u2028", "<0x0", "HAMLET: To be"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(PLAY, path, vocab_size=800)
    return path


def write(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pieces_of(folder: Path) -> list[str]:
    """The learned pieces, best first."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [processor.id_to_piece(i) for i in range(259, processor.vocab_size())]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line on standard error of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(["train-tokenizer", *map(str, words)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_both_files_give_the_same_ids_in_other_programs(folder: Path) -> None:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_folder(folder)
    for text in [*AWKWARD, *random_texts(300, typed=False)]:
        ids = slow.encode(text)
        assert fast.encode(text).ids == [1, *ids], repr(text)
        assert ours.encode(text) == [1, *ids], repr(text)
        if "\0" not in text and "▁" not in text:  # sentencepiece decodes U+2581 as a space, too
            assert ours.decode(ids) == text == fast.decode(ids), repr(text)


@pytest.mark.parametrize("reader", ["LlamaTokenizerFast", "AutoTokenizer", "mlx-lm"])
def test_transformers_and_mlx_lm_read_the_same_ids(folder: Path, reader: str) -> None:
    transformers = pytest.importorskip("transformers")
    if reader == "mlx-lm":
        utils = pytest.importorskip("mlx_lm.tokenizer_utils")
        theirs = utils.load(folder)
    else:
        theirs = getattr(transformers, reader).from_pretrained(folder)
    ours = Tokenizer.from_folder(folder)
    # Whatever its files say, that class of transformers 5 adds no space to a text that starts with one.
    skipped = (" ", "▁") if reader == "LlamaTokenizerFast" else ()
    texts = [text for text in [*AWKWARD, *random_texts(200, typed=False)] if not text.startswith(skipped)]
    assert len(texts) > 100
    for text in texts:
        assert theirs.encode(text) == ours.encode(text), repr(text)


def test_typed_control_tokens_are_text_for_us_as_for_sentencepiece(folder: Path) -> None:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = Tokenizer.from_folder(folder)
    for text in ("</s>", "a<s>b", "<unk>", "<0x0A>", "<0x41>"):
        ids = ours.encode(text, as_message=True)[1:]
        assert ids == slow.encode(text) and not {0, 1, 2, 13, 68} & {*ids}
        assert ours.decode(ids) == text


def test_the_model_states_what_llama_2_states(folder: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    assert (trainer.model_type, trainer.vocab_size, trainer.byte_fallback) == (2, 800, True)  # 2: BPE
    assert (trainer.split_digits, trainer.allow_whitespace_only_pieces) == (True, True)
    assert (trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id) == (0, 1, 2, -1)
    assert round(trainer.character_coverage, 5) == 0.99995
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (True, False)
    assert [piece.piece for piece in model.pieces[:5]] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]


def test_the_first_merges_are_the_most_frequent_pairs(folder: Path) -> None:
    """Counted here by brute force, over words with the spaces in front."""
    words: Counter[tuple[str, ...]] = Counter()
    for line in PLAY.read_text().splitlines():
        for text in json.loads(line)["text"].split("\n"):
            if text:
                words.update(map(tuple, re.findall("▁*[^▁]+|▁+", "▁" + text.replace(" ", "▁"))))
    expected = []
    for _ in range(25):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        ranked = (item for item in pairs.most_common() if re.fullmatch("▁+|▁*[A-Za-z]+", "".join(item[0])))
        (best, count), (_, second) = islice(ranked, 2)
        if count == second:  # which one is first is sentencepiece's choice
            break
        expected.append("".join(best))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            merged[_merge(word, best) if best[0] in word else word] += count
        words = merged
    assert len(expected) > 20
    assert pieces_of(folder)[: len(expected)] == expected


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] += piece
        else:
            result.append(piece)
    return tuple(result)


def test_digits_stay_single_and_line_breaks_are_bytes(tmp_path: Path) -> None:
    train_tokenizer(write(tmp_path / "a.jsonl", "year 1999\nand 1999\n" * 50), tmp_path / "out", vocab_size=275)
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces_of(tmp_path / "out"))
    assert tokenizer.encode("\n")[-1] == 3 + ord("\n")


def test_the_same_text_gives_the_same_bytes_whatever_the_format(folder: Path, tmp_path: Path) -> None:
    parquet, zstandard = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("zstandard")
    import pyarrow

    texts = [json.loads(line)["text"] for line in PLAY.read_text().splitlines()]
    (tmp_path / "data").mkdir()
    half = len(texts) // 2
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", *texts[:half])
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", *texts[half:])
    write(tmp_path / "data" / "valid.jsonl", "zzz " * 10_000)  # not read
    parquet.write_table(pyarrow.table({"body": texts, "other": texts[::-1]}), tmp_path / "a.parquet")
    (tmp_path / "first.txt").write_text("\n".join(texts[:half]))
    (tmp_path / "second.txt").write_text("\n".join(texts[half:]))
    (tmp_path / "part-1.txt.gz").write_bytes(gzip.compress("\n".join(texts[:half]).encode()))
    (tmp_path / "part-2.txt.zst").write_bytes(zstandard.compress("\n".join(texts[half:]).encode()))
    train_tokenizer(tmp_path / "data", tmp_path / "1", vocab_size=800)
    train_tokenizer(tmp_path / "a.parquet", tmp_path / "2", vocab_size=800, text_key="body")
    train_tokenizer([tmp_path / "first.txt", tmp_path / "second.txt"], tmp_path / "3", vocab_size=800)
    train_tokenizer(tmp_path / "part-?.txt*", tmp_path / "4", vocab_size=800)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert {(tmp_path / n / name).read_bytes() for n in "1234"} == {(folder / name).read_bytes()}


def test_damaged_documents_are_left_out_if_wanted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": \n' + PLAY.read_text() + '{"body": "x"}\n')
    train_tokenizer(tmp_path / "a.jsonl", tmp_path / "out", vocab_size=800, skip_damaged=True)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_lines_are_drawn_by_the_seed(tmp_path: Path) -> None:
    rng = random.Random(0)
    text = "\n".join(
        " ".join(rng.choice(["love", "hate", "war", "peace", "king"]) * 2 for _ in range(3)) for _ in range(500)
    )
    data = write(tmp_path / "a.jsonl", text)
    options = {"vocab_size": 290, "input_sentence_size": 30}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_tokenizer(data, tmp_path / name, seed=seed, **options)  # type: ignore[arg-type]
    model = [(tmp_path / name / "tokenizer.model").read_bytes() for name in "abc"]
    assert model[0] == model[1] != model[2]


def test_no_text_is_left_out(tmp_path: Path) -> None:
    """sentencepiece itself drops lines that are long or have certain characters."""
    text = "aaab" * 5000 + "\nccc\0ddd\neee▅fff\r\nggg\thhh"
    train_tokenizer(write(tmp_path / "a.jsonl", text), tmp_path / "out", vocab_size=275, character_coverage=1.0)
    assert {*"abcdefgh"} <= {*pieces_of(tmp_path / "out")}
    words = "mot " * 3000 + "日" * 3000
    lines = [*lines_of(words)]
    assert "".join(lines) == words and max(len(line.encode()) for line in lines) <= 4192
    assert all(line.endswith(("mot", "mot ", "日")) for line in lines)
    assert [*lines_of("a\r\nb\n\n c\0d▅")] == ["a", "b", " c", "d"]


def test_a_vocabulary_that_does_not_fit_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "a.jsonl", "to be or not to be")
    words = ["--data", data, "--output", tmp_path / "out", "--vocab-size"]
    line = refused(capsys, *words, 5000)
    assert line.startswith("--vocab-size 5000 is too large for this text, which has only ")
    most = int(line.partition("only ")[2].split()[0])
    assert refused(capsys, *words, 261).startswith("--vocab-size 261 is too small: the text's characters need 266.")
    assert not (tmp_path / "out").exists()
    main_ok(*words, most)
    assert Tokenizer.from_folder(tmp_path / "out").vocab_size == most


def main_ok(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train-tokenizer", *map(str, words)])
    assert stop.value.code == 0


def test_bad_requests_are_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = write(tmp_path / "empty.jsonl", "", "\n\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    out = ("--output", tmp_path / "out")
    no_text = "The data holds no text to train a tokenizer on"
    assert refused(capsys, "--data", empty, *out).startswith(no_text)
    line = refused(capsys, "--data", tmp_path / "broken.jsonl", *out)
    assert line.startswith("broken.jsonl, line 2: is not JSON") and line.endswith("with --skip-damaged.")
    line = refused(capsys, "--data", PLAY, "--text-key", "body", *out)
    assert line.startswith("valid.jsonl, line 1: has no 'body'; it has ") and "name it with --text-key" in line
    line = refused(capsys, "--data", PLAY, "--text-key", "body", "--skip-damaged", *out)
    assert line.startswith(f"{no_text}; if the text is under another key, name it with --text-key")
    assert refused(capsys, "--data", tmp_path / "missing.txt", *out).startswith("There is no folder or file ")
    assert refused(capsys, "--data", PLAY, *out, "--character-coverage", "2").startswith("--character-coverage must be")
    assert refused(capsys, "--data", PLAY, *out, "--input-sentence-size", "-7") == (
        "--input-sentence-size must be 0 or more, got -7."
    )
    assert refused(capsys, "--data", PLAY, *out, "--vocab-size", "0").startswith("--vocab-size must be 1 to 1048576")
    assert refused(capsys, "--data", PLAY, "--output", folder) == f"{folder} exists; choose another --output."
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="^vocab_size must be 1 to"):
        train_tokenizer(PLAY, tmp_path / "out", vocab_size=0)


def test_what_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [json.loads(line)["text"] for line in PLAY.read_text().splitlines()]
    main_ok("--data", PLAY, "--output", tmp_path / "a", "--vocab-size", 700, "--json")
    assert json.loads(capsys.readouterr().out) == {
        "path": str(tmp_path / "a"),
        "vocab_size": 700,
        "pieces": 441,
        "documents": len(texts),
        "characters": sum(map(len, texts)),
    }
    main_ok("--data", PLAY, "--output", tmp_path / "b", "--vocab-size", 700)
    assert capsys.readouterr().out.splitlines()[0] == f"Wrote {tmp_path}/b: a tokenizer of 700 tokens"


def test_progress_is_reported_by_stage(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    train_tokenizer(PLAY, tmp_path / "a", vocab_size=900, progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert stages == ["Reading the corpus", "Learning merges"]
    for stage in stages:
        done = [(at, total) for name, at, total in calls if name == stage]
        assert done == sorted(done) and all(0 <= at <= total for at, total in done) and len(done) >= 4


# The training stands still at its first merges, so that it has no end.
ENDLESS = """
import os, signal
from mlx_openelm.cli.main import main
from mlx_openelm.text import sentencepiece_training
whole = sentencepiece_training._read_log
def read_log(process, log, learned):
    def stop(done):
        os.kill(process.pid, signal.SIGSTOP)
        print(process.pid, flush=True)
    whole(process, log, stop)
sentencepiece_training._read_log = read_log
main()
"""


def test_ctrl_c_ends_the_training_process_and_leaves_nothing(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(9)) for _ in range(20_000)]
    data = write(tmp_path / "a.jsonl", " ".join(words))
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "train-tokenizer", "--data", data, "--output", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(30) == 130 and process.stderr is not None and process.stderr.read() == b""
    finally:
        process.kill()
        with pytest.raises(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--input", "mlx-openelm train-tokenizer has no flag --input (did you mean --data?)"),
        ("--model_prefix", "mlx-openelm train-tokenizer has no flag --model_prefix (did you mean --output?)"),
        ("--model_type", "--model-type is not offered: a tokenizer is trained as Llama's"),
        ("--vocab_size", "mlx-openelm train-tokenizer has no flag --vocab_size (did you mean --vocab-size?)"),
    ],
)
def test_flags_of_sentencepiece_are_answered(flag: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, flag, "x").startswith(answer)


def test_every_line_is_as_likely_to_be_drawn() -> None:
    drawn = Counter(line for seed in range(2000) for line in _drawn(iter("abcdefghij"), 4, seed))
    assert all(abs(count - 800) < 100 for count in drawn.values()) and len(drawn) == 10
    assert [*_drawn(iter("abc"), 0, 0)] == [*"abc"] == [*_drawn(iter("abc"), 5, 0)]
