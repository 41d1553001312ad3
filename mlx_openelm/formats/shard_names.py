"""The files of a model whose weights are in shards: `model-00001-of-00002.safetensors`."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError
from ..wording import some
from . import foreign

_SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")
_LISTED = 8  # missing files named in an error before the rest is only counted


def complete_sets(folder: Path, indexed: set[str]) -> list[Path]:
    """The files that an index names, with those of the same sets of shards that it does not name.

    Raises:
        RequestError: a shard is missing.
    """
    sets = {_set_of(name) for name in indexed}
    names = indexed | {file.name for file in folder.glob("*.safetensors") if _set_of(file.name) in sets}
    _check_numbers(folder, names)
    return [folder / name for name in sorted(names)]


def find_unindexed(folder: Path, whole: str | None) -> list[Path]:
    """The weight files of a folder without an index; `whole` is the name of its file that is not a shard, if any.

    Raises:
        RequestError: there are no weights, or a shard is missing.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if whole is not None:
        # Shards, variants (model.fp16.safetensors) and copies (model (1).safetensors) repeat the same model. Files
        # named like model-2.safetensors may hold the rest of it; mlx-lm reads them too.
        files = [f for f in files if f.name == whole or (f.name.startswith("model-") and not _SHARD.fullmatch(f.name))]
    files = files or sorted(folder.glob("weights*.safetensors"))
    if not files:
        raise foreign.no_weights(folder)
    _check_numbers(folder, (file.name for file in files))
    return files


def _set_of(name: str) -> tuple[str, str] | str:
    """What identifies a set of shards: the name before the numbers, and the total; for other files the name."""
    found = _SHARD.fullmatch(name)
    return (found[1], found[3]) if found else name


def _check_numbers(folder: Path, names: Iterable[str]) -> None:
    """Raise RequestError if shards are missing from a numbered set."""
    sets: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for found in filter(None, map(_SHARD.fullmatch, names)):
        sets[found[1], found[3]].add(int(found[2]))
    missing: list[str] = []
    count = 0
    for (stem, total), numbers in sorted(sets.items()):
        if len(numbers) == int(total) and numbers == set(range(len(numbers))):  # some programs count from 0
            continue
        absent = (number for number in range(1, int(total) + 1) if number not in numbers)
        first = itertools.islice(absent, _LISTED)
        missing += [f"{stem}-{number:0{len(total)}}-of-{total}.safetensors" for number in first]
        count += int(total) - sum(number <= int(total) for number in numbers)
    if missing:
        raise RequestError(f"{folder} is incomplete, missing: {some(missing, count)}; download the folder again.")
