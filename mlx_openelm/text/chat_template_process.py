"""Rendering chat templates in a separate process with limits on time and memory: see `chat_template_worker`."""

from __future__ import annotations

import atexit
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OpenELMError, RequestError
from .chat_template_worker import CPU_SECONDS, MEMORY_BYTES, NO_JINJA, OUT_OF_MEMORY

# macOS does not enforce memory limits of processes. There we check the memory at this interval, in seconds.
_LIMITS_MEMORY = sys.platform == "linux"
_WATCH_SECONDS = 0.05
_ENDS = {
    -signal.SIGPROF: f"it took more than {CPU_SECONDS:g} seconds of processor time",
    OUT_OF_MEMORY: f"it took more than {MEMORY_BYTES >> 20} MB of memory",
}


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    The first call starts the process, which takes 0.2 seconds, mostly for importing jinja2. Later calls reuse it.

    Args:
        variables: JSON values; a value of another type becomes its type's name in angle brackets, as in transformers.

    Raises:
        RequestError: the template fails, takes too much time or memory, or renders too much.
        OpenELMError: the process could not be started, or jinja2 cannot be imported.
    """
    try:
        request = json.dumps(
            {"template": source, "variables": variables},
            ensure_ascii=False,
            default=lambda it: f"<{type(it).__name__}>",
        ).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as error:  # unsupported keys, or values that contain themselves
        raise RequestError(f"The messages cannot be written as JSON: {error}") from None
    answer = _ask(request)
    if "text" in answer:
        return answer["text"]
    raise RequestError(
        f"The chat template failed{answer['place']}: {' '.join(answer['error'].split())}; correct it, or use "
        "--chat-template plain or corenet"
    )


def _ask(request: bytes) -> dict[str, str]:
    """The answer to a request; if the process died while rendering, the reason as its `error`."""
    tries = 2  # another program may kill the process
    while True:
        answer = _the_worker().ask(request)
        if isinstance(answer, dict):
            return answer
        if answer == NO_JINJA:
            raise OpenELMError("Chat templates need jinja2, which cannot be imported: pip install jinja2")
        if answer is not None:  # None: another thread's template was stopped, and the process with it
            tries -= 1
            if answer in _ENDS or not tries:
                return {"error": _ENDS.get(answer, f"its process ended with status {answer}"), "place": ""}


class _Worker:
    """The process and its pipes; a lock lets one thread use them at a time."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("chat_template_worker.py")
        arguments = json.dumps([[str(folder) for folder in sys.path], _LIMITS_MEMORY])
        try:
            self._process = subprocess.Popen(
                # -I -S: it starts faster without the site module and environment variables. sys.path is an argument.
                [sys.executable, "-I", "-S", str(script), arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C must reach only the parent
            )
        except OSError as error:
            raise OpenELMError(f"No process for the chat template could be started: {error.strerror}") from None
        self._lock = threading.Lock()

    def has_ended(self) -> bool:
        assert self._process.stdin is not None
        return self._process.stdin.closed or self._process.poll() is not None

    def ask(self, request: bytes) -> dict[str, str] | int | None:
        """The answer to a request, the exit status if the process died on it, or None if it was ended before."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            if self._process.stdin.closed:  # ended by another thread's request
                return None
            try:
                self._process.stdin.write(request + b"\n")
                self._process.stdin.flush()
                grew = not _LIMITS_MEMORY and self._outgrows_its_memory()
                line = b"" if grew else self._process.stdout.readline()
            except BrokenPipeError:
                grew, line = False, b""
            except BaseException:  # Ctrl-C: a later request must not read this answer
                self.end()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            status = self.end()
        return OUT_OF_MEMORY if grew else status

    def _outgrows_its_memory(self) -> bool:
        """Wait for the answer; true if the process exceeds the memory limit first."""
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], _WATCH_SECONDS)[0]:
            usage = subprocess.run(["ps", "-o", "rss=", "-p", str(self._process.pid)], capture_output=True, text=True)
            if usage.stdout.strip().isdigit() and int(usage.stdout) << 10 > MEMORY_BYTES:
                return True
        return False

    def end(self) -> int:
        """Stop the process if it is still running; its exit status."""
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # the rest of the buffer could not be sent
                pass
        try:
            return self._process.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def abandon(self) -> None:
        """Close the pipes without flushing their buffers, and let the process run on."""
        for pipe in (self._process.stdin, self._process.stdout):
            if isinstance(pipe, io.BufferedWriter | io.BufferedReader):
                pipe.raw.close()
        self._process.returncode = 0


_worker: _Worker | None = None
_starting = threading.Lock()


def _the_worker() -> _Worker:
    global _worker
    with _starting:
        if _worker is None or _worker.has_ended():
            _worker = _Worker()
        return _worker


def _forget() -> None:
    """After a fork, in the child: the process belongs to the parent."""
    global _worker, _starting
    if _worker is not None:
        _worker.abandon()
    _worker, _starting = None, threading.Lock()


def _end() -> None:
    if _worker is not None:
        _worker.end()


os.register_at_fork(after_in_child=_forget)
atexit.register(_end)
