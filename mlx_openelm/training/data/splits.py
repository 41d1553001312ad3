"""Finding the train, valid and test files of a data set by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ...errors import RequestError

# Best first, for data sets on the hub in several formats: those that need no further package.
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SPLITS = ("train", "valid", "test")
_OTHER_NAMES = {"validation": "valid", "val": "valid", "dev": "valid"}
_SPLIT_NAME = re.compile(rf"({'|'.join((*SPLITS, *_OTHER_NAMES))})(?:[-_.].*)?")
_SHARD = re.compile(r"-\d+-of-(\d+).*$")
# Metadata of a data set on the hub, not data.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "state.json")


def suffix_of(name: str, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """The suffix of a data file; None for other files."""
    if name.rpartition("/")[2] in _DESCRIPTIONS:
        return None
    return max((suffix for suffix in suffixes if name.lower().endswith(suffix)), key=len, default=None)


def split_of(name: str, suffix: str) -> str | None:
    """The split that a path names in its file's name, or else in its folder's: `train`, `valid`, `test` or None."""
    folder, _, stem = name[: -len(suffix)].rpartition("/")
    names = (stem, folder.rpartition("/")[2])
    found = next((match for part in names if (match := _SPLIT_NAME.fullmatch(part.lower()))), None)
    return None if found is None else _OTHER_NAMES.get(found[1], found[1])


def find_splits(
    names: Iterable[str], where: str, *, choose_format: bool = False, suffixes: Sequence[str] = SUFFIXES
) -> dict[str, list[str]]:
    """The files of each split among `names`, paths below one folder; shards in order.

    A split is recognized by the file's name (`train.jsonl`, `train-00000-of-00002.parquet`), otherwise by the folder's
    (`data/train/0000.parquet`).

    Args:
        choose_format: of several formats, take the first in `suffixes`; otherwise they are an error.
        suffixes: those of data files, best first.

    Raises:
        RequestError: several candidates for a split, such as `train.json` and `train.jsonl`.
    """
    candidates: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name in sorted(names):
        suffix = suffix_of(name, suffixes)
        if suffix is None:
            continue
        folder, _, stem = name[: -len(suffix)].rpartition("/")
        family = _SHARD.sub("", stem)
        found = _SPLIT_NAME.fullmatch(stem.lower())
        if found is None:
            folder, _, family = folder.rpartition("/")
            found = _SPLIT_NAME.fullmatch(family.lower())
        if found is not None:
            split = _OTHER_NAMES.get(found[1], found[1])
            candidates.setdefault(split, {}).setdefault((f"{folder}/{family}", suffix), []).append(name)
    order = suffixes if choose_format else None
    return {split: _only_one(candidates[split], split, where, order) for split in SPLITS if split in candidates}


def _only_one(
    families: dict[tuple[str, str], list[str]], split: str, where: str, order: Sequence[str] | None
) -> list[str]:
    """The files of the one candidate for `split`."""
    # A name that is exactly the split's (`train`) wins over those that begin with it (`train_sft`).
    exact = {key: files for key, files in families.items() if key[0].rpartition("/")[2].lower() == split}
    families = exact or families
    if order is not None:
        best = min(order.index(suffix) for _, suffix in families)
        families = {key: files for key, files in families.items() if key[1] == order[best]}
    if len(families) > 1:
        names = ", ".join(sorted(files[0] for files in families.values()))
        raise RequestError(f"{where} has several files for {split} ({names}): keep one, or give one file alone.")
    files = next(iter(families.values()))
    ending = next(iter(families))[1]
    shards = [_SHARD.search(name.removesuffix(ending)) for name in files]
    totals = {int(shard[1]) for shard in shards if shard is not None}
    if len(totals) > 1:
        raise RequestError(f"{where} has files of several data sets for {split} ({', '.join(files[:4])}): keep one.")
    if totals and totals != {len(files)}:
        raise RequestError(f"{where} has {len(files)} of the {totals.pop()} files of {split} ({files[0]}).")
    return files
