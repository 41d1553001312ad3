"""From names to folders: local ones first, then downloads from a stand-in for the hub."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from mlx_openelm import errors
from mlx_openelm.errors import OpenELMError, RequestError, quote
from mlx_openelm.hub import catalog, corenet, offline, progress, resolve
from mlx_openelm.sources import open_source
from mlx_openelm.text import shared_tokenizer
from mlx_openelm.text.tokenizer import Tokenizer

import pytest
from fake_hub import FakeHub

REPO = "apple/OpenELM-270M"
WANTED = {
    "config.json": '{"model_type": "openelm"}',
    "generation_config.json": '{"bos_token_id": 1}',
    "model-00001-of-00002.safetensors": "first" * 20_000,
    "model-00002-of-00002.safetensors": "second" * 20_000,
    "model.safetensors.index.json": '{"weight_map": {}}',
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer.model": "pieces",
    "tokenizer_config.json": '{"bos_token": "<s>"}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "license",
    "README.md": "card",
}
UNWANTED = {
    "modeling_openelm.py": "raise SystemExit('code of a repository ran')",
    "configuration_openelm.py": "raise SystemExit('code of a repository ran')",
    "LICENSE.py": "raise SystemExit('code of a repository ran')",
    "pytorch_model.bin": "pickle",
    "consolidated.pt": "pickle",
    "optimizer.pkl": "pickle",
    "onnx/model.safetensors": "a copy for another program",
    "figure.png": "picture",
}


ELSEWHERE = (
    f"run `hf download {REPO} --local-dir OpenELM-270M` and `hf download hf-internal-testing/llama-tokenizer "
    "tokenizer.model --local-dir OpenELM-270M` on a machine with a network, copy the folder here and give its "
    'path, as in `load("OpenELM-270M")`; `load("tiny")` needs no network.'
)


def make_folder(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def repo_folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "served", WANTED | UNWANTED)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits at least a second before each of its five retries."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def message_of(error: pytest.ExceptionInfo[OpenELMError]) -> str:
    """The message, which must be one line."""
    text = str(error.value)
    assert text and "\n" not in text
    return text


# Local names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_folder(tmp_path / "package" / "tiny", {"config.json": "{}"})
    monkeypatch.setitem(catalog.PACKAGED, "tiny", folder)
    return folder


@pytest.mark.parametrize("name", ["tiny", "Tiny", " tiny "])
def test_tiny_is_packaged(name: str, packaged: Path) -> None:
    assert resolve.resolve(name) == packaged
    assert resolve.source_repo(name) is None


def test_tiny_missing_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(catalog.PACKAGED, "tiny", tmp_path / "nothing")
    with pytest.raises(OpenELMError, match="install mlx-openelm again") as error:
        resolve.resolve("tiny")
    assert error.value.exit_code == 1


def test_local_folder_is_itself(here: Path) -> None:
    make_folder(here, {"models/mine/config.json": "{}", "plain/weights.safetensors": ""})
    for name in ("models/mine", "models/mine/", "./models/mine", str(here / "models/mine"), "plain"):
        assert resolve.resolve(name).resolve() == (here / name).resolve()
        assert resolve.source_repo(name) is None
    assert resolve.resolve(Path("plain")) == Path("plain")


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    make_folder(here, {"mine/config.json": "{}"})
    assert resolve.resolve("~/mine") == here / "mine"


@pytest.mark.parametrize("name", ["270m", "OpenELM-1.1B", "apple/OpenELM-3B", "tiny"])
def test_folder_named_as_a_model_wins_only_with_a_config(name: str, here: Path, packaged: Path) -> None:
    (here / name).mkdir(parents=True)
    (here / name / "notes.txt").write_text("no model")
    release = catalog.find(name)
    assert resolve.source_repo(name) == (release.hub_repo if release else None)
    if release is None:
        assert resolve.resolve(name) == packaged
    (here / name / "config.json").write_text("{}")
    assert resolve.source_repo(name) is None
    assert resolve.resolve(name).resolve() == (here / name).resolve()


@pytest.mark.parametrize(
    "name",
    [
        "./mine",
        "../mine",
        "~/mine-nowhere",
        "/nowhere/mine",
        "a/b/c",
        "mine/",
        "model.safetensors",
        "x/y.gguf",
    ],
)
def test_path_that_does_not_exist(name: str, here: Path) -> None:
    with pytest.raises(RequestError) as error:
        resolve.resolve(name)
    assert message_of(error) == f"The folder {name} does not exist."
    assert error.value.exit_code == 2


def test_a_path_object_is_never_a_hub_name(here: Path) -> None:
    with pytest.raises(RequestError, match="The folder 270m does not exist"):
        resolve.resolve(Path("270m"))


def test_a_file_is_not_a_folder(here: Path) -> None:
    make_folder(here, {"model.safetensors": ""})
    with pytest.raises(RequestError, match=r"model\.safetensors is a file: give the folder"):
        resolve.resolve("model.safetensors")


def test_revision_of_a_local_folder(packaged: Path) -> None:
    with pytest.raises(RequestError, match="tiny is a local folder, which has no revision 'v2'"):
        resolve.resolve("tiny", revision="v2")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("tinny", "did you mean tiny?"),
        ("OpenELM-7B", "OpenELM-3B"),
        ("270", "270m"),
        ("gpt2", "give tiny, tiny-draft, tiny-instruct, 270m"),
    ],
)
def test_unknown_name_lists_close_ones(name: str, close: str, here: Path) -> None:
    with pytest.raises(RequestError) as error:
        resolve.resolve(name)
    assert message_of(error).startswith(f"There is no model named '{name}'")
    assert close in message_of(error)


@pytest.mark.parametrize("name", ["", "  ", "owner/", "/owner", "a\0b", "x" * 5000, "~nobody-here/x"])
def test_strange_names_are_refused(name: str, here: Path) -> None:
    with pytest.raises(RequestError):
        resolve.resolve(name)


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("270m", "apple/OpenELM-270M"),
        ("1.1B-instruct", "apple/OpenELM-1_1B-Instruct"),
        ("openelm-3b", "apple/OpenELM-3B"),
        ("apple/openelm-450m", "apple/OpenELM-450M"),
        ("mlx-community/OpenELM-270M", "mlx-community/OpenELM-270M"),
        ("me/my-model.v2", "me/my-model.v2"),
    ],
)
def test_source_repo(name: str, repo: str, here: Path) -> None:
    assert resolve.source_repo(name) == repo


# Downloads that work


def test_download_takes_the_model_and_no_code(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    folder = resolve.resolve("270m")
    assert {path.name: path.read_text() for path in folder.iterdir()} == WANTED
    assert sorted(hub.files_sent) == sorted(WANTED)
    assert not [path for _, path in hub.requests if path.endswith((".py", ".bin", ".pt", ".pkl", ".png"))]


def test_patterns_of_a_caller_cannot_ask_for_code(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    folder = resolve.download(REPO, patterns=["*"])
    assert {path.name for path in folder.iterdir()} == {*WANTED, "figure.png"}
    assert not [path for _, path in hub.requests if path.endswith((".py", ".bin", ".pt", ".pkl"))]


def test_second_resolve_transfers_nothing_and_needs_no_server(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    folder = resolve.resolve("270m")
    sent = len(hub.files_sent)
    assert resolve.resolve("apple/OpenELM-270M") == folder
    assert len(hub.files_sent) == sent == len(WANTED)
    hub.stop()
    assert resolve.resolve("270m") == folder


def test_a_changed_repository_is_downloaded_again(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    first = resolve.resolve("270m")
    (repo_folder / "config.json").write_text('{"changed": true}')
    second = resolve.resolve("270m")
    assert second != first
    assert json.loads((second / "config.json").read_text()) == {"changed": True}
    assert hub.files_sent.count("config.json") == 2
    assert hub.files_sent.count("model-00001-of-00002.safetensors") == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_cache_serves_while_the_hub_is_down(status: int, hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    folder = resolve.resolve("270m")
    hub.status = status
    assert resolve.resolve("270m") == folder


def test_cache_without_license_and_card_is_enough_offline(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    # What mlx-lm would leave in the cache.
    folder = resolve.download(REPO, patterns=["*.json", "*.safetensors", "tokenizer.model", "*.jinja"])
    assert not (folder / "README.md").exists()
    hub.stop()
    assert resolve.resolve("270m") == folder


def test_revision(hub: FakeHub, repo_folder: Path) -> None:
    repo = hub.add(REPO, repo_folder, refs={"main", "refs/pr/1", "v1.0"})
    commit = repo.commit()
    for revision in ("v1.0", "refs/pr/1", commit):
        assert resolve.resolve("270m", revision=revision).name == commit


def test_added_tokens_come_from_the_hub_too(hub: FakeHub, tmp_path: Path) -> None:
    """As transformers' slow tokenizers save them: in a separate file."""
    local = tmp_path / "local"
    local.mkdir()
    shutil.copy(Path(__file__).parent / "fixtures" / "shakespeare-hf" / "tokenizer.model", local)
    (local / "added_tokens.json").write_text('{"<|im_end|>": 2049, "<|im_start|>": 2048}')
    hub.add("me/model", local)
    folder = resolve.download("me/model", patterns=resolve.MODEL_PATTERNS)
    ids = [Tokenizer.from_folder(place).encode("<|im_start|>a<|im_end|>") for place in (local, folder)]
    assert ids[0] == ids[1] and {2048, 2049} <= set(ids[0])


def test_tokenizer_download_takes_only_the_tokenizer(hub: FakeHub, repo_folder: Path) -> None:
    repo = "mlx-community/OpenELM-1_1B-Instruct"
    (repo_folder / "added_tokens.json").write_text("{}")
    hub.add(repo, repo_folder)
    folder = resolve.download(repo, patterns=resolve.TOKENIZER_PATTERNS)
    assert {path.name for path in folder.iterdir()} == set(resolve.TOKENIZER_PATTERNS)
    # Offline, the same cache must not pass for the model.
    hub.stop()
    assert resolve.download(repo, patterns=resolve.TOKENIZER_PATTERNS) == folder
    with pytest.raises(OpenELMError, match="only a part of mlx-community/OpenELM-1_1B-Instruct"):
        resolve.resolve("mlx-community/OpenELM-1_1B-Instruct")


def announcement() -> str:
    """The lines of a first download; `WANTED` has 220.1 kB."""
    assert round(sum(map(len, WANTED.values())), -2) == 220_100
    return f"Downloading {REPO}, 220.1 kB ...\nDownloaded {REPO}\n"


def test_piped_progress_is_two_plain_lines_once(
    hub: FakeHub, repo_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add(REPO, repo_folder)
    resolve.resolve("270m")
    assert capfd.readouterr() == ("", announcement())
    resolve.resolve("270m")
    assert capfd.readouterr() == ("", "")


def test_terminal_shows_bars_only_for_a_download(
    hub: FakeHub, repo_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, repo_folder)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    resolve.resolve("270m")
    shown = capfd.readouterr().err
    assert shown.startswith(f"Downloading {REPO}, 220.1 kB ...\n\r  0%|")
    assert "/220k [" in shown and shown.endswith(f"\rDownloaded {REPO}\n")
    resolve.resolve("270m")
    assert capfd.readouterr() == ("", "")


def test_a_long_piped_download_shows_lines(
    hub: FakeHub, repo_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    hub.add(REPO, repo_folder)
    resolve.resolve("270m")
    first, *lines, last = capfd.readouterr().err.splitlines()
    assert (first, last) == tuple(announcement().splitlines())
    assert lines[-1] == f"Downloading {REPO}: 220.1 kB of 220.1 kB"
    assert all(line.startswith(f"Downloading {REPO}: ") for line in lines)


def test_cached_files_do_not_count(hub: FakeHub, repo_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub.add(REPO, repo_folder)
    resolve.download(REPO, patterns=["model-00001*"])
    assert "Downloading apple/OpenELM-270M, 100.0 kB ...\n" in capfd.readouterr().err
    resolve.resolve("270m")
    assert "Downloading apple/OpenELM-270M, 120.1 kB ...\n" in capfd.readouterr().err
    # Of a newer version nobody knows yet which files are in the cache already.
    (repo_folder / "README.md").write_text("another card")
    resolve.resolve("270m")
    assert capfd.readouterr().err == announcement().replace(", 220.1 kB", "")


def test_nothing_is_downloaded_if_downloads_are_denied(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    with offline.no_network("--dry-run downloads nothing"):
        with pytest.raises(OpenELMError) as error:
            resolve.resolve("270m")
        assert message_of(error).startswith(
            f"dry_run downloads nothing and {REPO} is not in the download cache: run `hf download {REPO} "
        )
        with pytest.raises(OpenELMError, match="dry_run downloads nothing and corenet:270M/lora is not in the"):
            corenet.download("corenet:270M/lora")
    assert hub.requests == [] and not Path(hub_cache()).exists()
    folder = resolve.resolve("270m")
    asked = len(hub.requests)
    with offline.no_network("--dry-run downloads nothing"):
        assert resolve.resolve("270m") == folder
    assert len(hub.requests) == asked


def test_environment_is_honoured_in_a_new_process(hub: FakeHub, hub_env: dict[str, str], repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    code = "from mlx_openelm.hub.resolve import resolve; print(resolve('270m'))"

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | hub_env | more
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)

    first = run()
    assert first.stdout.startswith(hub_env["HF_HOME"])
    assert first.stderr == announcement()
    asked = len(hub.requests)
    offline = run(HF_HUB_OFFLINE="1")
    assert (offline.stdout, offline.stderr, len(hub.requests)) == (first.stdout, "", asked)


# Downloads that fail


def test_repository_that_does_not_exist(hub: FakeHub, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RequestError) as error:
        resolve.resolve("apple/OpenELM-7B")
    assert message_of(error) == (
        "There is no folder and no hub repository named apple/OpenELM-7B (did you mean apple/OpenELM-3B "
        "or apple/OpenELM-270M?); a private one needs `hf auth login`."
    )
    assert capfd.readouterr() == ("", "")


def test_a_mistyped_folder_is_named_as_one(hub: FakeHub, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="There is no folder and no hub repository named models/foo"):
        resolve.resolve("models/foo")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OpenELMError, match="models/foo is neither a folder nor in the download cache"):
        resolve.resolve("models/foo")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.stop()
    with pytest.raises(OpenELMError, match=r"Cannot reach .* and models/foo is neither a folder nor in the download"):
        resolve.resolve("models/foo")


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository(status: int, hub: FakeHub, repo_folder: Path) -> None:
    hub.add("meta-llama/Llama-2-7b", repo_folder, gated=status)
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("meta-llama/Llama-2-7b")
    assert message_of(error) == (
        "meta-llama/Llama-2-7b is gated: accept its conditions at "
        "https://huggingface.co/meta-llama/Llama-2-7b, then log in with `hf auth login` or set HF_TOKEN."
    )
    assert error.value.exit_code == 1


def test_revision_that_does_not_exist(hub: FakeHub, repo_folder: Path) -> None:
    hub.add(REPO, repo_folder)
    for revision in ("v9", "0" * 40):
        with pytest.raises(RequestError) as error:
            resolve.resolve("270m", revision=revision)
        assert message_of(error).startswith(f"{REPO} has no revision '{revision}': give a branch, a tag")


def test_refused_token_is_not_shown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    hub.rejects_token = True
    with pytest.raises(OpenELMError, match="refuses your token: log in again with `hf auth login`") as error:
        resolve.resolve("270m")
    assert "secret" not in message_of(error)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("name", ["me/two words", "me/a--b", "me/x.git", "-me/x", "me/" + "x" * 200])
def test_invalid_repository_name(name: str, hub: FakeHub, here: Path) -> None:
    with pytest.raises(RequestError, match="a valid hub repository name") as error:
        resolve.resolve(name)
    assert message_of(error).startswith(quote(name))
    assert hub.requests == []


def test_no_network_and_nothing_cached(hub: FakeHub) -> None:
    hub.stop()
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    text = message_of(error)
    assert text.startswith("Cannot reach 127.0.0.1 (") and "refused" in text
    assert text.endswith(f" and {REPO} is not in the download cache: connect once, or {ELSEWHERE}")
    assert error.value.exit_code == 1


def test_offline_and_nothing_cached(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert message_of(error) == (
        f"HF_HUB_OFFLINE is set and {REPO} is not in the download cache: unset it and connect once, or {ELSEWHERE}"
    )
    assert hub.requests == []


def test_in_python_the_advice_is_in_python() -> None:
    assert offline.model("me/my-model").endswith('as in `load("my-model")`; `load("tiny")` needs no network')
    assert offline.adapter("me/lora").endswith('give it with `adapter_path="lora"`')
    assert offline.tokenizer().endswith('with `tokenizer="llama-tokenizer/tokenizer.model"`')
    assert offline.corenet("corenet:3B/dora").endswith('with `adapter_path="OpenELM-3B/openelm_dora_3B.pt"`')
    assert 'as in `load("OpenELM-270M")`;' in offline.corenet("corenet:270M/mlx-4bit")


def test_the_commands_for_elsewhere_name_the_revision_and_other_repositories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "names_flags", True)
    assert offline.model("me/my-model", "v1.0") == (
        "run `hf download me/my-model --revision v1.0 --local-dir my-model` on a machine with a network, "
        "copy the folder here and give it with --model my-model; --model tiny needs no network"
    )
    assert offline.adapter("me/lora") == (
        "run `hf download me/lora --local-dir lora` on a machine with a network, "
        "copy the folder here and give it with --adapter-path lora"
    )
    port = offline.corenet("corenet:270M/mlx-4bit")
    assert f" {catalog.CORENET_URL}/mlx/270M-4bit/config.json {catalog.CORENET_URL}/mlx/270M-4bit/weights." in port
    assert "--model OpenELM-270M;" in port
    assert offline.corenet("corenet:3B/dora").endswith("give it with --adapter-path OpenELM-3B/openelm_dora_3B.pt")


def commands_in(message: str) -> list[list[str]]:
    """The commands that a message has in backquotes, as words."""
    return [shlex.split(text) for text in message.split("`")[1::2]]


def test_the_commands_for_elsewhere_give_a_folder_that_loads(
    hub: FakeHub, hub_env: dict[str, str], tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message's own commands run, on a machine that reaches the hub."""
    pytest.importorskip("huggingface_hub.cli.hf")
    monkeypatch.setattr(errors, "names_flags", True)
    fixture = Path(__file__).parent / "fixtures" / "shakespeare-hf"
    (tmp_path / "apple").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixture / name, tmp_path / "apple")
    hub.add(REPO, tmp_path / "apple")
    hub.add(catalog.TOKENIZER_REPO, fixture)
    for words in commands_in(offline.model(REPO)):
        assert words[0] == "hf"
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words[1:]]
        subprocess.run(command, env=os.environ | hub_env, cwd=here, check=True, capture_output=True)
    hub.stop()
    source = open_source("OpenELM-270M")
    assert source.path == here / "OpenELM-270M" and source.tokenizer.vocab_size == 2048


def test_a_folder_without_a_tokenizer_says_how_to_get_one(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = Path(__file__).parent / "fixtures" / "shakespeare-hf"
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixture / name, folder)
    with pytest.raises(RequestError, match="copy the one it was trained with there"):  # it has 2,048 tokens
        open_source(folder)
    monkeypatch.setattr(shared_tokenizer, "LLAMA2", replace(shared_tokenizer.LLAMA2, vocab_size=2048))
    with pytest.raises(RequestError) as error:
        open_source(folder)
    assert commands_in(message_of(error)) == [
        ["hf", "download", catalog.TOKENIZER_REPO, "tokenizer.model", "--local-dir", str(folder)]
    ]


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (500, "has a server error (HTTP 500): try again later"),
        (503, "(HTTP 503)"),
        (429, "limits your requests"),
    ],
)
def test_server_errors(status: int, text: str, hub: FakeHub) -> None:
    hub.status = status
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert message_of(error).startswith("127.0.0.1 ") and text in message_of(error)
    assert error.value.exit_code == 1


def test_broken_transfer_leaves_nothing_that_looks_complete(hub: FakeHub, repo_folder: Path, no_waiting: None) -> None:
    hub.add(REPO, repo_folder, broken="model-00002-of-00002.safetensors")
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert message_of(error).startswith(f"The transfer of {REPO} from 127.0.0.1 broke off (")
    assert message_of(error).endswith("run the same command again, completed files are kept.")
    cache = Path(hub_cache())
    assert not list(cache.rglob("model-00002*")) and not list(cache.rglob("*.incomplete"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OpenELMError, match=f"HF_HUB_OFFLINE is set and only a part of {REPO} is in the"):
            resolve.resolve("270m")

    hub.repos[REPO].broken = None
    folder = resolve.resolve("270m")
    assert {path.name: path.read_text() for path in folder.iterdir()} == WANTED


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
    ],
)
def test_disk_full(failure: Exception, hub: FakeHub, repo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise failure

    hub.add(REPO, repo_folder)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert message_of(error) == (
        f"The disk is full; {REPO} does not fit. Free some space in {hub_cache()}, "
        "or set HF_HOME to a folder on another disk."
    )
    assert error.value.exit_code == 1


def test_cache_that_cannot_be_written(hub: FakeHub, repo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    hub.add(REPO, repo_folder)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert f"Cannot write to the download cache {hub_cache()} (Permission denied): set HF_HOME" in message_of(error)


def test_signed_addresses_and_tokens_stay_out_of_messages(
    hub: FakeHub, repo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("403 for https://cdn.example/x?Signature=SECRET with hf_SECRET\nmore")

    hub.add(REPO, repo_folder)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    with pytest.raises(OpenELMError) as error:
        resolve.resolve("270m")
    assert "(403 for the hub with hf_...)" in message_of(error)
    assert "SECRET" not in message_of(error)


def test_an_endpoint_with_a_password_is_not_shown(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    endpoint = hub.url.replace("//", "//me:SECRET@")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(OpenELMError, match=r"Cannot reach 127\.0\.0\.1 ") as error:
        resolve.resolve("270m")
    assert "SECRET" not in message_of(error)


@pytest.mark.parametrize("endpoint", ["", "huggingface.co", "http:///"])
def test_endpoint_that_is_not_an_address(endpoint: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(RequestError, match="HF_ENDPOINT must be a whole address"):
        resolve.resolve("270m")


def test_invalid_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "“hf_secret”")
    with pytest.raises(OpenELMError, match="Your token has invalid characters"):
        resolve.resolve("270m")


def test_server_that_is_not_a_hub(hub: FakeHub, repo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, repo_folder)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_HEADER_X_REPO_COMMIT", "X-Not-There")
    with pytest.raises(OpenELMError, match="does not answer like a model hub: check HF_ENDPOINT"):
        resolve.resolve("270m")


def test_repository_without_a_model(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("apple/OpenELM", make_folder(tmp_path / "family", {"README.md": "card", "LICENSE": "license"}))
    with pytest.raises(RequestError, match=r"apple/OpenELM has no config.json, so it is not a model \(did you mean"):
        resolve.resolve("apple/OpenELM")


def test_repository_with_pickles_only(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("me/pickled", make_folder(tmp_path / "pickled", {"config.json": "{}", "pytorch_model.bin": "pickle"}))
    with pytest.raises(RequestError, match=r"me/pickled has no \*.safetensors; pickled weights"):
        resolve.resolve("me/pickled")
    assert hub.files_sent == ["config.json"]


def test_repository_without_wanted_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("me/nothing", make_folder(tmp_path / "nothing", {"a.py": "code"}))
    with pytest.raises(RequestError, match="me/nothing does not have any of these files: "):
        resolve.resolve("me/nothing")
