"""safetensors files: headers checked before anything is read, tensors read lazily, written one at a time.

Format: 8 bytes little-endian length of a JSON header, the header, the data; the header gives each
tensor's dtype, shape and byte range within the data.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError, quote
from ..inputs import check_file, read_json, refuse_pointer
from ..wording import SOME, some
from . import foreign
from .weights import Tensor, Weights, streaming

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

# What is read; integers but U32 and U8 only to be refused by the tensor's name, or to be left out.
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SHARD = re.compile(r"(.+)-([0-9]+)-of-([0-9]+)\.safetensors")
# Neither a path, nor half a character, which no file's name holds.
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")
_MAX_HEADER = 100_000_000  # as the format's reference library
# Of the largest tensor: what is prepared while one is written; the next matrix, and seldom one more.
_AHEAD_SHARE = 16


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: Path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is read from, as transformers and mlx-lm choose them.

    `model.safetensors` goes before shards, and before an index that does not name it; then the shards of the index,
    with those of the same set that it does not list; else every `model*.safetensors`, or `weights*.safetensors`.

    Raises:
        RequestError: none there, a damaged index, a shard that is missing or lies outside the folder.
    """
    whole = folder / WHOLE
    has_whole = whole.exists() or whole.is_symlink()
    indexed = _indexed(folder)
    if indexed is None:
        files = _unindexed(folder, has_whole)
        _check_numbers(folder, (file.name for file in files))
        return files
    if has_whole and WHOLE not in indexed:
        return [whole]
    if absent := [name for name in sorted(indexed) if not (folder / name).is_file()]:
        raise RequestError(f"{folder / INDEX} names {some(absent)}: missing in its folder; download the folder again.")
    sets = {_set_of(name) for name in indexed}
    names = indexed | {file.name for file in folder.glob("*.safetensors") if _set_of(file.name) in sets}
    _check_numbers(folder, names)
    return [folder / name for name in sorted(names)]


def index_of(files: Sequence[Path]) -> Path | None:
    """The index beside the weight files of a model, if it names all of them and nothing else."""
    folder = files[0].parent
    return folder / INDEX if _indexed(folder) == {file.name for file in files} else None


def _indexed(folder: Path) -> set[str] | None:
    """The files that a folder's index names; None without an index."""
    index = folder / INDEX
    if not index.exists():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map.")
    for name in weight_map.values():
        # A shard is a file beside its index; anything else could read what is not the model's.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or len(name.encode()) > 255:
            raise RequestError(f"{index} names {quote(name)}, which is not a file in its folder.")
    return set(weight_map.values())


def _unindexed(folder: Path, has_whole: bool) -> list[Path]:
    files = sorted(folder.glob("model*.safetensors"))
    if has_whole:
        # Shards, variants (model.fp16.safetensors) and copies (model (1).safetensors) hold the same model again; files
        # named like model-2.safetensors may hold the rest of it, and mlx-lm reads them.
        files = [f for f in files if f.name == WHOLE or (f.name.startswith("model-") and not _SHARD.fullmatch(f.name))]
    files = files or sorted(folder.glob("weights*.safetensors"))
    if not files:
        raise foreign.no_weights(folder)
    return files


def _set_of(name: str) -> tuple[str, str] | str:
    """What the shards of one set have in common: the name before their numbers, and how many there are."""
    found = _SHARD.fullmatch(name)
    return (found[1], found[3]) if found else name


def _check_numbers(folder: Path, names: Iterable[str]) -> None:
    """Raises RequestError if there are shards but not all that their numbers promise."""
    sets: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
    for found in filter(None, map(_SHARD.fullmatch, names)):
        sets[found[1], found[3]].add(int(found[2]))
    missing: list[str] = []
    count = 0
    for (stem, total), numbers in sorted(sets.items()):
        if len(numbers) == int(total) and numbers == set(range(len(numbers))):  # some programs count from 0
            continue
        lacking = (number for number in range(1, int(total) + 1) if number not in numbers)
        shown = itertools.islice(lacking, SOME)
        missing += [f"{stem}-{number:0{len(total)}}-of-{total}.safetensors" for number in shown]
        count += int(total) - sum(number <= int(total) for number in numbers)
    if missing:
        raise RequestError(f"{folder} is incomplete, missing: {some(missing, count)}; download the folder again.")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in one file, from its header alone; refused are the files that the reference library refuses.

    Raises:
        RequestError: the file is truncated, corrupt, or holds a type that is not supported.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                refuse_pointer(path, start + file.read(64))
                raise _damaged(path, "its header is cut off" if size else "it is empty, even its header is cut off")
            raw = file.read(length)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its metadata are not strings by name")
    tensors = {name: _tensor_info(path, name, entry, size - 8 - length) for name, entry in header.items()}
    _check_filled(path, {name: entry["data_offsets"] for name, entry in header.items()}, size - 8 - length)
    return tensors


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, value in pairs:
            if name in values:
                raise _damaged(path, f"its header names {quote(name)} twice")
            values[name] = value
        "".join(values).encode()  # half a character is no name
        return values

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _tensor_info(path: Path, name: str, entry: object, data_bytes: int) -> TensorInfo:
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
            "or U32 and U8 for what MLX packed."
        )
    if end - start != _count_bytes(shape, DTYPES[dtype].size, end - start):
        raise _damaged(path, f"the bytes of {quote(name)} do not match its shape")
    if end > data_bytes:
        raise _damaged(path, f"{quote(name)} is cut off")
    return TensorInfo(DTYPES[dtype], tuple(shape), path)


def _count_bytes(shape: list[int], size: int, limit: int) -> int:
    """The bytes of an array; of one that has more than `limit`, some number beyond it."""
    if 0 in shape:
        return 0
    for n in shape:
        size *= n
        if size > limit:
            break
    return size


def _check_filled(path: Path, spans: Mapping[str, tuple[int, int]], data_bytes: int) -> None:
    """The data are the tensors one after the other: what overlaps or is left over means that the file is damaged."""
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
        RequestError: as `read_header`, or a tensor stands in two files.
    """
    tensors: dict[str, TensorInfo] = {}
    for path in files:
        for name, info in read_header(path).items():
            if name in tensors:
                raise RequestError(
                    f"{name} stands both in {tensors[name].file.name} and in {path.name}; remove the one that does not "
                    f"belong to the model from {path.parent}."
                )
            tensors[name] = info
    return tensors


def read_lazily(files: Iterable[Path]) -> dict[str, mx.array]:
    """Every tensor in `files`, unevaluated: MLX reads its bytes, with several threads, when it is first used."""
    weights: dict[str, mx.array] = {}
    for path in files:
        # The format is named, since files in the hub's cache may be links to names without an ending.
        try:
            weights.update(mx.load(str(path), format="safetensors"))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise _damaged(path, f"MLX cannot read it ({error})") from None
    return weights


def write_shards(
    folder: Path,
    weights: Weights,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `weights` to `folder` in shards of at most `max_shard_bytes`, with the index; empties them.

    Each tensor is dropped once it is written, and few are read ahead, so that they never fill memory together.

    Args:
        progress: called with the bytes written so far and in all.
    """
    tensors = weights.tensors()
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    names = [WHOLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    headers = [_header({name: tensors[name] for name in shard}, metadata or {}) for shard in shards]
    del tensors
    written, total = 0, sum(sizes.values())
    with streaming():
        values = _evaluated(weights, max(sizes.values(), default=0) // _AHEAD_SHARE)
        for shard, file_name, header in zip(shards, names, headers, strict=True):
            with (folder / file_name).open("wb") as file:
                file.write(header)
                for name in shard:
                    file.write(_bytes(next(values)))
                    written += sizes[name]
                    if progress is not None:
                        progress(written, total)
    weight_map = {name: file_name for shard, file_name in zip(shards, names, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _evaluated(weights: Weights, ahead: int) -> Iterator[mx.array]:
    """Every tensor in order, taken out of `weights`; while the caller writes one, the next are read and computed.

    At least `ahead` bytes of them: a matrix behind small tensors, or behind parts of one before, must not wait.
    """
    waiting: collections.deque[mx.array] = collections.deque()
    behind = 0  # bytes of all that wait but the first
    for name in list(weights):
        tensor = weights.take(name)
        mx.async_eval(tensor)
        behind += tensor.nbytes if waiting else 0
        waiting.append(tensor)
        del tensor
        while len(waiting) > 1 and behind >= ahead:
            yield waiting.popleft()
            behind -= waiting[0].nbytes
    while waiting:
        yield waiting.popleft()


def _bytes(tensor: mx.array) -> memoryview:
    return memoryview(mx.contiguous(tensor.reshape(-1)).view(mx.uint8))  # type: ignore[arg-type]


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into shards; a tensor larger than the limit gets one of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the data, so it starts on a multiple of 8
    return len(header).to_bytes(8, "little") + header
