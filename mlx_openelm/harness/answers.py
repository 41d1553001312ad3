"""The answers to requests in a file to which lines are only added, so that a run goes on where another was killed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import OpenELMError, RequestError


class Answers:
    """Answers by request, in memory and in a file if there is one.

    A line that a killed run left unfinished is dropped. Answers of another model, or in another setting, have other
    keys.

    Args:
        setting: what answers depend on besides the request: the model's fingerprint, its type, and so on.
        path: the file; None keeps answers only in memory.

    Raises:
        RequestError: the file cannot be opened, is not one of answers, or is in use by another run.
    """

    def __init__(self, setting: Any, path: Path | None = None):
        self._setting = json.dumps(setting, sort_keys=True, default=str)
        self._known: dict[str, Any] = {}
        self._file: Any = None
        self.path = path
        if path is not None:
            self._open(path)

    def key(self, method: str, arguments: Any, repeat: int = 0) -> str:
        """The key of a request; `repeat` counts the equal requests before it."""
        text = json.dumps([self._setting, method, arguments, repeat], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._known.get(key)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep answers by key, which are on their way to the disk, all of them at once, when this returns.

        Raises:
            OpenELMError: the file cannot be written, for example because the disk is full.
        """
        self._known |= answers
        if self._file is None:
            return
        lines = [json.dumps({"key": key, "answer": answer}) + "\n" for key, answer in answers.items()]
        content = "".join(lines).encode()
        try:
            written = self._file.write(content)
        except OSError as error:
            raise OpenELMError(f"{self.path} cannot be written: {error.strerror}.") from None
        if written != len(content):  # the rest did not fit; what follows must not be joined to it
            raise OpenELMError(f"{self.path} cannot be written: the disk is full.")

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what is added is one write, which a killed process has made or not.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the run)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until it is closed, or the process dies
            self._read(path)
        except BlockingIOError:
            raise RequestError(f"{path} is in use by another run; wait for it, or give another --output.") from None
        except OSError as error:
            raise RequestError(f"{path} cannot be opened: {error.strerror}.") from None

    def _read(self, path: Path) -> None:
        """Read the lines of earlier runs; drops a damaged last one."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["answer"]
            except (ValueError, TypeError, KeyError, RecursionError):
                if number < len(lines):
                    raise RequestError(
                        f"{path}, line {number}, is no answer of an evaluation; remove the file to begin again."
                    ) from None
                whole -= len(line) + 1
        if whole < len(content):
            os.truncate(path, whole)

    def close(self) -> None:
        """Close the file, for other runs to use."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
