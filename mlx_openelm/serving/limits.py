"""Who may use the server: API keys, pages in a browser, names of the host."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Sequence
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import RequestError
from ..inputs import read_text
from .context import failure
from .failures import APIError

log = logging.getLogger("mlx_openelm.serving")

# What can be asked for without a key: the page itself, and whether the server is well.
_OPEN = ("/", "/health")
_MAX_KEYS_BYTES = 1 << 20


def read_keys(path: Path) -> list[str]:
    """The API keys in a file, one on each line; lines that begin with # are comments.

    Raises:
        RequestError: the file cannot be read, or has none.
    """
    lines = [line.strip() for line in read_text(path, max_bytes=_MAX_KEYS_BYTES).removeprefix("\ufeff").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not all(key.isascii() for key in keys):
        raise RequestError(f"{path} has an API key with other characters than ASCII's, which headers cannot carry.")
    if not keys:
        raise RequestError(f"{path} has no API keys; write one on each line.")
    return keys


class Keys:
    """API keys. How long a comparison takes says nothing about them."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def fits(self, key: str) -> bool:
        """Whether it is one of them: all are compared, whichever fits."""
        digest = sha256(key.encode("utf-8", "replace")).digest()
        return sum(hmac.compare_digest(digest, one) for one in self._digests) > 0


class Guard:
    """Refuses requests that may not be made, and logs the others; an ASGI application around another.

    Args:
        keys: the API keys; None lets everybody in.
        origins: of pages that may use the server besides its own; `*` is any.
        hosts: names besides addresses and localhost that a request may call the server; None allows any. Without
            this, a page could reach a server on the same machine through a name that its owner points there.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys | None = None,
        origins: Sequence[str] = (),
        hosts: Sequence[str] | None = None,
    ):
        self.app, self.keys, self.origins = app, keys, set(origins)
        self.hosts = None if hosts is None or "*" in self.origins else {*hosts, *map(_host_of, self.origins)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            error = self._refusal(scope)
            await (self.app if error is None else failure(error))(scope, receive, watched)
        finally:
            if log.isEnabledFor(logging.INFO):
                route = getattr(scope.get("route"), "path", "(unknown)")
                seconds = time.perf_counter() - started
                log.info("%s %s %s in %.3f s", scope["method"], route, status or "-", seconds)

    def _refusal(self, scope: Scope) -> APIError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.hosts is not None and not self._knows(_name(host)):
            message = "The server does not answer to that name; call it by its address, or see --allowed-origins."
            return APIError(message, 403, code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not {origin.rstrip("/"), "*"} & self.origins and _netloc(origin) != host:
            message = "Pages of this origin may not use the server; allow it with --allowed-origins."
            return APIError(message, 403, code="origin_not_allowed")
        if self.keys is None or scope["path"] in _OPEN or scope["method"] == "OPTIONS":
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.keys.fits(key.strip()):
            return None
        message = "The API key is missing or wrong; send it as Authorization: Bearer KEY."
        return APIError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _knows(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or (self.hosts and name in self.hosts):
            return True
        try:
            return bool(ip_address(name))
        except ValueError:
            return False


def _host_of(origin: str) -> str:
    return _name(_netloc(origin))


def _netloc(origin: str) -> str:
    """The host and port of an origin; empty if it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # an address in brackets that is none
        return ""


def _name(host: str) -> str:
    """The name in a Host header, without a port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
