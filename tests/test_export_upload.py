"""`export --upload-repo`: the uploaded files and their card."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from mlx_openelm import convert
from mlx_openelm.jobs.export import export
from mlx_openelm.publishing.upload import UploadOptions, publish

import pytest
from fake_hub import FakeHub
from huggingface_hub import metadata_load
from in_process import run_here

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
PARAMETERS = "2,485,056"
REPO = "me/plays-export"
WRITER = {"HF_TOKEN": "hf_writer"}
GGUF, FOLDER = ("--format", "gguf"), ("--format", "huggingface")


def run_export(*args: object, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    return run_here("export", *args, env=env, folder=folder, offline=False)


@pytest.fixture
def original(hub: FakeHub, tmp_path: Path) -> Path:
    """`them/plays` on the hub, with its authors' card and license."""
    folder = Path(shutil.copytree(SHAKESPEARE, tmp_path / "served"))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: plays\nlicense_link: LICENSE\n---\n# Plays\n")
    (folder / "LICENSE").write_text("Do as you like it.\n")
    hub.add("them/plays", folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def sent(hub: FakeHub, repo: str = REPO) -> dict[str, bytes]:
    """The files that arrived in a repository."""
    folder = hub.repos[repo].folder
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".gitattributes"}


@pytest.mark.parametrize("kind", ["q8_0", pytest.param("f16", marks=pytest.mark.slow)])
def test_a_gguf_file_with_card_and_license(
    kind: str, original: Path, hub: FakeHub, hub_env: dict[str, str], out: Path
) -> None:
    pytest.importorskip("gguf")
    args = ["--model", "them/plays", *GGUF, "--gguf-type", kind, "--upload-repo", REPO]
    done = run_export(*args, env=hub_env | WRITER, folder=out)
    assert done.returncode == 0, done.stderr
    file = f"plays-{kind}.gguf"
    assert [path.name for path in out.iterdir()] == [file]
    arrived = sent(hub)
    assert arrived.keys() == {file, "README.md", "LICENSE"}
    assert arrived[file] == (out / file).read_bytes() and arrived["LICENSE"] == b"Do as you like it.\n"
    card = metadata_load(hub.repos[REPO].folder / "README.md")
    facts = [card[key] for key in ("base_model", "license", "license_name", "library_name", "pipeline_tag")]
    assert facts == ["them/plays", "other", "plays", "gguf", "text-generation"]
    assert card.get("base_model_relation") == ("quantized" if kind == "q8_0" else None)
    text = arrived["README.md"].decode()
    assert f"| Parameters | {PARAMETERS} |" in text and "| Layers | 6 |" in text
    assert f"llama-cli --hf-repo {REPO} --hf-file {file}" in text
    assert f"mlx-openelm export --model them/plays --format gguf --gguf-type {kind}" in text
    assert done.stdout.splitlines()[-1].endswith(f"{hub.url}/{REPO}")


def test_a_hugging_face_folder(original: Path, hub: FakeHub, hub_env: dict[str, str], out: Path) -> None:
    args = ["--model", "them/plays", *FOLDER, "--output", "hf", "--upload-repo", REPO, "--json"]
    done = run_export(*args, env=hub_env | WRITER, folder=out)
    assert done.returncode == 0, done.stderr
    arrived, written = sent(hub), {path.name: path.read_bytes() for path in (out / "hf").iterdir()}
    assert arrived.keys() == written.keys() and "LICENSE" in written
    assert {name for name in written if arrived[name] != written[name]} == {"README.md"}  # it names the repository
    for name in ("README.md", "LICENSE"):
        assert (out / "hf" / name).is_file()
    card = metadata_load(hub.repos[REPO].folder / "README.md")
    assert [card[key] for key in ("base_model", "license", "library_name")] == ["them/plays", "other", "transformers"]
    assert "mlx-openelm export --model them/plays --format huggingface --output hf" in arrived["README.md"].decode()
    values = json.loads(done.stdout)
    assert values["path"] == "hf" and values["upload"]["url"] == f"{hub.url}/{REPO}"


def test_the_folder_gets_a_card_even_without_an_upload(tmp_path: Path) -> None:
    packed = convert(SHAKESPEARE, tmp_path / "packed", quantize=True).path
    export(packed, tmp_path / "hf", format="huggingface")
    card = metadata_load(tmp_path / "hf" / "README.md")
    assert card["library_name"] == "transformers" and "base_model" not in card
    assert f"| Parameters | {PARAMETERS} |" in (tmp_path / "hf" / "README.md").read_text()


def test_the_card_of_a_gguf_file_does_not_need_the_source_afterwards(tmp_path: Path) -> None:
    """Everything on the card is read before the weights are written."""
    pytest.importorskip("gguf")
    model = Path(shutil.copytree(SHAKESPEARE, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: mit\nbase_model: them/plays\n---\n# Plays\n")
    result = export(model, tmp_path / "a.gguf", format="gguf", gguf_type="q4_0")
    shutil.rmtree(model)
    options = UploadOptions(upload_repo=REPO, dry_run=True)
    plan = publish(result.path, options, card=result.card, licenses=result.licenses)
    assert {file.name for file in plan.files} == {"a.gguf", "README.md"}
    front = plan.card.split("---")[1]
    assert "license: mit" in front and "base_model: them/plays" in front and "relation: quantized" in front
    assert "mlx-openelm export --model model --format gguf --output a.gguf --gguf-type q4_0" in plan.card
    assert str(tmp_path) not in plan.card


@pytest.mark.parametrize(("format", "name"), [(FOLDER, "shakespeare-hf-hf"), (GGUF, "shakespeare-hf-f16.gguf")])
def test_a_dry_run_leaves_nothing_and_makes_no_request(
    format: list[str], name: str, hub: FakeHub, hub_env: dict[str, str], out: Path
) -> None:
    before = sorted(out.rglob("*"))
    for output in ([], ["--output", f"x-{name}"]):
        args = ["--model", SHAKESPEARE, *format, *output, "--upload-repo", REPO, "--dry-run"]
        done = run_export(*args, env=hub_env, folder=out)
        assert (done.returncode, done.stderr) == (0, "")
        path = output[-1] if output else name
        assert done.stdout.startswith(f"Would write {path}: ")
        assert f"Would upload {path}; nothing was sent." in done.stdout and "dry-run" not in done.stdout
        assert sorted(out.rglob("*")) == before and hub.requests == []
    (out / name).touch()
    done = run_export("--model", SHAKESPEARE, *format, "--upload-repo", REPO, "--dry-run", env=hub_env, folder=out)
    assert done.returncode == 2 and done.stdout == ""


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ([*FOLDER, "--upload-repo", REPO], 1, "Uploading needs a token that may write"),
        ([*FOLDER, "--dry-run"], 2, "--dry-run needs --upload-repo"),
        ([*GGUF, "--output", "a.bin", "--upload-repo", REPO, "--dry-run"], 2, "--output a.bin does not"),
    ],
)
def test_refused_before_any_work(
    args: list[str], code: int, message: str, hub: FakeHub, hub_env: dict[str, str], out: Path
) -> None:
    done = run_export("--model", SHAKESPEARE, *args, env=hub_env, folder=out)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert list(out.iterdir()) == [] and hub.requests == []


def test_a_refused_upload_keeps_the_file(hub: FakeHub, hub_env: dict[str, str], out: Path) -> None:
    pytest.importorskip("gguf")
    hub.forbids = True
    done = run_export(
        "--model", SHAKESPEARE, *GGUF, "--output", "a.gguf", "--upload-repo", REPO, env=hub_env | WRITER, folder=out
    )
    assert done.returncode == 1 and done.stdout.startswith("Wrote a.gguf: f16")
    assert "refuses your token to write" in done.stderr
    assert "a.gguf is kept; `mlx-openelm upload --path a.gguf" in done.stderr
    assert (out / "a.gguf").is_file() and hub.commits == []
