"""A server in this process, on a free port of the loopback device."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from mlx_openelm import load, native
from mlx_openelm.model import OpenELM
from mlx_openelm.serving.app import make_app
from mlx_openelm.serving.context import Context
from mlx_openelm.serving.metrics import Metrics
from mlx_openelm.serving.models import Models
from mlx_openelm.serving.options import ServeOptions
from mlx_openelm.serving.running import listen, make_server, url_of
from mlx_openelm.serving.worker import Worker
from mlx_openelm.sources import open_source
from mlx_openelm.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass
class Serving:
    """A running server."""

    url: str
    worker: Worker
    context: Context
    gave_up: list[bool]
    headers: dict[str, str]

    def post(self, path: str, body: Any = None, **keywords: Any) -> httpx2.Response:
        given = {"json": body} if body is not None else {}
        headers = self.headers | keywords.pop("headers", {})
        return httpx2.post(self.url + path, timeout=60, headers=headers, **given, **keywords)

    def get(self, path: str, **keywords: Any) -> httpx2.Response:
        headers = self.headers | keywords.pop("headers", {})
        return httpx2.get(self.url + path, timeout=60, headers=headers, **keywords)

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends as it should."""
        with httpx2.stream("POST", self.url + path, json=body, timeout=60, headers=self.headers) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def error(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error of a request."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"].endswith((".", "?"))
        return error

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def metric(self, name: str) -> float:
        """The value of a metric, with its labels as written."""
        lines = [line for line in self.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
        return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def expected_of(values: list[Any]) -> Any:
    """Log-probabilities to compare with: bit for bit with the CPU kernels, without them to rounding."""
    listed = [one for value in values for one in (value if isinstance(value, list) else [value])]
    return listed if native.kernels is not None else pytest.approx(listed, abs=1e-3)


def flat(values: list[list[Any]]) -> list[Any]:
    return [one for value in values for one in value]


@cache
def tiny() -> tuple[OpenELM, Tokenizer]:
    """The packaged model, for lone runs; the servers have their own."""
    return load("tiny")


def load_alone(model: str) -> tuple[OpenELM, Tokenizer, OpenELM | None]:
    return (*load(model), None)


@contextmanager
def serving(
    models: Mapping[str, str] | None = None,
    adapters: Mapping[str, str] | None = None,
    *,
    template: str | None = None,
    keys: list[str] | None = None,
    hosts: list[str] | None = None,
    load: Callable[[str], tuple[OpenELM, Tokenizer, OpenELM | None]] = load_alone,
    prepare: Callable[[Context], object] = lambda context: None,
    memory: Mapping[str, Any] | None = None,
    **options: Any,
) -> Iterator[Serving]:
    """A server; `memory` are further arguments of `Models`."""
    chosen = ServeOptions(**{"log_level": "WARNING", "max_tokens": 16, **options})
    chosen.validate()
    sizes = {"text_bytes": 1 << 30, "prefix_bytes": 1 << 26, **(memory or {})}
    offered = Models(models or {"tiny": "tiny"}, adapters or {}, open_source, load, max_rows=chosen.max_rows, **sizes)
    gave_up: list[bool] = []
    worker = Worker(offered, Metrics(), chosen.max_rows + chosen.max_queue, lambda: gave_up.append(True))
    context = Context(worker, chosen, worker.metrics, template)
    worker.start()
    worker.run(offered.load_first).result()
    prepare(context)
    started = threading.Event()
    with listen("127.0.0.1", 0) as bound:
        server = make_server(make_app(context, keys=keys, hosts=hosts), chosen.log_level, started.set)
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        assert started.wait(20)
        headers = {} if keys is None else {"Authorization": f"Bearer {keys[0]}"}
        try:
            yield Serving(url_of(bound), worker, context, gave_up, headers)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
