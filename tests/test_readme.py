"""The README's commands and its Python run as written; what needs a network or installs is left to CI itself."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def offline_commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    commands = [line.split("&& ")[-1] for line in lines]
    network = re.compile(r"--model (?!tiny)|--upload|apt-get|pytest|benchmarks/")
    return [command for command in commands if not network.search(command)]


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_there_are_commands_to_run():
    commands = offline_commands()
    assert len(commands) >= 7
    assert any(command.startswith("python generate.py") for command in commands)


@pytest.mark.parametrize("command", offline_commands())
def test_a_command_runs_as_written(command: str):
    done = run(command, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_commands_that_need_a_network_name_flags_that_exist():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("mlx-openelm")]
    for line in lines:
        words = shlex.split(line)
        known = run(f"{words[0]} {words[1]} --help", ROOT).stdout
        for word in words[2:]:
            if word.startswith("-"):
                assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", known), (line, word)


def test_the_python_runs_as_written(tmp_path: Path):
    for block in blocks("python"):
        script = tmp_path / "snippet.py"
        script.write_text(block)
        done = run(f"{sys.executable} {script}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 50
