"""The second tier of a prefix tree: files that survive the process. Nothing here fails a request.

A file that is damaged, or is not what the tree expects, is removed. Files of other models are left alone, but count
towards the size, and go when theirs is the longest time without use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import OpenELMError, RequestError
from ..formats import prefix_file
from ..inputs import to_path
from ..messages import warn
from .cache_origin import Origin
from .options import check_number
from .segments import Content, Kind

# The largest size of a folder by default, in bytes.
DEFAULT_BYTES = 4 << 30
_PATTERN = "prefix-*.safetensors"


@dataclass(frozen=True)
class Entry:
    """What a file holds: positions `start` to the end of `tokens`, or a whole sliding cache after all of them."""

    file: str
    key: str
    kind: Kind
    tokens: list[int]
    start: int
    is_whole: bool


class PrefixDisk:
    """A folder with the keys and values of prefixes, for one tree at a time.

    Args:
        folder: where the files are; made if it does not exist. Several processes may use it.
        origin: `Origin.of(model)`: only files that the same weights, adapters included, and type made are used.
        config: the model's configuration, whose sizes the arrays must have.
        max_bytes: the largest size of all files together, 4 GiB by default; those that were not used for the longest
            time are removed first.

    Raises:
        RequestError: the folder cannot be made, or `max_bytes` is not a whole number, 0 or above.
    """

    def __init__(self, folder: str | Path, origin: Origin, config: ModelConfig, max_bytes: int = DEFAULT_BYTES):
        check_number("--max-bytes", max_bytes, 0, math.inf, "a whole number of bytes, 0 or above", kind=Integral)
        self.folder, self.origin, self.config, self.max_bytes = to_path(folder), origin, config, max_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # prompts are private
            found = [(path.stat().st_mtime_ns, path) for path in self.folder.glob(_PATTERN)]
        except OSError as error:
            raise RequestError(f"{folder} cannot be used for prompt caches: {error.strerror}.") from None
        self._sizes: OrderedDict[str, int] = OrderedDict()  # least recently used first
        for _, path in sorted(found):
            with contextlib.suppress(OSError):  # another process removed it
                self._sizes[path.name] = path.stat().st_size
        self._warned = False
        self.removed: Callable[[str], object] = lambda file: None  # set by the tree that uses it
        self._shrink()

    @property
    def nbytes(self) -> int:
        """The size of all files."""
        return sum(self._sizes.values())

    def entries(self) -> list[Entry]:
        """What the files of this model hold, shorter prefixes first."""
        found = []
        for file in list(self._sizes):
            try:
                notes = prefix_file.read_notes(self.folder / file)
                if self._is_ours(notes):
                    found.append(_entry(file, notes))
            except (ValueError, KeyError, TypeError, RecursionError):
                self.remove(file)
        return sorted(found, key=lambda entry: (len(entry.tokens), entry.start))

    def read(self, file: str, tokens: Sequence[int], start: int) -> Content | None:
        """What a file holds of `tokens` from `start` on; None, and the file is removed, if that is something else."""
        try:
            layers, notes = prefix_file.read(self.folder / file)
            entry = _entry(file, notes)
            numbers = json.loads(notes["numbers"])
            content = Content(layers, None if numbers is None else tuple(map(int, numbers)))
            fits = self._is_ours(notes) and entry.tokens == list(tokens) and (entry.is_whole or entry.start == start)
            length = len(tokens) if entry.is_whole else len(tokens) - start
            if fits and content.fits(entry.kind, self.config, length):
                return content
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self.remove(file)
        return None

    def write(self, content: Content, key: str, kind: Kind, tokens: Sequence[int], start: int) -> str | None:
        """Write what a tree holds of `tokens` from `start` on; the file's name, or None if it cannot be written."""
        entry = {"key": key, "kind": json.dumps(kind), "tokens": json.dumps(list(tokens)), "start": str(start)}
        notes = self.origin.notes() | entry | {"numbers": json.dumps(content.numbers)}
        identity = json.dumps([self.origin.fingerprint, self.origin.dtype, *entry.values()])
        file = f"prefix-{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.safetensors"
        if content.nbytes > self.max_bytes:
            return None
        try:
            prefix_file.write(self.folder / file, content.layers, notes)
            self._sizes[file] = (self.folder / file).stat().st_size
        except (OpenELMError, OSError) as error:
            if not self._warned:
                warn(f"Prompt caches are not kept in {self.folder}: {error}")
            self._warned = True
            return None
        self._sizes.move_to_end(file)
        self._shrink()
        return file if file in self._sizes else None

    def use(self, file: str) -> None:
        """Note that a file was used, for later processes too."""
        if file in self._sizes:
            self._sizes.move_to_end(file)
            with contextlib.suppress(OSError):
                os.utime(self.folder / file)

    def remove(self, file: str) -> None:
        """Remove a file, and tell the tree."""
        self._sizes.pop(file, None)
        self.removed(file)
        with contextlib.suppress(OSError):
            (self.folder / file).unlink()

    def _is_ours(self, notes: dict[str, Any]) -> bool:
        origin = Origin.from_notes(notes)
        return (origin.fingerprint, origin.dtype) == (self.origin.fingerprint, self.origin.dtype)

    def _shrink(self) -> None:
        while self._sizes and self.nbytes > self.max_bytes:
            self.remove(next(iter(self._sizes)))


def _entry(file: str, notes: dict[str, str]) -> Entry:
    """From the strings in a file; ValueError, KeyError or TypeError if they are not an entry's."""
    kind, tokens, start = tuple(json.loads(notes["kind"])), json.loads(notes["tokens"]), int(notes["start"])
    if not all(type(token) is int for token in tokens) or not 0 <= start < len(tokens):
        raise ValueError(file)
    return Entry(file, notes["key"], kind, tokens, start, json.loads(notes["numbers"]) is not None)
