"""From sources to files: patterns, folders, and data sets on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ....errors import RequestError
from ....inputs import check_file, to_path
from ...options.source import Source
from ..splits import split_of, suffix_of

# Best first, for data sets on the hub in several formats.
SUFFIXES = (
    *(".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet", ".jsonl.zst", ".json.zst"),
    *(".txt", ".txt.gz", ".txt.zst"),
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1_000_000
# What to do about data without text.
OTHER_KEY = "if the text is under another key, name it with --text-key, or as text_key of its source"


@dataclass(frozen=True)
class TextFile:
    """A file of documents, and the key, or the column, that holds their text."""

    path: str
    text_key: str

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


def find_files(source: Source, split: str, text_key: str) -> list[TextFile]:
    """The files of a source, in order.

    In a folder, or a data set on the hub, files that are named after a split (`train`, `valid`, `test`) are that
    split's. The split `train` without such files has all that are of no split.

    Args:
        split: `train` or `valid`.
        text_key: the key of sources that name none.

    Raises:
        RequestError: there are no such files, or one has an unknown format.
        OpenELMError: a download failed.
    """
    key = source.text_key or text_key
    files = [TextFile(str(path), key) for path in _paths(source.path, split)]
    for file in files:
        check_file(Path(file.path))
    return files


def validation_sources(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Those of the sources that have validation files."""
    return tuple(source for source in sources if _is_collection(source.path) and _paths(source.path, "valid", True))


def _is_collection(path: str) -> bool:
    """Whether a source has splits of its own: a folder, or a data set on the hub."""
    return os.path.isdir(to_path(path)) or not (os.path.exists(to_path(path)) or _looks_local(path))


def _paths(name: str, split: str, may_lack: bool = False) -> list[Path]:
    if _RANGE.search(name) or (any(mark in name for mark in "*?[") and not os.path.exists(to_path(name))):
        return _matching(name)
    path = to_path(name)
    if os.path.isdir(path):
        return _in_folder(path, split, may_lack)
    if os.path.exists(path):
        if suffix_of(path.name, SUFFIXES) is None:
            raise RequestError(f"{name} is not a file of text; give one of {', '.join(SUFFIXES)}.")
        return [path]
    if _looks_local(name):
        raise RequestError(f"There is no folder or file {name}; give one, or a data set on the hub as owner/name.")
    from ..hub import download_splits

    splits = download_splits(name, SUFFIXES)
    found = splits.get(split) or (splits.get("all", []) if split == "train" else [])
    if not found and not may_lack:
        raise RequestError(f"The data set {name} has no files for {split} (only {', '.join(splits)}).")
    return found


def _looks_local(name: str) -> bool:
    """Whether a name that does not exist is a mistyped path, rather than a data set on the hub."""
    owner, _, rest = name.partition("/")
    return suffix_of(name, SUFFIXES) is not None or not owner or not rest or "/" in rest or owner in (".", "..", "~")


def _in_folder(folder: Path, split: str, may_lack: bool) -> list[Path]:
    by_split: dict[str | None, list[Path]] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(parent, name)
            relative = path.relative_to(folder).as_posix()
            suffix = suffix_of(relative, SUFFIXES)
            if suffix is not None:
                by_split.setdefault(split_of(relative, suffix), []).append(path)
    found = by_split.get(split) or (by_split.get(None, []) if split == "train" else [])
    if not found and not may_lack:
        raise RequestError(f"{folder} has no {split} files; they end in {', '.join(SUFFIXES)}.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _matching(pattern: str) -> list[Path]:
    """The files of a pattern: every one of a range must exist; `*` and `?` match those that do."""
    found: list[Path] = []
    for name in _expand(pattern):
        path = to_path(name)
        if any(mark in name for mark in "*?[") and not os.path.exists(path):
            import glob

            found += sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
        else:
            found.append(path)
    if not found:
        raise RequestError(f"No file matches {pattern}.")
    for path in found:
        if suffix_of(path.name, SUFFIXES) is None:
            raise RequestError(f"{path} is not a file of text; its name must end in one of {', '.join(SUFFIXES)}.")
    return found


def _expand(pattern: str) -> list[str]:
    """The names that a pattern with ranges means, as in a shell: `{08..11}` is 08, 09, 10, 11."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = int(found[1]), int(found[2])
    width = max(len(found[1]), len(found[2])) if found[1].startswith("0") or found[2].startswith("0") else 0
    if abs(last - first) >= _MOST_FILES:
        raise RequestError(f"{pattern} names more than {_MOST_FILES:,} files.")
    step = 1 if last >= first else -1
    rest = _expand(pattern[found.end() :])
    start = pattern[: found.start()]
    return [f"{start}{number:0{width}d}{end}" for number in range(first, last + step, step) for end in rest]
