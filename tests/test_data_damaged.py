"""Data files as found in practice: line ends of every kind, and damaged files, each refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
from pathlib import Path

from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation.windows import load_documents
from mlx_openelm.training.data.read import read_records, read_splits

import pytest

TEXTS = ["a\u2028b", "c\x85d", "e\u2029\x0b\x0c\x1c\x1e", "f\r\n\rg\n"]


def contents(path: Path) -> list[str]:
    return [record.values["text"] for record in read_records([path])]


def refusal(call, *arguments) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    assert type(caught.value) is RequestError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\r", "\r\r\n"])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz"])
def test_lines_end_only_with_lf_cr_or_both(tmp_path, end, name):
    for mark in (b"", b"\xef\xbb\xbf"):
        content = mark + end.join(json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert contents(path) == TEXTS


def test_every_kind_of_line_end_counts_as_one_line(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\r{"text": "b"}\r\n\n{"text": 3}')
    assert "train.jsonl, line 4: 'text' is a number" in refusal(read_records, [path])


def test_a_json_array_with_cr_line_ends(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(json.dumps([{"text": text} for text in TEXTS], indent=1).replace("\n", "\r").encode())
    assert contents(path) == TEXTS


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": NaN}', "'text' is a number, not text"),
        (b'{"text": -Infinity}', "'text' is a number, not text"),
        (b'{"text": 1e999}', "'text' is a number, not text"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 11)"),
        (b'{"text": "\xed\xa0\x80"}', "is not UTF-8 text"),
        (b'{"text": "a\tb"}', "is not JSON (Invalid control character"),
        (b'{"text": "a\x00b"}', "is not JSON (Invalid control character"),
        (b'\xff\xfe{\x00"\x00', "is not UTF-8 text (byte 1)"),
        (b'{"' + b"k" * 100_000 + b'": 1}', "has no 'text'"),
        (b"x" * 1_000_000, "is not JSON"),
        (b'{"text": "a"', "is not JSON"),
        (b"{'text': 'a'}", "is not JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, expected):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    what = refusal(read_records, [path])
    assert what.startswith("train.jsonl, line 2: ") and expected in what
    path.write_bytes(line)
    refusal(read_records, [path])
    path.with_suffix(".json").write_bytes(b'[{"text": "good"},' + line + b"]")
    refusal(read_records, [path.with_suffix(".json")])


def test_a_lone_surrogate_is_text(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a\\ud800"}')
    assert contents(path) == ["a\ud800"]


def test_duplicate_keys_are_read_as_by_mlx_lm(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "meta": {"b": 1, "c": 2, "b": 1}}')
    assert contents(path) == ["a"]


def test_pipes_devices_and_folders_are_refused(tmp_path):
    pipe = tmp_path / "train.jsonl"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        assert "is a pipe or a device, not a file" in refusal(read_splits, path)
        assert "is a pipe or a device, not a file" in refusal(load_documents, path)
    assert "train.jsonl is a pipe or a device" in refusal(read_splits, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").symlink_to("nowhere")
    assert "train.jsonl does not exist" in refusal(read_splits, tmp_path / "other")
    assert "is a folder" in refusal(load_documents, tmp_path)
    for name in ("n" * 5000 + ".jsonl", "a\0b.jsonl", "~nobody_of_that_name/a.jsonl"):
        assert "is not a file" in refusal(read_splits, name)


def test_a_pipe_opened_by_the_shell_is_read_as_text(tmp_path):
    for folder in ("/dev/fd", "/proc/self/fd"):
        if not os.path.isdir(folder):
            continue
        reader, writer = os.pipe()
        os.write(writer, b"To be")
        os.close(writer)
        assert load_documents(f"{folder}/{reader}") == ["To be"]
        os.close(reader)
    device = os.open("/dev/zero", os.O_RDONLY)
    assert "is a pipe or a device, not a file" in refusal(load_documents, f"/dev/fd/{device}")
    os.close(device)


def test_a_decompression_bomb_is_refused(tmp_path):
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * 30_000_000))
    assert "unpacks to more than 100 times its size" in refusal(read_records, [path])
    path.write_bytes(gzip.compress(b'{"text": "a"}')[:-12])
    assert "cannot be read" in refusal(read_records, [path])


def test_text_files_with_a_byte_order_mark_and_line_ends(tmp_path):
    for name, content in (("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r{"text": "b"}\r\n'), ("a.txt", b"\xef\xbb\xbfa\rb")):
        path = tmp_path / name
        path.write_bytes(content)
        assert load_documents(path) == (["a", "b"] if name == "a.jsonl" else ["a\nb"])


def bases() -> dict[str, bytes]:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"messages": [{"role": "user", "content": f"{i} é"}, {"role": "assistant", "content": "x" * i}]}
        for i in range(40)
    ]
    files = {}
    for compression in ("none", "snappy", "zstd"):
        for sums in (False, True):
            buffer = io.BytesIO()
            table = pa.Table.from_pylist(rows)
            parquet.write_table(table, buffer, compression=compression, write_page_checksum=sums)
            files[f"{compression}-{sums}.parquet"] = buffer.getvalue()
    return files


def test_damaged_parquet_is_refused_in_one_line(tmp_path):
    """With random bytes changed: a one-line refusal or complete records, nothing else."""
    draw = random.Random(0)
    for name, content in bases().items():
        path = tmp_path / name
        for _ in range(60):
            data = bytearray(content)
            if draw.random() < 0.2:
                del data[draw.randrange(len(data)) :]
            for _ in range(draw.randrange(1, 5) if data else 0):
                data[draw.randrange(len(data))] = draw.choice([0, 255, 128, draw.randrange(256)])
            path.write_bytes(data)
            try:
                read_records([path])
            except RequestError as error:
                assert type(error) is RequestError and "\n" not in str(error) and len(str(error)) < 600


def test_text_in_parquet_that_is_not_utf_8(tmp_path):
    files = bases()
    path = tmp_path / "train.parquet"
    path.write_bytes(files["none-False.parquet"].replace("7 é".encode(), b"7 \xff\xff"))
    assert "train.parquet cannot be read as parquet ('utf-8' codec" in refusal(read_records, [path])
    path.write_bytes(files["none-True.parquet"].replace("7 é".encode(), b"7 zz"))
    assert "cannot be read as parquet" in refusal(read_records, [path])  # its checksum
