"""Writing a model as safetensors: shards of limited size and their index, one tensor in memory at a time."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from .safetensors import DTYPES, INDEX, WHOLE, Tensor, Weights, streaming

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# While a tensor is written, this fraction of the largest one's bytes is prepared: usually the next matrix.
_AHEAD_SHARE = 16


def write(
    folder: Path,
    weights: Weights,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `weights` to `folder` in shards of at most `max_shard_bytes`, with the index; empties `weights`.

    Each tensor is dropped once it is written, and few are read ahead, so that they are never all in memory.

    Args:
        metadata: strings by name for the header of each file.
        progress: called with the bytes written so far and the total.
    """
    tensors = weights.tensors
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    shards = _split(sizes, max_shard_bytes)
    names = [WHOLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    headers = [_header({name: tensors[name] for name in shard}, metadata or {}) for shard in shards]
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

    At least `ahead` bytes are prepared, so that a matrix behind small tensors does not wait for them to be written.
    """
    waiting: collections.deque[mx.array] = collections.deque()
    behind = 0  # bytes of all waiting tensors but the first
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
    """The raw values of a tensor, without a copy if it is contiguous."""
    return memoryview(mx.contiguous(tensor.reshape(-1)).view(mx.uint8))  # type: ignore[arg-type]


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, split into shards; a tensor larger than the limit gets a shard of its own."""
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
    """The bytes before the data of a file: the header's length and the header."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map the data into memory, so it is aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header
