"""A client for streams of server-sent events, as thin as it can be, so that it measures the server."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ...errors import RequestError, quote

_MAX_LINE = 1 << 20


class StatusError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, body: str):
        super().__init__(f"{status}: {body[:200]}")
        self.status = status


def check_url(url: str) -> SplitResult:
    """The parts of a server's address; RequestError if it is none."""
    parts = urlsplit(url)
    try:
        parts.port  # noqa: B018 (it is checked when it is read)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise RequestError(f"--serve must be the address of a server, such as http://127.0.0.1:8080, got {quote(url)}.")
    return parts


class Client:
    """Sends requests to one server, each on a connection of its own."""

    def __init__(self, url: str, key: str | None = None):
        parts = check_url(url)
        self._host, self._path = parts.hostname or "", parts.path.rstrip("/").removesuffix("/v1")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._headers = f"Host: {parts.netloc}\r\nConnection: close\r\n"
        if key is not None:
            self._headers += f"Authorization: Bearer {key}\r\n"

    async def get(self, path: str) -> Any:
        """The JSON at a path."""
        text = b"".join([part async for part in self._answer("GET", path, b"")])
        return json.loads(text)

    async def events(self, path: str, body: Any) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream; to close this is to leave.

        Raises:
            StatusError: the server answers with an error, or sends one in the stream.
            OSError, asyncio.IncompleteReadError: the connection failed.
        """
        rest = b""
        parts = self._answer("POST", path, json.dumps(body).encode())
        try:
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise StatusError(500, json.dumps(event["error"]))
                        yield event
        finally:
            await parts.aclose()

    async def _answer(self, method: str, path: str, body: bytes) -> AsyncGenerator[bytes, None]:
        """The parts of an answer's body as they arrive."""
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._ssl, limit=_MAX_LINE)
        try:
            head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
            status = int((await reader.readline()).split(b" ")[1])
            is_chunked = False
            while (line := (await reader.readline()).strip().lower()) != b"":
                is_chunked |= line.startswith(b"transfer-encoding:") and line.endswith(b"chunked")
            parts = _chunks(reader) if is_chunked else _rest(reader)
            if status != 200:
                raise StatusError(status, b"".join([part async for part in parts]).decode("utf-8", "replace"))
            async for part in parts:
                yield part
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readline()).partition(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _rest(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while part := await reader.read(65536):
        yield part
