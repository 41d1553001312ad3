"""Reading documents from files in chunks: JSON lines and arrays, parquet, plain text; compressed with gzip or zstd."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ....errors import RequestError, quote
from ....inputs import LFS_POINTER, kind_of, pointer_error
from ....json_values import spread_error
from ....wording import install, some
from .files import OTHER_KEY, TextFile

# Documents of a chunk, the unit that workers read and tokenize: of lines, blank ones count.
CHUNK = 16
_LONGEST_LINE = 1 << 28
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Raw:
    """A document before it is parsed.

    Args:
        content: a line of JSON or a whole text as bytes, or the value of a table's cell.
        number: its line, row or item in the file, counted from 1; 0 if it is the whole file.
    """

    content: Any
    number: int


class Damaged(Exception):
    """A document that cannot be read; the text says why."""


class NoKey(Damaged):
    """A document without the key of its text."""


def read_chunks(file: TextFile, start: int = 0) -> Iterator[tuple[list[Raw], bool]]:
    """The chunks of a file from chunk `start` on, each with whether it is the last.

    Raises:
        RequestError: the file cannot be read, is empty, or has no such column.
    """
    chunks = iter(_chunks(file, start))
    chunk = next(chunks, None)
    if chunk is None:
        if start == 0:
            raise RequestError(f"{file.path} is empty: it holds no documents.")
        return
    for following in chunks:
        yield chunk, False
        chunk = following
    yield chunk, True


def read_texts(files: Iterable[TextFile], *, skip_damaged: bool = False) -> Iterator[str]:
    """The texts of files, without empty ones, in order.

    Raises:
        RequestError: a file cannot be read, or a document is damaged; the message names the file and line.
    """
    for file in files:
        for chunk, _ in read_chunks(file):
            for raw in chunk:
                try:
                    text = text_of(raw, file)
                except Damaged as error:
                    if not skip_damaged:
                        raise damaged(file, raw, error) from None
                    continue
                if text:
                    yield text


def damaged(file: TextFile, raw: Raw, reason: Damaged) -> RequestError:
    """The error for a document that cannot be read."""
    first = f"{OTHER_KEY}; else " if isinstance(reason, NoKey) else ""
    return RequestError(
        f"{place_of(file.path, raw.number)}: {reason} ({file.path}); {first}correct it, or leave such documents out "
        "with --skip-damaged."
    )


def no_text(file: TextFile) -> RequestError:
    """The error for a source, with this file, in which there is no text."""
    return RequestError(f"There is no text in {file.path} and the other files of its source; {OTHER_KEY}.")


def text_of(raw: Raw, file: TextFile) -> str:
    """The text of a document; empty for a blank line, and for null.

    Raises:
        Damaged: it is not UTF-8, not JSON, or has no text under the key.
    """
    value = raw.content
    if isinstance(value, bytes):
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Damaged(f"is not UTF-8 text (byte {error.start + 1})") from None
        if raw.number == 0 or not text.strip():
            return text if raw.number == 0 else ""
        value = _parse(text.rstrip("\r\n"))
    if isinstance(value, dict):
        if file.text_key not in value:
            found = some([quote(str(key)) for key in value]) or "nothing"
            raise NoKey(f"has no {quote(file.text_key)}; it has {found}")
        value = value[file.text_key]
    elif not isinstance(value, str | None) or isinstance(raw.content, bytes):
        raise Damaged(f"is {kind_of(value)}, not a JSON object with {quote(file.text_key)}")
    if not isinstance(value, str | None):
        raise Damaged(f"{quote(file.text_key)} is {kind_of(value)}, not text")
    return value or ""


def place_of(path: str, number: int) -> str:
    """Where a document is, for messages: `train.jsonl, line 12`."""
    name = Path(path).name
    return name if number == 0 else f"{name}, {'row' if name.lower().endswith('.parquet') else 'line'} {number}"


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise Damaged(f"is not JSON ({error.msg}: column {error.colno})") from None
    except (ValueError, RecursionError):
        raise Damaged("is not JSON that can be read") from None


def _chunks(file: TextFile, start: int) -> Iterable[list[Raw]]:
    name = file.name.lower()
    if name.endswith(".parquet"):
        return _table(file, start)
    return _lines(file, start) if ".json" in name else _whole(file, start)


def _whole(file: TextFile, start: int) -> Iterator[list[Raw]]:
    with _reading(file), _open(file) as stream:
        content = stream.read(_LONGEST_LINE + 1)
        if len(content) > _LONGEST_LINE:
            raise RequestError(f"{file.path} has more than {_LONGEST_LINE >> 20} MB in one document; split it.")
        if content and start == 0:
            yield [Raw(content.removeprefix(b"\xef\xbb\xbf"), 0)]


def _lines(file: TextFile, start: int) -> Iterator[list[Raw]]:
    with _reading(file), _open(file) as stream:
        first = stream.readline(_LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
        if first.startswith(LFS_POINTER):
            raise pointer_error(Path(file.path))
        if first.strip() == b"{":
            raise spread_error(Path(file.path))
        if first.lstrip()[:1] == b"[" and ".jsonl" not in file.name.lower():
            yield from itertools.islice(_array(file, first + stream.read()), start, None)
            return
        pieces = itertools.chain([first] if first else [], iter(lambda: stream.readline(_LONGEST_LINE), b""))
        numbered = enumerate(_split(pieces, file), 1)
        for number in itertools.count():
            chunk = list(itertools.islice(numbered, CHUNK))
            if not chunk:
                return
            if number >= start:
                yield [Raw(line, at) for at, line in chunk]


def _split(pieces: Iterable[bytes], file: TextFile) -> Iterator[bytes]:
    """The lines of what `readline` gives, which only knows LF; lines may also end with CR, as JSON holds none."""
    for piece in pieces:
        if len(piece) == _LONGEST_LINE:
            raise RequestError(f"{file.path} has a line of more than {_LONGEST_LINE >> 20} MB.")
        yield from piece.splitlines() if b"\r" in piece else (piece,)


def _array(file: TextFile, content: bytes) -> Iterator[list[Raw]]:
    """The chunks of a JSON array."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file.path} is not JSON ({error}).") from None
    for at in range(0, len(values), CHUNK):
        yield [Raw(value, number) for number, value in enumerate(values[at : at + CHUNK], at + 1)]


def _table(file: TextFile, start: int) -> Iterator[list[Raw]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RequestError(f"Reading {file.name} needs the package pyarrow: {install('data')}.") from None
    try:
        with parquet.ParquetFile(file.path, page_checksum_verification=True) as table:
            if file.text_key not in table.schema_arrow.names:
                names = some([quote(name) for name in table.schema_arrow.names])
                raise RequestError(f"{file.path} has no column {quote(file.text_key)}; it has {names}; {OTHER_KEY}.")
            done = 0  # rows of the row groups before
            rest: list[Raw] = []
            for group in range(table.num_row_groups):
                size = table.metadata.row_group(group).num_rows
                if done + size > start * CHUNK:
                    at = done
                    for batch in table.iter_batches(_PARQUET_ROWS, [group], [file.text_key]):
                        skipped = min(max(0, start * CHUNK - at), batch.num_rows)
                        values = batch.column(0).slice(skipped).to_pylist()
                        rest += [Raw(value, number) for number, value in enumerate(values, at + skipped + 1)]
                        at += batch.num_rows
                        whole = len(rest) // CHUNK * CHUNK
                        yield from (rest[first : first + CHUNK] for first in range(0, whole, CHUNK))
                        rest = rest[whole:]
                done += size
            if rest:
                yield rest
    except (ArrowException, OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{file.path} cannot be read as parquet ({' '.join(str(error).split())}).") from None


def _open(file: TextFile) -> BinaryIO:
    name = file.name.lower()
    if name.endswith(".gz"):
        return gzip.open(file.path)  # type: ignore[return-value]
    if not name.endswith(".zst"):
        return open(file.path, "rb")
    try:
        import zstandard
    except ImportError:
        raise RequestError(f"Reading {file.name} needs the package zstandard: {install('pretrain')}.") from None
    return io.BufferedReader(_Zstd(file.path, zstandard.ZstdDecompressor), 1 << 17)


class _Zstd(io.RawIOBase):
    """The content of a zstd file of any number of frames; unlike zstandard's readers it notices a missing end."""

    def __init__(self, path: str, decompressor: Callable[[], Any]):
        self._file = open(path, "rb")  # noqa: SIM115 (`close` closes it)
        self._decompressor = decompressor
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            has_ended = self._frame is None or self._frame.eof
            data = (self._frame.unused_data if self._frame and has_ended else b"") or self._file.read(1 << 16)
            if not data and not has_ended:
                raise EOFError("it ends in the middle of a frame")
            if not data:
                return 0
            self._frame = self._decompressor().decompressobj() if has_ended else self._frame
            self._ready = self._frame.decompress(data)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


class _reading:
    """A context in which errors of reading a file become one line."""

    def __init__(self, file: TextFile):
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        damaged = isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"
        if error is not None and damaged:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise RequestError(f"{self._file.path} cannot be read: {reason}.") from None
