"""Errors and warnings on a terminal: folded between words, with whole commands, on lines of their own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from mlx_openelm.cli.terminal import folded

import pytest
from terminals import run_on_terminal

ROOT = Path(__file__).parent.parent
TO_TYPE = "hf download apple/OpenELM-270M-Instruct --local-dir OpenELM-270M-Instruct"


def piped(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_openelm", *words]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_an_error_is_folded_between_words(columns: int) -> None:
    shown = run_on_terminal(columns, "generate", "hi", "--model", "270m-instruct")
    assert shown.startswith("error: HF_HUB_OFFLINE is set and apple/OpenELM-270M-Instruct")
    assert columns - 30 < max(map(len, shown.splitlines())) <= columns
    assert f"run\n  {TO_TYPE}\nand\n  hf " in shown.replace(" \\\n     ", "")
    assert "--model OpenELM-270M-Instruct" in shown and "--model tiny" in shown  # on one line


@pytest.mark.parametrize("columns", [{}, {"COLUMNS": "60"}])
def test_an_error_that_is_piped_is_one_line(columns: dict[str, str]) -> None:
    line = piped("generate", "hi", "--model", "270m-instruct", env=columns).stderr
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
    shown = run_on_terminal(80, "generate", "hi", "--max-tokens", "515")
    lines = shown.splitlines()
    at = next(index for index, line in enumerate(lines) if "warning:" in line)
    assert lines[at].startswith("warning: The text is now longer than the 512 tokens the model was trained on;")
    text = piped("generate", "hi", "--max-tokens", "515").stdout.rstrip("\n")
    on_terminal = "\n".join([*lines[:at], *lines[at + 2 :]])  # the warning takes two lines
    assert text not in on_terminal  # which has a line break more, before the warning
    assert re.sub(r"\s", "", on_terminal).startswith(re.sub(r"\s", "", text))


def test_statistics_say_that_the_positions_ended() -> None:
    for tokens, end in ((2000, " (the model's last position)"), (4, "")):
        shown = run_on_terminal(120, "generate", "hi", "--max-tokens", tokens)
        assert f", finish reason: length{end}\n" in shown
