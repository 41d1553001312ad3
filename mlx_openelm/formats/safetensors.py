"""safetensors files: headers checked before anything is read, tensors read lazily, written one at a time.

Format: 8 bytes little-endian length of a JSON header, the header, the data; the header gives each
tensor's dtype, shape and byte range within the data.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import mlx.core as mx

from ..errors import RequestError
from ..inputs import read_json
from .weights import Tensor, Weights, streaming

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
# Of the largest tensor: what is prepared while one is written; the next matrix, and seldom one more.
_AHEAD_SHARE = 16


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    file: Path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else every `model*.safetensors`.

    Raises:
        RequestError: none there, a damaged index, a shard that is missing or lies outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("weights*.safetensors"))
        if not files:
            raise RequestError(f"{folder} holds no model*.safetensors file.")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map.")
    for name in weight_map.values():
        # A shard is a file beside its index; anything else could read what is not the model's.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise RequestError(f"{index} names {name!r}, which is not a file in its folder.")
        if not (folder / name).is_file():
            raise RequestError(f"{index} names {name}, which is missing; download the folder again.")
    return [folder / name for name in sorted(set(weight_map.values()))]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in one file, from its header alone.

    Raises:
        RequestError: the file is truncated, corrupt, or holds a type that is not supported.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, "its header is cut off")
            raw = file.read(length)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, size - 8 - length) for name, entry in header.items()}
    spans = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, _), (start, _, name) in pairwise(spans):
        if start < end:
            raise _damaged(path, f"{name} overlaps another tensor")
    return tensors


def _tensor_info(path: Path, name: str, entry: object, data_bytes: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[index]
        well_formed = all(type(n) is int and n >= 0 for n in (*shape, start, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise _damaged(path, f"its header entry for {name} is malformed")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise RequestError(f"{path} stores {name} as {dtype}, which is not supported; expected {', '.join(DTYPES)}.")
    if end - start != math.prod(shape) * DTYPES[dtype].size:
        raise _damaged(path, f"the bytes of {name} do not match its shape")
    if end > data_bytes:
        raise _damaged(path, f"{name} is cut off")
    return TensorInfo(DTYPES[dtype], tuple(shape), path)


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
                raise RequestError(f"{name} stands both in {tensors[name].file.name} and in {path.name}.")
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
    names = ["model.safetensors"]
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
