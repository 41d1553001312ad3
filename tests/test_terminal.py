"""Errors and warnings on a terminal: folded between words, with whole commands, on lines of their own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

from mlx_openelm import Tokenizer, console, load
from mlx_openelm.cli import terminal
from mlx_openelm.cli.main import main
from mlx_openelm.cli.terminal import folded

import pytest
from huggingface_hub import constants
from in_process import run_here
from terminals import run_on_terminal

TO_TYPE = "hf download apple/OpenELM-270M-Instruct --local-dir OpenELM-270M-Instruct"


def shown_here(columns: int, *words: str) -> str:
    """What a command shows on a terminal of this width, run in this process; less than the terminal holds unread."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with pytest.MonkeyPatch.context() as patch, open(child, "w", encoding="utf-8") as stream:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(terminal, "_line_is_open", False)  # another test in this process may have left it so
        patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it
        with pytest.raises(SystemExit):
            main(words)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side is closed
        while part := os.read(parent, 1 << 16):
            shown += part
    os.close(parent)
    return shown.decode().replace("\r\n", "\n")


def prompt_of(tokenizer: Tokenizer, tokens: int) -> str:
    """A prompt of about so many tokens, less than ten more."""
    prompt = "hi"
    while len(tokenizer.encode(prompt)) < tokens:
        prompt += " hi hi"
    return prompt


ODD = "a\x1b[31mred\x07\u202e\x85\x7f\udcff"
ODD_SHOWN = "a\\u001b[31mred\\u0007\\u202e\\u0085\\u007f\\udcff"


def test_control_characters_are_shown_rather_than_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from users and downloads; text in any script, tabs and line ends stay as they are."""
    text = "Größe\t日本語\u3000\u200d👩\u200d💻\nنیم\u200cفاصله"
    console.say(f"{ODD} {text}")
    console.print_line(f"{ODD} {text}")
    console.print_rows([("path", ODD)])
    console.print_json({"path": ODD})
    shown = capsys.readouterr()
    assert shown.err == f"{ODD_SHOWN} {text}\n"
    assert shown.out == f'{ODD_SHOWN} {text}\npath  {ODD_SHOWN}\n{{"path": "{ODD_SHOWN}"}}\n'
    assert json.loads(shown.out.splitlines()[-1]) == {"path": ODD}


def test_a_result_shows_an_odd_path(tmp_path: Path) -> None:
    done = run_here("convert", "--model", "tiny", "--mlx-path", str(tmp_path / "a\x1b[31mred\u202e"))
    assert "/a\\u001b[31mred\\u202e: 8.51 bits" in done.stdout and "\x1b" not in done.stdout + done.stderr


# What cli modules may print without escapes: empty lines, lines to be copied, texts without names.
PRINTED = re.compile(r"print\(\)|shlex\.quote|end=|_NOT_HERE|completion|text\)|Console\(\)")


def test_commands_print_lines_through_the_console() -> None:
    """So that `print_line` escapes them."""
    lines = [line for path in Path(terminal.__file__).parent.glob("*.py") for line in path.read_text().splitlines()]
    printed = [line for line in lines if re.search(r"(?<![._a-z])print\(", line)]
    assert printed and [line for line in printed if not PRINTED.search(line)] == []


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_an_error_is_folded_between_words(columns: int) -> None:
    shown = shown_here(columns, "generate", "hi", "--model", "270m-instruct")
    assert shown.startswith("error: HF_HUB_OFFLINE is set and apple/OpenELM-270M-Instruct")
    assert columns - 30 < max(map(len, shown.splitlines())) <= columns
    assert f"run\n  {TO_TYPE}\nand\n  hf " in shown.replace(" \\\n     ", "")
    assert "--model OpenELM-270M-Instruct" in shown and "--model tiny" in shown  # on one line


@pytest.mark.parametrize("columns", [{}, {"COLUMNS": "60"}])
def test_an_error_that_is_piped_is_one_line(
    columns: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.delenv("COLUMNS", raising=False)
        for name, value in columns.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit):
            main(["generate", "hi", "--model", "270m-instruct"])
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and len(line) > 300 and f"run `{TO_TYPE}` and " in line


def test_every_command_of_a_folded_message_can_be_copied() -> None:
    commands = [
        "mlx-openelm convert --model tiny --dequantize --mlx-path 'my  -q folder'",
        'mlx-openelm generate "To be, or --not to be" --model tiny --max-tokens 12 --temp 0.7',
    ]
    text = f"Do it with two commands: `{' && '.join(commands)}`."
    for columns in (60, 80, 120):
        first, *lines = folded(text, columns).splitlines()
        assert first == "Do it with two commands:"
        shell = "\n".join(lines).replace("\\\n", "").splitlines()
        assert [shlex.split(line) for line in shell] == [shlex.split(command) for command in commands]


def test_short_commands_stay_in_the_sentence_and_in_one_piece() -> None:
    text = "A token is needed (see its page): log in again with `hf auth login`, or see mlx-openelm lora --help."
    for columns in range(40, 100):
        lines = folded(text, columns).splitlines()
        assert max(map(len, lines)) <= columns and " ".join(lines) == text
        assert any("`hf auth login`" in line for line in lines)
        assert any("mlx-openelm lora --help" in line for line in lines)
    assert folded(text, len(text)) == text


def test_a_warning_does_not_go_into_the_text() -> None:
    _, tokenizer = load("tiny")
    prompt = prompt_of(tokenizer, 490)
    words = ("generate", prompt, "--max-tokens", 517 - len(tokenizer.encode(prompt)))
    shown = run_on_terminal(80, *words)
    lines = shown.splitlines()
    at = next(index for index, line in enumerate(lines) if "warning:" in line)
    assert lines[at].startswith("warning: The text is now longer than the 512 tokens the model was trained on;")
    text = run_here(*words).stdout.rstrip("\n")
    on_terminal = "\n".join([*lines[:at], *lines[at + 2 :]])  # the warning takes two lines
    assert text not in on_terminal  # which has a line break more, before the warning
    assert re.sub(r"\s", "", on_terminal).startswith(re.sub(r"\s", "", text))


def test_statistics_say_that_the_positions_ended() -> None:
    long = prompt_of(load("tiny")[1], 1000)  # of 1024
    for prompt, tokens, end in ((long, 2000, " (the model's last position)"), ("hi", 4, "")):
        shown = run_on_terminal(120, "generate", prompt, "--max-tokens", tokens)
        assert f", finish reason: length{end}\n" in shown
