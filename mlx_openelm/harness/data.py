"""Data sets in local folders that are laid out as on the hub: FOLDER/owner/name or FOLDER/name, and then as there."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError, quote
from ..inputs import read_bytes
from ..wording import install

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
# Names of files and folders by split. MMLU has `dev` beside `validation`.
_SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "dev": ("dev",),
    "test": ("test",),
}
# The names that a data set had before, by its name now; the owner does not count.
_OLD_NAMES = {"mmlu": ("mmlu_no_train",)}
_MAX_BYTES = 1 << 30


def find(folder: Path, dataset: str) -> Path | None:
    """The folder of the data set `owner/name` in `folder`, under any owner or none."""
    name = dataset.rsplit("/", 1)[-1]
    for known in (name, *_OLD_NAMES.get(name, ())):
        others = sorted(path for path in folder.glob(f"*/{known}") if path.is_dir())
        for place in (folder / dataset, folder / known, *others):
            if place.is_dir() and place.name == known:
                return place
    return None


def split_files(root: Path, config: str | None) -> dict[str, list[Path]]:
    """The files of each split of a data set's configuration, as the hub names them.

    `CONFIG/test-00000-of-00001.parquet`, `CONFIG/test/0000.parquet`, `test.jsonl`, in `data` too; or `CONFIG.jsonl`,
    which is the split `test`.
    """
    folders = [root / config, root / "data" / config] if config else []
    folders += [root, root / "data", root / "default"]
    for folder in folders:
        found = {split: _files_of(folder, names) for split, names in _SPLITS.items()}
        if any(found.values()):
            return {split: files for split, files in found.items() if files}
    for suffix in SUFFIXES if config else ():
        if (file := root / f"{config}{suffix}").is_file():
            return {"test": [file]}
    return {}


def _files_of(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of a split in a folder: those of the first format that it has."""
    for name in names:
        for suffix in SUFFIXES:
            files = [folder / f"{name}{suffix}", *folder.glob(f"{name}-*{suffix}"), *folder.glob(f"{name}/*{suffix}")]
            if files := sorted(file for file in files if file.is_file()):
                return files
    return []


def read_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The records of files, in order.

    Raises:
        RequestError: a file cannot be read, or pyarrow is not installed.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        if file.suffix == ".parquet":
            rows += _read_parquet(file)
            continue
        content = read_bytes(file, max_bytes=_MAX_BYTES).decode("utf-8-sig", "replace")
        try:
            if file.suffix == ".csv":
                rows += csv.DictReader(io.StringIO(content, newline=""))
            elif content.lstrip().startswith("["):
                rows += json.loads(content)
            else:
                rows += [json.loads(line) for line in content.split("\n") if line.strip()]
        except (ValueError, RecursionError, csv.Error) as error:
            raise RequestError(f"{file} cannot be read: {error}.") from None
    if wrong := next((number for number, row in enumerate(rows, 1) if not isinstance(row, dict)), None):
        raise RequestError(f"{files[0]}: record {wrong} is no JSON object.")
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise RequestError(f"Reading {file} needs pyarrow: {install('data')}.") from None
    try:
        return parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of both kinds
        raise RequestError(f"{file} cannot be read: {str(error).splitlines()[0].rstrip('.')}.") from None


def download_split(dataset: str, config: str | None, split: str) -> list[Path]:
    """The files of a split of a data set on the hub, downloaded unless they are in the cache.

    Data sets that are programs there are read from the branch in which the hub has converted them to parquet.

    Raises:
        RequestError: the data set has no such split, or does not exist.
        OpenELMError: access was refused, or a download failed.
    """
    from huggingface_hub import snapshot_download

    from ..hub import offline
    from ..hub.errors import explain_download

    kinds = [f"*{suffix}" for suffix in SUFFIXES]
    for revision in ("main", "refs/convert/parquet"):
        try:
            root = Path(snapshot_download(dataset, repo_type="dataset", revision=revision, allow_patterns=kinds))
        except Exception as error:
            raise explain_download(error, f"datasets/{dataset}", None, offline.data_set(dataset)) from error
        if files := split_files(root, config).get(split):
            return files
    raise RequestError(f"The data set {dataset} has no files of the split {split} that are understood.")


def _refuse_lists(file: Path, rows: Any) -> None:
    """Refuse a CSV table with lists, of which a task would take the letters for choices.

    Raises:
        RequestError: all cells of a column are lists or objects, written as text.
    """
    for name in rows.column_names:
        cells = [str(cell).strip() for cell in rows[name] if cell is not None]
        if cells and all(map(_is_list, cells)):
            raise RequestError(
                f"{file} has lists in the column {quote(name)}, which CSV cannot hold; give JSON Lines or Parquet."
            )


def _is_list(cell: str) -> bool:
    """Whether a text is a list or an object as Python, JSON or NumPy writes it, and not a text in brackets."""
    if cell[:1] + cell[-1:] not in ("[]", "{}"):
        return False
    if cell[1:].lstrip()[:1] in ("'", '"'):
        return True  # NumPy writes no commas
    try:
        ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


@contextlib.contextmanager
def local_first(folder: Path | None) -> Iterator[None]:
    """Inside, `datasets.load_dataset` takes a data set from `folder` if it is there, and says so if none is anywhere.

    lm-eval's tasks name their data sets themselves and call that function.
    """
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, *args: Any, **kwargs: Any) -> Any:
        root = None if folder is None else find(folder, path)
        if root is None:
            return original(path, name, *args, **kwargs)
        files = split_files(root, name)
        if not files:
            return original(str(root), name, *args, **kwargs)
        splits = datasets.DatasetDict()
        for split, those in files.items():  # each with files of one format, which may be another than the others'
            kind = {".parquet": "parquet", ".csv": "csv"}.get(those[0].suffix, "json")
            splits |= original(kind, data_files={split: [str(file) for file in those]})
            if kind == "csv":
                _refuse_lists(those[0], splits[split])
        return splits

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original
