"""`mlx-openelm bench --serve`: what it measures, beside servers whose behavior is known."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from mlx_openelm.cli.main import main
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.jobs.bench.load import LoadOptions, measure_load, percentiles

import numpy as np
import pytest
from serving_apps import serving

FIRST, BETWEEN = 0.05, 0.02


class Fake(BaseHTTPRequestHandler):
    """Waits, sends six tokens, one every 20 ms, and closes the connection, as HTTP/1.0 does; some requests fail."""

    asked: ClassVar[list[dict[str, Any]]] = []
    fails: ClassVar[bool] = False

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply(200, json.dumps({"data": [{"id": "fake"}]}))

    def reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if self.fails:
            self.reply(503, "{}")
            return
        self.send_response(200)
        self.end_headers()
        time.sleep(FIRST)
        for n in range(6):
            delta = {"choices": [{"index": 0, "delta": {"content": f"{n}"}}]}
            self.wfile.write(f"data: {json.dumps(delta)}\n\n".encode())
            self.wfile.flush()
            time.sleep(BETWEEN)
        usage = {"prompt_tokens": 10, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}
        self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())


@contextmanager
def fake() -> Iterator[tuple[str, type[Fake]]]:
    handler = type("Handler", (Fake,), {"asked": [], "fails": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()


def test_percentiles_are_those_of_numpy() -> None:
    for count in (1, 2, 7, 100, 101):
        values = np.random.default_rng(count).random(count)
        found = percentiles(list(values))
        for share in (50, 95, 99):
            assert found[f"p{share}"] == np.percentile(values, share, method="inverted_cdf")
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_times_and_counts_are_the_servers() -> None:
    with fake() as (url, handler):
        load = measure_load(LoadOptions(serve=url, clients=3, seconds=0.6, turns=2), prompt_tokens=5)
    values = load.to_json()
    assert values["model"] == "fake" and values["errors"] == {}
    assert load.answered == len(handler.asked) >= 6
    assert values["tokens"] == 7 * load.answered and values["cached_tokens"] == 4 * load.answered
    assert FIRST <= values["time_to_first_token"]["p50"] < FIRST + 0.5
    assert 0.5 * BETWEEN <= values["inter_token"]["p50"] < 10 * BETWEEN
    assert len(load.first) == load.answered and len(load.between) == 5 * load.answered


def test_conversations_share_their_beginnings() -> None:
    with fake() as (url, handler):
        measure_load(LoadOptions(serve=url, clients=2, seconds=0.8, turns=3), prompt_tokens=5, generation_tokens=9)
    conversations = [body["messages"] for body in handler.asked]
    assert len({conversation[0]["content"] for conversation in conversations}) == 1
    assert {len(conversation) for conversation in conversations} == {2, 4, 6}  # three turns
    for conversation in conversations:
        if len(conversation) > 2:
            assert conversation[:-2] in conversations and conversation[-2]["content"] == "012345"
    assert all(body["max_tokens"] == 9 and body["stream"] for body in handler.asked)


def test_arrivals_are_random_and_independent_of_the_answers() -> None:
    with fake() as (url, _):
        load = measure_load(LoadOptions(serve=url, rate=40, seconds=1.5, load_seed=3), prompt_tokens=2)
    assert 35 <= load.answered <= 90  # 60 on average, with a deviation of 8
    assert load.seconds >= 1.4


def test_clients_leave_early() -> None:
    with fake() as (url, _):
        load = measure_load(LoadOptions(serve=url, clients=4, seconds=0.6, disconnects=1), generation_tokens=3)
    assert load.answered == 0 and load.left > 5 and not load.errors
    assert 0 < load.tokens <= 2 * load.left


def test_errors_are_counted_by_kind() -> None:
    with fake() as (url, handler):
        handler.fails = True
        load = measure_load(LoadOptions(serve=url, clients=2, seconds=0.3))
    assert set(load.errors) == {"HTTP 503"} and load.answered == 0
    with pytest.raises(OpenELMError, match="no list of models"):
        measure_load(LoadOptions(serve=url))


def test_our_server_is_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("\ufeff# mine\nsk-one\n")
    with serving(keys=["sk-one"]) as server:
        flags = ["bench", "--serve", f"{server.url}/v1", "--seconds", "0.5", "-g", "8", "-p", "40", "--clients", "3"]
        flags += ["--api-key-file", str(keys), "--disconnects", "0.2"]
        for extra in ([], ["--json"]):
            with pytest.raises(SystemExit) as stop:
                main([*flags, *extra])
            assert stop.value.code == 0
        *lines, last = capsys.readouterr().out.splitlines()
        values = json.loads(last)
        assert values["model"] == "tiny" and values["errors"] == {} and values["answered"] > 0
        assert values["cached_tokens"] > 0
        for label in ("Requests", "Throughput", "First token", "Between tokens", "Prompts", "Errors"):
            assert any(line.startswith(label) for line in lines), label
        server.wait_until(lambda: not server.worker.in_flight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serve": "127.0.0.1:8080"}, "serve must be the address"),
        ({"serve": "http://a:b"}, "serve must be the address"),
        ({"clients": 0}, "clients must be"),
        ({"rate": 0}, "rate must be"),
        ({"seconds": float("nan")}, "seconds must be"),
        ({"turns": 0}, "turns must be"),
        ({"disconnects": 2}, "disconnects must be"),
    ],
)
def test_wrong_options_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        measure_load(LoadOptions(**{"serve": "http://127.0.0.1:1", **values}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rate", "2"], "--rate is for a server"),
        (["--serve", "http://a", "--kv-bits", "8"], "--kv-bits cannot be combined with --serve"),
        (["--api-key-file", "keys"], "--api-key-file is for a server"),
        (["--serve", "http://a", "--exact-activations"], "--exact-activations cannot be combined with --serve"),
        (["--serve", "http://a", "--no-expand"], "--no-expand cannot be combined with --serve"),
        (["--serve", "http://a", "--api-key-file", os.devnull], "null is a pipe or a device"),
        (["--serve", "http://a", "--plot", "a.png"], "--plot cannot be combined with --serve"),
        (["--serve", "http://a", "-p", "1,2"], "--prompt-tokens must be one number"),
    ],
)
def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err
