"""`mlx-openelm serve`: its flags, how it starts, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

from mlx_openelm import generate
from mlx_openelm.cli.main import main
from mlx_openelm.cli.serve import is_loopback, read_adapters, read_names, use_template
from mlx_openelm.errors import RequestError
from mlx_openelm.serving.models import Models
from mlx_openelm.serving.running import listen, make_server
from mlx_openelm.sources import open_source

import httpx2
import pytest
from serve_processes import process
from serving_apps import FIXTURES, load_alone, tiny
from starlette.applications import Starlette

COMPLETIONS = "/v1/completions"
KINGS = "Enter a KING. " * 20


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The error of a command line."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *flags])
    assert stop.value.code == 2
    return capsys.readouterr().err


def ask(url: str, **body: Any) -> dict[str, Any]:
    response = httpx2.post(url + COMPLETIONS, json={"prompt": "ROMEO.", "max_tokens": 8, **body}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def test_it_serves_warm_prompts_with_drafts_and_ends_with_sigterm(tmp_path: Path) -> None:
    file = tmp_path / "warm.txt"
    file.write_text(KINGS)
    with process("--log-level", "info", "--warm", str(file), "--draft-model", "tiny-draft") as server:
        assert server.url.startswith("http://127.0.0.1:")
        assert any("Processed 1 prompt of" in line for line in server.messages)
        answer = ask(server.url, prompt=KINGS)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
        assert answer["choices"][0]["text"] == generate(*tiny(), KINGS, max_tokens=8)
        assert ask(server.url)["choices"][0]["text"] == generate(*tiny(), "ROMEO.", max_tokens=8)
        httpx2.get(server.url + "/secret/path?key=sk-secret", headers={"Authorization": "Bearer sk-secret"})
        code, messages = server.end(signal.SIGTERM)
    assert code == 0
    assert f"POST {COMPLETIONS} 200" in messages and "404" in messages
    assert "secret" not in messages and "Traceback" not in messages


def test_ctrl_c_finishes_what_runs() -> None:
    found: list[dict[str, Any]] = []
    with process() as server:
        body = {"max_tokens": 150, "logit_bias": {"2": -100}}
        is_running, end = False, time.monotonic() + 60
        while not is_running:  # again if a text ended before it was seen, which takes a moment
            assert time.monotonic() < end
            thread = threading.Thread(target=lambda: found.append(ask(server.url, **body)))
            thread.start()
            while thread.is_alive() and not is_running:
                is_running = "texts_running 1.0" in httpx2.get(server.url + "/metrics", timeout=60).text
        code, messages = server.end(signal.SIGINT)
        thread.join(20)
    assert code == 130 and "Traceback" not in messages
    assert found[-1]["usage"]["completion_tokens"] == 150


def test_flags_are_defaults_of_requests(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-one\n")
    flags = ["--model", f"plays={FIXTURES / 'shakespeare-hf'}", "--adapter", f"l={FIXTURES / 'peft-lora'}"]
    with process(*flags, "--temp", "0.9", "--max-tokens", "5", "--api-key-file", str(keys)) as server:
        headers = {"Authorization": "Bearer sk-one"}
        listed = httpx2.get(server.url + "/v1/models", headers=headers).json()["data"]
        assert [model["id"] for model in listed] == ["plays", "plays:l"]
        body = {"prompt": "ROMEO.", "seed": 3}
        answer = httpx2.post(server.url + COMPLETIONS, json=body, headers=headers, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 5
        expected = generate(*load_plays(), "ROMEO.", max_tokens=5, temp=0.9, seed=3)
        assert answer["choices"][0]["text"] == expected
        assert httpx2.get(server.url + "/v1/models").status_code == 401


def load_plays() -> Any:
    from mlx_openelm import load

    return load(FIXTURES / "shakespeare-hf")


def test_a_process_that_is_killed_leaves_a_cache_that_is_right(tmp_path: Path) -> None:
    """`kill -9` while the folder is written to; then every text is right, and some were held."""
    folder, prompts = str(tmp_path / "held"), [f"{n} {KINGS}" for n in range(5)]
    expected = {prompt: generate(*tiny(), prompt, max_tokens=8) for prompt in prompts}
    flags = ("--prompt-cache-dir", folder, "--prompt-cache-bytes", "600kB", "--log-level", "error")
    with process(*flags) as server:
        for prompt in prompts:
            assert ask(server.url, prompt=prompt)["choices"][0]["text"] == expected[prompt]
        threads = [threading.Thread(target=_try, args=(server.url, prompt)) for prompt in prompts]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(20)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700  # prompts are private
    with process(*flags) as server:
        answers = [ask(server.url, prompt=prompt) for prompt in prompts]
    assert [answer["choices"][0]["text"] for answer in answers] == list(expected.values())
    assert sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers) > 0


def _try(url: str, prompt: str) -> None:
    with contextlib.suppress(httpx2.HTTPError):
        ask(url, prompt=prompt)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000."),
        (["--host", "203.0.113.77"], "--host and --port"),
        (["--log-level", "loud"], "--log-level must be one of DEBUG"),
        (["--temp", "-1"], "--temp must be between"),
        (["--max-tokens", "0"], "--max-tokens must be 1 or more"),
        (["--max-rows", "0"], "--max-rows must be"),
        (["--max-queue", "-1"], "--max-queue must be"),
        (["--timeout", "0"], "--timeout must be"),
        (["--num-draft-tokens", "99"], "--num-draft-tokens must be"),
        (["--num-draft-tokens", "3"], "--num-draft-tokens needs --draft-model."),
        (["--api-key-file", "nothing"], "nothing does not exist."),
        (["--chat-template", "nothing"], "nothing"),
        (["--chat-template", "own"], "no chat template of its own"),
        (["--model", "nothing"], "nothing"),
        (["--model", "a=tiny", "--model", "a=tiny-draft"], "Two models have the name 'a'"),
        (["--adapter", "a"], "--adapter must be NAME=PATH"),
        (["--adapter", "a=nothing"], "nothing"),
        (["--warm", "nothing"], "nothing does not exist."),
        (["--memory-limit", "much"], "--memory-limit must be a size"),
        (["--prompt-cache-size", "3"], "--prompt-cache-bytes"),
        (["--decode-concurrency", "3"], "--max-rows"),
        (["--adapter-path", "a"], "--adapter"),
    ],
)
def test_wrong_flags_are_named(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    error = refusal(capsys, "--port", "0", *flags)
    assert message in " ".join(error.split()) and error.startswith("error: ")


def test_a_port_in_use_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"on port {port}" in refusal(capsys, "--port", port, "--model", "no-such-model")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the second server cannot bind the port")
def test_two_servers_that_bind_a_port_at_once_say_the_same() -> None:
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with listen("127.0.0.1", port) as bound:
            other.listen()
            with pytest.raises(RequestError, match=f"on port {port}: address already in use; choose others"):
                make_server(Starlette(), "WARNING").run(sockets=[bound])


def test_packages_that_are_missing_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_openelm.cli.serve.find_spec", lambda name: None if name == "uvicorn" else sys)
    assert "The server needs uvicorn: pip install '.[serve]'" in refusal(capsys)


def test_names_of_models(tmp_path: Path) -> None:
    folder = tmp_path / "my=model"
    folder.mkdir()
    found = read_names(["tiny", "apple/OpenELM-270M", "big=3b", str(folder), "x=" + str(folder)])
    assert found == {
        **{"tiny": "tiny", "apple/OpenELM-270M": "apple/OpenELM-270M", "big": "3b"},
        **{"my=model": str(folder), "x": str(folder)},
    }
    assert read_adapters(["a=b", "c=d=0.5"]) == {"a": "b", "c": "d=0.5"}
    for wrong in (["=tiny"], ["a="]):
        with pytest.raises(RequestError):
            read_names(wrong)
    for wrong in (["a:b=c"], ["a=b", "a=c"], ["=b"]):
        with pytest.raises(RequestError):
            read_adapters(wrong)


def test_other_machines_are_only_let_in_with_a_warning() -> None:
    with process("--host", "0.0.0.0") as server:
        assert any("can be reached from other machines" in line for line in server.messages)
        assert json.loads(httpx2.get(server.url.replace("0.0.0.0", "127.0.0.1") + "/health").text) == {"status": "ok"}


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [
        ("localhost", "127.0.0.1", True),
        ("my-machine", "127.0.1.1", True),
        ("127.example.com", "0.0.0.0", False),
        ("localhost.example.com", "0.0.0.0", False),
    ],
)
def test_an_address_not_a_name_says_who_can_reach_the_server(
    monkeypatch: pytest.MonkeyPatch, host: str, address: str, local: bool
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda asked, *_, **__: found if asked == host else [])
    with listen(host, 0) as bound:
        assert is_loopback(bound) == local


def test_a_local_server_answers_to_the_name_it_was_given() -> None:
    with process("--host", "LocalHost") as server:
        for name, status in (("localhost", 200), ("elsewhere", 403)):
            assert httpx2.get(server.url + "/health", headers={"Host": name}).status_code == status


def test_a_template_in_a_file_is_read_once(tmp_path: Path) -> None:
    """Requests neither read it nor, when it is gone, show its path."""
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}")
    models = Models({"a": "tiny", "b": "tiny-instruct"}, {}, open_source, load_alone)
    assert use_template("plain", models) == "plain" and use_template(None, models) is None
    with pytest.raises(RequestError, match="a has no chat template of its own"):
        use_template("own", models)
    assert use_template(str(file), models) is None
    file.unlink()
    for entry in models.entries.values():
        tokenizer = entry.tokenizer
        ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hark"}], tokenizer.default_template)
        assert tokenizer.decode(ids) == "[Hark]"
