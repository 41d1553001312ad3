"""Loss and divergence against the reference implementation and brute force."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

from mlx_openelm import QuantizeOptions, convert, errors, load, perplexity, quantize
from mlx_openelm.cli import perplexity as cli
from mlx_openelm.cli.main import main, parse
from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation import windows as windows_module
from mlx_openelm.evaluation.perplexity import kl_divergence, mean_nll, measure
from mlx_openelm.evaluation.windows import EXAMPLE_KEYS, cut, load_documents, make_windows
from mlx_openelm.training.data.kinds import KINDS

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import write_tiny

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def loaded():
    return load(FIXTURES / "shakespeare-hf", dtype="float32")


@pytest.fixture(scope="module")
def windows(loaded):
    return make_windows(loaded[1], load_documents(FIXTURES / "valid.jsonl"), 256)


def log_softmax(logits: mx.array) -> np.ndarray:
    wide = np.array(logits, dtype=np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.slow
def test_the_mean_loss_equals_the_reference(loaded, windows, reference):
    expected = reference["valid"]
    assert len(windows) == expected["windows"]
    result = mean_nll(loaded[0], windows)
    assert result.tokens == expected["windows"] * expected["window_tokens"]
    assert abs(result.nll - expected["mean_nll"]) < 1e-4
    assert abs(result.perplexity - np.exp(expected["mean_nll"])) < 1e-2


def test_loss_and_error_equal_a_loop_for_any_batch_and_chunk(loaded, windows):
    # Logits are computed for 256 positions at a time, which end within a window.
    model, windows = loaded[0], [window[:201] for window in windows[:3]]
    losses = []
    for window in windows:
        logprobs = log_softmax(model(mx.array([window[:-1]]))[0])
        losses += [-logprobs[i, token] for i, token in enumerate(window[1:])]
    for batch_size in (1, 2):
        result = mean_nll(model, windows, batch_size=batch_size)
        assert result.nll == pytest.approx(np.mean(losses), abs=1e-5)
        assert result.standard_error == pytest.approx(np.std(losses) / len(losses) ** 0.5, rel=1e-3)


def test_divergence_equals_a_loop_and_is_zero_to_itself(loaded, windows, tmp_path):
    model = loaded[0]
    convert(FIXTURES / "shakespeare-hf", tmp_path / "packed", quantize=True, q_bits=8)
    quantized = load(tmp_path / "packed")[0]
    expected = []
    for window in windows[:2]:
        p, q = (log_softmax(m(mx.array([window[:-1]]))[0]) for m in (model, quantized))
        expected.append((np.exp(p) * (p - q)).sum(-1))
    assert kl_divergence(model, quantized, windows[:2], batch_size=2) == pytest.approx(np.mean(expected), rel=1e-3)
    assert np.mean(expected) < 1e-3
    assert kl_divergence(model, model, windows[:2]) == 0


def test_logits_exist_for_a_few_positions_at_a_time(loaded, windows, monkeypatch):
    model, seen = loaded[0], []
    logits = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, rows: seen.append(rows.shape[0]) or logits(self, rows))
    mean_nll(model, windows[:4], batch_size=4)
    assert sum(seen) == 4 * 256
    assert max(seen) <= 256


def test_progress_counts_windows(loaded, windows):
    steps: list[tuple[int, int]] = []
    mean_nll(loaded[0], windows[:3], batch_size=2, progress=lambda *step: steps.append(step))
    assert steps == [(2, 3), (3, 3)]


def test_windows_start_with_bos_and_drop_the_remainder(loaded):
    tokenizer = loaded[1]
    ids = [*tokenizer.encode("To be"), 2, *tokenizer.encode("or not to be"), 2]
    cut = make_windows(tokenizer, ["To be", "or not to be"], 4)
    assert cut == [[1, *ids[start : start + 4]] for start in range(0, len(ids) - 3, 4)]
    whole = make_windows(tokenizer, ["To be", "or not to be"], len(ids))  # nothing is left over
    assert whole == [[1, *ids]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', "line 2"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", "not json\n", "line 1"),
        ("a.jsonl", "\n\n", "no text"),
        ("a.txt", "", "no text"),
        ("a.json", '[{"text": "x"}, "y"]', "item 2: expected a JSON object with the string 'text'"),
        ("a.json", '{\n "text": "x"\n}', "a.json has a JSON object over several lines; write each object on its own"),
    ],
)
def test_bad_data_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        load_documents(path)


def test_missing_files_short_texts_and_empty_requests_are_refused(loaded, tmp_path):
    with pytest.raises(RequestError, match="does not exist"):
        load_documents(tmp_path / "absent.txt")
    with pytest.raises(RequestError, match="fewer than a window of 256"):
        make_windows(loaded[1], ["To be"], 256)
    with pytest.raises(RequestError, match="nothing to measure"):
        mean_nll(loaded[0], [])
    with pytest.raises(RequestError, match="batch_size"):
        mean_nll(loaded[0], [[1, 2]], batch_size=0)


@pytest.mark.parametrize(
    "record", [{"prompt": "a", "completion": "b"}, {"messages": []}, {"conversations": []}, {"instruction": "a"}]
)
def test_examples_for_fine_tuning_are_sent_to_what_measures_them(tmp_path, record, monkeypatch):
    path = tmp_path / "my data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(RequestError, match="is an example for fine-tuning") as error:
        load_documents(path)
    assert f'`finetune(name, FineTuneOptions(test=True, data="{path}"))`' in str(error.value)
    monkeypatch.setattr(errors, "names_flags", True)
    with pytest.raises(RequestError) as error:
        load_documents(path)
    command = str(error.value).partition("is measured by: ")[2].strip("`.")
    assert shlex.split(command) == ["mlx-openelm", "lora", "--test", "--data", str(path)]
    with pytest.raises(RequestError, match="is a folder; give a file of it, or the perplexity of examples") as error:
        load_documents(tmp_path)
    assert str(error.value).endswith(f"`mlx-openelm lora --test --data {tmp_path}`.")


def test_the_command_that_measures_examples_loads_the_same_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = ["--model", "my model", "--adapter-path", "adapter", "--revision", "v1", "--dtype", "float32"]
    for words, kept in ((given, given), (given[2:4], given[2:4]), ([], []), (["--model", "tiny"], [])):
        with pytest.raises(SystemExit):
            main(["perplexity", *words, "--data", "my data.jsonl"])
        command = capsys.readouterr().err.partition("is measured by: ")[2].strip("`.\n")
        program, *rest = shlex.split(command)
        assert [program, *rest] == ["mlx-openelm", "lora", "--test", *kept, "--data", "my data.jsonl"]
        _, values = parse(rest)
        assert values.adapter_path == "adapter" if kept else "adapter_path" not in values


def test_the_keys_of_examples_are_those_that_training_reads():
    assert set(EXAMPLE_KEYS) == {key for kind in KINDS for key in kind.keys} - {"text"}


def test_text_files_are_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\nsecond\n")
    assert load_documents(path) == ["first\nsecond\n"]
    path.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\rthird")
    assert load_documents(path) == ["first\nsecond\nthird"]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(json.dumps({"text": "a b"}) + "\n" + json.dumps({"text": "c"}) + "\n")
    assert load_documents(jsonl) == ["a b", "c"]


@pytest.mark.parametrize(
    ("name", "is_array"),
    [
        *((name, False) for name in ("a.jsonl", "a.json", "A.JSONL", "a.jsonl.gz", "a.json.gz")),
        *((name, True) for name in ("a.json", "a.json.gz")),
    ],
)
def test_records_are_read_as_the_other_commands_read_them(tmp_path, name, is_array):
    records = [{"text": "a b"}, {"text": "c"}]
    text = json.dumps(records) if is_array else "".join(f"{json.dumps(record)}\r" for record in records)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert load_documents(tmp_path / name) == ["a b", "c"]


def test_texts_may_be_gzipped(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first\r\nsecond"))
    assert load_documents(tmp_path / "a.txt.gz") == ["first\nsecond"]
    (tmp_path / "b.txt.gz").write_bytes(b"first")
    with pytest.raises(RequestError, match="b.txt.gz cannot be read: Not a gzipped file"):
        load_documents(tmp_path / "b.txt.gz")


def plain_losses(model, window: list[int]) -> list[float]:
    """The loss of each token of a window but the first, from one forward pass."""
    logprobs = log_softmax(model(mx.array([window[:-1]]))[0])
    return [-logprobs[place, token] for place, token in enumerate(window[1:])]


@pytest.mark.parametrize(("length", "stride"), [(32, 8), (32, 32), (32, 1), (500, 100)])
def test_strided_windows_measure_each_token_once(loaded, length, stride):
    model, tokenizer = loaded
    documents = ["To be, or not to be, that is the question:", "Whether 'tis nobler in the mind to suffer"] * 2
    ids = [token for document in documents for token in (*tokenizer.encode(document), 2)]
    found = measure(model, cut(tokenizer, documents, length, stride), batch_size=3)
    losses, end = [], 0
    while end < len(ids):
        first, end = end, min(len(ids), end + (stride if end else length))
        losses += plain_losses(model, [1, *ids[max(0, end - length) : end]])[first - end :]
    assert found.tokens == len(losses) == len(ids)
    assert found.nll == pytest.approx(np.mean(losses), abs=1e-4)
    assert found.standard_error == pytest.approx(np.std(losses) / len(losses) ** 0.5, rel=1e-3)


def test_bits_per_byte_and_character_are_those_of_the_text(loaded):
    model, tokenizer = loaded
    documents = ["Café — to be, or not?\n\nAy 😀", " a space in front", "plain"]
    text = "".join(documents)
    found = measure(model, cut(tokenizer, documents, 16, 16))
    assert (found.bytes, found.characters) == (len(text.encode()), len(text))
    bits, error = found.bits_per("bytes")
    assert bits == pytest.approx(found.nll * found.tokens / np.log(2) / len(text.encode()))
    assert error == pytest.approx(found.standard_error * found.tokens / np.log(2) / len(text.encode()))
    assert found.bits_per("characters")[0] == pytest.approx(bits * len(text.encode()) / len(text))
    # Windows without a stride drop what is left over, of the text too.
    windows = cut(tokenizer, documents, 16)
    assert sum(window.bytes for window in windows) < len(text.encode())


def test_reading_a_large_file_is_announced(loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(windows_module, "_SLOW_BYTES", 1000)
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 100)
    perplexity(*loaded, text, sequence_length=64)
    said: list[str] = []
    options = QuantizeOptions(method="gptq", calibration=str(text), sequence_length=64, num_samples=1)
    quantize(write_tiny(tmp_path / "tiny"), tmp_path / "quantized", options, say=said.append, progress=False)
    assert said == ["Reading text.txt, 2.1 kB"] == capsys.readouterr().err.splitlines()[:1]
    perplexity(*loaded, text, sequence_length=64, progress=False)
    assert "Reading" not in capsys.readouterr().err


def test_strides_that_cannot_be_are_refused(loaded):
    for stride in (0, 17, -1):
        with pytest.raises(RequestError, match="stride must be from 1 to the sequence_length, 16"):
            cut(loaded[1], ["To be"], 16, stride)


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    def write(rows):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        return tmp_path / "a.parquet"

    assert load_documents(write([{"text": "a b", "n": 1}, {"text": "c", "n": 2}])) == ["a b", "c"]
    for rows, message in (
        ([{"body": "a"}], "has no column 'text'; it has body"),
        ([{"text": "a"}, {"text": None}], "row 2: 'text' is no text"),
        ([{"text": ""}], "contains no text"),
    ):
        with pytest.raises(RequestError, match=message):
            load_documents(write(rows))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(RequestError, match=r"a.parquet cannot be read: .*[^.]\.$"):
        load_documents(tmp_path / "a.parquet")


def test_the_reference_is_loaded_once_and_refused_before_anything_is(capsys, monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(cli, "load", lambda name, *args, **keys: loaded.append(str(name)) or load(name, *args, **keys))
    words = ["perplexity", "--data", str(FIXTURES / "valid.jsonl"), "--num-samples", "1", "--sequence-length", "32"]
    words += ["--model", "tiny", "--model", "tiny", "--reference-model", "tiny-draft", "--json"]
    for more, code, expected in (["--stride", "8"], 2, []), ([], None, ["tiny-draft", "tiny", "tiny"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert (stop.value.code or None, loaded) == (code, expected)
    assert "--stride and --reference-model exclude each other." in capsys.readouterr().err


def test_several_models_are_one_table(capsys, tmp_path):
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["perplexity", "--data", str(FIXTURES / "valid.jsonl"), "--num-samples", "2", *words])
        assert not stop.value.code
        return capsys.readouterr().out

    models = ["tiny", str(FIXTURES / "shakespeare-hf")]
    words = [word for model in models for word in ("--model", model)]
    values = json.loads(run(*words, "--json", "--sequence-length", "64"))["models"]
    assert [value["model"] for value in values] == models
    alone = json.loads(run("--model", models[1], "--json", "--sequence-length", "64"))
    assert alone == values[1] and alone["bits_per_byte"] > 0
    lines = run(*words, "--sequence-length", "64").splitlines()
    assert lines[0].split() == ["model", "perplexity", "nats/token", "bits/byte", "bits/character", "tokens"]
    assert f"{values[0]['perplexity']:.4f}" in lines[1] and f"{values[1]['bits_per_character']:.4f}" in lines[2]
    text = run("--sequence-length", "64", "--stride", "32")
    assert "2 windows of 64, one every 32" in text and "per byte, " in text
