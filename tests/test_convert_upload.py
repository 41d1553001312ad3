"""`convert --upload-repo`, from the command line to a stand-in for the hub and back."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx_openelm
from mlx_openelm.cli.main import main
from mlx_openelm.jobs.convert import Conversion

import pytest
from fake_hub import FakeHub
from huggingface_hub import metadata_load
from in_process import run_here

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
REPO = "me/shakespeare-4bit"
WRITER = {"HF_TOKEN": "hf_writer"}


def convert(*args: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_here("convert", *args, env=env, offline=False)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A trained model with its authors' card and license."""
    folder = Path(shutil.copytree(SHAKESPEARE, tmp_path / "original"))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: plays\nlicense_link: LICENSE\n---\n# Plays\n")
    (folder / "LICENSE").write_text("Do as you like it.\n")
    return folder


def sent(hub: FakeHub, repo: str = REPO) -> dict[str, bytes]:
    """The files that arrived in a repository."""
    folder = hub.repos[repo].folder
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitattributes"}


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_without_a_token_no_work_is_started(hub: FakeHub, hub_env: dict[str, str], tmp_path: Path) -> None:
    done = convert("--mlx-path", tmp_path / "out", "--upload-repo", REPO, env=hub_env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Uploading needs a token that may write" in one_line(done)
    assert not (tmp_path / "out").exists() and hub.requests == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--private"], "--private needs --upload-repo"),
        (["--upload-repo", "me/two words"], "'me/two words' is not a valid name for a repository"),
        (["--upload-repo", REPO, "--upload-revision", "a b"], "--upload-revision must be the name of a branch"),
    ],
)
def test_invalid_requests_are_refused(
    args: list[str], message: str, hub: FakeHub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    done = convert("--mlx-path", tmp_path / "out", *args, env=hub_env | WRITER)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in one_line(done)
    assert not (tmp_path / "out").exists() and hub.requests == []


def test_a_dry_run_leaves_nothing_and_makes_no_request(hub: FakeHub, hub_env: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    before = sorted(tmp_path.rglob("*"))
    done = convert("--model", SHAKESPEARE, "--mlx-path", out, "--upload-repo", REPO, "--dry-run", env=hub_env)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Would write {out}: 16.00 bits per weight")
    assert f"Would upload {out}; nothing was sent." in lines
    files = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
    assert files <= {line.split()[0] for line in lines if line.startswith("  ")}
    assert hub.requests == [] and sorted(tmp_path.rglob("*")) == before
    # Nor is anything downloaded, or an existing folder taken for a new one.
    done = convert("--model", "270m", "--mlx-path", out, "--upload-repo", REPO, "--dry-run", env=hub_env)
    assert done.returncode == 1 and "--dry-run downloads nothing and apple/OpenELM-270M is not in" in one_line(done)
    done = convert("--mlx-path", tmp_path, "--upload-repo", REPO, "--dry-run", env=hub_env)
    assert done.returncode == 2 and f"{tmp_path} exists; choose another --mlx-path" in one_line(done)
    assert hub.requests == [] and sorted(tmp_path.rglob("*")) == before


def test_the_written_files_arrive_byte_for_byte(
    original: Path, hub: FakeHub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["-q", "--upload-repo", REPO, "--private", "--commit-message", "Four bits", "--json"]
    done = convert("--model", original, "--mlx-path", out, *flags, env=hub_env | WRITER)
    assert done.returncode == 0, done.stderr
    arrived = sent(hub)
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert arrived.keys() == written.keys()
    assert {name for name in written if arrived[name] != written[name]} == {"README.md"}  # it names the repository
    assert f'load("{REPO}")' in arrived["README.md"].decode()
    assert arrived["LICENSE"] == b"Do as you like it.\n"
    assert hub.repos[REPO].private
    assert [(commit["repo"], commit["message"]) for commit in hub.commits] == [(REPO, "Four bits")]
    values = json.loads(done.stdout)
    assert values["mlx_path"] == str(out)
    assert values["upload"]["url"] == f"{hub.url}/{REPO}"
    assert {file["name"]: file["size"] for file in values["upload"]["files"]} == {n: len(b) for n, b in arrived.items()}


def test_license_and_base_survive_a_second_conversion(
    original: Path, hub: FakeHub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    """From the authors' repository to ours, and from ours to a third."""
    hub.add("them/plays", original)
    first = ["--model", "them/plays", "--mlx-path", tmp_path / "first", "-q", "--upload-repo", REPO]
    second = ["--model", REPO, "--mlx-path", tmp_path / "second", "-d", "--upload-repo", "me/again"]
    for args in (first, second):
        done = convert(*args, env=hub_env | WRITER)
        assert done.returncode == 0, done.stderr
    cards = {}
    for repo in (REPO, "me/again"):
        cards[repo] = metadata_load(hub.repos[repo].folder / "README.md")
        assert sent(hub, repo)["LICENSE"] == b"Do as you like it.\n"
        facts = [cards[repo][key] for key in ("base_model", "license", "license_name", "license_link", "library_name")]
        assert facts == ["them/plays", "other", "plays", "LICENSE", "mlx"]
    assert cards[REPO]["base_model_relation"] == "quantized" and "4-bit" in cards[REPO]["tags"]
    assert "base_model_relation" not in cards["me/again"] and "4-bit" not in cards["me/again"]["tags"]


def test_a_refused_upload_keeps_the_folder_and_says_so(hub: FakeHub, hub_env: dict[str, str], tmp_path: Path) -> None:
    hub.forbids = True
    out = tmp_path / "out"
    args = ["--model", SHAKESPEARE, "--mlx-path", out]
    done = convert(*args, "--upload-repo", "apple/OpenELM-270M", env=hub_env | WRITER)
    assert done.returncode == 1 and done.stdout.startswith(f"Wrote {out}: ")
    message = one_line(done)
    assert "refuses your token to write to apple/OpenELM-270M" in message
    again = f"mlx-openelm upload --path {out} --upload-repo apple/OpenELM-270M"
    assert f"{out} is kept; `{again}` tries again" in message
    assert (out / "model.safetensors").is_file() and hub.commits == []


def test_a_hub_that_fails_during_the_upload(hub: FakeHub, hub_env: dict[str, str], tmp_path: Path) -> None:
    """It answers who the user is, before the work, and fails after that."""
    hub.fails_at = "/api/repos/create"
    out = tmp_path / "out"
    done = convert("--model", SHAKESPEARE, "--mlx-path", out, "--upload-repo", REPO, env=hub_env | WRITER)
    assert done.returncode == 1
    assert "has a server error (HTTP 500)" in one_line(done) and f"{out} is kept" in done.stderr
    assert (out / "model.safetensors").is_file() and hub.repos == {}


def test_a_network_that_fails_after_the_work(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def convert_then_stop(*args: Any, **options: Any) -> Conversion:
        result = mlx_openelm.convert(*args, **options)
        assert ("GET", "/api/whoami-v2") in hub.requests
        hub.stop()
        return result

    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr("mlx_openelm.cli.convert.convert", convert_then_stop)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main(["convert", "--model", str(SHAKESPEARE), "--mlx-path", str(out), "--upload-repo", REPO])
    assert end.value.code == 1
    errors = capfd.readouterr().err
    assert errors.startswith("error: Cannot reach 127.0.0.1") and errors.count("\n") == 1
    assert f"{out} is kept; `mlx-openelm upload --path {out} --upload-repo {REPO}` tries again" in errors
    assert (out / "model.safetensors").is_file()


def test_an_unreachable_hub_is_reported_before_the_work(hub: FakeHub, hub_env: dict[str, str], tmp_path: Path) -> None:
    hub.stop()
    done = convert("--mlx-path", tmp_path / "out", "--upload-repo", REPO, env=hub_env | WRITER)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Cannot reach 127.0.0.1" in one_line(done)
    assert not (tmp_path / "out").exists()
