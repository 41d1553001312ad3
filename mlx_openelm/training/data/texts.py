"""The documents of files of text, one after another: JSON lines and arrays, parquet, plain text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import RequestError, quote
from ...inputs import check_file, read_text, to_path
from .read import _find_files, _NotJSON, _read_json, _read_parquet

_PLAIN = ".txt"


@dataclass(frozen=True)
class TextFile:
    """A file of documents, and the key, or the column, that holds their text."""

    path: Path
    text_key: str

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.path.stat().st_size


def find_texts(data: Sequence[str | Path], text_key: str) -> list[TextFile]:
    """The files of text that `data` names: each a file, a folder with `train` files, or a data set on the hub.

    Raises:
        RequestError: there are none.
        OpenELMError: a download failed.
    """
    paths: list[Path] = []
    for name in data:
        path = to_path(name)
        paths += [path] if path.suffix.lower() == _PLAIN else _find_files(name, ("train",))["train"]
    for path in paths:
        check_file(path)
    return [TextFile(path, text_key) for path in paths]


def read_texts(file: TextFile) -> Iterator[str]:
    """The documents of a file.

    Raises:
        RequestError: it cannot be read, or a document has no text; the message says where.
    """
    if file.path.suffix.lower() == _PLAIN:
        yield read_text(file.path)
        return
    is_table = file.path.suffix.lower() == ".parquet"
    for value, where in _read_parquet(file.path) if is_table else _read_json(file.path):
        text = value.get(file.text_key) if isinstance(value, dict) else None
        if isinstance(value, _NotJSON):
            raise RequestError(f"{where} {value.reason}.")
        if not isinstance(text, str):
            raise RequestError(
                f"{where} has no text under {quote(file.text_key)}; --text-key names the key, or the column."
            )
        yield text
