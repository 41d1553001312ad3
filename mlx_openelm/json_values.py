"""The values of files of JSON: lines, or an array; plain or gzipped."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RequestError
from .inputs import LFS_POINTER, pointer_error


@dataclass(frozen=True)
class NotJSON:
    """Stands in for a value that could not be read."""

    reason: str


def read_values(path: Path) -> Iterable[tuple[Any, str]]:
    """The values of a file with JSON lines or a JSON array, whatever its name, and where each is.

    Raises:
        RequestError: the file cannot be read, or is an object over several lines.
    """
    content = read_unpacked(path).removeprefix(b"\xef\xbb\xbf")
    # JSON lines hold objects, so a file that begins with a bracket is an array, unless its name says .jsonl.
    if content.lstrip()[:1] == b"[" and ".jsonl" not in path.name.lower():
        array = _parse(content)
        if isinstance(array, NotJSON):
            raise RequestError(f"{path.name}: {array.reason}.")
        for number, value in enumerate(array, 1):
            yield value, f"{path.name}, item {number}"
        return
    # bytes.splitlines only splits at \n, \r\n and \r; JSON strings may contain the other line ends of str.
    begun = False
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            value = _parse(line)
            if not begun and isinstance(value, NotJSON) and _is_spread(line, content):
                raise spread_error(path)
            begun = True
            yield value, f"{path.name}, line {number}"


def spread_error(path: Path) -> RequestError:
    """The error for a file that should be JSON lines, and begins with an object over several of them."""
    return RequestError(
        f"{path} has a JSON object over several lines; write each object on its own line, or all in an array [...]."
    )


def _is_spread(line: bytes, content: bytes) -> bool:
    """Whether a file whose first line is not JSON begins with an object over several lines."""
    return line.strip() == b"{" or isinstance(_parse(content), dict)


def read_unpacked(path: Path) -> bytes:
    """The content of a file, of one that ends in `.gz` unpacked.

    Raises:
        RequestError: it cannot be read, or is a Git LFS pointer.
    """
    try:
        content = _decompress(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RequestError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if content.startswith(LFS_POINTER):
        raise pointer_error(path)
    return content


def _decompress(path: Path) -> bytes:
    """The content of a gzipped file. One that expands far more than text could fill the memory, and is refused."""
    limit = (1 << 24) + 100 * path.stat().st_size
    with gzip.open(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise RequestError(f"{path} unpacks to more than 100 times its size; unpack it and give the .jsonl or .json.")
    return content


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return NotJSON(f"is not UTF-8 text (byte {error.start + 1})")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return NotJSON(f"is not JSON ({error.msg}: {place})")
    except RecursionError:
        return NotJSON("is not JSON that can be read (nested too deeply)")
    except ValueError as error:
        return NotJSON(f"is not JSON ({error})")
