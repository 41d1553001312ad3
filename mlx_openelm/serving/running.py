"""Running the application on a socket: uvicorn, with connections that do not wait for ever."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import RequestError

# Seconds that a client may take to send the head of a request, and to read what it was sent.
HEAD_SECONDS, READ_SECONDS = 30.0, 60.0
# While Python runs in two threads, how long one waits for the other; the engine must not wait 5 ms for each step.
_SWITCH_SECONDS = 0.0005
_KEEP_ALIVE_SECONDS = 30


class Connection(H11Protocol):
    """A connection that ends if its client sends the head of a request too slowly, or reads nothing of an answer."""

    def __init__(self, *args: Any, **keywords: Any):
        super().__init__(*args, **keywords)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._unread = 0  # bytes of the answer, when the client was last seen to be slow

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect("head", HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._got("head")
        elif "head" not in self._timers:
            self._expect("head", HEAD_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._got(name)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        self._wait_for_reading()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._got("read")
        super().resume_writing()

    def _wait_for_reading(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._expect("read", READ_SECONDS, self._check_reading)

    def _check_reading(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._wait_for_reading()
        else:
            self.transport.abort()

    def _expect(self, name: str, seconds: float, otherwise: Callable[[], object]) -> None:
        """Call `otherwise` after so many seconds unless `_got` is called before."""
        self._got(name)
        self._timers[name] = self.loop.call_later(seconds, otherwise)

    def _got(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()


class _Server(uvicorn.Server):
    """Says when it listens; a second signal, of whatever kind, ends it without waiting for requests."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], object]):
        super().__init__(config)
        self._when_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        except OSError as error:  # two servers may bind a port, until one of them listens
            host, port, *_ = sockets[0].getsockname() if sockets else ("", 0)
            raise _cannot_listen(host, port, error) from None
        self._when_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.force_exit or self.should_exit
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound already, before any model is loaded.

    Raises:
        RequestError: the address is not this machine's, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(found, key=lambda one: one[0] != socket.AF_INET)  # localhost has two
        # With the protocol named, asyncio turns Nagle's algorithm off; without, each small answer takes 40 ms more.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise _cannot_listen(host, port, error) from None
    return bound


def _cannot_listen(host: str, port: int, error: OSError) -> RequestError:
    reason = (error.strerror or str(error)).lower()
    return RequestError(
        f"The server cannot listen at {host} on port {port}: {reason}; choose others with --host and --port."
    )


def url_of(bound: socket.socket) -> str:
    """The address of the server, for people."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Starlette, log_level: str, started: Callable[[], object] = lambda: None) -> uvicorn.Server:
    """A server for the application; `serve(sockets=[...])` or `run` starts it."""
    _log(log_level)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
    )
    return _Server(config, started)


def run(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serve until a signal asks for the end; what runs is finished first, unless a second one comes.

    SIGTERM ends the process with status 0, Ctrl-C as it ends other commands.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    signal.signal(signal.SIGTERM, _exit)
    server.run(sockets=[bound])


def _exit(*_: Any) -> None:
    raise SystemExit(0)


def _log(level: str) -> None:
    """Log to standard error; uvicorn only what is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, at in (("mlx_openelm.serving", level), ("uvicorn.error", "CRITICAL")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(at)
