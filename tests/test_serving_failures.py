"""What goes wrong: clients that leave or do not read, steps and threads that fail, restarts."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_openelm import generate
from mlx_openelm.generation.engine import Engine
from mlx_openelm.serving import embeddings as serving_embeddings
from mlx_openelm.serving import running as serving_running
from mlx_openelm.serving import texts as serving_texts
from mlx_openelm.serving import worker as serving_worker
from mlx_openelm.serving.models import Resident
from mlx_openelm.serving.worker import Worker

import httpx2
import pytest
from serving_apps import Serving, serving, tiny

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG = {"prompt": "ROMEO.", "max_tokens": 1000, "logit_bias": {"2": -100}}  # never ends by itself


@pytest.fixture
def server() -> Iterator[Serving]:
    with serving(max_rows=2) as running:
        yield running


class Steps:
    """Counts the steps of all engines, each of which takes `seconds` longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float):
        self.count, self.seconds = 0, seconds
        step = Engine.step

        def counted(engine: Engine) -> Any:
            self.count += 1
            time.sleep(self.seconds)
            return step(engine)

        monkeypatch.setattr(Engine, "step", counted)


def raw_request(
    server: Serving, body: dict[str, Any], path: str = COMPLETIONS, buffer: int | None = None
) -> socket.socket:
    """A request that was sent and not read; of the answer `buffer` bytes may wait to be read."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    sock = socket.socket()
    sock.settimeout(20)
    if buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.connect((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(content)}\r\n\r\n"
    sock.sendall(head.encode() + content)
    return sock


@pytest.mark.covering
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses"])
def test_a_client_that_leaves_frees_its_row_within_a_step(
    server: Serving, monkeypatch: pytest.MonkeyPatch, path: str, is_stream: bool
) -> None:
    steps = Steps(monkeypatch, 0.02)
    asked = {"messages": [{"role": "user", "content": "ROMEO."}]} if path == CHAT else {"prompt": "ROMEO."}
    limit = "max_tokens"
    if path == "/v1/responses":
        asked, limit = {"input": "ROMEO."}, "max_output_tokens"
    sock = raw_request(server, {**asked, limit: 1000, "logit_bias": {"2": -100}, "stream": is_stream}, path)
    server.wait_until(lambda: server.worker.running == 1 and steps.count > 3)
    cancelled: list[int] = []
    original = server.worker.thread._cancelled
    monkeypatch.setattr(server.worker.thread, "_cancelled", lambda one: (cancelled.append(steps.count), original(one)))
    sock.close()
    server.wait_until(lambda: server.worker.running == 0)
    assert cancelled and steps.count - cancelled[0] <= 1
    server.wait_until(lambda: not server.worker.in_flight)
    route = path.removeprefix("/v1/")
    name = f'mlx_openelm_requests_total{{outcome="cancelled",route="{route}"}}'
    server.wait_until(lambda: server.metric(name) == 1)


def test_a_client_that_leaves_the_queue_is_forgotten(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, 0.03)
    running = [raw_request(server, LONG) for _ in range(2)]
    server.wait_until(lambda: server.worker.running == 2)
    waiting = raw_request(server, LONG)
    server.wait_until(lambda: server.worker.waiting == 1)
    waiting.close()
    server.wait_until(lambda: server.worker.waiting == 0)
    for sock in running:
        sock.close()
    server.wait_until(lambda: server.worker.running == 0)
    steps.seconds = 0.0
    assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 200


def test_leaving_an_embedding_ends_it(server: Serving) -> None:
    sock = raw_request(server, {"input": [[5] * 1000] * 100}, "/v1/embeddings")
    server.wait_until(lambda: bool(server.worker.thread.tasks))
    sock.close()
    server.wait_until(lambda: not server.worker.thread.tasks and not server.worker.in_flight)


def test_a_long_list_of_embeddings_does_not_hold_up_others(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seconds = serving_embeddings.embedding, [0.02]

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds[0])
        return whole(*arguments)

    monkeypatch.setattr(serving_embeddings, "embedding", slow)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.post, "/v1/embeddings", {"input": ["ROMEO. " * 5] * 40})
        server.wait_until(lambda: bool(server.worker.in_flight))
        assert server.post("/v1/embeddings", {"input": "a"}).status_code == 200
        assert not long.done()
        seconds[0] = 0.0
        assert len(long.result().json()["data"]) == 40


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that read slowly are noticed after half a second and a few kilobytes."""
    monkeypatch.setattr(serving_running, "READ_SECONDS", 0.5)
    made = serving_running.Connection.connection_made

    def with_small_buffer(self: Any, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(serving_running.Connection, "connection_made", with_small_buffer)


def test_a_client_that_does_not_read_is_cut_off(
    server: Serving, small_buffers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others go on meanwhile, and the row is freed."""
    steps = Steps(monkeypatch, 0.0)
    body = {**LONG, "stream": True, "logprobs": 20}  # a megabyte
    sock = raw_request(server, body, buffer=4096)
    server.wait_until(lambda: steps.count > 0)
    expected = generate(*tiny(), "JULIET.", max_tokens=16)
    assert server.post(COMPLETIONS, {"prompt": "JULIET."}).json()["choices"][0]["text"] == expected
    server.wait_until(lambda: not server.worker.in_flight)
    name = 'mlx_openelm_requests_total{outcome="cancelled",route="completions"}'
    server.wait_until(lambda: server.metric(name) == 1)
    sock.close()


def test_a_client_that_reads_slowly_gets_all(server: Serving, small_buffers: None) -> None:
    """Though for longer than it may read nothing, too much is left for the server to go on writing."""
    sock = raw_request(server, {"input": ["ROMEO."] * 200}, "/v1/embeddings", buffer=4096)
    content, end = b"", time.monotonic() + 1.0
    while time.monotonic() < end:
        content += sock.recv(4096)
        time.sleep(0.02)
    head, _, body = content.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].splitlines()[0])
    assert len(body) < size / 2
    while len(body) < size and (part := sock.recv(1 << 20)):
        body += part
    assert len(json.loads(body)["data"]) == 200
    sock.close()


def test_a_stream_that_is_quiet_is_kept_open(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_texts, "_PING_SECONDS", 0.05)
    Steps(monkeypatch, 0.2)
    body = {"prompt": "ROMEO.", "max_tokens": 3, "stream": True}
    with httpx2.stream("POST", server.url + COMPLETIONS, json=body, timeout=20) as response:
        lines = list(response.iter_lines())
    assert ": still working" in lines and lines[-2] == "data: [DONE]"


def test_a_step_that_fails_ends_its_texts_with_500(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 500, not a 404; whole in a stream that has begun; the next request is served."""
    step, fails = Engine.step, [True]

    def failing(engine: Engine) -> Any:
        if fails[0] and engine.rows and engine.rows[0].tokens:
            raise RuntimeError("out of memory at /secret/path")
        return step(engine)

    monkeypatch.setattr(Engine, "step", failing)
    error = server.error(COMPLETIONS, {"prompt": "ROMEO."}, 500)
    assert error["type"] == "server_error" and "secret" not in error["message"]
    with httpx2.stream(
        "POST", server.url + COMPLETIONS, json={"prompt": "ROMEO.", "stream": True}, timeout=20
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "data: [DONE]" not in lines
    fails[0] = False
    assert server.get("/health").status_code == 200
    expected = generate(*tiny(), "ROMEO.", max_tokens=16)
    assert server.post(COMPLETIONS, {"prompt": "ROMEO."}).json()["choices"][0]["text"] == expected


def test_a_text_that_fails_leaves_the_others(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constraint that no token fits in the end: an error of its own."""
    pytest.importorskip("llguidance")
    sock = raw_request(server, {**LONG, "max_tokens": 60})
    tokenizer = tiny()[1]
    banned = {str(token): -100 for token in tokenizer.encode("123456789", add_bos=False)}
    response = server.post(COMPLETIONS, {"prompt": "a", "regex": "(", "logit_bias": banned})
    assert response.status_code == 400 and "regex" in response.json()["error"]["message"]
    content = b""
    while b"completion_tokens" not in content:
        content += sock.recv(65536)
    text = json.loads(content.partition(b"\r\n\r\n")[2])["choices"][0]["text"]
    assert text == generate(*tiny(), "ROMEO.", max_tokens=60, logit_bias={2: -100})


def test_a_thread_that_dies_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """503 everywhere while it is gone, for the requests that it had too."""
    monkeypatch.setattr(serving_worker, "_RESTART_SECONDS", 3600)  # it is started below
    step, deliver, dies = Engine.step, Worker.deliver, [True]

    def dying(engine: Engine) -> Any:
        if dies[0] and engine.rows and engine.rows[0].tokens:
            raise SystemExit  # as an error in MLX's thread would, it passes every `except Exception`
        return step(engine)

    def lingering(worker: Worker, batch: Any) -> None:
        deliver(worker, batch)
        if batch == [worker.died]:
            time.sleep(1)

    with serving() as server:
        monkeypatch.setattr(Engine, "step", dying)
        monkeypatch.setattr(Worker, "deliver", lingering)
        error = server.error(COMPLETIONS, {"prompt": "ROMEO."}, 503)
        assert error["code"] == "engine_unavailable"
        for path in ("/health", "/v1/models"):
            assert server.get(path).status_code == 503, path
        assert server.post(COMPLETIONS, {"prompt": "a"}).headers["retry-after"]
        assert server.metric("mlx_openelm_engine_up") == 0
        dies[0] = False
        assert server.worker.loop is not None
        server.worker.loop.call_soon_threadsafe(server.worker._restart)
        server.wait_until(lambda: server.get("/health").status_code == 200)
        expected = generate(*tiny(), "ROMEO.", max_tokens=16)
        assert server.post(COMPLETIONS, {"prompt": "ROMEO."}).json()["choices"][0]["text"] == expected
        assert server.metric("mlx_openelm_engine_restarts_total") == 1
        assert not server.worker.in_flight


def test_a_thread_that_cannot_be_kept_alive_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_worker, "_RESTART_SECONDS", 0.01)

    def dying(engine: Engine) -> Any:
        raise SystemExit

    with serving() as server:
        monkeypatch.setattr(Engine, "step", dying)
        for _ in range(3):
            server.wait_until(lambda: server.worker.is_alive)
            assert server.post(COMPLETIONS, {"prompt": "a"}).status_code == 503
        server.wait_until(lambda: server.gave_up == [True])
        assert server.get("/health").status_code == 503


def test_a_thread_that_dies_while_it_is_to_end_answers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(engine: Engine) -> Any:
        if engine_thread.is_stopping:
            raise SystemExit
        time.sleep(0.01)
        return []

    with serving() as server:
        engine_thread = server.worker.thread
        monkeypatch.setattr(Engine, "step", dying)
        sock = raw_request(server, {"prompt": "a"})
        server.wait_until(lambda: bool(server.worker.in_flight))
        server.worker.stop()
    assert b" 503 " in sock.recv(65536).splitlines()[0]
    assert server.worker.thread is engine_thread and not server.gave_up


def test_a_stop_finishes_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch, 0.03)
    with serving() as server:
        sock = raw_request(server, {**LONG, "max_tokens": 80})
        server.wait_until(lambda: server.worker.running == 1)
        steps.seconds = 0.0
    content = b""
    while part := sock.recv(65536):
        content += part
    answer = json.loads(content.partition(b"\r\n\r\n")[2])
    assert answer["choices"][0]["text"] == generate(*tiny(), "ROMEO.", max_tokens=80, logit_bias={2: -100})


def test_what_is_held_stays_within_its_bytes() -> None:
    """Caches that grow until the machine stops."""
    with serving(memory={"prefix_bytes": 2_000_000}) as server:
        (resident,) = server.worker.models.residents
        for number in range(8):
            server.post(COMPLETIONS, {"prompt": f"{number} " + "Enter a KING. " * 60, "max_tokens": 2})
            assert resident.tree.nbytes <= 2_000_000
        assert server.metric("mlx_openelm_prompt_cache_bytes") > 0
        assert server.metric("mlx_openelm_text_bytes_reserved") == 0


def test_nothing_is_left_of_requests(server: Serving) -> None:
    for _ in range(3):
        server.post(COMPLETIONS, {"prompt": "a", "n": 2})
        server.error(COMPLETIONS, {"prompt": "a", "top_p": 7})
        raw_request(server, LONG).close()
    server.wait_until(lambda: not server.worker.in_flight and server.worker.running == 0)
    (resident,) = server.worker.models.residents
    assert isinstance(resident, Resident)
    server.wait_until(lambda: not server.worker.thread.texts and not resident.engine.is_busy)
