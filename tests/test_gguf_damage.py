"""GGUF files that are damaged, hostile, or only unusual: refused cheaply in one line, or read correctly."""

from __future__ import annotations

import functools
import os
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.errors import RequestError
from mlx_openelm.formats import gguf as gguf_format
from mlx_openelm.formats import gguf_header
from mlx_openelm.jobs.export import export

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import SCALARS, TYPES, RawFile, RawTensor

gguf = pytest.importorskip("gguf")


first = functools.cache(gguf_files.small_file)


def small_file() -> RawFile:
    """A file that a test may change; its weights are made once."""
    return replace(first(), keys=[*first().keys], tensors=[*first().tensors])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_file().write(tmp_path_factory.mktemp("plain") / "a.gguf")


def refused(path: Path, message: str) -> None:
    """Refused soon, in one line that names the file."""
    started = time.process_time()
    with pytest.raises(RequestError, match=message) as error:
        gguf_format.read(path)
    assert time.process_time() - started < 2
    text = str(error.value)
    assert path.name in text
    assert "\n" not in text and len(text) < len(str(path)) + 500


def same_as(path: Path, plain: Path) -> None:
    """Read the same as the unchanged file."""
    (ours, our_text), (theirs, their_text) = gguf_format.read(path), gguf_format.read(plain)
    assert ours.config == theirs.config
    assert our_text.encode("ab a") == their_text.encode("ab a")
    assert ours.weights.keys() == theirs.weights.keys()
    for name in theirs.weights:
        assert mx.array_equal(ours.weights[name], theirs.weights[name]), name


# Tensor offsets.


def place(name: str, offset: int) -> Callable[[RawFile], None]:
    return lambda file: file.tensor(name, offset=offset)


def twice(file: RawFile) -> None:
    file.tensors.append(file.tensors[1])


def swapped(file: RawFile) -> None:
    """Two norms at each other's offset."""
    size = len(dict(file.tensors)["token_embd.weight"].data)
    file.tensor("output_norm.weight", offset=size + 1024)
    file.tensor("blk.0.attn_norm.weight", offset=size)


TENSORS: dict[str, tuple[Callable[[RawFile], None], str]] = {
    "overlapping": (place("output_norm.weight", 0), "'output_norm.weight' is at byte 0 of the data instead of"),
    "misaligned": (place("output_norm.weight", 269313), "is at byte 269313 of the data instead of 269312"),
    "a gap": (place("output_norm.weight", 269344), "is at byte 269344 of the data instead of 269312"),
    "far outside": (place("output_norm.weight", 1 << 40), "is at byte 1099511627776"),
    "an offset that overflows": (
        place("output_norm.weight", (1 << 64) - 64),
        "is at byte 18446744073709551552",
    ),
    "swapped": (swapped, "is at byte"),
    "twice": (twice, "the tensor 'output_norm.weight' appears twice"),
    "a size of zero": (lambda f: f.tensor("output_norm.weight", shape=(0,)), r"has shape \[0\]"),
    "a huge size": (lambda f: f.tensor("output_norm.weight", shape=(1 << 63, 2)), "is cut off"),
    "sizes that overflow": (lambda f: f.tensor("output_norm.weight", shape=(1 << 32, 1 << 32)), "is cut off"),
    "no dimension": (lambda f: f.tensor("token_embd.weight", shape=()), r"has shape \[\]"),
    "a 1-D embedding": (
        lambda f: f.tensor("token_embd.weight", shape=(263 * 256,)),
        "no two-dimensional token_embd.weight",
    ),
    "five dimensions": (lambda f: f.tensor("output_norm.weight", shape=(1, 1, 1, 1, 256)), "has 5 dimensions"),
    "1000 dimensions": (lambda f: f.tensor("output_norm.weight", shape=(1,) * 1000), "has 1000 dimensions"),
    "another shape": (lambda f: f.tensor("output_norm.weight", shape=(2, 128)), r"has shape \[2, 128\] instead of"),
    "rows that blocks do not divide": (
        lambda f: f.tensor("blk.0.ffn_down.weight", kind=12, shape=(512, 128)),
        r"'blk.0.ffn_down.weight' of type Q4_K has shape \[512, 128\]",
    ),
    "a long name": (lambda f: f.tensors.append(("x" * 64, RawTensor(0, (1,), b"\0" * 4))), "too long for a tensor"),
    "a name that is not UTF-8": (lambda f: f.tensors.append((b"\xff", RawTensor(0, (1,), b"\0" * 4))), "not UTF-8"),
    "too many": (lambda f: setattr(f, "counts", (1 << 40, 17)), "claims 1099511627776 tensors"),
    "a count above the actual number": (lambda f: setattr(f, "counts", (21, 17)), "damaged or not a GGUF file"),
    "a count below the actual number": (lambda f: setattr(f, "counts", (19, 17)), "blk.1.ffn_down.weight is missing"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_invalid_tensors_are_refused(tmp_path: Path, name: str) -> None:
    change, message = TENSORS[name]
    file = small_file()
    change(file)
    refused(file.write(tmp_path / "a.gguf"), message)


def test_a_file_cut_inside_its_last_tensor_is_refused(tmp_path: Path) -> None:
    data = small_file().pack()
    (tmp_path / "a.gguf").write_bytes(data[:-1])
    refused(tmp_path / "a.gguf", "'blk.1.ffn_down.weight' is cut off")


def test_other_orders_alignments_and_trailing_data_are_accepted(tmp_path: Path, plain: Path) -> None:
    file = small_file()
    file.tensors.reverse()
    same_as(file.write(tmp_path / "reversed.gguf"), plain)
    for alignment in (1, 8, 64, 4096):
        file = small_file()
        file.alignment = alignment
        file.key("general.alignment", "u32", alignment)
        same_as(file.write(tmp_path / "aligned.gguf"), plain)
    file = small_file()
    file.tail = b"what some program appends"
    same_as(file.write(tmp_path / "longer.gguf"), plain)


@pytest.mark.parametrize(
    ("kind", "value"),
    [("u32", 0), ("u32", 3), ("u32", 33), ("i32", -32), ("f32", 32.0), ("str", "32"), ("bool", True), ("u64", 1 << 62)],
)
def test_an_invalid_alignment_is_refused(tmp_path: Path, kind: str, value: Any) -> None:
    file = small_file()
    file.key("general.alignment", kind, value)
    refused(file.write(tmp_path / "a.gguf"), "general.alignment|damaged")


# Keys.


def test_version_2_is_read_and_others_are_refused(tmp_path: Path, plain: Path) -> None:
    file = small_file()
    file.version = 2
    same_as(file.write(tmp_path / "a.gguf"), plain)
    refusals = {0: "version is 0", 1: "GGUF version 1", 4: "version is 4, not 2 or 3", 3 << 24: "other byte order"}
    for version, message in refusals.items():
        file.version = version
        refused(file.write(tmp_path / "a.gguf"), message)


def test_unknown_keys_of_every_type_are_ignored(tmp_path: Path, plain: Path) -> None:
    file = small_file()
    for kind in SCALARS:
        file.key(f"x.{kind}", kind, 1)
        file.key(f"x.list.{kind}", f"array of {kind}", [1, 0, 1])
        file.key(f"x.empty.{kind}", f"array of {kind}", [])
    file.key("x.nested", "array of array of array of u8", [[[1], []], [], [[2, 3]]])
    file.key("general.author", "str", b"J\xf6rg")  # text in another encoding
    file.key("general.tags", "array of str", ["a", b"\xff"])
    file.key("", "u64", (1 << 64) - 1)
    same_as(file.write(tmp_path / "a.gguf"), plain)


def test_values_equal_those_the_package_reads(tmp_path: Path) -> None:
    file = small_file()
    extremes = {"i8": -128, "u16": 65535, "i64": -(1 << 63), "u64": (1 << 64) - 1, "f64": 1e300, "bool": False}
    for kind, value in extremes.items():
        file.key(f"x.{kind}", kind, value)
        file.key(f"x.list.{kind}", f"array of {kind}", [value, 1])
    file.key("x.str", "str", "naïve 🙂")
    path = file.write(tmp_path / "a.gguf")
    fields = gguf.GGUFReader(path).fields.items()
    theirs = {name: value.contents() for name, value in fields if not name.startswith("GGUF.")}
    assert gguf_header.read(path).values == theirs


HEADERS: dict[str, tuple[Callable[[RawFile], None], str]] = {
    "a key twice": (lambda f: f.keys.append(f.keys[1]), "the key 'openelm.block_count' appears twice"),
    "a key that is not UTF-8": (lambda f: f.keys.append((b"\xff" * 999, "u8", 0)), "is not UTF-8"),
    "2**60 keys": (lambda f: setattr(f, "counts", (20, 1 << 60)), "more than 4194304 values"),
    "a count of keys above the actual number": (lambda f: setattr(f, "counts", (20, 18)), "damaged or not a GGUF file"),
    "deep nesting": (lambda f: f.key("x", "array of " * 5 + "u8", [[[[[1]]]]]), "arrays nested more than 4 deep"),
    "a long list": (lambda f: f.key("x", "array of u8", [0] * ((1 << 22) + 1)), "more than 4194304 values"),
    "many lists": (lambda f: f.key("x", "array of array of u8", [[0] * 1024] * 4097), "more than 4194304 values"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_invalid_headers_are_refused(tmp_path: Path, name: str) -> None:
    change, message = HEADERS[name]
    file = small_file()
    change(file)
    refused(file.write(tmp_path / "a.gguf"), message)


def test_a_header_may_have_a_million_tokens(tmp_path: Path) -> None:
    """Each has its text, score and type."""
    file = small_file()
    file.key("x", "array of u8", [0] * (3 * (1 << 20)))
    assert len(gguf_header.read(file.write(tmp_path / "a.gguf")).values["x"]) == 3 * (1 << 20)


@pytest.mark.parametrize("count", [1 << 20, 1 << 40, (1 << 64) - 1])
def test_huge_lengths_are_not_trusted(tmp_path: Path, count: int) -> None:
    """Lengths of a key's name, a text, and lists of numbers, texts and lists, with no data after them."""
    lengths = struct.pack("<Q", count)
    name = struct.pack("<Q", 1) + b"x"
    for after in (
        lengths,
        name + struct.pack("<I", 8) + lengths,
        *(name + struct.pack("<II", 9, kind) + lengths for kind in (0, 8, 9, 12)),
        name + struct.pack("<II", 9, 9) + struct.pack("<Q", 1 << 19) + (struct.pack("<I", 9) + lengths) * 3,
    ):
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + after)
        refused(tmp_path / "a.gguf", "cut off|more than")


def test_values_of_unknown_types_are_refused(tmp_path: Path) -> None:
    file = small_file()
    data = file.pack()
    place = data.index(b"general.architecture") + len(b"general.architecture")
    (tmp_path / "a.gguf").write_bytes(data[:place] + struct.pack("<I", 13) + data[place + 4 :])
    refused(tmp_path / "a.gguf", "a value of unknown type 13")


PER_LAYER = ["feed_forward_length", "attention.head_count", "attention.head_count_kv"]
NO_LISTS: list[tuple[str, Any]] = [
    ("array of i32", []), ("array of i32", [1]), ("array of i32", [1, 1, 1]), ("array of i32", [0, 1]),
    ("array of i32", [1, -1]), ("array of u64", [1, 1 << 63]), ("array of u32", [(1 << 32) - 1] * 2),
    ("array of f32", [2.0, 2.0]), ("array of bool", [True, True]), ("array of str", ["1", "2"]),
    ("array of array of i32", [[1], [1]]), ("str", "22"), ("f32", 2.0), ("bool", True), ("i32", -2), ("u64", 1 << 63),
]  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("name", PER_LAYER)
@pytest.mark.parametrize(("kind", "value"), NO_LISTS)
def test_invalid_sizes_per_layer_are_refused(tmp_path: Path, name: str, kind: str, value: Any) -> None:
    file = small_file()
    file.key(f"openelm.{name}", kind, value)
    refused(
        file.write(tmp_path / "a.gguf"), f"openelm.{name} (is .*, which is not a valid value|has . values for 2 layers)"
    )


@pytest.mark.covering
@pytest.mark.parametrize(
    "name", ["block_count", "embedding_length", "context_length", "attention.key_length", "attention.value_length",
             "rope.dimension_count"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("kind", "value"),
    [("u32", 0), ("i64", -1), ("u64", 1 << 63), ("f32", 2.0), ("bool", True), ("str", "2"), ("array of u32", [2])],
)
def test_invalid_sizes_are_refused(tmp_path: Path, name: str, kind: str, value: Any) -> None:
    file = small_file()
    file.key(f"openelm.{name}", kind, value)
    refused(file.write(tmp_path / "a.gguf"), f"openelm.{name} is .*, which is not a valid value")


@pytest.mark.covering
@pytest.mark.parametrize("name", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
@pytest.mark.parametrize(
    ("kind", "value"),
    [("f32", float("nan")), ("f32", float("inf")), ("f64", 1e300), ("f32", 0.0), ("f32", -1.0), ("str", "nan"),
     ("bool", True), ("array of f32", [1.0]), ("u64", (1 << 64) - 1)],
)  # fmt: skip
def test_invalid_numbers_are_refused(tmp_path: Path, name: str, kind: str, value: Any) -> None:
    file = small_file()
    file.key(f"openelm.{name}", kind, value)
    refused(file.write(tmp_path / "a.gguf"), "which is not a valid value|must be a positive number")


OTHER: dict[str, tuple[str, str, Any, str]] = {
    "a shard": ("split.count", "u16", 3, "one of the 3 files of a split model; join them"),
    "an adapter": ("general.type", "str", "adapter", "is not a model: its general.type is 'adapter'"),
    "another architecture": ("general.architecture", "str", "llama", "is a 'llama' model"),
    "an architecture of control characters": ("general.architecture", "str", "\x1b[31m\n" * 999, "is a '.* model"),
    "not text": ("general.architecture", "array of u8", list(b"openelm"), r"is a \[111, .* model"),
    "scaled positions": ("openelm.rope.scaling.type", "str", "yarn", "scales its positions"),
    "linearly scaled positions": ("openelm.rope.scaling.factor", "f32", 2.0, "scales its positions"),
    "scaled positions by the old key": ("openelm.rope.scale_linear", "f32", 4.0, "scales its positions"),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_models_are_refused_by_name(tmp_path: Path, name: str) -> None:
    key, kind, value, message = OTHER[name]
    file = small_file()
    file.key(key, kind, value)
    refused(file.write(tmp_path / "a.gguf"), message)


def test_a_missing_architecture_is_refused(tmp_path: Path) -> None:
    file = small_file()
    del file.keys[0]
    refused(file.write(tmp_path / "a.gguf"), "no general.architecture, so it is not a model")


def test_defaults_that_llama_cpp_assumes_are_accepted(tmp_path: Path, plain: Path) -> None:
    """Explicitly unscaled positions, shard one of one, and missing keys that have defaults."""
    file = small_file()
    file.key("openelm.rope.scaling.type", "str", "linear")
    file.key("openelm.rope.scaling.factor", "f32", 1.0)
    file.key("split.count", "u16", 1)
    file.key("general.type", "str", "model")
    same_as(file.write(tmp_path / "a.gguf"), plain)
    missing = {"openelm.rope.freq_base", "openelm.rope.dimension_count", "openelm.attention.value_length"}
    file.keys = [entry for entry in file.keys if entry[0] not in missing]
    same_as(file.write(tmp_path / "a.gguf"), plain)
    file.key("openelm.rope.scaling.type", "str", "none")
    file.key("openelm.rope.scaling.factor", "f32", 2.0)
    same_as(file.write(tmp_path / "a.gguf"), plain)


def test_without_key_value_heads_each_head_has_its_own(tmp_path: Path) -> None:
    file = small_file()
    file.keys = [entry for entry in file.keys if entry[0] != "openelm.attention.head_count_kv"]
    qkv = np.zeros((3 * 256, 256), np.float32)
    for layer in range(2):
        file.tensor(f"blk.{layer}.attn_qkv.weight", shape=qkv.shape, data=qkv.tobytes())
    assert gguf_format.read(file.write(tmp_path / "a.gguf"))[0].config.num_kv_heads == (2, 2)


TOKENIZERS: dict[str, tuple[str, Any, str]] = {
    "add_space_prefix": ("str", "", "add_space_prefix is ''"),
    "token_type": ("array of bool", [True] * 263, "has no tokenizer.ggml.token_type"),
    "tokens": ("array of str", [b"\xff"] * 263, "has no tokenizer.ggml.tokens"),
    "scores": ("array of i32", [0] * 263, "has no tokenizer.ggml.scores"),
    "model": ("u64", 1 << 63, "has a 9223372036854775808"),
    "bos_token_id": ("u64", 1 << 63, "bos_token_id is 9223372036854775808"),
    "eos_token_id": ("i32", -1, "eos_token_id is -1"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_invalid_tokenizer_keys_are_refused(tmp_path: Path, name: str) -> None:
    kind, value, message = TOKENIZERS[name]
    file = small_file()
    file.key(f"tokenizer.ggml.{name}", kind, value)
    refused(file.write(tmp_path / "a.gguf"), message)


@pytest.mark.parametrize("kind", [0, 7, -1, 1 << 30])
def test_unknown_token_types_are_refused(tmp_path: Path, kind: int) -> None:
    file = small_file()
    file.key("tokenizer.ggml.token_type", "array of i32", [*TYPES[:-1], kind])
    refused(file.write(tmp_path / "a.gguf"), f"of unknown type {kind}")


# Paths that are not files.


def test_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    refused(tmp_path / "pipe.gguf", "a pipe or a device, not a file")
    refused(tmp_path / "folder.gguf", "a folder, not a file")
    for call in (gguf_format.is_gguf, gguf_format.check):
        with pytest.raises(RequestError, match="a pipe or a device, not a file"):
            call(tmp_path / "pipe.gguf")
    with pytest.raises(RequestError, match="a pipe or a device, not a file"):
        export("tiny", tmp_path / "pipe.gguf", format="gguf", overwrite=True)
