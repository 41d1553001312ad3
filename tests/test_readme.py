"""The commands and the Python of the README and the guides.

Every command is parsed by the command it names. Those that need no network, no file of the reader's and only seconds
run as written, in order, in a temporary folder that looks like a clone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from mlx_openelm.cli.main import PROGRAM, parse
from mlx_openelm.errors import RequestError
from mlx_openelm.hub import catalog

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ((PROGRAM,), ("python", "generate.py"), ("python", "convert.py"))
# The fewest commands that must run, so that a rule below that skips too many is noticed.
FEWEST = {
    "README.md": 11,
    "backends.md": 1,
    "benchmarks.md": 0,
    "cpu.md": 1,
    "fine-tuning.md": 0,
    "formats.md": 5,
    "publishing.md": 2,
    "quantization.md": 4,
    "coming-from-mlx-lm.md": 0,
}


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.DOTALL)


def commands(document: Path) -> list[str]:
    """The lines of its shell blocks; of `a && b`, the last."""
    lines = [line for block in blocks(document, "bash") for line in block.splitlines() if line.strip()]
    return [line.split("&& ")[-1] for line in lines]


def words(command: str) -> list[str]:
    """The command's words, without what is piped into it."""
    return shlex.split(command.split("| ")[-1])


def why_not_run(command: str) -> str | None:
    """What a command needs that the tests do not have; None for one that runs."""
    given = words(command)
    if not any(tuple(given[: len(start)]) == start for start in OURS):
        return "another program"
    named = [word for flag, word in pairwise(given) if flag in ("--model", "--reference-model")]
    is_release = any(catalog.find(name) or name.startswith("corenet:") for name in named)
    is_repository = any(re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not (ROOT / name).exists() for name in named)
    if is_release or is_repository:
        return "a model that is downloaded"
    if any(Path(word).name.startswith("my_") for word in given):
        return "a file of the reader's"
    if given[1] == "upload" and not Path(given[given.index("--path") + 1]).name.startswith(("plays", "tiny")):
        return "a model that is downloaded"
    if "--upload-repo" in given and "--dry-run" not in given:
        return "the hub"
    if {"--report", "--target-bpw", "--method"} & set(given):
        return "minutes"  # tested in test_quantizing.py
    if given[1] == "lora":
        return "minutes"  # run with fewer steps below, and in test_lora_folder.py
    return None


def run(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    bin_folder = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what a clone has at its top, where commands may write."""
    for name in ("generate.py", "convert.py", "lora", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def by_name(document: Path) -> str:
    return document.name


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_nothing_is_left_to_fill_in(document: Path) -> None:
    assert not re.search(r"@@|TODO|XXX", document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_have_targets(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).is_file(), target


def test_the_layout_names_what_exists() -> None:
    layout = blocks(ROOT / "README.md", "text")[0]
    names = [name for line in layout.splitlines() for name in re.findall(r"[\w/.]+", re.split(r"  +", line)[0])]
    assert len(names) > 15 and all((ROOT / "mlx_openelm" / name).exists() for name in names)


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_commands_run_as_written(document: Path, clone: Path) -> None:
    if any("gguf" in command for command in commands(document)):
        pytest.importorskip("gguf")
    able = [command for command in commands(document) if why_not_run(command) is None]
    assert len(able) >= FEWEST[document.name]
    for command in able:
        done = run(command, clone)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_command_is_accepted_by_its_parser(document: Path) -> None:
    """Flags that exist, values of their types: what a command line is checked for before any work."""
    lines = [words(command) for command in commands(document)]
    for line in [line for line in lines if line[0] == PROGRAM]:
        command, _ = parse(line[1:])  # runs nothing
        assert callable(command), line


def test_fine_tuning_runs_in_order(clone: Path) -> None:
    """The README's section, in two steps instead of many, and with `tiny` instead of the 270M model."""
    section = (ROOT / "README.md").read_text().partition("## Fine-tuning\n")[2].partition("\n## ")[0]
    lines = [line for line in commands(ROOT / "README.md") if line in section]
    assert [words(line)[1] for line in lines] == ["lora", "lora", "lora", "lora", "generate", "fuse"]
    for line in lines:
        shorter = re.sub(r"--(iters|epochs) \d+", "--iters 2", line).replace("--model 270m", "--model tiny")
        shorter = shorter.replace("--data", "--val-batches 1 --test-batches 1 --data")
        done = run(f"{shorter} --max-tokens 4" if "generate" in line else shorter, clone)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line
    assert (clone / "expenses-270m" / "model.safetensors").is_file()


def test_an_unknown_flag_is_detected() -> None:
    with pytest.raises(RequestError, match="--q-bit "):
        parse(["convert", "--q-bit", "4"])


def test_the_python_runs_as_written(tmp_path: Path) -> None:
    for block in blocks(ROOT / "README.md", "python"):
        script = tmp_path / "snippet.py"
        script.write_text(block)
        done = run(f"{sys.executable} {script}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 50
