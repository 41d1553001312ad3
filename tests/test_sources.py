"""Model sources: what a name means, downloads of CoreNet's files, sources that change while being read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load, loading
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.hub import catalog, corenet
from mlx_openelm.sources import named_tokenizer, open_source
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"
BYTES = bytes(range(256)) * 4000  # a megabyte
AVERAGE = "pretrained/270M/checkpoint_average.pt"


# What a name means.


def test_a_folder() -> None:
    source = open_source(str(FOLDER))
    assert (source.name, source.path, source.repo, source.release) == (str(FOLDER), FOLDER, None, None)
    assert source.checkpoint.weights.keys() == source.checkpoint.config.tensor_shapes().keys()
    assert source.tokenizer.vocab_size == 2048


def test_a_hub_name(hub: FakeHub, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "served")
    hub.add("apple/OpenELM-270M", tmp_path / "served")
    for name in ("270m", "apple/OpenELM-270M"):
        source = open_source(name)
        assert (source.repo, source.release) == ("apple/OpenELM-270M", catalog.find("270m"))
    hub.add("somebody/shakespeare", tmp_path / "served")
    source = open_source("somebody/shakespeare")
    assert (source.repo, source.release) == ("somebody/shakespeare", None)


@pytest.mark.parametrize("name", ["a.pt", "b/c.pth", "/nowhere/model.gguf", "~/none.GGUF"])
def test_a_missing_file_is_refused(name: str, hub: FakeHub) -> None:
    with pytest.raises(RequestError, match=f"file {name} does not exist"):
        open_source(name)
    assert hub.requests == []


@pytest.mark.parametrize("name", [*catalog.PACKAGED, Path("tiny"), " tiny"])
def test_a_tokenizer_may_be_named_by_a_packaged_model(name: str | Path) -> None:
    tokenizer = open_source(FOLDER, tokenizer=name).tokenizer
    assert tokenizer.encode("To be") == Tokenizer.from_folder(catalog.PACKAGED[str(name).strip()]).encode("To be")


def test_a_local_tokenizer_overrides_a_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # without a tokenizer, such as a run's output
    assert named_tokenizer("tiny").vocab_size == named_tokenizer(catalog.TINY_FOLDER).vocab_size
    shutil.copy(FOLDER / "tokenizer.model", tmp_path / "tiny" / "tokenizer.model")
    assert named_tokenizer("tiny").model_file == Path("tiny", "tokenizer.model")


def test_a_gguf_file_goes_to_its_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_openelm.formats import gguf

    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    whole = open_source(FOLDER)
    monkeypatch.setattr(gguf, "read", lambda given: (whole.checkpoint, whole.tokenizer) if given == path else None)
    source = open_source(str(path))
    assert (source.path, source.checkpoint, source.tokenizer) == (path, whole.checkpoint, whole.tokenizer)
    other = open_source(path, tokenizer=FOLDER / "tokenizer.model")
    assert other.tokenizer is not whole.tokenizer
    with pytest.raises(RequestError, match="config_yaml belongs"):
        open_source(path, config_yaml=tmp_path / "run.yaml")


def test_revision_and_config_yaml_are_refused_where_they_do_not_apply(tmp_path: Path) -> None:
    (tmp_path / "c.pt").write_bytes(b"x")
    for model in (tmp_path / "c.pt", "corenet:270M/checkpoint_average"):
        with pytest.raises(RequestError, match="no revision 'main'"):
            open_source(model, revision="main")
    with pytest.raises(RequestError, match="config_yaml belongs"):
        open_source(FOLDER, config_yaml=tmp_path / "run.yaml")


# A source that changes.


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER, tmp_path / "small"))


def test_the_working_directory_may_change_after_opening(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small.rename(small.with_name("OpenELM-270M"))
    monkeypatch.chdir(folder)
    source = open_source(".")
    monkeypatch.chdir(folder.parent)
    with source.reading():
        mx.eval(source.checkpoint.weights)
    assert source.path == folder and source.release == catalog.find("270m")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b" ")


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def replace(path: Path) -> None:
    """Another file with the same content and times."""
    status = path.stat()
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


@pytest.mark.covering
@pytest.mark.parametrize("change", [append, touch, replace, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_source_that_changes_while_it_is_converted(small: Path, change: Callable[[Path], None], name: str) -> None:
    done = []

    def progress(written: int, total: int) -> None:
        if not done:
            done.append(change(small / name))

    with pytest.raises(OpenELMError, match=f"{name} was changed while it was being read") as caught:
        convert(small, small.parent / "out", progress=progress)
    assert caught.value.exit_code == 1
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_unrelated_files_may_change(small: Path) -> None:
    convert(small, small.parent / "out", progress=lambda *_: (small / "notes.txt").write_text("x") and None)
    assert (small.parent / "out" / "config.json").is_file()


def test_a_source_cut_short_while_it_is_read(small: Path) -> None:
    """MLX reports missing data."""
    with pytest.raises(OpenELMError, match="was changed while"):
        convert(small, small.parent / "out", progress=lambda *_: os.truncate(small / "model.safetensors", 10**6))
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_a_read_error_of_the_disk_is_reported(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise RuntimeError("[read] Unable to\nread from file.")

    monkeypatch.setattr(mlx_format, "write", write)
    with pytest.raises(OpenELMError) as caught:
        convert(small, small.parent / "out")
    assert "small failed ([read] Unable to read from file.)" in str(caught.value)
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_a_full_disk_leaves_nothing(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def progress(written: int, total: int) -> None:
        if written > total // 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OpenELMError, match="No space left on device; nothing was left"):
        convert(small, small.parent / "out", progress=progress)
    assert [path.name for path in small.parent.iterdir()] == ["small"]


def test_the_next_run_cleans_up_after_a_kill(small: Path) -> None:
    code = f"""
import time
from mlx_openelm import convert
def progress(written, total):
    if written > total // 2:
        print("half", flush=True)
        time.sleep(60)
convert({str(small)!r}, {str(small.parent / "out")!r}, progress=progress)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in small.parent.iterdir())
    assert left == [f".out.partial-{process.pid}", "small"]
    convert(small, small.parent / "out")
    assert sorted(path.name for path in small.parent.iterdir()) == ["out", "small"]
    assert loading.load(small.parent / "out")[0].parameters()


# Downloads of CoreNet's files.


class Server:
    """A fake of Apple's file server: files by path, ranges, and transfers that break off."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []  # path and range
        self.breaks: list[int] = []  # for each coming transfer, the number of bytes after which it breaks off
        self.status: int | None = None
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, byte_range = self.path.lstrip("/"), self.headers.get("Range")
                server.requests.append((path, byte_range))
                data = server.files.get(path)
                status = server.status or (404 if data is None else None)
                if status is not None or data is None:
                    self.send_response(status or 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                tag = server.tags.get(path, '"one"')
                start = 0
                if byte_range and self.headers.get("If-Range") == tag:
                    start = int(byte_range.removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                end = start + server.breaks.pop(0) if server.breaks else len(data)
                self.wfile.write(data[start:end])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: FakeHub) -> Iterator[Server]:
    server = Server()
    monkeypatch.setenv(corenet.URL_VARIABLE, server.url)
    monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    yield server
    server.close()


def cached(tmp_path: Path) -> list[str]:
    """The files in the cache, without locks."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock")


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.files[AVERAGE] = BYTES
    name = "corenet:270M/checkpoint_average"
    path = corenet.download(name)
    assert path.read_bytes() == BYTES
    assert capfd.readouterr().err == f"Downloading {name}, 1.0 MB ...\nDownloaded {name}\n"
    assert corenet.download("corenet:270m/checkpoint_average.pt") == path
    assert server.requests == [(AVERAGE, None)]
    assert cached(tmp_path) == ["checkpoint_average.pt"]


def test_a_transfer_resumes_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.files[AVERAGE] = BYTES
    server.breaks = [300_000, 200_000]
    assert corenet.download("corenet:270M/checkpoint_average").read_bytes() == BYTES
    assert server.requests == [(AVERAGE, None), (AVERAGE, "bytes=300000-"), (AVERAGE, "bytes=500000-")]


def test_a_transfer_resumes_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.files[AVERAGE] = BYTES
    server.breaks = [100_000] * 4
    with pytest.raises(OpenELMError, match="broke off.*run the same command again") as caught:
        corenet.download("corenet:270M/checkpoint_average")
    assert caught.value.exit_code == 1
    assert "checkpoint_average.pt" not in cached(tmp_path)
    assert corenet.download("corenet:270M/checkpoint_average").read_bytes() == BYTES
    assert server.requests[-1] == (AVERAGE, "bytes=400000-")
    assert cached(tmp_path) == ["checkpoint_average.pt"]


def test_a_file_that_changed_meanwhile_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    server.files[AVERAGE] = BYTES
    server.breaks = [100_000] * 4
    with pytest.raises(OpenELMError):
        corenet.download("corenet:270M/checkpoint_average")
    server.files[AVERAGE], server.tags[AVERAGE] = BYTES[::-1], '"two"'
    assert corenet.download("corenet:270M/checkpoint_average").read_bytes() == BYTES[::-1]


def test_download_addresses(server: Server, tmp_path: Path) -> None:
    for name, path in {
        "corenet:1.1B/checkpoint_epoch_0_iter_49999": "pretrained/1.1B/checkpoint_epoch_0_iter_49999.pt",
        "corenet:1_1B/checkpoint_epoch_0_iter_349999": "pretrained/1.1B/checkpoint_epoch_0_iter_349999.pt",
        "corenet:3B/training_checkpoint_last": "pretrained/3B/training_checkpoint_last.pt",
        "corenet:450M/mlx": "mlx/450M/weights.safetensors",
        "corenet:450M/mlx-4bit": "mlx/450M-4bit/weights.safetensors",
    }.items():
        server.files |= {path: path.encode(), str(Path(path).parent / "config.json"): b"{}"}
        found = corenet.download(name)
        is_port = path.endswith("safetensors")
        assert (found / "weights.safetensors" if is_port else found).read_bytes() == path.encode()
        assert not is_port or (found / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("corenet:7B/checkpoint_average", "270M, 450M, 1.1B, 3B"),
        ("corenet:270M-instruct/checkpoint_average", "is not a CoreNet download"),
        ("corenet:", "corenet:270M/checkpoint_average"),
        ("corenet:270M", "checkpoint_average"),
        ("corenet:270M/checkpoint_averag", "did you mean checkpoint_average"),
        (
            "corenet:270M/checkpoint_epoch_0_iter_50000",
            "checkpoint_epoch_0_iter_49999 to checkpoint_epoch_0_iter_349999",
        ),
        ("corenet:270M/../../etc/passwd", "is not a published file"),
        ("corenet:../270M/mlx", "is not a CoreNet download"),
    ],
)
def test_names_never_published_are_refused_before_any_request(server: Server, name: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(name)
    assert words in str(caught.value)
    assert server.requests == []


def test_server_errors(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "corenet:270M/checkpoint_average"
    with pytest.raises(RequestError, match="127.0.0.1 has no corenet:270M/checkpoint_average"):
        corenet.download(name)
    for status, words in ((503, "has a server error"), (403, "refused to send"), (302, "refused to send")):
        server.status = status
        with pytest.raises(OpenELMError, match=words) as caught:
            corenet.download(name)
        assert caught.value.exit_code == 1
    server.close()
    with pytest.raises(
        OpenELMError, match="Cannot reach 127.0.0.1 and corenet:270M/checkpoint_average is not in .* run `curl "
    ):
        corenet.download(name)
    monkeypatch.setenv(corenet.URL_VARIABLE, "somewhere")
    with pytest.raises(RequestError, match="must be a whole address"):
        corenet.download(name)
    assert cached(tmp_path) == []


def test_downloads_when_offline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    server.files[AVERAGE] = BYTES
    name = "corenet:270M/checkpoint_average"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OpenELMError, match="HF_HUB_OFFLINE"):
        corenet.download(name)
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = corenet.download(name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert corenet.download(name) == path


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files[AVERAGE] = BYTES
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(OpenELMError, match="Cannot write to"):
        corenet.download("corenet:270M/checkpoint_average")
    if Path("/dev/full").exists():  # a full disk
        place = tmp_path / "cache" / "corenet" / "pretrained" / "270M"
        place.mkdir(parents=True)
        (place / ".checkpoint_average.pt.partial").symlink_to("/dev/full")
        monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "cache"))
        with pytest.raises(OpenELMError, match="The disk is full"):
            corenet.download("corenet:270M/checkpoint_average")


def test_the_location_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (corenet.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corenet.cache_folder() == tmp_path / ".cache" / "mlx-openelm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert corenet.cache_folder() == tmp_path / "xdg" / "mlx-openelm"
    monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert corenet.cache_folder() == tmp_path / "mine"


def test_concurrent_downloads_share_one_transfer(server: Server) -> None:
    server.files[AVERAGE] = BYTES
    found: list[bytes] = []
    name = "corenet:270M/checkpoint_average"
    threads = [threading.Thread(target=lambda: found.append(corenet.download(name).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [BYTES] * 4
    assert len(server.requests) == 1


def test_a_downloaded_port_folder_loads(server: Server, tmp_path: Path, reference: dict[str, Any]) -> None:
    weights = {n.removeprefix("transformer."): w for n, w in mx.load(str(FOLDER / "model.safetensors")).items()}
    mx.save_safetensors(str(tmp_path / "w.safetensors"), weights)
    values = json.loads((FOLDER / "config.json").read_text()) | {"model_name": "custom", "padding_index": 2048}
    server.files["mlx/270M/weights.safetensors"] = (tmp_path / "w.safetensors").read_bytes()
    server.files["mlx/270M/config.json"] = json.dumps(values).encode()
    source = open_source("corenet:270M/mlx", tokenizer=FOLDER / "tokenizer.model")
    assert (source.repo, source.release) == ("apple/OpenELM-270M", catalog.find("270m"))
    model, _ = load("corenet:270M/mlx", dtype="float32", tokenizer=FOLDER / "tokenizer.model")
    logits = np.array(model(mx.array([reference["ids"][0]])))[0]
    assert np.abs(logits - reference["logits_0"]).max() < 1e-4
    assert len(server.requests) == 2


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent / "fixtures" / "shakespeare-hf")
    with pytest.raises(RequestError, match="There is no model named"):
        open_source(name)


def test_out_of_memory_is_not_reported_as_a_damaged_file() -> None:
    source = open_source("tiny")
    message = "[malloc] Unable to allocate 123456789 bytes."
    with pytest.raises(RuntimeError, match="Unable to allocate"), source.reading():
        raise RuntimeError(message)
    with pytest.raises(OpenELMError, match="the disk may be failing"), source.reading():
        raise RuntimeError("[read] Unable to read from file.")
