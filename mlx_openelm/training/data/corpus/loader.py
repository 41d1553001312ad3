"""The data of each update of a pretraining run, prepared ahead by a thread and worker processes."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections import Counter, deque
from typing import Any, NamedTuple

from ....errors import RequestError
from ....inputs import to_path
from ....text.fingerprint import fingerprint
from ....text.tokenizer import Tokenizer
from ...options.corpus import CORENET, DataOptions
from ..batches import Step
from . import corenet, packed
from .caching import CachingChunks
from .documents import CHUNK, place_of
from .encoding import Encoder, check_ftfy
from .files import find_files
from .packed import Document, PackedRows
from .reader import Job, Position, Stream
from .repeating import RepeatedChunks
from .rows import Rows, pack, pad, to_batch
from .workers import Closed, InProcess, Workers

_VERSION = 1
# Updates that are prepared ahead: at least and at most.
_AHEAD = 4, 64
# Updates whose examples `describe` knows.
_KNOWN = 4


class _Update(NamedTuple):
    """The data of an update, and the stream's state after it."""

    epoch: int
    batches: list[Rows]
    num_targets: int
    first_example: int
    places: list[tuple[str, int]]
    state: dict[str, Any]


class PretrainingData:
    """A stream of updates' data without end, the same for any number of workers.

    In `packed` mode rows are full, and process r of n has rows r, r + n, ... of each micro-batch. In `corenet` mode
    rows end in padding, and a step has a batch for each micro-batch and each of CoreNet's processes that this one
    stands for: r, r + n, ... of `processes`.

    Args:
        options: checked here.
        batch_size: rows of a micro-batch over all processes.
        max_seq_length: positions of a row.
        grad_accumulation_steps: micro-batches of an update.
        state: what `state` returned in an earlier run, to continue from there.

    Raises:
        RequestError: no data, invalid options, or a `state` of other data; the message says what differs.
        OpenELMError: a download failed, or a worker could not be started.
    """

    def __init__(
        self,
        options: DataOptions,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        max_seq_length: int,
        grad_accumulation_steps: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        state: dict[str, Any] | None = None,
    ):
        options.check_data()
        if options.repairs_text:
            check_ftfy()
        self._options, self._tokenizer = options, tokenizer
        self._batch_size, self._length, self._accumulation = batch_size, max_seq_length, grad_accumulation_steps
        self._world_size, self._rank, self._seed = world_size, rank, seed
        self.processes = self._emulated(state)
        self._check_batch()
        self._files = [find_files(source, "train", options.text_key) for source in options.data]
        self._tokenizer_fingerprint = fingerprint(tokenizer)
        self._key = self._make_key()
        self._state = self._begin(state)
        self.waited = 0.0
        self._totals = Counter(self._state["totals"])
        self._failure: BaseException | None = None
        self._ready: _Update | None = None
        self._closed = False
        self._known: deque[tuple[int, list[tuple[str, int]]]] = deque(maxlen=_KNOWN)
        self._open()

    def step(self) -> Step:
        """This process's data of the next update; `num_targets` and `num_tokens` are over all processes.

        Raises:
            RequestError: a damaged document or file, by file and line.
            OpenELMError: a worker ended, or the disk is full.
        """
        started = time.perf_counter()
        self.wait()
        update, self._ready = self._ready, None
        assert update is not None
        index = self._state["steps"]
        self._state = update.state
        self._known.append((update.first_example, update.places))
        batches = [to_batch(rows) for rows in update.batches]
        examples = range(update.first_example, update.first_example + len(update.places))
        step = Step(index, update.epoch, batches, update.num_targets, update.num_targets, tuple(examples))
        self.waited += time.perf_counter() - started
        return step

    def wait(self) -> None:
        """Wait until the next step can be given, so that bad data is refused before anything is written.

        Raises:
            RequestError, OpenELMError: as `step`.
        """
        if self._failure is not None:
            raise self._failure
        if self._ready is None:
            update = self._queue.get()
            if isinstance(update, BaseException):
                self._failure = update
                self.close()
                raise update
            self._ready = update

    def state(self) -> dict[str, Any]:
        """The position after the last step that was given, for JSON."""
        return self._state

    def describe(self, example: int) -> str:
        """Where an example of one of the last steps is from: `train.jsonl, line 12`."""
        for first, places in self._known:
            if first <= example < first + len(places):
                return place_of(*places[example - first])
        return f"example {example}"

    def record(self) -> dict[str, Any]:
        """What the run's record says of the data: how it is made, and the totals up to the last step given."""
        options, totals = self._options, self._state["totals"]
        record = {
            "mode": options.mode,
            "sources": [
                {
                    "path": source.path,
                    "weight": source.weight,
                    "text_key": source.text_key or options.text_key,
                    "files": len(files),
                    "bytes": sum(os.path.getsize(file.path) for file in files),
                }
                for source, files in zip(options.data, self._files, strict=True)
            ],
            "ftfy": options.repairs_text,
            "tokenizer": self._tokenizer_fingerprint,
            "seed": self._seed,
            "workers": options.workers,
            "epochs": self._state["epoch"],
            **totals,
            "documents": self._state["counts"],
        }
        if options.mode == CORENET:
            characters, tokens = options.filters
            filters = {"min_characters": characters, "min_tokens": tokens, "piece_words": options.piece_words}
            return record | filters | {"corenet_processes": self.processes}
        return record | {"shuffle_buffer": options.shuffle_buffer}

    def close(self) -> None:
        """End the workers; `step` cannot be called any more."""
        self._closed = True
        self._chunks.close()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        self._chunks.close_caches()

    def __enter__(self) -> PretrainingData:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _emulated(self, state: dict[str, Any] | None) -> int:
        """The number of CoreNet's processes: that of the option, or of the run that is continued, or this run's."""
        earlier = (state or {}).get("key", {}).get("corenet_processes")
        return self._options.corenet_processes or earlier or self._world_size

    def _check_batch(self) -> None:
        if self._batch_size < 1 or self._length < 2 or self._accumulation < 1:
            raise RequestError(
                "--batch-size and --grad-accumulation-steps must be 1 or more, and --max-seq-length 2 or more."
            )
        shares = self.processes if self._options.mode == CORENET else self._world_size
        if self._batch_size % shares:
            raise RequestError(
                f"--batch-size is shared by {shares} processes, so it must be a multiple of {shares}, "
                f"got {self._batch_size}."
            )
        if shares % self._world_size:
            raise RequestError(
                f"--corenet-processes must be a multiple of the {self._world_size} processes of this run, got {shares}."
            )

    def _make_key(self) -> dict[str, Any]:
        """What must be the same in the run that is continued."""
        options = self._options
        sizes = [[[file.name, os.path.getsize(file.path), file.text_key] for file in files] for files in self._files]
        key = {
            "mode": options.mode,
            "files": hashlib.sha256(repr(sizes).encode()).hexdigest()[:32],
            "weight": [source.weight for source in options.data],
            "tokenizer": self._tokenizer_fingerprint,
            "seed": self._seed,
            "max_seq_length": self._length,
            "ftfy": options.repairs_text,
            "skip_damaged": options.skip_damaged,
        }
        if options.mode != CORENET:
            return key | {"shuffle_buffer": options.shuffle_buffer}
        filters = [*options.filters, options.piece_words]
        return key | {"filters": filters, "corenet_processes": self.processes, "batch_size": self._batch_size}

    def _begin(self, state: dict[str, Any] | None) -> dict[str, Any]:
        if state is None:
            totals = {"tokens": 0, "positions": 0, "padding": 0}
            return {"version": _VERSION, "key": self._key, "steps": 0, "examples": 0, "epoch": 0, "totals": totals,
                    "counts": {}, "stream": None}  # fmt: skip
        if state.get("version") != _VERSION:
            raise RequestError("The state of the data is of another version of mlx-openelm; start a new run.")
        for name, value in self._key.items():
            # A damaged document that stopped a run may be skipped when it continues.
            if state["key"].get(name) != value and name != "skip_damaged":
                raise RequestError(
                    f"The data is not that of the run to continue (its {name} changed); give the same data and "
                    "options, or start a new run."
                )
        return state

    def _open(self) -> None:
        """Start the workers, and the thread that prepares updates."""
        options, stream = self._options, self._state["stream"]
        encoder = self._make_encoder()
        if options.mode == CORENET:
            files = [file for each in self._files for file in each]
            streams = corenet.make_streams(files, self.processes, self._seed)
            places = [each["start"] for each in stream["streams"]] if stream else []
            ahead = 2
        else:
            shuffles = options.shuffle_buffer > 1
            streams = [
                Stream(files, f"{self._seed} {number} files" if shuffles else None)
                for number, files in enumerate(self._files)
            ]
            places = [each["start"] for each in stream["sources"]] if stream else []
            # While a block is used, the next one is made.
            ahead = options.shuffle_buffer // CHUNK + 4 * max(1, options.workers)
        starts = [Position(*place) for place in places] or [Position()] * len(streams)
        folder = None if options.token_cache is None else str(to_path(options.token_cache))
        job = Job(streams, starts, encoder, options.skip_damaged, folder)
        key = encoder.fingerprint(self._tokenizer_fingerprint)
        chunks: InProcess | Workers
        if options.workers:
            chunks = Workers(job, key, options.workers, ahead=ahead, shares_streams=options.mode != CORENET)
        else:
            chunks = InProcess(job, key)
        self._chunks = CachingChunks(chunks, folder, key, self._tokenizer.vocab_size)
        self._source: PackedRows | corenet.CorenetBatches
        if options.mode == CORENET:
            self._source = corenet.CorenetBatches(
                self._chunks, self.processes, self._batch_size // self.processes, stream
            )
        else:
            weights = [source.weight for source in options.data]
            repeated = RepeatedChunks(self._chunks, streams)
            self._source = PackedRows(repeated, weights, length=self._length, buffer=options.shuffle_buffer,
                                      seed=self._seed, state=stream)  # fmt: skip
        self._queue: queue.Queue[_Update | BaseException] = queue.Queue(self._ahead())
        self._prepared = (self._state["steps"], self._state["examples"])
        self._thread: threading.Thread = threading.Thread(target=self._prepare_ahead, daemon=True)
        self._thread.start()

    def _ahead(self) -> int:
        """Updates to prepare ahead. Packed rows come a window at a time: while one is used, the next is read."""
        least, most = _AHEAD
        return min(most, max(least, 2 * packed.WINDOW // (self._batch_size * self._length * self._accumulation)))

    def _make_encoder(self) -> Encoder:
        options = self._options
        if options.mode != CORENET:
            return Encoder(self._tokenizer, options.repairs_text)
        characters, tokens = options.filters
        return Encoder(self._tokenizer, options.repairs_text, options.piece_words, characters, tokens,
                       self._length + 1)  # fmt: skip

    def _prepare_ahead(self) -> None:
        try:
            while not self._closed:
                self._queue.put(self._prepare())
        except Closed:
            pass
        except BaseException as error:
            self._queue.put(error)

    def _prepare(self) -> _Update:
        if isinstance(self._source, PackedRows):
            micro_batches = [
                [self._source.take().pieces for _ in range(self._batch_size)] for _ in range(self._accumulation)
            ]
            # All rows of a micro-batch are one batch, of which a process has its share.
            batches = [rows[self._rank :: self._world_size] for rows in micro_batches]
            rows = [row for batch in micro_batches for row in batch]
        else:
            taken = [batch for _ in range(self._accumulation) for batch in self._source.take()]
            own = range(self._rank, self.processes, self._world_size)
            batches = [
                [[row] for row in taken[micro * self.processes + process]]
                for micro in range(self._accumulation)
                for process in own
            ]
            rows = [[row] for batch in taken for row in batch]
        return self._finish(batches, rows)

    def _finish(self, batches: list[list[list[Document]]], rows: list[list[Document]]) -> _Update:
        """The update of these batches; `rows` are those of all processes."""
        is_packed = isinstance(self._source, PackedRows)
        steps, first = self._prepared
        numbers: dict[int, int] = {}
        places: list[tuple[str, int]] = []
        for row in rows:
            for piece in row:
                numbers[id(piece)] = first + len(places)
                places.append((piece.path, piece.number))
        lengths = sum(len(piece.targets) for row in rows for piece in row)
        tokens = lengths if is_packed else lengths - len(rows)
        positions = len(rows) * self._length
        self._totals.update({"tokens": tokens, "positions": positions, "padding": positions - tokens})
        self._prepared = (steps + 1, first + len(places))
        state = {
            "version": _VERSION,
            "key": self._key,
            "steps": steps + 1,
            "examples": first + len(places),
            "epoch": self._source.epoch,
            "totals": dict(self._totals),
            "counts": {name: count for name, count in self._source.counts().items() if count},
            "stream": self._source.state(),
        }
        made = []
        for batch in batches:
            examples = tuple(numbers[id(piece)] for row in batch for piece in row)
            bos = self._tokenizer.bos_token_id
            made.append(pack(batch, self._length, bos, examples) if is_packed else pad(batch, self._length, examples))
        return _Update(self._source.epoch, made, tokens, first, places, state)
