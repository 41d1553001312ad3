"""Finding the train, valid and test files of a data set by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import RequestError

# Best first, for data sets on the hub in several formats: those that need no further package.
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SPLITS = ("train", "valid", "test")
_OTHER_NAMES = {"validation": "valid", "val": "valid", "dev": "valid"}
_SPLIT_NAME = re.compile(rf"({'|'.join((*SPLITS, *_OTHER_NAMES))})(?:[-_.].*)?")
_SHARD = re.compile(r"-\d+-of-(\d+).*$")
# Metadata of a data set on the hub, not data.
_DESCRIPTIONS = ("dataset_infos.json", "dataset_info.json", "state.json")


def suffix_of(name: str) -> str | None:
    """The suffix of a data file; None for other files."""
    if name.rpartition("/")[2] in _DESCRIPTIONS:
        return None
    return next((suffix for suffix in reversed(SUFFIXES) if name.lower().endswith(suffix)), None)


def find_splits(names: Iterable[str], where: str, *, choose_format: bool = False) -> dict[str, list[str]]:
    """The files of each split among `names`, paths below one folder; shards in order.

    A split is recognized by the file's name (`train.jsonl`, `train-00000-of-00002.parquet`), otherwise by the folder's
    (`data/train/0000.parquet`).

    Args:
        choose_format: of several formats, take the first in `SUFFIXES`; otherwise they are an error.

    Raises:
        RequestError: several candidates for a split, such as `train.json` and `train.jsonl`.
    """
    candidates: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name in sorted(names):
        suffix = suffix_of(name)
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
    return {split: _only_one(candidates[split], split, where, choose_format) for split in SPLITS if split in candidates}


def _only_one(families: dict[tuple[str, str], list[str]], split: str, where: str, choose_format: bool) -> list[str]:
    """The files of the one candidate for `split`."""
    # A name that is exactly the split's (`train`) wins over those that begin with it (`train_sft`).
    exact = {key: files for key, files in families.items() if key[0].rpartition("/")[2].lower() == split}
    families = exact or families
    if choose_format:
        best = min(SUFFIXES.index(suffix) for _, suffix in families)
        families = {key: files for key, files in families.items() if key[1] == SUFFIXES[best]}
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
