"""Reading safetensors files: which files make a model, headers checked first, tensors read lazily.

Format: the length of a JSON header (8 bytes, little-endian), the header, the data. The header gives each tensor's
dtype, shape and byte range within the data. `shards` writes them.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError, quote
from ..inputs import LFS_POINTER, check_file, pointer_error, read_json
from ..wording import some
from . import foreign

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# The types that can be read. Of the integers, models use only U32 and U8; the rest are read so that an error can name
# the tensor, or so that it can be dropped.
DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "BOOL": mx.bool_,
    "I8": mx.int8,
    "I16": mx.int16,
    "I32": mx.int32,
    "I64": mx.int64,
    "U16": mx.uint16,
    "U64": mx.uint64,
}
_SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")
# A file name: not a path, and without lone surrogates, which no file name has.
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")
_LISTED = 8  # missing files named in an error before the rest is only counted
_MAX_HEADER = 100_000_000  # as in the format's reference library


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header, and the file it is in."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: Path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is read from, chosen as transformers and mlx-lm do.

    `model.safetensors` wins over shards, and over an index that does not name it; then the shards of the index, with
    those of the same set that it does not list; else every `model*.safetensors`, or `weights*.safetensors`.

    Raises:
        RequestError: there are no weights, the index is damaged, or a shard is missing or outside the folder.
    """
    whole = folder / WHOLE
    has_whole = whole.exists() or whole.is_symlink()
    indexed = _indexed(folder)
    if indexed is None:
        files = _unindexed(folder, has_whole)
        _check_numbers(folder, (file.name for file in files))
        return files
    if (has_whole and WHOLE not in indexed) or (indexed == {WHOLE} and whole.is_file()):
        return [whole]
    if absent := [name for name in sorted(indexed) if not (folder / name).is_file()]:
        raise RequestError(f"{folder / INDEX} names {some(absent)}, which is missing: download the folder again.")
    sets = {_set_of(name) for name in indexed}
    names = indexed | {file.name for file in folder.glob("*.safetensors") if _set_of(file.name) in sets}
    _check_numbers(folder, names)
    return [folder / name for name in sorted(names)]


def index_of(files: Sequence[Path]) -> Path | None:
    """The index beside the weight files of a model, if it names all of them and nothing else."""
    folder = files[0].parent
    return folder / INDEX if _indexed(folder) == {file.name for file in files} else None


def _indexed(folder: Path) -> set[str] | None:
    """The files that a folder's index names; None if there is no index."""
    index = folder / INDEX
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map.")
    for name in weight_map.values():
        # Shards are files beside their index; any other path could reach files that are not the model's.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or len(name.encode()) > 255:
            raise RequestError(f"{index} names {quote(name)}, which is not a file in its folder.")
    return set(weight_map.values())


def _unindexed(folder: Path, has_whole: bool) -> list[Path]:
    """The weight files of a folder without an index; RequestError if there are none."""
    files = sorted(folder.glob("model*.safetensors"))
    if has_whole:
        # Shards, variants (model.fp16.safetensors) and copies (model (1).safetensors) repeat the same model. Files
        # named like model-2.safetensors may hold the rest of it; mlx-lm reads them too.
        files = [f for f in files if f.name == WHOLE or (f.name.startswith("model-") and not _SHARD.fullmatch(f.name))]
    files = files or sorted(folder.glob("weights*.safetensors"))
    if not files:
        raise foreign.no_weights(folder)
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


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in one file, from its header alone. Refuses every file that the reference library refuses.

    Raises:
        RequestError: the file is truncated, corrupt, or has a type that is not supported.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                if (start + file.read(64)).startswith(LFS_POINTER):
                    raise pointer_error(path)
                raise _damaged(path, "its header is cut off" if size else "it is empty, even its header is cut off")
            raw = file.read(length)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(_unique, path))
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its metadata are not strings by name")
    tensors = {name: _tensor_info(path, name, entry, size - 8 - length) for name, entry in header.items()}
    _check_filled(path, {name: entry["data_offsets"] for name, entry in header.items()}, size - 8 - length)
    return tensors


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of the header; RequestError for a name that occurs twice, ValueError for a lone surrogate."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _damaged(path, f"its header names {quote(name)} twice")
        values[name] = value
    "".join(values).encode()
    return values


def _tensor_info(path: Path, name: str, entry: object, data_bytes: int) -> TensorInfo:
    """One entry of the header, checked against the number of data bytes in the file."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        well_formed = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise _damaged(path, f"its header entry for {quote(name)} is malformed")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(
            f"{path} stores {quote(name)} as {quote(dtype)}, which is not supported; expected F32, F16 or BF16, "
            "or U32 and U8 for weights packed by MLX."
        )
    nbytes = 0 if 0 in shape else DTYPES[dtype].size
    for n in shape:
        nbytes *= n
        if nbytes > end - start:  # no need to multiply the many dimensions of a hostile file
            break
    if nbytes != end - start:
        raise _damaged(path, f"the bytes of {quote(name)} do not match its shape")
    if end > data_bytes:
        raise _damaged(path, f"{quote(name)} is cut off")
    return TensorInfo(DTYPES[dtype], tuple(shape), path)


def _check_filled(path: Path, spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    """Tensors must fill the data one after the other; RequestError for overlaps and for bytes of no tensor."""
    reached = 0
    for start, end, name in sorted((start, end, name) for name, (start, end) in spans.items()):
        if start < reached:
            raise _damaged(path, f"{quote(name)} overlaps another tensor")
        if start > reached:
            raise _damaged(path, f"{start - reached} bytes before {quote(name)} belong to no tensor")
        reached = end
    if reached < data_bytes:
        raise _damaged(path, f"{data_bytes - reached} bytes at its end belong to no tensor")


def _damaged(path: Path, why: str) -> RequestError:
    return RequestError(f"{path} is damaged: {why}; download or convert it again.")


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors in all of `files`.

    Raises:
        RequestError: as `read_header`, or a tensor is in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise RequestError(
                    f"{name} is both in {tensors[name].file.name} and in {path.name}; remove the file that does not "
                    f"belong to the model from {path.parent}."
                )
            tensors[name] = info
    return tensors


def read_lazily(files: Iterable[Path]) -> dict[str, mx.array]:
    """Every tensor in `files`, unevaluated: MLX reads its bytes, with several threads, when it is first used."""
    weights: dict[str, mx.array] = {}
    for path in files:
        # Give the format: files in the hub's cache may be links to names without an ending.
        try:
            weights.update(mx.load(str(path), format="safetensors"))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise _damaged(path, f"MLX cannot read it ({error})") from None
    return weights
