"""`--help` and other output that people read: complete, in order, and never broken inside a word."""

from __future__ import annotations

import os
import pty
import re

from mlx_openelm import console
from mlx_openelm.cli.help_text import render
from mlx_openelm.cli.main import COMMANDS, _program, command, main
from mlx_openelm.training.run.progress import RunProgress

import pytest

WIDTHS = (60, 80, 120)


def parsers() -> dict[str, object]:
    return {"": _program()} | {name: command(name)[0] for name in COMMANDS}


def output(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", WIDTHS)
def test_help_fits_the_width_without_breaking_words(columns: int) -> None:
    for name, parser in parsers().items():
        text = render(parser, columns)
        assert max(map(len, text.splitlines())) <= columns, name
        whole = render(parser, 100)
        # Examples have backslashes where they are broken.
        assert [w for w in text.split() if w != "\\"] == [w for w in whole.split() if w != "\\"], name


def test_help_has_the_width_of_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, least in ((60, 50), (80, 70), (300, 90)):
        monkeypatch.setenv("COLUMNS", str(columns))
        longest = max(map(len, output(capsys, "lora", "-h").splitlines()))
        assert least < longest <= min(columns, 100)
    monkeypatch.delenv("COLUMNS")
    assert max(map(len, output(capsys, "lora", "-h").splitlines())) <= 80


@pytest.mark.parametrize(
    ("name", "main_flags"),
    [
        ("generate", ["--model", "--prompt", "--max-tokens", "--temp", "--top-p", "--seed"]),
        ("lora", ["--model", "--train", "--data", "--iters", "--batch-size", "--learning-rate"]),
        ("quantize", ["--model", "--mlx-path", "--q-bits"]),
    ],
)
def test_the_flags_that_matter_come_first(name: str, main_flags: list[str]) -> None:
    text = render(command(name)[0], 80)
    first = text.partition("\nCommon flags:\n")[2].partition("\n\n")[0]
    flags = re.findall(r"^  (?:-\w, )?(--[\w-]+)", first, flags=re.MULTILINE)
    assert flags[: len(main_flags)] == main_flags
    assert len(flags) <= 12


def test_every_flag_is_in_the_help_once() -> None:
    for name, parser in parsers().items():
        text = render(parser, 100).partition("\nExamples:")[0]
        for flag in parser.flags:  # type: ignore[attr-defined]
            if flag.startswith("--") and not flag.startswith("--no-"):
                assert len(re.findall(rf"^  (?:.*, )?{flag}(?![\w-])", text, flags=re.MULTILINE)) == 1, (name, flag)


def test_texts_begin_with_a_noun_or_verb_and_end_as_sentences() -> None:
    for name, parser in parsers().items():
        for action in parser._actions:  # type: ignore[attr-defined]
            text = re.sub(r"  \[default: .*\]$", "", action.help)
            assert text[0].isupper() and text.endswith("."), (name, text)
            assert not re.match(r"(Its?|The same|That|This|What keeps)\b", text), (name, text)
            assert "by default" not in text, (name, text)


def test_defaults_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(output(capsys, "lora", "--help").split())
    for shown in ("[default: 1e-5]", "[default: 1000]", "[default: tiny]", "[default: the optimizer's]"):
        assert shown in text
    assert "0.0]" not in text and "e-0" not in text and "None" not in text and "%(" not in text
    assert "--seed N Seed of the run: the same seed gives the same adapter. [default: 0]" in text


def test_help_of_a_command_in_every_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        texts = {output(capsys, *words) for words in ((name, "--help"), (name, "-h"), ("help", name), ("-h", name))}
        assert len(texts) == 1
    assert len({output(capsys, *words) for words in ((), ("-h",), ("--help",), ("help",), ("help", "help"))}) == 1
    assert output(capsys, "-V") == output(capsys, "--version")
    with pytest.raises(SystemExit) as stop:
        main(["help", "nothing"])
    assert stop.value.code == 2
    assert "has no command 'nothing'" in capsys.readouterr().err


def test_examples_can_be_copied() -> None:
    for parser in parsers().values():
        examples = render(parser, 60).partition("\nExamples:\n")[2]
        joined = examples.replace(" \\\n      ", " ")
        assert "\\" not in joined
        assert [line.strip() for line in joined.splitlines()] == [
            line.strip()
            for line in parser.epilog.splitlines()  # type: ignore[attr-defined]
        ]


@pytest.mark.covering
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("words", [["doctor"], ["info", "tiny"], ["info", "3b"]])
def test_reports_fit_the_width(
    words: list[str], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = output(capsys, *words)
    monkeypatch.setenv("COLUMNS", str(columns))
    narrow = output(capsys, *words)
    assert max(map(len, whole.splitlines())) > columns
    assert max(map(len, narrow.splitlines())) <= columns
    texts = [re.sub(r"[█\d.\s]+", "", text) for text in (whole, narrow)]
    assert texts[0] == texts[1]


def test_a_long_path_is_below_its_label_and_broken_at_slashes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/home/someone/with/a/long/path/site-packages/scipy_openblas32/lib/libscipy_openblas.so"
    rows = [("BLAS", f"{path}, 12 GFLOP/s"), ("", f"-> remove {path}"), ("numpy", "none (pip install '.[x]')")]
    for columns in (60, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        console.print_rows(rows)
        label, first, second, arrow, *_ = lines = capsys.readouterr().out.splitlines()
        assert label == "BLAS" and arrow.startswith("  -> remove")
        assert first.startswith("  /home/someone/") and first.endswith("/") and second.startswith("  ")
        assert (first + second.lstrip()).endswith(f"{path}, 12 GFLOP/s")
        assert max(map(len, lines)) <= columns
    monkeypatch.setenv("COLUMNS", "30")
    console.print_rows([("numpy", "none (pip install '.[x]')")])
    assert capsys.readouterr().out == "numpy  none\n       (pip install '.[x]')\n"
    monkeypatch.delenv("COLUMNS")
    console.print_rows(rows)
    assert capsys.readouterr().out.splitlines()[0] == f"BLAS   {path}, 12 GFLOP/s"


def test_a_terminal_gives_the_width() -> None:
    parent, child = pty.openpty()
    os.environ.pop("COLUMNS", None)
    import fcntl
    import struct
    import termios

    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
    with os.fdopen(child, "w") as stream:
        assert console.columns(stream) == 57
    os.close(parent)


def test_a_training_line_is_broken_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"train_loss": 3.5, "learning_rate": 1e-5, "tokens_per_second": 12345.6, "trained_tokens": 1234567}
    for columns in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(columns))
        RunProgress().reported(1000, values | {"peak_memory": 12.5})
        lines = capsys.readouterr().err.splitlines()
        assert max(map(len, lines)) <= columns
        assert all(line.startswith("  ") for line in lines[1:])
        assert "12,346 tokens/s, peak 12.5 GB" in " ".join(" ".join(lines).split())
    monkeypatch.delenv("COLUMNS")
    RunProgress().reported(1000, values | {"peak_memory": 12.5})
    assert capsys.readouterr().err.count("\n") == 1
