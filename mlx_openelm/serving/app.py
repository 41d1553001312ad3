"""The routes of the server, and what happens when it starts and stops."""

from __future__ import annotations

import asyncio
import re
from base64 import b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .chat import chat
from .completions import completions
from .context import Context, answer, close, failure, route
from .embeddings import detokenize, embeddings, tokenize
from .failures import APIError
from .gauges import EngineState
from .limits import Guard, Keys
from .metrics import CONTENT_TYPE
from .responses import responses

PAGE = Path(__file__).with_name("page.html")
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


async def models(context: Context, request: Request) -> Response:
    data = [_model(name, entry.created) for name, entry in context.models.names()]
    return answer({"object": "list", "data": data})


async def model(context: Context, request: Request) -> Response:
    name = request.path_params["name"]
    entry, _ = context.models.find(name)
    return answer(_model(name, entry.created))


def _model(name: str, created: int) -> dict[str, object]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mlx-openelm"}


async def health(request: Request) -> Response:
    context: Context = request.app.state.context
    if context.worker.is_alive:
        return answer({"status": "ok"})
    return answer({"status": "unavailable"}, 503)


async def metrics(request: Request) -> Response:
    return Response(request.app.state.context.metrics.show(), media_type=CONTENT_TYPE)


def page_policy(page: bytes) -> str:
    """The Content-Security-Policy of the page: its own script and style run, by their digests, and nothing else does.

    It reaches this server only.
    """
    found = [(kind.decode(), b64encode(sha256(text).digest()).decode()) for kind, text in _INLINE.findall(page)]
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    none = "'none'"
    for kind in ("script", "style"):
        digests = [f"'sha256-{digest}'" for name, digest in found if name == kind]
        rules.append(f"{kind}-src {' '.join(digests) or none}")
    return "; ".join([*rules, "frame-ancestors 'none'"])


async def page(request: Request) -> Response:
    content = PAGE.read_bytes()
    headers = {"Content-Security-Policy": page_policy(content), "Referrer-Policy": "no-referrer"}
    return Response(content, media_type="text/html; charset=utf-8", headers=headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: "There is no such route; those of OpenAI's protocol begin with /v1.",
        405: f"This route does not take {request.method}.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return failure(APIError(message, error.status_code, headers=dict(error.headers or {})))


def make_app(context: Context, *, keys: Sequence[str] | None = None, hosts: Sequence[str] | None = None) -> Starlette:
    """The application.

    Args:
        context: its worker has been started.
        keys: API keys, one of which every request needs.
        hosts: as for `Guard`.
    """
    worker = context.worker

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.loop = asyncio.get_running_loop()
        try:
            yield
        finally:
            worker.stop()
            await asyncio.to_thread(worker.join)
            worker.loop = None
            close(context)

    def post(path: str, handler: object) -> Route:
        name = path.removeprefix("/v1/").strip("/")
        return Route(path, route(handler, name), methods=["POST"])  # type: ignore[arg-type]

    routes = [
        post("/v1/completions", completions),
        post("/v1/chat/completions", chat),
        post("/v1/responses", responses),
        post("/v1/embeddings", embeddings),
        post("/tokenize", tokenize),
        post("/detokenize", detokenize),
        Route("/v1/models", route(models, "models")),
        Route("/v1/models/{name:path}", route(model, "models")),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/", page),
    ]
    origins = context.options.origins
    middleware = [
        Middleware(Guard, keys=None if keys is None else Keys(keys), origins=origins, hosts=hosts),
    ]
    if origins:
        middleware.insert(
            0,
            Middleware(
                CORSMiddleware,
                allow_origins=list(origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            ),
        )
    app = Starlette(
        routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers={HTTPException: _http_error}
    )
    app.state.context = context
    context.metrics.registry.register(EngineState(worker))
    return app
