"""Uploads to a fake hub: what arrives, what is never sent, and the message of every failure."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_openelm
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.hub.resolve import resolve
from mlx_openelm.publishing.card import compose_card, write_card
from mlx_openelm.publishing.origin import Origin
from mlx_openelm.publishing.upload import UploadOptions, check, publish, upload

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from huggingface_hub import HfApi, metadata_load
from in_process import run_here

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
REPO = "me/OpenELM-4bit"
NEVER = {
    "modeling_openelm.py": "code",
    "optimizer.pt": "pickle",
    "adapters.safetensors": "other weights",
    ".env": "secret",
    "train.log": "log",
    "LICENSE.py": "code",
    ".cache/token": "secret",
    "checkpoints/model.safetensors": "other weights",
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "converted"
    mlx_openelm.convert(SHAKESPEARE, out, quantize=True, q_group_size=64)
    (out / "README.md").unlink(missing_ok=True)
    return out


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    """A model folder after some use, with other files and our card."""
    out = shutil.copytree(converted, tmp_path / "mine")
    write_card(out, name="mine", origin=Origin("apple/OpenELM-270M", "apple/OpenELM-270M"))
    (out / "LICENSE").write_text("license")
    for name, text in NEVER.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(text)
    return out


@pytest.fixture
def writer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub, with a token that may write to `me`."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits at least a second before each of its five retries."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def write_gguf(path: Path) -> None:
    """A complete GGUF file with one tensor."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "openelm")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {Path(name).parts[0] for name in NEVER}


def arrived(hub: FakeHub, repo: str = REPO) -> dict[str, bytes]:
    folder = hub.repos[repo].folder
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".gitattributes"
    }


def run(*args: Any, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return run_here(*args, env=env, offline=False)


def message_of(error: pytest.ExceptionInfo[OpenELMError]) -> str:
    text = str(error.value)
    assert text and "\n" not in text and "hf_writer" not in text
    return text


# From a folder to the hub and back


def test_upload_and_download_give_the_same_model(
    folder: Path, writer: FakeHub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "mlx_openelm", "upload", "--path", str(folder), "--upload-repo", REPO]
    env = os.environ | hub_env | {"HF_TOKEN": "hf_writer"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)  # as everybody does, in another process
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith(f": {writer.url}/{REPO}")
    assert done.stderr == f"Uploading {folder} to {REPO} ...\nUploaded {REPO}\n"

    files = arrived(writer)
    assert set(files) == model_names(folder)
    for name in set(files) - {"README.md"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert [commit["repo"] for commit in writer.commits] == [REPO]
    assert writer.commits[0]["revision"] == "main" and writer.commits[0]["message"] == "Upload with mlx-openelm"
    assert not writer.repos[REPO].private

    downloaded = resolve(REPO)
    card = (downloaded / "README.md").read_text()
    assert f'load("{REPO}")' in card and metadata_load(downloaded / "README.md")["base_model"] == "apple/OpenELM-270M"
    ours, _ = mlx_openelm.load(folder)
    theirs, tokenizer = mlx_openelm.load(REPO)
    ids = mx.array([tokenizer.encode("To be, or not to be")])
    assert mx.array_equal(ours(ids), theirs(ids)) and ids.size > 5


def test_private_revision_and_message(folder: Path, writer: FakeHub) -> None:
    done = upload(folder, REPO, private=True, revision="q4", commit_message="Four bits")
    assert writer.repos[REPO].private
    assert [(c["revision"], c["message"]) for c in writer.commits] == [("q4", "Four bits")]
    assert arrived(writer) == {}  # main is unchanged
    assert (writer.repos[REPO].branches["q4"] / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert done.url == f"{writer.url}/{REPO}/tree/q4"
    assert (resolve(REPO, revision="q4") / "config.json").is_file()
    # Again, with an existing branch and repository.
    (folder / "LICENSE").write_text("another")
    upload(folder, REPO, private=True, revision="q4")
    assert writer.commits[1]["files"] == ["LICENSE"]


def test_bare_name_belongs_to_the_token_s_owner(folder: Path, writer: FakeHub) -> None:
    done = upload(folder, "OpenELM-4bit")
    assert done.repo == REPO and b'load("me/OpenELM-4bit")' in arrived(writer)["README.md"]


def test_private_is_refused_for_an_existing_public_repository(folder: Path, writer: FakeHub) -> None:
    writer.add(REPO, writer.new_folder())
    for call in (
        lambda: check(UploadOptions(upload_repo=REPO, private=True)),
        lambda: upload(folder, REPO, private=True),
    ):
        with pytest.raises(OpenELMError, match="exists and is public"):
            call()
    assert writer.commits == []
    writer.repos[REPO].private = True
    upload(folder, REPO)
    assert writer.repos[REPO].private


def test_weights_of_an_earlier_upload_are_removed(folder: Path, writer: FakeHub) -> None:
    there = writer.new_folder()
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name in (*stale, "adapters.safetensors", "notes.txt", "other.gguf"):
        (there / name).write_text("old")
    (there / "models").mkdir()
    (there / "models" / "other.safetensors").write_text("of another model")
    writer.add(REPO, there)
    upload(folder, REPO)
    assert sorted(writer.commits[0]["deleted"]) == stale
    assert (there / "models" / "other.safetensors").exists()
    assert {"adapters.safetensors", "notes.txt", "other.gguf", "model.safetensors"} <= set(arrived(writer))


def test_gguf_file(writer: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "openelm-q8_0.gguf"
    write_gguf(file)
    (tmp_path / "README.md").write_text("not this one's")
    there = writer.new_folder()
    (there / "model.safetensors").write_text("kept")
    writer.add(REPO, there)
    upload(file, REPO)
    assert set(writer.commits[0]["files"]) == {"openelm-q8_0.gguf", "README.md"} and not writer.commits[0]["deleted"]
    assert arrived(writer)["openelm-q8_0.gguf"] == file.read_bytes()
    assert b"llama-cli --hf-repo me/OpenELM-4bit --hf-file openelm-q8_0.gguf" in arrived(writer)["README.md"]


def test_gguf_file_with_a_card_and_license_from_elsewhere(writer: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "openelm-q8_0.gguf"
    write_gguf(file)
    source = tmp_path / "source"
    source.mkdir()
    (source / "LICENSE").write_text("license")
    origin = Origin("apple/OpenELM-270M", "apple/OpenELM-270M", licenses=(source / "LICENSE",))

    def card(repo: str) -> str:
        return compose_card(file, name=repo, origin=origin, method="q8_0")

    options = UploadOptions(upload_repo="OpenELM-4bit")
    done = publish(file, options, card=card, licenses=origin.licenses)
    assert done.repo == REPO and set(arrived(writer)) == {"openelm-q8_0.gguf", "LICENSE", "README.md"}
    assert arrived(writer)["LICENSE"] == b"license"
    text = arrived(writer)["README.md"].decode()
    assert "base_model_relation: quantized" in text and "--hf-repo me/OpenELM-4bit" in text


def test_a_license_that_is_a_link_to_a_private_file_is_not_sent(writer: FakeHub, tmp_path: Path) -> None:
    file, source = tmp_path / "openelm.gguf", tmp_path / "source"
    write_gguf(file)
    source.mkdir()
    (tmp_path / ".netrc").write_text("secret")
    (source / "LICENSE").symlink_to(tmp_path / ".netrc")
    options = UploadOptions(upload_repo=REPO)
    with pytest.raises(RequestError, match="LICENSE is a link to a file outside its folder"):
        publish(file, options, card=lambda repo: "# x\n", licenses=[source / "LICENSE"])
    assert writer.requests == []


# Concurrent changes by others


def test_a_repository_that_changed_in_the_meantime_is_left_alone(folder: Path, writer: FakeHub) -> None:
    there = writer.add(REPO, writer.new_folder()).folder
    (there / "model.safetensors.index.json").write_text("old")

    def someone_commits() -> None:
        (there / "README.md").write_text("# Mine\n")
        (there / "model-00001-of-00002.safetensors").write_text("somebody's new weights")

    writer.meanwhile = someone_commits
    assert failure(folder).startswith(f"{REPO} was changed by someone else meanwhile: try again.")
    names = {"README.md", "model.safetensors.index.json", "model-00001-of-00002.safetensors"}
    assert set(arrived(writer)) == names and (there / "README.md").read_text() == "# Mine\n"
    assert writer.commits == []


def test_each_commit_names_its_parent(folder: Path, writer: FakeHub) -> None:
    writer.add(REPO, writer.new_folder())
    upload(folder, REPO, revision="q4")
    (folder / "LICENSE").write_text("another")
    upload(folder, REPO, revision="q4")
    parents = [commit["parent"] for commit in writer.commits]
    assert parents[1] == writer.commits[0]["commit"] and len(set(parents)) == 2


def test_private_files_are_not_sent_to_a_public_repository_created_meanwhile(
    folder: Path, writer: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:

    create = HfApi.create_repo

    def someone_is_faster(*args: Any, **kwargs: Any) -> Any:
        writer.add(REPO, writer.new_folder())
        return create(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_repo", someone_is_faster)
    with pytest.raises(OpenELMError, match="exists and is public"):
        upload(folder, REPO, private=True)
    assert writer.commits == [] and writer.objects == {} and arrived(writer) == {}


# Cards


def test_own_card_is_sent_as_it_is(folder: Path, writer: FakeHub) -> None:
    (folder / "README.md").write_text("# My model\n")
    upload(folder, REPO)
    assert arrived(writer)["README.md"] == b"# My model\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [("# Written on the hub\n", True), ("---\nlicense: mit\n---\n# Mine\n", True), ("---\nlicense: mit\n---\n", False)],
)
def test_card_written_on_the_hub_is_kept(text: str, kept: bool, folder: Path, writer: FakeHub) -> None:
    there = writer.new_folder()
    (there / "README.md").write_text(text)
    writer.add(REPO, there)
    done = upload(folder, REPO)
    assert (arrived(writer)["README.md"] == text.encode()) == kept
    assert ("README.md" in [file.name for file in done.files]) != kept


def test_our_card_is_replaced_by_a_newer_one(folder: Path, writer: FakeHub) -> None:
    upload(folder, REPO)
    origin = Origin("apple/OpenELM-270M", "apple/OpenELM-270M")
    write_card(folder, name="mine", origin=origin, method="awq")
    upload(folder, REPO)
    assert writer.commits[1]["files"] == ["README.md"] and b"method `awq`" in arrived(writer)["README.md"]


# Dry runs


def test_dry_run_shows_everything_and_makes_no_request(folder: Path, hub: FakeHub, hub_env: dict[str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    args = ["--path", folder, "--upload-repo", REPO, "--private", "--upload-revision", "q4", "--commit-message", "Hi"]
    done = run("upload", *args, "--dry-run", env=hub_env)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert {f"repository      {REPO}", "visibility      private", "revision        q4", "commit message  Hi"} <= set(
        lines
    )
    listed = [line.split()[0] for line in lines if line.endswith(("B", "kB", "MB")) and len(line.split()) == 3]
    assert set(listed) == model_names(folder)
    assert {"checkpoints/", "adapters.safetensors"} <= set(
        next(line for line in lines if line.startswith("Not sent: ")).removeprefix("Not sent: ").split(", ")
    )
    assert f'model, tokenizer = load("{REPO}")' in lines
    assert hub.requests == [] and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_dry_run_names_what_it_cannot_know(folder: Path, hub: FakeHub, hub_env: dict[str, str]) -> None:
    def plan(path: Path) -> list[str]:
        done = run("upload", "--path", path, "--upload-repo", REPO, "--dry-run", env=hub_env)
        assert done.returncode == 0, done.stderr
        return [" ".join(line.split()) for line in done.stdout.splitlines()]

    unknown = (
        "The hub was not contacted. In an existing repository files with these names are replaced. Its other files:"
    )
    removed = "model*.safetensors or weights*.safetensors or model.safetensors.index.json"
    ours = plan(folder)
    assert unknown in ours and f"older weights removed if their names match {removed}" in ours
    assert "README.md kept, and this one not sent, if a person wrote or edited it" in ours
    assert "anything else kept" in ours
    (folder / "README.md").write_text("# Mine\n")
    assert "README.md replaced by yours" in plan(folder)
    file = folder / "model.gguf"
    write_gguf(file)
    assert "older weights kept" in plan(file)  # files that a GGUF upload does not remove
    assert hub.requests == []


def test_dry_run_is_what_is_sent(folder: Path, writer: FakeHub, hub_env: dict[str, str]) -> None:
    done = run("upload", "--path", folder, "--upload-repo", REPO, "--dry-run", "--json", env=hub_env)
    values = json.loads(done.stdout)
    assert writer.requests == [] and values["url"] is None and values["own_card"] is False
    upload(folder, REPO)
    assert {file["name"]: file["size"] for file in values["files"]} == {k: len(v) for k, v in arrived(writer).items()}
    assert values["size"] == sum(map(len, arrived(writer).values()))
    assert values["card"].encode() == arrived(writer)["README.md"]


# Requests that are refused before anything is sent


@pytest.mark.parametrize("name", ["me/two words", "a/b/c", "me/a--b", "me/x.git", "-me/x", "", "me/" + "x" * 200])
def test_bad_names(name: str, folder: Path, writer: FakeHub) -> None:
    for call in (lambda: check(UploadOptions(upload_repo=name)), lambda: upload(folder, name)):
        with pytest.raises(RequestError, match="not a valid name for a repository"):
            call()
    assert writer.requests == []


@pytest.mark.parametrize("revision", ["0" * 40, "a b", "-x", "a..b", "x/", "", "x.lock"])
def test_bad_revisions(revision: str, folder: Path, writer: FakeHub) -> None:
    with pytest.raises(RequestError, match="upload_revision must be the name of a branch"):
        upload(folder, REPO, revision=revision)
    assert writer.requests == []


def test_pull_request_that_does_not_exist(folder: Path, writer: FakeHub) -> None:
    with pytest.raises(RequestError, match="has no such revision"):
        upload(folder, REPO, revision="refs/pr/5")
    assert writer.commits == []


def test_flags_that_need_a_repository() -> None:
    check(UploadOptions())
    with pytest.raises(RequestError, match="private, dry_run needs upload_repo"):
        check(UploadOptions(private=True, dry_run=True))


def test_check_asks_before_long_work(writer: FakeHub) -> None:
    check(UploadOptions(upload_repo=REPO))
    assert writer.requests == [("GET", "/api/whoami-v2")]
    check(UploadOptions(upload_repo=REPO, private=True))  # no such repository yet
    assert writer.repos == {}


def test_folders_that_are_not_a_model(folder: Path, writer: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        upload(tmp_path / "nothing", REPO)
    with pytest.raises(RequestError, match="give the folder"):
        upload(folder / "config.json", REPO)
    (tmp_path / "bad.gguf").write_text("no")
    with pytest.raises(RequestError, match="not a GGUF file"):
        upload(tmp_path / "bad.gguf", REPO)
    partial = shutil.copytree(folder, tmp_path / ".mine.partial-123")
    with pytest.raises(RequestError, match="interrupted conversion"):
        upload(partial, REPO)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RequestError, match="is damaged"):
        upload(folder, REPO)
    weights.unlink()
    with pytest.raises(RequestError):
        upload(folder, REPO)
    assert writer.requests == []


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(name: str, folder: Path, writer: FakeHub, tmp_path: Path) -> None:
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match=f"{name} is a link to a file outside the folder"):
        upload(folder, REPO)
    assert writer.requests == []


# Refusals and failures: one line, and the folder is kept


def failure(folder: Path, repo: str = REPO) -> str:
    with pytest.raises(OpenELMError) as error:
        upload(folder, repo)
    assert error.value.exit_code == 1
    text = message_of(error)
    assert text.endswith(
        f". {folder} is kept; `mlx-openelm upload --path {folder} --upload-repo {repo}` tries again "
        "and sends no large file twice."
    )
    assert (folder / "model.safetensors").is_file()
    return text


def test_no_token(folder: Path, hub: FakeHub, hub_env: dict[str, str]) -> None:
    with pytest.raises(OpenELMError, match="needs a token that may write: log in with `hf auth login`, or set HF"):
        check(UploadOptions(upload_repo=REPO))
    assert failure(folder).startswith("Uploading needs a token")
    done = run("upload", "--path", folder, "--upload-repo", REPO, env=hub_env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "needs a token" in done.stderr
    assert hub.requests == []


def test_wrong_token(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    text = failure(folder)
    assert text.startswith("127.0.0.1 refuses your token: log in again") and "hf_wrong" not in text


def test_token_that_may_only_read(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert failure(folder).startswith("Your token may only read")
    assert hub.requests == [("GET", "/api/whoami-v2")]


def test_invalid_token(folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "“hf_secret”")
    assert failure(folder).startswith("Your token has invalid characters")


def test_refused_repository(folder: Path, writer: FakeHub) -> None:
    writer.forbids = True
    assert failure(folder, "apple/OpenELM-270M").startswith(
        "127.0.0.1 refuses your token to write to apple/OpenELM-270M"
    )
    # An existing repository of another user is refused at the first file.
    writer.add("apple/OpenELM-270M", writer.new_folder())
    assert "refuses your token to write" in failure(folder, "apple/OpenELM-270M")
    assert writer.commits == []


def test_no_network(folder: Path, writer: FakeHub) -> None:
    writer.stop()
    text = failure(folder)
    assert text.startswith("Cannot reach 127.0.0.1 (") and "refused" in text


def test_offline(folder: Path, writer: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert failure(folder).startswith("HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it.")
    assert writer.requests == []


@pytest.mark.parametrize(("status", "text"), [(500, "has a server error (HTTP 500)"), (429, "limits your requests")])
def test_server_errors(status: int, text: str, folder: Path, writer: FakeHub) -> None:
    writer.status = status
    assert text in failure(folder)


@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "/lfs/", "/commit/"])
def test_server_errors_during_the_upload(part: str, folder: Path, writer: FakeHub, no_waiting: None) -> None:
    writer.fails_at = part
    assert "127.0.0.1 has a server error (HTTP 500)" in failure(folder)
    assert writer.commits == []


def test_refused_card(folder: Path, writer: FakeHub) -> None:
    writer.rejects_card = True
    with pytest.raises(RequestError) as error:
        upload(folder, REPO)
    assert '127.0.0.1 refuses the front matter of README.md ("license" must be one of [mit])' in message_of(error)
    assert writer.objects == {}


def test_server_that_is_not_a_hub(folder: Path, writer: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: json.loads("<html>"))
    assert "does not answer like a model hub" in failure(folder)


def test_broken_transfer_can_be_continued(folder: Path, writer: FakeHub, no_waiting: None) -> None:
    writer.breaks_uploads = True
    assert failure(folder).startswith(f"The transfer of {REPO} to 127.0.0.1 broke off (")
    assert writer.commits == []
    writer.breaks_uploads = False
    upload(folder, REPO)
    assert set(arrived(writer)) == model_names(folder)


def test_large_files_are_not_sent_twice(folder: Path, writer: FakeHub, no_waiting: None) -> None:
    writer.fails_at = "/commit/"
    failure(folder)
    assert [path for method, path in writer.requests if method == "PUT"]
    writer.fails_at = None
    writer.requests.clear()
    upload(folder, REPO)
    assert not [path for method, path in writer.requests if method == "PUT"]
    assert set(arrived(writer)) == model_names(folder)


def test_interrupted(
    folder: Path, writer: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        upload(folder, REPO)
    assert f"Interrupted. {folder} is kept; `mlx-openelm upload --path {folder}" in capfd.readouterr().err
    from huggingface_hub.utils import are_progress_bars_disabled

    assert not are_progress_bars_disabled()


def test_command_without_a_repository(folder: Path, hub_env: dict[str, str]) -> None:
    done = run("upload", "--path", folder, env=hub_env)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "--upload-repo is missing" in done.stderr
