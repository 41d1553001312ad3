"""Files that other programs wrote, read with bounds: a damaged or hostile one is refused before it costs much."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

from .errors import RequestError

# The largest file that is read whole; the largest tokenizers anyone publishes have some 35 MB.
MAX_BYTES = 1 << 26
# The largest text, as prompt or to measure on.
_MAX_TEXT_BYTES = 1 << 31
# The largest JSON object that is read whole: configurations and indexes of shards have less than a megabyte.
_MAX_JSON_BYTES = 1 << 24
# Where the shell opens the pipes of `<(command)`. Other pipes may have no writer, and would be waited for without end.
_OPEN_FILES = ("/dev/fd", "/proc/self/fd")
# What Git leaves in the place of a large file where Git LFS is not installed.
_POINTER = b"version https://git-lfs"
# YAML is parsed by Python itself, a megabyte in ten seconds: the largest text, the most values once aliases are
# expanded, and the longest number (1:1:1 is one, whose digits count in sixties).
_MAX_YAML_BYTES, _MAX_YAML_NODES, _MAX_YAML_NUMBER = 1 << 18, 100_000, 1000


def check_file(path: Path) -> int:
    """The size in bytes of a regular file; asked before it is opened, since a FIFO would block.

    Raises:
        RequestError: it does not exist, is a folder, a FIFO or a device, or its name cannot be looked up.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:  # a name that is too long, or holds a null character
        raise RequestError(f"{path} cannot be read: {_reason(error)}.") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise RequestError(f"{path} is {kind}, not a file.")
    return status.st_size


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        RequestError: it cannot be read, is no regular file, a pointer of Git LFS, or larger than `max_bytes`.
    """
    if (size := check_file(path)) > max_bytes:
        raise RequestError(f"{path} has {size} bytes, more than the {max_bytes} such a file may have.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {_reason(error)}.") from None
    refuse_pointer(path, content)
    return content


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raises RequestError if a file that starts so only stands for one that Git LFS has not brought."""
    if start.startswith(_POINTER):
        raise RequestError(
            f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder, or download it again."
        )


def to_path(name: str | Path) -> Path:
    """The path that a person's text means, `~` expanded.

    Raises:
        RequestError: no file can have that name.
    """
    path = Path(str(name).strip() if isinstance(name, str) else name)
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


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a regular UTF-8 file, line ends as they are; errors as `read_bytes`, and for other encodings."""
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start}).") from None


def read_stream(file: BinaryIO, name: str) -> bytes:
    """All that a pipe or standard input gives, up to `_MAX_TEXT_BYTES`.

    Raises:
        RequestError: there is more.
    """
    content = file.read(_MAX_TEXT_BYTES + 1)
    if len(content) > _MAX_TEXT_BYTES:
        raise RequestError(f"{name} gives more than {_MAX_TEXT_BYTES} bytes.")
    return content


def read_text_source(path: Path) -> bytes:
    """The content of a text that a person names: a regular file, or a pipe that the shell opened (`<(command)`).

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


def read_json(path: Path, name: str = "config.json", *, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`, or in the file `name` of the folder `path`.

    Raises:
        RequestError: missing, unreadable, larger than `max_bytes`, not JSON, or not an object.
    """
    path = path / name if path.is_dir() else path
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        values = json.loads(content)
    except RecursionError:
        raise RequestError(f"{path} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as error:
        raise RequestError(f"{path} cannot be read as JSON: {_reason(error)}.") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} must hold a JSON object, not {kind_of(values)}.")
    return values


def read_yaml(path: Path, loader: Any = None) -> Any:
    """The values in a YAML file of plain data, whose aliases must not multiply them without bound.

    Args:
        loader: a subclass of PyYAML's `SafeLoader`, by default that.

    Raises:
        RequestError: missing, unreadable, not YAML, or one whose aliases expand to too many values.
    """
    return parse_yaml(read_text(path, max_bytes=_MAX_YAML_BYTES), str(path), loader)


def parse_yaml(text: str, place: str, loader: Any = None) -> Any:
    """The values in YAML text of plain data, as `read_yaml`; errors name the `place`."""
    import yaml

    if len(text) > _MAX_YAML_BYTES:
        raise RequestError(f"{place} has {len(text)} characters, more than the {_MAX_YAML_BYTES} that YAML may have.")
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
        raise RequestError(f"{place} is not valid YAML: it is nested too deeply.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise RequestError(f"{place} is not valid YAML: {' '.join(_reason(error).split())}.") from None


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, aliases expanded; ValueError beyond the bounds."""
    if node.tag.endswith((":int", ":float")) and len(node.value) > _MAX_YAML_NUMBER:
        raise ValueError(f"a number has more than {_MAX_YAML_NUMBER} characters")
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias stands for what holds it")
        return known[id(node)]
    known[id(node)] = 0
    children = node.value if isinstance(node.value, list) else []
    count = 1
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            count += _count_nodes(part, known)
            if count > _MAX_YAML_NODES:
                raise ValueError(f"it holds more than {_MAX_YAML_NODES} values")
    known[id(node)] = count
    return count


def kind_of(value: object) -> str:
    """What a JSON value is, for a message."""
    kinds = {list: "a list", str: "a string", type(None): "null", bool: "true or false", dict: "an object"}
    return kinds.get(type(value), "a number")


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return reason.partition("; use sys.set_int_max_str_digits")[0].rstrip(".")
