"""Looping text: detected by its tokens, and noted after greedy decoding."""

from __future__ import annotations

import sys

from mlx_openelm.cli.main import main
from mlx_openelm.generation.piece import Piece
from mlx_openelm.generation.repetition import ends_in_loop

import pytest


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([7] * 24, True),
        ([7] * 23, False),
        ([1, 2, 3, *[4, 5] * 12], True),
        ([*[4, 5] * 12, 6], False),  # it left the loop
        (list(range(64)) * 3, True),
        (list(range(64)) * 2, False),
        (list(range(65)) * 4, False),  # a refrain
        ([*[8, 9, 10, 11, 12] * 5, 8, 9], True),  # the last round is incomplete
        (list(range(200)), False),
        ([], False),
    ],
)
def test_a_loop_is_a_block_at_least_three_times(tokens: list[int], loops: bool) -> None:
    assert ends_in_loop(tokens) is loops


@pytest.mark.parametrize(
    ("tokens", "words", "advice"),
    [
        ([5, 6] * 20, [], "try --repetition-penalty 1.2 or --temp 0.7\n"),
        ([5, 6] * 20, ["--json"], "try --repetition-penalty 1.2 or --temp 0.7\n"),
        ([5, 6] * 20, ["--temp", "0.5"], None),
        ([5, 6] * 20, ["--repetition-penalty", "1.1"], None),
        ([5, 6] * 20, ["--no-verbose"], None),
        (list(range(5, 45)), [], None),
    ],
)
def test_a_loop_is_noted_once_where_there_is_something_to_try(
    tokens: list[int],
    words: list[str],
    advice: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pieces = [Piece("so ", token, -1.0, 3, 1.0, n, 1.0, 0.1) for n, token in enumerate(tokens, 1)]
    monkeypatch.setattr("mlx_openelm.cli.generate.stream_generate", lambda *_, **__: iter(pieces))
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "hi", *words])
    error = capsys.readouterr().err
    assert error.count("note: the text repeats itself") == (advice is not None)
    assert advice is None or error.endswith(advice)


def test_the_note_is_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [Piece("so ", 5, -1.0, 3, 1.0, n, 1.0, 0.1) for n in range(1, 41)]
    monkeypatch.setattr("mlx_openelm.cli.generate.stream_generate", lambda *_, **__: iter(pieces))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "hi"])
    note = capsys.readouterr().err.partition("note: ")[2]
    assert note.count("\n") > 1 and max(map(len, note.splitlines())) <= 60


def test_an_instruct_model_may_want_its_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlx_openelm import load

    monkeypatch.setattr("mlx_openelm.cli.generate.load", lambda *_, **__: load("tiny"))
    monkeypatch.setattr("mlx_openelm.cli.generate.stream_generate", lambda *_, **__: iter(looping))
    looping = [Piece("so ", 5, -1.0, 3, 1.0, n, 1.0, 0.1) for n in range(1, 40)]
    with pytest.raises(SystemExit):
        main(["generate", "--model", "270m-instruct", "--prompt", "hi"])
    assert capsys.readouterr().err.endswith("--repetition-penalty 1.2, --temp 0.7 or --chat-template corenet\n")
    with pytest.raises(SystemExit):
        main(["generate", "--model", "270m-instruct", "--prompt", "hi", "--chat-template", "corenet"])
    assert capsys.readouterr().err.endswith("--repetition-penalty 1.2 or --temp 0.7\n")
