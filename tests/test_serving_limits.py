"""What a server refuses, and how: every error in OpenAI's form, none of them with a path or a key."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mlx_openelm import errors
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.engine import Engine
from mlx_openelm.serving import context as serving_context
from mlx_openelm.serving import running as serving_running
from mlx_openelm.serving.chat import FIELDS as CHAT_FIELDS
from mlx_openelm.serving.completions import FIELDS as COMPLETION_FIELDS
from mlx_openelm.serving.failures import as_api_error
from mlx_openelm.serving.limits import Keys, read_keys

import httpx2
import pytest
from serving_apps import FIXTURES, Serving, serving, tiny
from starlette.applications import Starlette

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
HELLO = [{"role": "user", "content": "ROMEO."}]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    with serving() as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {}, "prompt"),
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [""]}, "prompt"),
        (COMPLETIONS, {"prompt": 3}, "prompt"),
        (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
        (COMPLETIONS, {"prompt": [True, 5]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [10**40]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1], "a", None]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 200}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (COMPLETIONS, {"prompt": "a", "nonsense": 1}, "nonsense"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": -2}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": "8"}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
        (COMPLETIONS, {"prompt": "a", "temperature": 2.1}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": True}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "temperature": "warm"}, "temperature"),
        (COMPLETIONS, {"prompt": "a", "top_p": -0.1}, "top_p"),
        (COMPLETIONS, {"prompt": "a", "presence_penalty": 3}, "presence_penalty"),
        (COMPLETIONS, {"prompt": "a", "seed": 1.5}, "seed"),
        (COMPLETIONS, {"prompt": "a", "seed": 10**25}, "seed"),
        (COMPLETIONS, {"prompt": "a", "stop": ""}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": [1]}, "stop"),
        (COMPLETIONS, {"prompt": "a", "stop": ["a"] * 17}, "stop"),
        (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
        (COMPLETIONS, {"prompt": "a", "n": 129}, "n"),
        (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias"),
        (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
        (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "a", "stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type"),
        (COMPLETIONS, {"prompt": "a", "response_format": {}}, "response_format.type"),
        (COMPLETIONS, {"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (COMPLETIONS, {"prompt": "a", "num_draft_tokens": 3}, "num_draft_tokens"),
        (COMPLETIONS, {"prompt": "a", "kv_bits": 7}, "kv_bits"),
        (COMPLETIONS, {"prompt": "a", "model": 7}, "model"),
        (COMPLETIONS, {"prompt": "a", "user": 7}, "user"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "Hello"}, "messages"),
        (CHAT, {"messages": ["Hello"]}, "messages[0]"),
        (CHAT, {"messages": [{"content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"messages": HELLO, "tools": "none", "tool_choice": "none"}, "tools"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "logprobs": 2}, "logprobs"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"messages": HELLO, "modalities": ["audio"]}, "modalities"),
        (CHAT, {"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "messages"),
        (RESPONSES, {"input": "a " * 2000}, "input"),
    ],
)
def test_what_is_wrong_is_named(server: Serving, path: str, body: dict[str, Any], param: str | None) -> None:
    error = server.error(path, body)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if param is not None:
        assert param.partition("[")[0] in error["message"]
    assert "--" not in error["message"].replace("the server's --", "")  # clients know no flags of their own
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "x": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": '
        + b'{"properties": {"a": ' * 200
        + b"{}"
        + b"}}" * 200
        + b"}}}",
        "\ufeff{".encode(),
    ],
)
def test_a_body_that_is_no_request_is_400(server: Serving, body: bytes) -> None:
    response = httpx2.post(server.url + COMPLETIONS, content=body, timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert len(response.text) < 1000


def test_half_of_a_surrogate_pair_is_text(server: Serving) -> None:
    response = httpx2.post(server.url + COMPLETIONS, content=b'{"prompt": "\\ud800", "echo": true}', timeout=20)
    assert response.status_code == 200 and "\ufffd" in response.json()["choices"][0]["text"]


def test_defaults_and_what_clients_say_of_themselves_are_accepted(server: Serving) -> None:
    about = {
        **{"user": "me", "metadata": {"chat": "1"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        **{"prompt_cache_key": "k", "seed": None, "stop": None, "n": 1, "logit_bias": None, "response_format": None},
    }
    chat = {
        **{"tools": [], "tool_choice": "auto", "functions": [], "parallel_tool_calls": True, "modalities": ["text"]},
        **{"audio": None, "prediction": None, "logprobs": False, "max_completion_tokens": 3, "top_logprobs": None},
    }
    completion = {"best_of": 1, "suffix": None, "echo": False, "logprobs": None, "max_tokens": 3}
    assert server.post(CHAT, {"messages": HELLO, **about, **chat}).status_code == 200
    unused = {"tools": [{"type": "function"}], "tool_choice": "none"}
    sent_back = [*HELLO, {"role": "assistant", "content": "{}", "parsed": {}}, *HELLO]
    answers = [server.post(CHAT, {"messages": sent_back, **more}).json() for more in ({}, unused)]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert server.post(COMPLETIONS, {"prompt": "a", **about, **completion}).status_code == 200


def test_errors_name_keys_of_requests_and_flags_of_the_server(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "a"}]}
    for message in (call, {"role": "tool", "content": "a", "tool_call_id": "b"}):
        error = server.error(CHAT, {"messages": [*HELLO, message]})["message"]
        assert error.endswith("give one that does with the server's --chat-template FILE.")
    error = server.error(COMPLETIONS, {"prompt": "a", "num_draft_tokens": 3})["message"]
    assert error == "num_draft_tokens needs a draft model, and the server has none; leave it out."
    for names_flags in (False, True):
        monkeypatch.setattr(errors, "names_flags", names_flags)
        known = as_api_error(RequestError("--temp is wrong; lower --max-kv-size, or set --dtype"))
        assert known.message == "temperature is wrong; lower max_kv_size, or set the server's --dtype."
        assert known.param == "temperature"


def test_tools_that_are_not_to_be_used_change_nothing(server: Serving) -> None:
    tool = [{"type": "function", "name": "f", "parameters": {}}]
    for path, body, key, chosen in (
        (CHAT, {"messages": HELLO, "max_tokens": 2}, "tools", "tool_choice"),
        (CHAT, {"messages": HELLO, "max_tokens": 2}, "functions", "function_call"),
        (RESPONSES, {"input": "a", "max_output_tokens": 2}, "tools", "tool_choice"),
    ):
        assert server.post(path, {**body, key: tool, chosen: "none"}).status_code == 200
        assert server.post(path, {**body, key: []}).status_code == 200
        for choice in ({}, {chosen: "auto"}):
            assert server.error(path, {**body, key: tool, **choice})["param"] == key


def test_every_key_may_be_null(server: Serving) -> None:
    for path, fields, asked in ((COMPLETIONS, COMPLETION_FIELDS, "prompt"), (CHAT, CHAT_FIELDS, "messages")):
        body: dict[str, Any] = dict.fromkeys(fields) | {asked: "a" if asked == "prompt" else HELLO}
        assert server.post(path, {**body, "a_key_of_next_year": None}).status_code == 200


def test_a_prompt_that_is_too_long_is_400(server: Serving) -> None:
    most = tiny()[0].config.rope_max_length
    for path, body in (
        (COMPLETIONS, {"prompt": [5] * (most + 1)}),
        (CHAT, {"messages": [{"role": "user", "content": "Enter a KING. " * most}]}),
    ):
        error = server.error(path, body)
        assert error["code"] == "context_length_exceeded" and str(most) in error["message"]
    fits = server.post(COMPLETIONS, {"prompt": [5] * most, "max_tokens": 5}).json()
    assert fits["usage"]["completion_tokens"] == 1 and fits["choices"][0]["finish_reason"] == "length"


def test_a_prompt_that_is_far_too_long_is_not_made_into_tokens(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep the prompts of others waiting."""
    entry = server.worker.models.entries["tiny"]
    monkeypatch.setattr(entry.tokenizer, "encode", lambda *_, **__: pytest.fail("it was"))
    long = "Enter a KING. " * 200_000
    for path, body in (
        (COMPLETIONS, {"prompt": long}),
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
        ("/v1/embeddings", {"input": ["a" * 10**6]}),
        ("/v1/responses", {"input": long}),
    ):
        assert server.error(path, body)["code"] == "context_length_exceeded"


def test_a_text_that_needs_too_much_memory_is_400() -> None:
    with serving(memory={"text_bytes": 3_000_000}) as server:
        error = server.error(COMPLETIONS, {"prompt": [5] * 900, "max_tokens": 100})
        assert "needs up to" in error["message"] and "max_tokens" in error["message"]
        long = {"stream": True, "max_tokens": 900}
        for path, body in (
            (COMPLETIONS, {**long, "prompt": [[5], [6] * 900], "n": 4}),
            (CHAT, {**long, "messages": [{"role": "user", "content": "ROMEO. " * 250}]}),
            (RESPONSES, {"stream": True, "max_output_tokens": 900, "input": "ROMEO. " * 250}),
        ):
            key = "max_output_tokens" if path == RESPONSES else "max_tokens"
            for streamed in (True, False):
                message = server.error(path, {**body, "stream": streamed})["message"]
                assert "needs up to" in message and f"lower {key}," in message
        server.wait_until(lambda: not server.worker.in_flight)
        assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2}).status_code == 200


def test_a_body_that_is_too_large_is_413() -> None:
    with serving(max_body_bytes=2000) as server:
        assert server.post(COMPLETIONS, {"prompt": "a " * 500}).status_code == 200
        assert server.error(COMPLETIONS, {"prompt": "a " * 5000}, 413)["code"] == "body_too_large"
        chunks = iter([b'{"prompt": "', *[b"a " * 500] * 10, b'"}'])  # of unknown length
        response = httpx2.post(server.url + COMPLETIONS, content=chunks, timeout=20)
        assert response.status_code == 413
        with socket.create_connection(server.url.removeprefix("http://").split(":"), 10) as sock:  # type: ignore[arg-type]
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6000000\r\n\r\n")
            for _ in range(6):  # many clients read only when they have sent everything
                sock.sendall(b" " * 1_000_000)
                time.sleep(0.01)
            assert sock.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_full_queue_is_429_with_the_time_to_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    step, goes_on = Engine.step, threading.Event()
    monkeypatch.setattr(Engine, "step", lambda engine: goes_on.wait(20) and step(engine))
    with serving(max_rows=1, max_queue=1) as server, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(server.post, COMPLETIONS, {"prompt": "ROMEO."}) for _ in range(6)]
        server.wait_until(lambda: sum(answer.done() for answer in answers) == 4)
        goes_on.set()
        assert sorted(answer.result().status_code for answer in answers) == [200] * 2 + [429] * 4
        refused = next(answer.result() for answer in answers if answer.result().status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        error = server.error(COMPLETIONS, {"prompt": "a", "n": 3})
        assert "2 texts at most" in error["message"]


def test_a_second_signal_does_not_wait() -> None:
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)):
        stopped = serving_running.make_server(Starlette(), "ERROR")
        stopped.handle_exit(first, None)
        assert stopped.should_exit and not stopped.force_exit
        stopped.handle_exit(second, None)
        assert stopped.force_exit


def test_a_request_that_takes_too_long_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.02) or step(engine))
    body = {"prompt": "ROMEO.", "max_tokens": 1000, "n": 8, "logit_bias": {"2": -100}}  # 20 seconds
    # A stream that has not begun by then is a 408 too; on a slow machine it begins in the longer time.
    for seconds in (0.2, 4.0):
        with serving(timeout=seconds) as server:
            late = server.post(COMPLETIONS, body)
            assert late.status_code == 408 and late.json()["error"]["code"] == "timeout"
            assert late.headers["x-should-retry"] == "false"
            server.wait_until(lambda: server.worker.running == 0)
            with httpx2.stream("POST", server.url + COMPLETIONS, json={**body, "stream": True}, timeout=60) as response:
                *_, last = [line for line in response.iter_lines() if line]
            server.wait_until(lambda: server.worker.running == 0)
            assert server.metric('mlx_openelm_requests_total{outcome="timeout",route="completions"}') == 2
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        if response.status_code == 200:
            break
    assert response.status_code == 200


def test_the_time_of_a_request_counts_what_comes_before_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(serving_context, "make_constraint", lambda *_: done.wait(20))
    with serving(timeout=0.1) as server:
        assert server.error(COMPLETIONS, {"prompt": "a", "choice": ["a"], "stream": True}, 408)["code"] == "timeout"
        done.set()


@pytest.mark.parametrize(("seconds", "timeout"), [(0.3, 600), (30, 0.3)])
def test_a_body_that_does_not_arrive_is_408(monkeypatch: pytest.MonkeyPatch, seconds: float, timeout: float) -> None:
    monkeypatch.setattr(serving_context, "BODY_SECONDS", seconds)
    with serving(timeout=timeout) as server:
        with socket.create_connection(server.url.removeprefix("http://").split(":"), 10) as sock:  # type: ignore[arg-type]
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            answer = b"".join(iter(lambda: sock.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 408") and b"did not arrive within 0." in answer
        monkeypatch.setattr(serving_context, "BODY_SECONDS", 20)
        assert server.get("/health").status_code == 200


def test_heads_one_byte_at_a_time_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_running, "HEAD_SECONDS", 20)
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving() as server:
        address: Any = server.url.removeprefix("http://").split(":")
        with socket.create_connection(address, 10) as sock:
            for byte in head:  # slow, but in time
                sock.sendall(bytes([byte]))
                time.sleep(0.002)
            assert sock.recv(1000).startswith(b"HTTP/1.1 200")
            monkeypatch.setattr(serving_running, "HEAD_SECONDS", 0.5)
            end = time.monotonic() + 15
            with pytest.raises(OSError):  # the second request on the connection never comes
                while time.monotonic() < end:
                    sock.sendall(b"X")
                    time.sleep(0.02)
        with socket.create_connection(address, 10) as sock:
            sock.settimeout(15)
            assert sock.recv(10) == b""  # nothing was sent at all
        monkeypatch.setattr(serving_running, "HEAD_SECONDS", 20)
        assert server.get("/health").status_code == 200


def test_headers_that_are_wrong_or_endless_are_refused(server: Serving) -> None:
    address: Any = server.url.removeprefix("http://").split(":")
    for head in (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 1_000_000,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n",
    ):
        with socket.create_connection(address, 10) as sock:
            sock.settimeout(5)
            try:
                sock.sendall(head)
                assert sock.recv(1000).split(b" ")[1][:1] == b"4"
            except ConnectionError:
                pass
    assert server.get("/health").status_code == 200


def test_keys_are_asked_for() -> None:
    with serving(keys=["sk-one", "sk-two"]) as server:
        for headers in (
            {},
            {"Authorization": "Bearer sk-on"},
            {"Authorization": "sk-one"},
            {"Authorization": "Basic x"},
        ):
            for method, path in (("POST", COMPLETIONS), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/none")):
                response = httpx2.request(method, server.url + path, headers=headers, timeout=20)
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert "sk-" not in response.text
        assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200
        for key, status in (("sk-two", 200), ("sk-twö", 401)):
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert httpx2.get(server.url + "/v1/models", headers=headers, timeout=20).status_code == status
        assert httpx2.get(server.url + "/health", timeout=20).status_code == 200


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comparison is of digests, through `compare_digest`, and none is left out after one that fits."""
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(["a", "bb", "ccc"])
    for key, fits in (("a", True), ("ccc", True), ("d" * 1000, False), ("", False), ("\ud800", False)):
        compared.clear()
        assert keys.fits(key) is fits
        assert len(compared) == 3 and {len(one) for pair in compared for one in pair} == {32}


def test_files_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the editor\nsk-one\n\n  sk-two  \n")
    assert read_keys(file) == ["sk-one", "sk-two"]
    file.write_text("\ufeffsk-one\r\n")  # as some editors of Windows write it
    assert read_keys(file) == ["sk-one"]
    for text, message in (("# none\n", "has no API keys"), ("sk-one\nschlüssel\n", "headers cannot carry")):
        file.write_text(text)
        with pytest.raises(RequestError, match=message):
            read_keys(file)


def test_other_pages_are_kept_out_unless_told(server: Serving) -> None:
    other, own = {"Origin": "https://chat.example"}, {"Origin": server.url}
    refused = server.post(COMPLETIONS, {"prompt": "a"}, headers=other)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in refused.headers
    assert server.post(COMPLETIONS, {"prompt": "a"}, headers=own).status_code == 200
    malformed = server.get("/health", headers={"Origin": "http://["})
    assert malformed.status_code == 403 and malformed.json()["error"]["code"] == "origin_not_allowed"
    with serving(allowed_origins=["https://chat.example,https://b.example/"]) as told:
        answer = told.post(COMPLETIONS, {"prompt": "a"}, headers=other)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        preflight = {**other, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        response = httpx2.request("OPTIONS", told.url + COMPLETIONS, headers=preflight, timeout=20)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        assert told.get("/v1/models", headers={"Origin": "https://c.example"}).status_code == 403


def test_names_that_point_here_are_kept_out(server: Serving) -> None:
    """Otherwise a page could reach the server through a name that its owner points at this machine."""
    with serving(hosts=[]) as local:
        port = local.url.rpartition(":")[2]
        for host, status in (
            *((f"evil.example:{port}", 403), ("evil.example", 403), (f"localhost:{port}", 200)),
            *((f"127.0.0.1:{port}", 200), ("[::1]", 200), ("a.localhost", 200)),
        ):
            assert local.get("/v1/models", headers={"Host": host}).status_code == status, host
    assert server.get("/v1/models", headers={"Host": "chat.example"}).status_code == 200


def test_errors_have_no_paths(tmp_path: Path) -> None:
    """Of an adapter that is gone by the time it is used, and of a model that was served from a folder."""
    import shutil

    adapter = tmp_path / "secret" / "adapter"
    shutil.copytree(FIXTURES / "peft-lora", adapter)
    folder = str(FIXTURES / "shakespeare-hf")
    with serving({"plays": folder}, {"a": str(adapter)}) as server:
        resident = server.worker.models.entries["plays"].resident
        assert resident is not None and resident.pool is not None
        resident.pool._held.clear()
        shutil.rmtree(adapter)
        response = server.post(COMPLETIONS, {"model": "plays:a", "prompt": "a"})
        assert response.status_code in (400, 500)
        assert "secret" not in response.text and "fixtures" not in response.text
        assert server.get("/v1/models").text.count("/") == 0


def test_unknown_routes_and_methods(server: Serving) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405)):
        response = httpx2.request(method, server.url + path, timeout=20)
        assert response.status_code == status and response.json()["error"]["message"]


def test_small_answers_are_not_held_back(server: Serving) -> None:
    """Nagle's algorithm and delayed acknowledgements would cost 40 ms for each answer on a connection that is kept."""
    with httpx2.Client(timeout=20) as client:
        took = []
        for _ in range(20):
            started = time.perf_counter()
            client.get(server.url + "/health")
            took.append(time.perf_counter() - started)
    assert sorted(took)[5] < 0.03
