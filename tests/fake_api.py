"""A small stand-in for the server's API, which answers the chat page with what a test wants."""

from __future__ import annotations

import json
import math
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from mlx_openelm.serving.app import PAGE, page_policy


@dataclass
class FakeAPI:
    """A running server; set its attributes, and look at the requests that it got."""

    tokens: list[str] = field(default_factory=lambda: ["Well", " met", ", sir", "."])
    delay: float = 0.0  # seconds before each token
    pauses_after: int | None = None  # tokens, after which an answer waits until `goes_on` is set
    goes_on: threading.Event = field(default_factory=threading.Event)
    status: int = 200
    error: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    breaks_after: int | None = None  # tokens, after which the connection ends
    models: list[str] = field(default_factory=lambda: ["tiny", "tiny:polite", "tiny:rude", "other"])
    key: str | None = None
    context: int | None = None  # messages, each of which counts as a token
    requests: list[dict[str, Any]] = field(default_factory=list)
    sent: int = 0  # tokens of the last answer
    left: int = 0  # answers whose connection was closed before their end
    paths: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                api.paths.append(self.path)
                if self.path == "/":
                    page = PAGE.read_bytes()
                    headers = {"Content-Security-Policy": page_policy(page)}
                    self._send(200, page, "text/html; charset=utf-8", headers)
                elif self.path == "/v1/models" and self._is_allowed():
                    self._json(200, {"data": [{"id": name, "object": "model"} for name in api.models]})

            def do_POST(self) -> None:
                api.paths.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.requests.append(body)
                if not self._is_allowed():
                    return
                if api.status != 200:
                    self._json(api.status, {"error": {"message": api.error}}, api.headers)
                    return
                count = len(body["messages"])
                if api.context is not None and count > api.context:
                    error = {"message": "messages has too many tokens.", "code": "context_length_exceeded"}
                    self._json(400, {"error": error})
                    return
                if self.path == "/tokenize":
                    self._json(200, {"count": count, "max_model_len": api.context})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    self._stream(body)
                except OSError:
                    api.left += 1

            def _stream(self, body: dict[str, Any]) -> None:
                api.sent = 0
                self._event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
                for token in api.tokens[: api.breaks_after]:
                    time.sleep(api.delay)
                    if api.sent == api.pauses_after:
                        api.goes_on.wait(60)
                    logprobs = None
                    if body.get("logprobs"):
                        top = [{"token": token, "logprob": math.log(0.75)}, {"token": "<b>", "logprob": math.log(0.2)}]
                        logprobs = {"content": [{**top[0], "top_logprobs": top}]}
                    self._event({"choices": [{"index": 0, "delta": {"content": token}, "logprobs": logprobs}]})
                    api.sent += 1
                if api.breaks_after is not None:
                    return
                self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                details = {"cached_tokens": 7}
                usage = {"prompt_tokens": 9, "completion_tokens": api.sent, "prompt_tokens_details": details}
                self._event({"choices": [], "usage": usage})
                self.wfile.write(b"data: [DONE]\n\n")

            def _event(self, values: dict[str, Any]) -> None:
                self.wfile.write(f"data: {json.dumps(values)}\n\n".encode())
                self.wfile.flush()

            def _is_allowed(self) -> bool:
                if api.key is None or self.headers.get("Authorization") == f"Bearer {api.key}":
                    return True
                self._json(401, {"error": {"message": "The API key is missing or wrong."}})
                return False

            def _json(self, status: int, values: Any, headers: dict[str, str] | None = None) -> None:
                self._send(status, json.dumps(values).encode(), "application/json", headers or {})

            def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in ({"Content-Type": kind, "Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        return Handler
