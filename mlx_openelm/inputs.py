"""Reading untrusted files with limits on size and nesting."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RequestError, quote

# The largest file that is read whole; the largest published tokenizers have about 35 MB.
MAX_BYTES = 1 << 26
# The largest text for a prompt or an evaluation.
_MAX_TEXT_BYTES = 1 << 31
# The largest JSON file: configurations and shard indexes have less than a megabyte.
_MAX_JSON_BYTES = 1 << 24
# Where the shell opens the pipes of `<(command)`. Other pipes may have no writer, so reading could block forever.
_OPEN_FILES = ("/dev/fd", "/proc/self/fd")
# The start of the file that Git leaves in place of a large one if Git LFS is not installed.
LFS_POINTER = b"version https://git-lfs"
# YAML is parsed in pure Python, a megabyte in ten seconds. Limits: the size of the text, the number of values after
# aliases are expanded, and the length of a number (1:1:1 is a base-60 number in YAML).
_MAX_YAML_BYTES, _MAX_YAML_NODES, _MAX_YAML_NUMBER = 1 << 18, 100_000, 1000


def check_file(path: Path) -> int:
    """The size in bytes of a regular file. Call it before opening, since opening a FIFO would block.

    Raises:
        RequestError: it does not exist, is a folder, a FIFO or a device, or its name is not valid.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a name that is too long, or contains a null character
        raise RequestError(f"{path} cannot be read: {_reason(error)}.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise RequestError(f"{path} is {kind}, not a file.")
    return status.st_size


def refuse_device(path: str | Path) -> None:
    """Raise a `RequestError` for a pipe or a device, where a name may mean a file, a folder or something else."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        check_file(Path(path))


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        RequestError: it cannot be read, is not a regular file, is a Git LFS pointer, or is larger than `max_bytes`.
    """
    if (size := check_file(path)) > max_bytes:
        raise RequestError(f"{path} has {size} bytes, more than the limit of {max_bytes} for such a file.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {_reason(error)}.") from None
    if content.startswith(LFS_POINTER):
        raise pointer_error(path)
    return content


def pointer_error(path: Path) -> RequestError:
    """The error for a file that begins with `LFS_POINTER`: Git LFS has not downloaded the real one."""
    return RequestError(
        f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download it again."
    )


def to_path(name: str | Path) -> Path:
    """The path that a user typed, with `~` expanded.

    Raises:
        RequestError: no file can have that name.
    """
    if not isinstance(name, str | os.PathLike):
        raise RequestError(f"{quote(name)} is not a name or a path.")
    path = Path(name.strip() if isinstance(name, str) else name)
    try:
        path = path.expanduser()
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RequestError(f"{path} is not a file: its name is too long.") from None
    except (RuntimeError, ValueError) as error:  # no such user, a null character
        raise RequestError(f"{path} is not a file: {_reason(error)}.") from None
    return path


def path_list(value: Any, flag: str) -> list[str | os.PathLike[str]]:
    """The paths that an argument holds: one path, or a sequence of them.

    Raises:
        RequestError: it is anything else.
    """
    paths = [value] if isinstance(value, str | os.PathLike) else value
    if not isinstance(paths, Sequence) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise RequestError(f"{flag} must be a path, or several, got {quote(value)}.")
    return list(paths)


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular UTF-8 file, line ends unchanged; errors as `read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def check_characters(source: str, text: str) -> None:
    """Raise a `RequestError` for what cannot be written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{source} has half of a surrogate pair, which is not a character: {quote(text)}.") from None


def read_stream(file: BinaryIO, name: str) -> bytes:
    """Everything from a pipe or standard input, up to `_MAX_TEXT_BYTES`; `name` is for messages.

    Raises:
        RequestError: there is more.
    """
    content = file.read(_MAX_TEXT_BYTES + 1)
    if len(content) > _MAX_TEXT_BYTES:
        raise RequestError(f"{name} has more than {_MAX_TEXT_BYTES} bytes, the limit for a text.")
    return content


def read_text_source(path: Path) -> bytes:
    """The content of a text file that a user named: a regular file, or a pipe that the shell opened (`<(command)`).

    Raises:
        RequestError: as `read_bytes`, and more than `_MAX_TEXT_BYTES`.
    """
    if str(path.parent) not in _OPEN_FILES or not path.is_fifo():
        return read_bytes(path, max_bytes=_MAX_TEXT_BYTES)
    try:
        with path.open("rb") as file:
            return read_stream(file, str(path))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {_reason(error)}.") from None


def split_lines(text: str) -> list[str]:
    r"""The lines of a text, which end with \n, \r\n or \r. `str.splitlines` also breaks at U+2028, U+0085 and \x0b."""
    return re.split("\r\n?|\n", text)


def read_json(
    path: Path, name: str = "config.json", *, max_bytes: int = _MAX_JSON_BYTES, missing_ok: bool = False
) -> dict[str, Any]:
    """The JSON object in `path`, or in the file `name` of the folder `path`.

    With `missing_ok`, a file that does not exist gives an empty object.

    Raises:
        RequestError: missing, unreadable, larger than `max_bytes`, not JSON, or not an object.
    """
    if missing_ok and not path.exists():
        return {}
    path = path / name if path.is_dir() else path
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        values = json.loads(content)
    except RecursionError:
        raise RequestError(f"{path} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"{path} cannot be read as JSON: {_reason(error)}.") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} must contain a JSON object, not {kind_of(values)}.")
    return values


def read_yaml(path: Path, loader: Any = None) -> Any:
    """The values in a YAML file of plain data.

    Args:
        loader: a subclass of PyYAML's `SafeLoader`, which is the default.

    Raises:
        RequestError: missing, unreadable, not YAML, or aliases expand to too many values.
    """
    return parse_yaml(read_text(path, max_bytes=_MAX_YAML_BYTES), str(path), loader)


def parse_yaml(text: str, source: str, loader: Any = None) -> Any:
    """The values in YAML text of plain data, as `read_yaml`; errors name the `source`."""
    import yaml

    if len(text) > _MAX_YAML_BYTES:
        raise RequestError(f"{source} has {len(text)} characters, more than the limit of {_MAX_YAML_BYTES} for YAML.")
    try:
        parser = (loader or yaml.SafeLoader)(text)
        try:
            root = parser.get_single_node()
            if root is None:
                return None
            _count_nodes(root, {})
            return parser.construct_document(root)
        finally:
            parser.dispose()
    except RecursionError:
        raise RequestError(f"{source} is not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{source} is not valid YAML: {' '.join(_reason(error).split())}.") from None


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """The number of values in a YAML node, aliases expanded; ValueError beyond the limits.

    `known` has the counts of nodes by id, 0 for a node whose children are still being counted.
    """
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_YAML_NUMBER:
        raise ValueError(f"a number has more than {_MAX_YAML_NUMBER} characters")
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias refers to a value that contains it")
        return known[id(node)]
    known[id(node)] = 0
    children = node.value if isinstance(node.value, list) else []
    count = 1
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            count += _count_nodes(part, known)
            if count > _MAX_YAML_NODES:
                raise ValueError(f"it has more than {_MAX_YAML_NODES} values")
    known[id(node)] = count
    return count


def kind_of(value: object) -> str:
    """The type of a JSON value, for a message: `a list`, `null`."""
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false", dict: "an object"}
    return kinds.get(type(value), "a number")


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason.partition("; use sys.set_int_max_str_digits")[0].rstrip(".")
