"""Worker processes that tokenize ahead, and the order in which their chunks are taken; or none, in this process."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from typing import IO

from .... import errors
from ....errors import OpenELMError, RequestError
from .reader import Chunk, Job, StreamReader
from .worker import Setup

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mlx_openelm.training.data.corpus.worker import main; main()"
)


class Closed(Exception):
    """The data was closed while a chunk was waited for."""


class InProcess:
    """No workers: chunks are read when they are taken."""

    def __init__(self, job: Job, encoder_key: str):
        self._readers = [StreamReader(job, number, encoder_key=encoder_key) for number in range(len(job.streams))]

    def take(self, stream: int) -> Chunk:
        return self._readers[stream].read()

    def close(self) -> None:
        pass


class Workers:
    """Processes that read and tokenize.

    Several share a stream, each every so many-th chunk of it; many streams are shared out instead. Chunks are taken in
    the stream's order whatever their number, so the data does not depend on it.

    Args:
        ahead: the chunks of each stream to read ahead.
        shares_streams: whether all workers read every stream; otherwise each stream has one worker.
    """

    def __init__(self, job: Job, encoder_key: str, number: int, *, ahead: int, shares_streams: bool):
        self._count, self._shares = number, shares_streams
        streams = len(job.streams)
        self._taken = [0] * streams
        self._asked = [0] * streams
        self._arrived: list[dict[int, deque[Chunk]]] = [{} for _ in range(streams)]
        self._failure: OpenELMError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for worker in range(number):
                offsets = [worker if shares_streams else 0] * streams
                stride = number if shares_streams else 1
                self._start(worker, Setup(job, stride, offsets, encoder_key, errors.names_flags))
            for stream in range(streams):
                for _ in range(ahead):
                    self._ask(stream)
        except BaseException:
            self.close()
            raise

    def take(self, stream: int) -> Chunk:
        """The next chunk of a stream.

        Raises:
            OpenELMError: a worker ended, or the error that it reported.
            Closed: `close` was called.
        """
        worker = self._worker_of(stream, self._taken[stream])
        arrived = self._arrived[stream].setdefault(worker, deque())
        if self._asked[stream] == self._taken[stream]:
            self._ask(stream)
        with self._changed:
            while not arrived:
                if self._closed:
                    raise Closed
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            chunk = arrived.popleft()
        self._taken[stream] += 1
        self._ask(stream)
        return chunk

    def close(self) -> None:
        """End the processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # what is buffered has no reader any more
                process.stdin.close()

    def _worker_of(self, stream: int, chunk: int) -> int:
        return (chunk if self._shares else stream) % self._count

    def _ask(self, stream: int) -> None:
        worker = self._worker_of(stream, self._asked[stream])
        self._asked[stream] += 1
        self._send(worker, stream)

    def _send(self, worker: int, message: object) -> None:
        pipe = self._processes[worker].stdin
        assert pipe is not None
        try:
            pipe.write(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            pipe.flush()
        except (OSError, ValueError):  # it ended, which the thread that reads from it reports
            pass

    def _start(self, worker: int, setup: Setup) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps([str(path) for path in sys.path])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C must reach only the parent
                env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
            )
        except OSError as error:
            raise OpenELMError(f"No process to read the data could be started: {error.strerror}.") from None
        self._processes.append(process)
        threading.Thread(target=self._receive, args=(worker, process), daemon=True).start()
        self._send(worker, setup)

    def _receive(self, worker: int, process: subprocess.Popen[bytes]) -> None:
        """Collect what a process answers until it ends or fails; one thread for each process."""
        assert process.stdout is not None
        with process.stdout as answers:
            failure = self._collect(worker, process, answers)
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _collect(self, worker: int, process: subprocess.Popen[bytes], answers: IO[bytes]) -> OpenELMError:
        """Collect the chunks of a process; returns why there are no more."""
        while True:
            try:
                stream, answer = pickle.load(answers)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                status = process.wait()
                reason = f"by signal {-status}" if status < 0 else f"with status {status}"
                return OpenELMError(
                    f"A process that reads the data ended unexpectedly ({reason}); if memory is short, give fewer "
                    "--num-workers. Continue with --resume."
                )
            if not isinstance(answer, Chunk):
                name, message = answer
                return (RequestError if name == RequestError.__name__ else OpenELMError)(message)
            with self._changed:
                self._arrived[stream].setdefault(worker, deque()).append(answer)
                self._changed.notify_all()
