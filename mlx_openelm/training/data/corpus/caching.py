"""Keeping the tokens of files in the token cache while they are used for the first time."""

from __future__ import annotations

from ....errors import OpenELMError
from .cache import CacheWriter
from .reader import Chunk
from .workers import InProcess, Workers


class CachingChunks:
    """Chunks as they are taken; those of whole files that come from no cache are written to it."""

    def __init__(self, chunks: InProcess | Workers, folder: str | None, key: str, vocab_size: int):
        self._chunks, self._folder, self._key, self._vocab_size = chunks, folder, key, vocab_size
        self._writers: dict[int, CacheWriter] = {}

    def take(self, stream: int) -> Chunk:
        chunk = self._chunks.take(stream)
        if self._folder is not None:
            self._keep(stream, chunk, self._folder)
        return chunk

    def close(self) -> None:
        self._chunks.close()

    def close_caches(self) -> None:
        """Remove unfinished caches; only once nothing takes chunks any more."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers.clear()

    def _keep(self, stream: int, chunk: Chunk, folder: str) -> None:
        writer = self._writers.pop(stream, None)
        if writer is None and chunk.position.chunk == 0 and not chunk.cached:
            try:
                writer = CacheWriter(folder, chunk.file, self._key, self._vocab_size)
            except OSError as error:
                raise OpenELMError(f"--token-cache {folder} cannot be written: {error.strerror}.") from None
        if writer is not None:
            writer.add(chunk.encoded, is_last=chunk.is_last)
            if not chunk.is_last:
                self._writers[stream] = writer
