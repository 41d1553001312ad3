"""Untrusted files are read within limits, and messages quote little of them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import inputs
from mlx_openelm.errors import QUOTED, OpenELMError, RequestError, quote
from mlx_openelm.generation import grammars
from mlx_openelm.hub import resolve
from mlx_openelm.publishing.files import model_files
from mlx_openelm.sources import open_source
from mlx_openelm.text.tokenizer import Tokenizer

import pytest

BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


def test_a_pipe_a_device_and_a_folder_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    started = time.process_time()
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(RequestError, match="not a file"):
            inputs.read_bytes(path)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "open_it",
    [
        resolve.locate,
        open_source,
        lambda name: open_source(Path(name)),
        Tokenizer.from_file,
        lambda name: model_files(Path(name)),
        lambda name: grammars._read(name, "--grammar", "a grammar"),
    ],
)
@pytest.mark.parametrize("name", ["pipe", "pipe.json"])
def test_a_pipe_that_is_named_where_other_things_may_be_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, open_it: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    with pytest.raises(RequestError, match=f"^{re.escape(name)} is a pipe or a device, not a file"):
        open_it(name)


@pytest.mark.parametrize("name", ["x" * 5000, "null\0character"])
def test_impossible_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot be read") as error:
        inputs.read_bytes(tmp_path / name)
    assert len(str(error.value)) < 2 * QUOTED


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "null\0character", "~nobody-of-this-name/model"])
def test_impossible_paths_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not a file"):
        inputs.to_path(name)


def test_a_path_is_expanded() -> None:
    assert inputs.to_path(" ~/a b ") == Path.home() / "a b"
    assert inputs.to_path(Path("nowhere/at all")) == Path("nowhere/at all")


def test_a_file_beyond_the_limit_of_its_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert inputs.read_bytes(tmp_path / "a", max_bytes=5) == b"12345"
    with pytest.raises(RequestError, match="5 bytes, more than the limit of 4"):
        inputs.read_bytes(tmp_path / "a", max_bytes=4)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"a": ' + "9" * 5000 + "}", "{'a': 1}", '{"a": 1'])
def test_invalid_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        inputs.read_json(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BILLION_LAUGHS, "more than 100000 values"),
        ("a: 1" + ":1" * 60_000, "a number has more than 1000 characters"),
        ("a: b\n" * 60_000, "more than the limit of 262144"),
        ("a: &a [*a]", "an alias refers to a value that contains it"),
        ("[" * 50_000, "nested too deeply"),
        ("a: 1\n---\nb: 2", "single document"),
        ("{[1]: 2}", "unhashable"),
    ],
)
def test_invalid_yaml_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(RequestError, match=reason):
        inputs.read_yaml(tmp_path / "run.yaml")
    assert time.process_time() - started < 10


def test_yaml_with_aliases_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert inputs.read_yaml(tmp_path / "run.yaml") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    (tmp_path / "run.yaml").write_text("")
    assert inputs.read_yaml(tmp_path / "run.yaml") is None


def test_messages_have_no_control_characters_or_endless_words() -> None:
    message = str(OpenELMError(f"naïve\x1b[31mred\nline\u202e\ud800 {'x' * 10_000} end"))
    assert message == f"naïve [31mred line   {'x' * 100}…{'x' * 99} end."
    folder = "f" * 300
    assert str(OpenELMError(f"{folder}/config.json: no model")).endswith("fff/config.json: no model.")


def test_a_quoted_value_is_short() -> None:
    assert quote("it's") == repr("it's")
    recursive: list = []
    recursive.append(recursive)
    for value in ("x" * 10_000_000, ["y"] * 1_000_000, {"k": "v" * 1000}, 10**5000, recursive, b"z" * 10_000):
        assert len(quote(value)) <= QUOTED
