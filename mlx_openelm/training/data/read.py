"""Reading the records of `--data` (a folder, one file, or a data set on the hub) as train, valid and test.

The formats are JSON lines (`.jsonl`), JSON arrays (`.json`), both also gzipped, and `.parquet`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import RequestError
from ...inputs import check_file, to_path
from ...json_values import NotJSON, read_values
from ...wording import install
from .kinds import KINDS, Faults, Kind, Record, columns_to_read, recognize
from .splits import SPLITS, SUFFIXES, find_splits, suffix_of

_EXPECTED = "train.jsonl, and valid.jsonl and test.jsonl where you have them (or .json, .parquet)"


@dataclass(frozen=True)
class Splits:
    """The records of each split, in the order of their files; a split that is not needed or does not exist is empty.

    `notes` are lines to show before training, about what was held out for validation.
    """

    train: list[Record] = field(default_factory=list)
    valid: list[Record] = field(default_factory=list)
    test: list[Record] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def read_splits(
    data: str | Path,
    *,
    valid_fraction: float = 0.1,
    seed: int = 0,
    need: Sequence[str] = ("train",),
    kinds: Sequence[Kind] = KINDS,
) -> Splits:
    """Read the records of a data set.

    A folder has `train`, `valid` (or `validation`, `val`, `dev`) and `test` files, directly or in its `data` folder,
    whole or in shards. Without a validation file, and if `data` is a single file, `valid_fraction` of the training
    records are drawn with `seed` and held out, always the same ones for the same file. If only the test split is
    needed, a single file is used whole.

    Args:
        data: a folder, a file, or a data set on the hub, `owner/name`.
        need: the splits that must exist. With `train`, validation records are read too; other splits are not.
        kinds: those that the records may be of.

    Raises:
        RequestError: no data, a missing split, ambiguous files, or bad records; the message names the first one's file
            and line (or item, or row) and the number of others.
        OpenELMError: a download that failed.
    """
    if not 0 <= valid_fraction < 1:
        raise RequestError(f"--valid-fraction must be at least 0 and less than 1, got {valid_fraction}.")
    files = _find_files(data, need)
    missing = [split for split in need if split not in files]
    if missing:
        found = f"only {', '.join(files)}" if files else "nothing"
        raise RequestError(f"{data} has no {' and no '.join(missing)} data ({found}); give a folder with {_EXPECTED}.")
    wanted = {*need, "valid"} if "train" in need else {*need}
    records = {split: read_records(files[split], kinds) for split in SPLITS if split in files and split in wanted}
    notes: tuple[str, ...] = ()
    if "train" in need and "valid" not in files:
        name = files["train"][0].name if len(files["train"]) == 1 else str(data)
        records["train"], records["valid"] = hold_out(records["train"], valid_fraction, seed)
        notes = (_hold_out_note(name, len(records["train"]), len(records["valid"])),)
    return Splits(**records, notes=notes)


def hold_out(records: list[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Split off a `fraction` of the records, drawn with `seed`; returns the rest and that fraction, both in order.

    At least one is drawn if `fraction` is not 0, and at least one is left.
    """
    number = min(max(1, round(len(records) * fraction)), len(records) - 1) if fraction else 0
    drawn = set(random.Random(seed).sample(range(len(records)), number))
    kept = [record for index, record in enumerate(records) if index not in drawn]
    return kept, [records[index] for index in sorted(drawn)]


def _hold_out_note(name: str, kept: int, held_out: int) -> str:
    if not held_out:
        return f"{name} has no validation data beside it: training runs without validation."
    return (
        f"{name} has no validation data beside it: {held_out} of its {kept + held_out} examples, drawn by the seed, "
        "are held out for validation."
    )


def whole_file_note(data: str | Path) -> str | None:
    """A note for a test alone if `data` is a single file, else None."""
    path = to_path(data)
    if not os.path.isfile(path):
        return None
    return f"{path.name} is used for testing as a whole; it should not contain training examples."


def _find_files(data: str | Path, need: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each split."""
    if not str(data).strip():  # it would mean the current folder
        raise RequestError(f"--data is empty: name a file, or a folder with {_EXPECTED}.")
    # For too long a name or an unknown user, os.path answers False; `Path` raises.
    path = to_path(data)
    if os.path.isdir(path):
        names = [
            found.relative_to(path).as_posix()
            for folder in (path, path / "data")
            if folder.is_dir()
            for found in folder.iterdir()
            if not found.is_dir() and not found.name.startswith(".")
        ]
        splits = find_splits(names, str(data))
        if not splits:
            raise RequestError(f"{data} holds no data: name its files {_EXPECTED}.")
        return {split: [path / name for name in files] for split, files in splits.items()}
    if os.path.exists(path):
        check_file(path)
        if suffix_of(path.name) is None:
            raise RequestError(
                f'{data} is not a data file; give one of {", ".join(SUFFIXES)} (plain text as {{"text": ...}}, '
                "one example a line)."
            )
        return {"test" if tuple(need) == ("test",) else "train": [path]}
    owner, _, name = str(data).partition("/")
    is_path = suffix_of(path.name) is not None or not owner or not name or "/" in name or owner in (".", "..", "~")
    if is_path:
        raise RequestError(f"There is no folder or file {data}; give one, or a data set on the hub as owner/name.")
    from .hub import download_splits

    files = download_splits(str(data))
    return files if set(files) != {"all"} else {"test" if tuple(need) == ("test",) else "train": files["all"]}


def read_records(paths: Sequence[Path], kinds: Sequence[Kind] = KINDS) -> list[Record]:
    """The records of the files of a split, all checked to be examples of the same kind.

    Raises:
        RequestError: an unreadable or empty file, or bad records, by file and line.
    """
    records: list[Record] = []
    faults = Faults()
    for path in paths:
        check_file(path)
        before = len(records), faults.number
        is_table = path.suffix.lower() == ".parquet"
        for value, source in _read_parquet(path, kinds) if is_table else read_values(path):
            if isinstance(value, dict):
                records.append(Record(value, source))
            else:
                faults.add(source, value.reason if isinstance(value, NotJSON) else "is not a JSON object {...}")
        if (len(records), faults.number) == before:
            raise RequestError(f"{path.name} is empty: it holds no examples ({path}).")
    faults.check()
    recognize(records, kinds)
    return records


def _read_parquet(path: Path, kinds: Sequence[Kind]) -> Iterable[tuple[Any, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise RequestError(f"Reading {path.name} needs the package pyarrow: {install('data')}.") from None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            # Other columns may be large and are not needed, except to explain what is wrong with a table of no kind.
            columns = columns_to_read(file.schema_arrow.names, kinds)
            rows = file.read(columns=columns or None).to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # text that is not UTF-8, a date out of range
        reason = " ".join(str(error).split())
        raise RequestError(f"{path.name} cannot be read as parquet ({reason}).") from None
    for number, row in enumerate(rows, 1):
        yield row, f"{path.name}, row {number}"
