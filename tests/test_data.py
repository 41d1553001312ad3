"""From files to records: folders, single files, data sets on the hub, and messages about bad ones."""

from __future__ import annotations

import builtins
import gzip
import json
import shutil
from pathlib import Path

from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.training.data.corpus.documents import read_texts
from mlx_openelm.training.data.corpus.files import TextFile
from mlx_openelm.training.data.read import find_splits, read_records, read_splits

import pytest
from fake_hub import FakeHub
from hypothesis import given, settings
from hypothesis import strategies as st


def texts(number: int, prefix: str = "t") -> list[dict]:
    return [{"text": f"{prefix}{index}"} for index in range(number)]


def as_lines(records: list) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def write(path: Path, content: str | bytes | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = as_lines(content) if ".jsonl" in path.name else json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def contents(records) -> list[str]:
    return [record.values["text"] for record in records]


def message(call, *arguments, **options) -> str:
    with pytest.raises(RequestError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Folders


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_folder_with_three_splits(tmp_path, ending):
    for split, number in (("train", 3), ("valid", 2), ("test", 1)):
        write(tmp_path / f"{split}.{ending}", texts(number, split))
    splits = read_splits(tmp_path, need=("train", "test"))
    assert contents(splits.train) == ["train0", "train1", "train2"]
    assert (contents(splits.valid), contents(splits.test)) == (["valid0", "valid1"], ["test0"])
    assert splits.notes == ()
    word = "line" if ending == "jsonl" else "item"
    assert [record.source for record in splits.train] == [f"train.{ending}, {word} {n}" for n in (1, 2, 3)]


def test_only_the_requested_splits_are_read(tmp_path):
    write(tmp_path / "train.jsonl", "broken")
    write(tmp_path / "test.jsonl", texts(2))
    splits = read_splits(tmp_path, need=("test",))
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (0, 0, 2)


def test_missing_splits_are_named(tmp_path):
    write(tmp_path / "train.jsonl", texts(4))
    assert "has no test data (only train)" in message(read_splits, str(tmp_path), need=("train", "test"))
    assert "holds no data" in message(read_splits, str(write(tmp_path / "empty" / "notes.md", "x").parent))


def test_without_validation_data_a_part_is_held_out_and_reported(tmp_path):
    write(tmp_path / "train.json", texts(40))
    splits = read_splits(tmp_path)
    assert (len(splits.train), len(splits.valid)) == (36, 4)
    assert len(splits.notes) == 1 and "4 of its 40 examples" in splits.notes[0]
    without = read_splits(tmp_path, valid_fraction=0)
    assert (len(without.train), len(without.valid)) == (40, 0)
    assert "without validation" in without.notes[0]


@pytest.mark.parametrize("name", ["validation.jsonl", "val.json", "dev.jsonl", "data/valid.jsonl"])
def test_other_names_for_validation(tmp_path, name):
    write(tmp_path / "train.jsonl", texts(3))
    write(tmp_path / name, texts(2, "v"))
    splits = read_splits(tmp_path)
    assert (len(splits.train), contents(splits.valid)) == (3, ["v0", "v1"])


def test_two_files_for_the_same_split_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", texts(3))
    write(tmp_path / "train.json", texts(3))
    assert "several files for train (train.json, train.jsonl)" in message(read_splits, tmp_path)


def test_shards_are_joined_in_order_and_must_be_complete(tmp_path):
    for index in (1, 0):
        write(tmp_path / "data" / f"train-0000{index}-of-00002.jsonl", texts(2, f"s{index}-"))
    assert contents(read_splits(tmp_path, valid_fraction=0).train) == ["s0-0", "s0-1", "s1-0", "s1-1"]
    (tmp_path / "data" / "train-00001-of-00002.jsonl").unlink()
    assert "1 of the 2 files of train" in message(read_splits, tmp_path)
    write(tmp_path / "data" / "train-00001-of-00003.jsonl", texts(2))  # two of the files, but the wrong ones
    assert "files of several data sets for train (data/train-00000-of-00002.jsonl" in message(read_splits, tmp_path)


def test_the_data_sets_of_the_paper_are_read():
    folder = Path(__file__).parents[2] / "shared" / "data" / "commonsense" / "openbookqa"
    if not folder.is_dir():
        pytest.skip("needs the data of the paper's evaluation")
    splits = read_splits(folder, need=("train", "test"))
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (4461, 496, 500)


# One file


@settings(max_examples=60, deadline=None)
@given(number=st.integers(1, 60), fraction=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_one_file_is_split_without_loss_or_overlap(tmp_path_factory, number, fraction, seed):
    path = write(tmp_path_factory.mktemp("data") / "mine.jsonl", texts(number))
    splits = read_splits(path, valid_fraction=fraction, seed=seed)
    train, valid = contents(splits.train), contents(splits.valid)
    assert sorted(train + valid) == sorted(contents(read_records([path])))
    assert train and (not valid) == (fraction == 0 or number == 1)
    assert len(valid) <= max(1, round(number * fraction))
    assert [r.values for r in read_splits(path, valid_fraction=fraction, seed=seed).valid] == texts_of(valid)


def texts_of(values: list[str]) -> list[dict]:
    return [{"text": value} for value in values]


def test_another_seed_holds_out_other_examples(tmp_path):
    path = write(tmp_path / "mine.jsonl", texts(100))
    drawn = {tuple(contents(read_splits(path, seed=seed).valid)) for seed in range(5)}
    assert len(drawn) == 5


def test_one_file_is_used_whole_for_testing(tmp_path):
    path = write(tmp_path / "mine.jsonl", texts(5))
    assert len(read_splits(path, need=("test",)).test) == 5
    assert "has no test data" in message(read_splits, path, need=("train", "test"))


def test_json_lines_called_json_byte_order_marks_blank_lines_and_gzip(tmp_path):
    lines = as_lines(texts(3))
    expected = ["t0", "t1", "t2"]
    assert contents(read_records([write(tmp_path / "a.json", lines)])) == expected
    assert contents(read_records([write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + lines.encode())])) == expected
    spaced = read_records([write(tmp_path / "c.jsonl", lines.replace("\n", "\r\n\n"))])
    assert contents(spaced) == expected and spaced[1].source == "c.jsonl, line 3"
    assert contents(read_records([write(tmp_path / "d.jsonl.gz", gzip.compress(lines.encode()))])) == expected
    odd = write(tmp_path / "e.jsonl", json.dumps({"text": "one\u2028line\x0b"}, ensure_ascii=False))
    assert contents(read_records([odd])) == ["one\u2028line\x0b"]


def test_paths_without_data_are_refused(tmp_path):
    assert "is not a data file" in message(read_splits, write(tmp_path / "story.txt", "once"))
    for name in (tmp_path / "nothing", "nothing.jsonl", "./a/b", "nothing"):
        assert "There is no folder or file" in message(read_splits, str(name))
    assert "data is empty" in message(read_splits, " ")
    assert "valid_fraction" in message(read_splits, tmp_path, valid_fraction=1.0)
    damaged = write(tmp_path / "a.jsonl.gz", b"not gzip")
    assert "cannot be read" in message(read_splits, damaged)


# Bad records

GOOD = '{"text": "a"}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, '{"text": "a"'], "line 2: is not JSON (Expecting ',' delimiter: column 13)"),
        ([GOOD, "[1, 2]"], "line 2: is not a JSON object"),
        ([GOOD, "null"], "line 2: is not a JSON object"),
        ([GOOD, '{"texts": "a"}'], "line 2: has no 'text'"),
        (['{"question": "a", "answer": "b"}'], "line 1: has none of the known sets of keys"),
        ([GOOD, '{"text": 3}'], "line 2: 'text' is a number, not text"),
        ([GOOD, '{"text": null}'], "line 2: 'text' is null; give it a value"),
        (['{"text": null, "prompt": "a", "completion": null}'], "line 1: 'completion' is null; give it a value"),
        (['{"text": null, "instruction": null, "output": null}'], "line 1: 'text' is null; give it a value"),
        (['{"messages": null}', GOOD], "line 1: has no 'text'"),
        ([GOOD, '{"text": ["a"]}'], "line 2: 'text' is a list, not text"),
        (['{"prompt": "a", "completion": true}'], "line 1: 'completion' is true or false, not text"),
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'], "line 2: has no 'completion'"),
        (['{"instruction": "a", "input": 3, "output": "b"}'], "line 1: 'input' is a number, not text"),
        (['{"messages": []}'], "line 1: Messages must be a list with at least one"),
        (['{"messages": [{"role": "king", "content": "a"}]}'], "line 1: Message 0 has role 'king'"),
        (['{"messages": [{"role": "user", "content": null}]}'], "line 1: The content of message 0 must be text"),
        (
            [GOOD, '{"messages": [{"role": "user", "content": "a"}]}'],
            "line 2: holds chat messages, but bad.jsonl, line 1",
        ),
        ([GOOD, "[" * 100_000], "line 2: is not JSON"),
    ],
)
def test_a_bad_line_is_named_with_the_reason(tmp_path, lines, expected):
    path = write(tmp_path / "bad.jsonl", "\n".join(lines))
    assert f"bad.jsonl, {expected}" in message(read_records, [path])


def test_the_first_bad_line_is_named_and_the_others_counted(tmp_path):
    path = write(tmp_path / "bad.jsonl", "\n".join([GOOD, "{", GOOD, "3", "{}x"]))
    text = message(read_records, [path])
    assert text.startswith("bad.jsonl, line 2:") and "2 more bad entries" in text
    path = write(tmp_path / "worse.json", json.dumps([{"text": "a"}, {"text": 1}, {"test": "a"}]))
    text = message(read_records, [path])
    assert text.startswith("worse.json, item 2:") and "1 more bad entry" in text


def test_empty_files_binary_files_and_bad_json_are_refused(tmp_path):
    for content in ("", "\n\n", "[]"):
        assert "train.json is empty" in message(read_records, [write(tmp_path / "train.json", content)])
    assert "line 2: is not UTF-8 text (byte 11)" in message(
        read_records, [write(tmp_path / "latin.jsonl", GOOD.encode() + b'\n{"text": "\xe9"}')]
    )
    assert "train.json: is not JSON" in message(read_records, [write(tmp_path / "train.json", '[{"text": "a"},')])


@pytest.mark.parametrize("content", ['{\n "text": "a"\n}', '{"text":\n "a"}', '{\n "text": "a"\n}\n{\n "text": "b"\n}'])
def test_an_object_over_several_lines_is_named(tmp_path, content):
    expected = "train.json has a JSON object over several lines; write each object on its own line, or all in an array"
    assert expected in message(read_records, [write(tmp_path / "train.json", content)])
    with pytest.raises(RequestError, match="over several lines" if content.startswith("{\n") else "is not JSON"):
        list(read_texts([TextFile(str(tmp_path / "train.json"), "text")]))


def test_a_bad_shard_after_a_good_one_is_refused(tmp_path):
    write(tmp_path / "train-00000-of-00002.jsonl", texts(2))
    write(tmp_path / "train-00001-of-00002.jsonl", [{"prompt": "a", "completion": "b"}])
    assert "train-00001-of-00002.jsonl, line 1: holds prompt and completion" in message(read_splits, tmp_path)


# Parquet


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table({"text": ["a", "b", "c"], "number": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "train.parquet")
    records = read_splits(tmp_path, valid_fraction=0).train
    assert contents(records) == ["a", "b", "c"] and records[2].source == "train.parquet, row 3"
    chats = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
    parquet.write_table(pa.table({"messages": chats}), tmp_path / "train.parquet")
    assert read_splits(tmp_path, valid_fraction=0).train[0].values == {"messages": chats[0]}
    parquet.write_table(pa.table({"prompt": [None], "completion": [None], "text": ["a"]}), tmp_path / "train.parquet")
    assert contents(read_splits(tmp_path, valid_fraction=0).train) == ["a"]
    parquet.write_table(pa.table({"question": ["a"]}), tmp_path / "train.parquet")
    assert "row 1: has none of the known sets of keys" in message(read_splits, tmp_path)
    table = pa.table({"text": ["a"], "tools": ["[]"], "images": [b"x"], "system": ["b"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert read_splits(tmp_path, valid_fraction=0).train[0].values == {"text": "a"}
    parquet.write_table(table.append_column("messages", [chats]), tmp_path / "train.parquet")
    assert "'images' is not offered" in message(read_splits, tmp_path)
    parquet.write_table(pa.table({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}), tmp_path / "train.parquet")
    assert "holds preference pairs" in message(read_splits, tmp_path)
    write(tmp_path / "train.parquet", b"PAR1 and nothing more")
    assert "cannot be read as parquet" in message(read_splits, tmp_path)


def test_without_pyarrow_the_package_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install '.[data]'" in message(read_splits, write(tmp_path / "train.parquet", b"PAR1"))


# Which files are splits


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["data/train-00000-of-00001.parquet", "README.md"], {"train": ["data/train-00000-of-00001.parquet"]}),
        (
            ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/validation-00000-of-00001-0b.parquet"],
            {
                "train": ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
                "valid": ["data/validation-00000-of-00001-0b.parquet"],
            },
        ),
        (["train.jsonl", "test.jsonl", "x.py"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
        (
            ["default/train/0000.parquet", "default/train/0001.parquet"],
            {"train": ["default/train/0000.parquet", "default/train/0001.parquet"]},
        ),
        (["train.jsonl", "train.parquet"], {"train": ["train.jsonl"]}),
        (["train.jsonl", "train_small.jsonl"], {"train": ["train.jsonl"]}),
        (["train_sft-00000-of-00001.parquet"], {"train": ["train_sft-00000-of-00001.parquet"]}),
        (["trainer_state.json", "testimony.jsonl", "dataset_infos.json"], {}),
    ],
)
def test_splits_are_found_in_the_hubs_layouts(names, expected):
    assert find_splits(names, "owner/name", choose_format=True) == expected


def test_ambiguous_configurations_are_refused():
    names = ["main/train-00000-of-00001.parquet", "other/train-00000-of-00001.parquet"]
    assert "several files for train (main/" in message(find_splits, names, "owner/name", choose_format=True)


# The hub


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    write(folder / "data" / "train.jsonl", texts(20))
    write(folder / "data" / "validation.jsonl", texts(4, "v"))
    write(folder / "load_script.py", "raise SystemExit('code of a repository ran')")
    write(folder / "README.md", "card")
    return folder


def test_a_data_set_on_the_hub(hub: FakeHub, served):
    hub.add("datasets/me/plays", served)
    splits = read_splits("me/plays")
    assert (len(splits.train), len(splits.valid), splits.notes) == (20, 4, ())
    assert splits.train[0].source == "train.jsonl, line 1"
    assert sorted(hub.files_sent) == ["data/train.jsonl", "data/validation.jsonl"]


def test_a_cached_data_set_needs_no_network(hub: FakeHub, served):
    hub.add("datasets/me/plays", served)
    first = read_splits("me/plays")
    sent = len(hub.files_sent)
    assert read_splits("me/plays") == first and len(hub.files_sent) == sent
    hub.stop()
    assert read_splits("me/plays") == first


def test_one_file_under_another_name_is_split(hub: FakeHub, tmp_path):
    write(tmp_path / "served" / "alpaca_data.json", [{"instruction": "a", "output": "b"}] * 20)
    hub.add("datasets/me/alpaca", tmp_path / "served")
    splits = read_splits("me/alpaca")
    assert (len(splits.train), len(splits.valid)) == (18, 2)


def test_missing_and_unsuitable_data_sets_are_refused(hub: FakeHub, served, tmp_path):
    hub.add("datasets/me/pictures", write(tmp_path / "pictures" / "a.png", "x").parent)
    hub.add("datasets/me/gated", served, gated=403)
    text = message(read_splits, "me/nothing")
    assert text.startswith("There is no file or folder me/nothing here, and no data set")
    assert "me/pictures has no files for train" in message(read_splits, "me/pictures")
    assert "nor a valid name of a data set" in message(read_splits, "me/a b")
    with pytest.raises(OpenELMError, match="datasets/me/gated is gated.*https://huggingface.co/datasets/me/gated"):
        read_splits("me/gated")
    hub.stop()
    with pytest.raises(
        OpenELMError, match="Cannot reach 127.0.0.1 .*datasets/me/other is not in the download cache"
    ) as error:
        read_splits("me/other")
    assert not isinstance(error.value, RequestError)
    text = str(error.value)
    assert text.startswith("There is no file or folder me/other here, and ") and "the model" not in text
    assert "run `hf download me/other --repo-type dataset` on a machine with a network" in text


def test_a_data_set_copied_from_another_machines_cache(hub: FakeHub, served, tmp_path):
    """As the error without a network says."""
    from huggingface_hub import constants, snapshot_download

    hub.add("datasets/me/plays", served)
    there = tmp_path / "there"
    snapshot_download("me/plays", repo_type="dataset", cache_dir=there)
    hub.stop()
    with pytest.raises(OpenELMError) as error:
        read_splits("me/plays")
    assert f"hub/datasets--me--plays from there into {constants.HF_HUB_CACHE}" in str(error.value)
    shutil.copytree(there / "datasets--me--plays", Path(constants.HF_HUB_CACHE, "datasets--me--plays"), symlinks=True)
    assert len(read_splits("me/plays").train) == 20
