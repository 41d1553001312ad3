"""The commands and the Python of the README and the guides.

Every command is parsed by the command it names. Those that need no network, no file of the reader's and only seconds
run in order, in a temporary folder that looks like a clone, as written except that some texts are shorter.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from mlx_openelm import backend
from mlx_openelm.cli.main import PROGRAM, parse
from mlx_openelm.errors import RequestError
from mlx_openelm.hub import catalog

import pytest
from in_process import run_here

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = ((PROGRAM,), ("python", "generate.py"), ("python", "convert.py"))
# The fewest commands that must run, so that a rule below that skips too many is noticed.
FEWEST = {
    "README.md": 12,
    "CHANGELOG.md": 0,
    "docs/README.md": 0,
    "backends.md": 1,
    "benchmarks.md": 1,
    "chat.md": 3,
    "constraints.md": 4,
    "cpu.md": 1,
    "drafts.md": 2,
    "evaluation.md": 6,
    "risk.md": 0,
    "fine-tuning.md": 0,
    "pretraining.md": 2,
    "preference.md": 0,
    "grpo.md": 0,
    "formats.md": 5,
    "generation.md": 15,
    "publishing.md": 2,
    "serving.md": 0,
    "clients.md": 0,
    "python.md": 0,
    "quantization.md": 4,
    "tokenizers.md": 1,
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
    if given[1] == "chat" and "| " not in command:
        return "somebody who types"
    named = [word for flag, word in pairwise(given) if flag in ("--model", "--reference-model", "--checkpoints")]
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
    if given[1] == "serve" or "--serve" in given:
        return "a server"  # run in test_serving_docs.py
    if given[1] == "lora":
        return "minutes"  # run with fewer steps below, and in test_lora_folder.py
    return None


def run_quickly(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Like `run`, but in this process if it is one command of ours, or one that reads what `echo` or `printf` print."""
    before, _, ours = command.rpartition(" | ")
    given = shlex.split(ours)
    if given[0] != PROGRAM or set("|<>;&$`*") & set(ours) or not re.match(r"(echo|printf) '?[^|]*$|$", before):
        return run(command, cwd)
    return run_here(*given[1:], stdin=run(before, cwd).stdout, folder=cwd)


def shortened(command: str) -> str:
    """The command, with a shorter text if it has the default length, and with less text to measure."""
    ends_itself = {"--max-tokens", "--stop", "--json-schema", "--regex", "--grammar", "--choice"} & set(words(command))
    if words(command)[:2] == [PROGRAM, "generate"] and not ends_itself:
        command += " --max-tokens 16"
    return re.sub(r"--num-samples \d+", "--num-samples 2", command)


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
    """The file's name, with its folder if the README has the same name."""
    return "docs/README.md" if document == ROOT / "docs" / "README.md" else document.name


def section(title: str) -> str:
    """The text of a section of the README."""
    return README.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_nothing_is_left_to_fill_in(document: Path) -> None:
    assert not re.search(r"@@|TODO|XXX", document.read_text())


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_have_targets(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (document.parent / target).is_file(), target
    for target, place in re.findall(r"\]\(([^):]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.+)$", (document.parent / target if target else document).read_text(), re.M)
        assert place in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], place


def test_the_layout_names_what_exists() -> None:
    layout = blocks(README, "text")[-1]
    names = [name for line in layout.splitlines() for name in re.findall(r"[\w/.]+", re.split(r"  +", line)[0])]
    assert len(names) > 15 and all((ROOT / "mlx_openelm" / name).exists() for name in names)


@pytest.mark.parametrize("index", [README, ROOT / "docs" / "README.md"], ids=by_name)
def test_an_index_names_every_guide(index: Path) -> None:
    guides = {*(ROOT / "docs").glob("*.md"), ROOT / "lora" / "README.md"} - {index}
    text = section("Documentation") if index == README else index.read_text()
    named = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", text)}
    assert guides - {ROOT / "docs" / "README.md"} <= named


def test_the_text_shown_is_the_text_generated(clone: Path) -> None:
    if backend.on_gpu():
        pytest.skip("shown is a CPU's text: bfloat16 may round another way")
    command = next(line for line in commands(README) if line.startswith("python generate.py"))
    assert run(command, clone).stdout == blocks(README, "text")[0]


def test_the_table_of_models_is_what_info_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not backend.has_kernels():
        pytest.skip("the table is for a CPU with our kernels")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import sizes

    assert "\n".join(sizes.table()) in section("The models")


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of the Markdown tables in a text, without heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if re.fullmatch(r"[\d.,]+", row[1])]


def test_the_speeds_match_the_benchmarks() -> None:
    """Both numbers of each comparison are in one row, which is about the same model and weights."""
    measured = table_rows((ROOT / "docs" / "benchmarks.md").read_text())
    rows = table_rows(section("Speed"))
    assert len(rows) >= 10
    for name, ours, *others in rows:
        about = set(re.findall(r"270M|3B|bfloat16|4 bit|LoRA|decoding|prompt of 512", name))
        for other in filter(None, others):
            assert any(row[1:3] == [ours, other] and all(word in row[0] for word in about) for row in measured), name


def test_pictures_are_small_and_are_drawn_by_a_command_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import pictures

    assert {path.name for path in pictures.IMAGES.iterdir()} == set(pictures.DRAWN)
    assert all(path.stat().st_size < 150_000 for path in pictures.IMAGES.iterdir())
    assert shlex.join(pictures.training_command()) in section("Fine-tuning")
    assert why_not_run(f"mlx-openelm {shlex.join(pictures.training_command())}") == "minutes"  # no download


# Those with the most commands; that their commands can be parsed is checked for all below.
SLOW = ("benchmarks.md", "constraints.md", "evaluation.md", "generation.md", "quantization.md")


@pytest.mark.parametrize(
    "document",
    [pytest.param(d, marks=pytest.mark.slow if by_name(d) in SLOW else [], id=by_name(d)) for d in DOCUMENTS],
)
def test_commands_run(document: Path, clone: Path) -> None:
    if any("gguf" in command for command in commands(document)):
        pytest.importorskip("gguf")
    if document.name == "constraints.md":
        pytest.importorskip("llguidance")
    able = [command for command in commands(document) if why_not_run(command) is None]
    assert len(able) >= FEWEST[by_name(document)]
    for command in able:
        done = run_quickly(shortened(command), clone)
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip(), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_every_command_is_accepted_by_its_parser(document: Path) -> None:
    """Flags that exist, values of their types: what a command line is checked for before any work."""
    lines = [words(command) for command in commands(document)]
    for line in [line for line in lines if line[0] == PROGRAM]:
        command, _ = parse(line[1:])  # runs nothing
        assert callable(command), line


@pytest.mark.slow
def test_fine_tuning_runs_in_order(clone: Path) -> None:
    """The README's section, in two steps instead of many, and with `tiny` instead of the 270M model."""
    lines = [line for line in commands(README) if line in section("Fine-tuning")]
    assert [words(line)[1] for line in lines] == ["lora", "lora", "lora", "lora", "generate", "fuse"]
    for line in lines:
        shorter = re.sub(r"--(iters|epochs) \d+", "--iters 2", line).replace("--model 270m", "--model tiny")
        shorter = shorter.replace("--data", "--val-batches 1 --test-batches 1 --data")
        done = run(f"{shorter} --max-tokens 4" if "generate" in line else shorter, clone)
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line
    assert (clone / "expenses-270m" / "model.safetensors").is_file()


def test_an_unknown_flag_is_detected() -> None:
    with pytest.raises(RequestError, match="q_bit "):
        parse(["convert", "--q-bit", "4"])


def test_the_python_runs_as_written(tmp_path: Path) -> None:
    for block in blocks(README, "python"):
        script = tmp_path / "snippet.py"
        script.write_text(block)
        done = run(f"{sys.executable} {script}", tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 50
