"""The token cache: the tokens of a file as a file of their own, which is memory-mapped and needs no tokenizing.

A cache file holds the tokens of all chunks one after another, 2 or 4 bytes each, then JSON with the fingerprints, the
lengths and a checksum of each chunk, then the position of that JSON. A file with another fingerprint counts as missing,
and one with a damaged chunk is removed; either is written when the text is next read from its beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ....errors import OpenELMError
from ....formats import atomic
from .files import TextFile

_VERSION = 1
_POSITION = 8  # bytes of the position of the JSON, at the end
_SAMPLE = 1 << 16


class Encoded(NamedTuple):
    """The documents of a chunk, or their pieces: tokens, and the number of each one's document in the file."""

    tokens: list[array[int]]
    numbers: list[int]
    counts: Counter[str]


def path_of(folder: str, file: TextFile, encoder: str) -> Path:
    """Where a file's tokens are kept, by its path, its text key and the encoder's fingerprint."""
    key = hashlib.sha256(repr([os.path.realpath(file.path), file.text_key, encoder]).encode()).hexdigest()
    stem = re.sub(r"[^\w.-]", "_", file.name)[:80]
    return Path(folder, f"{stem}-{key[:16]}.tokens")


def fingerprint(file: TextFile) -> str:
    """A hash of a file's size, its time of change, its first and its last bytes."""
    status = os.stat(file.path)
    with open(file.path, "rb") as stream:
        start = stream.read(_SAMPLE)
        stream.seek(max(0, status.st_size - _SAMPLE))
        content = hashlib.sha256(start + stream.read(_SAMPLE)).hexdigest()
    return f"{status.st_size} {status.st_mtime_ns} {content}"


class CachedTokens:
    """The cached tokens of a file; `open` gives one only if it is whole and up to date."""

    def __init__(self, path: Path, content: mmap.mmap, index: dict[str, Any]):
        self.path, self._content, self._index = path, content, index
        self.num_chunks: int = len(index["chunks"])

    @classmethod
    def open(cls, folder: str, file: TextFile, encoder: str) -> CachedTokens | None:
        path = path_of(folder, file, encoder)
        try:
            with path.open("rb") as stream:
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            start = int.from_bytes(content[-_POSITION:], "little")
            index = json.loads(content[start:-_POSITION])
            known = index["version"] == _VERSION and index["byteorder"] == sys.byteorder
            if known and index["file"] == fingerprint(file) and index["encoder"] == encoder:
                return cls(path, content, index)
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            pass
        return None

    def read(self, number: int) -> Encoded | None:
        """A chunk; None if it is damaged, and then the file is removed: the next epoch or run writes it again."""
        entry = self._index["chunks"][number]
        size = self._index["itemsize"]
        data = self._content[entry["start"] : entry["start"] + size * sum(entry["lengths"])]
        if zlib.crc32(data) != entry["crc32"]:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            return None
        values = array("H" if size == 2 else "i")
        values.frombytes(data)
        tokens, at = [], 0
        for length in entry["lengths"]:
            tokens.append(array("i", values[at : at + length]))
            at += length
        return Encoded(tokens, entry["numbers"], Counter(entry["counts"]))


class CacheWriter:
    """Writes the tokens of one file, chunk by chunk; the cache file appears when the last one is there."""

    def __init__(self, folder: str, file: TextFile, encoder: str, vocab_size: int):
        self._path = path_of(folder, file, encoder)
        self._type = "H" if vocab_size <= 1 << 16 else "i"
        self._index: dict[str, Any] = {
            "version": _VERSION,
            "byteorder": sys.byteorder,
            "itemsize": array(self._type).itemsize,
            "file": fingerprint(file),
            "encoder": encoder,
            "chunks": [],
        }
        self._stack = contextlib.ExitStack()
        partial = self._stack.enter_context(atomic.new_file(self._path))
        self._stream = self._stack.enter_context(partial.open("wb"))

    @property
    def num_chunks(self) -> int:
        """The chunks written so far."""
        return len(self._index["chunks"])

    def add(self, encoded: Encoded, *, is_last: bool) -> None:
        """Write the next chunk; the last one finishes the file.

        Raises:
            OpenELMError: the disk is full, or writing failed for another reason; nothing is left.
        """
        try:
            data = b"".join(array(self._type, tokens).tobytes() for tokens in encoded.tokens)
            entry = {"start": self._stream.tell(), "lengths": [len(tokens) for tokens in encoded.tokens]}
            entry |= {"numbers": encoded.numbers, "counts": dict(encoded.counts), "crc32": zlib.crc32(data)}
            self._index["chunks"].append(entry)
            self._stream.write(data)
            if is_last:
                start = self._stream.tell()
                self._stream.write(json.dumps(self._index).encode() + start.to_bytes(_POSITION, "little"))
                self._stack.close()
        except (OSError, OpenELMError) as error:
            self.abandon()
            reason = getattr(error, "strerror", None) or str(error)
            raise OpenELMError(
                f"The token cache {self._path} cannot be written: {reason.rstrip('.')}; free space, or leave out "
                "--token-cache, and continue with --resume."
            ) from None

    def abandon(self) -> None:
        """Remove what was written."""

        class Abandoned(Exception):
            pass

        with contextlib.suppress(Abandoned, OSError, OpenELMError):
            self._stack.__exit__(Abandoned, Abandoned(), None)
