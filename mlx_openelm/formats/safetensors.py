"""Reading safetensors files: which files make a model, headers checked first, tensors read lazily.

Format: the length of a JSON header (8 bytes, little-endian), the header, the data. The header gives each tensor's
dtype, shape and byte range within the data. `shards` writes such files.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import RequestError, quote
from ..inputs import LFS_POINTER, check_file, pointer_error, read_json
from ..wording import some
from . import shard_names

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
# The types of weights, by the names that flags and files give them.
WEIGHT_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# A file name: not a path, and without lone surrogates.
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")
_MAX_HEADER = 100_000_000  # as in the format's reference library
# Bytes of freed buffers that MLX may keep for reuse while tensors of many sizes pass through memory.
_KEPT_BYTES = 1 << 28


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header."""

    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not read yet: its type, its shape, and the function that reads or computes it."""

    dtype: mx.Dtype
    shape: tuple[int, ...]
    read: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size

    def cast(self, dtype: mx.Dtype) -> Tensor:
        """The same values in another type."""
        return self if dtype == self.dtype else Tensor(dtype, self.shape, lambda: self.read().astype(dtype))


@dataclass(eq=False, repr=False)
class Weights(Mapping[str, mx.array]):
    """A model's tensors by name, read one at a time, so that they are never all in memory together.

    `weights[name]` reads a tensor, `take` also forgets it; `tensors` gives types and shapes without reading. It owns
    the dictionary it is given, so that a tensor it forgets is freed.
    """

    tensors: dict[str, Tensor]

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, mx.array]) -> Weights:
        """From arrays that exist already, or that MLX reads when they are first used."""
        # A default argument binds each array, not the loop's last.
        return cls({n: Tensor(a.dtype, a.shape, lambda array=a: array) for n, a in arrays.items()})  # type: ignore[misc]

    def __getitem__(self, name: str) -> mx.array:
        return self.tensors[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def take(self, name: str) -> mx.array:
        """Read a tensor and forget it; the array may still be lazy."""
        return self.tensors.pop(name).read()


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """A block in which tensors are read, used and dropped one by one: MLX keeps few of their buffers for reuse."""
    limit = mx.set_cache_limit(_KEPT_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(limit)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model folder is read from, chosen as transformers and mlx-lm do.

    `model.safetensors` wins over shards, and over an index that does not name it; then the shards of the index, with
    those of the same set that it does not list; else every `model*.safetensors`, or `weights*.safetensors`.

    Raises:
        RequestError: there are no weights, the index is damaged, or a shard is missing or outside the folder.
    """
    whole, index = folder / WHOLE, folder / INDEX
    has_whole = whole.exists() or whole.is_symlink()
    if not index.exists():
        return shard_names.find_unindexed(folder, WHOLE if has_whole else None)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RequestError(f"{index} has no weight_map.")
    for name in weight_map.values():
        # Shards are files beside their index; any other path could reach files that are not the model's.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or len(name.encode()) > 255:
            raise RequestError(f"{index} names {quote(name)}, which is not a file in its folder.")
    indexed = set(weight_map.values())
    if (has_whole and WHOLE not in indexed) or (indexed == {WHOLE} and whole.is_file()):
        return [whole]
    if absent := [name for name in sorted(indexed) if not (folder / name).is_file()]:
        raise RequestError(f"{index} names {some(absent)}, which is missing; download the folder again.")
    return shard_names.complete_sets(folder, indexed)


def index_of(files: Sequence[Path]) -> Path | None:
    """The index beside the files that `weight_files` gave, if it names all of them and nothing else."""
    index = files[0].parent / INDEX
    if not index.exists():
        return None
    return index if set(read_json(index)["weight_map"].values()) == {file.name for file in files} else None


def read_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor in `files`, unread: headers are checked, and MLX reads the bytes, in threads, when they are used.

    Raises:
        RequestError: as `read_header`, or a tensor is in two files.
    """
    tensors: dict[str, Tensor] = {}
    found: dict[str, Path] = {}
    for path in files:
        names = read_header(path)  # in the order of the file, and MLX checks less
        try:  # with the format, since files in the hub's cache may be links to names without an ending
            arrays: dict[str, mx.array] = mx.load(str(path), format="safetensors")  # type: ignore[assignment]
        except (RuntimeError, ValueError) as error:
            raise _damaged(path, f"MLX cannot read it ({error})") from None
        for name in names:
            array = arrays[name]
            if name in tensors:
                raise RequestError(
                    f"{name} is both in {found[name].name} and in {path.name}; remove the file that does not "
                    f"belong to the model from {path.parent}."
                )
            found[name] = path
            tensors[name] = Tensor(array.dtype, array.shape, lambda array=array: array)  # type: ignore[misc]
    return tensors


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
        # JSON objects as tuples of (name, value) pairs: a dict would hide names that occur twice.
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=tuple)
        objects = [header, *(value for _, value in header)] if isinstance(header, tuple) else []
        for pairs in objects:
            names = [name for name, _ in pairs] if isinstance(pairs, tuple) else []
            "".join(names).encode()  # a UnicodeError, which is a ValueError, for a lone surrogate
            if len(set(names)) < len(names):
                twice, _ = collections.Counter(names).most_common(1)[0]
                raise _damaged(path, f"{quote(twice)} appears twice in its header")
    except RequestError:
        raise
    except (ValueError, RecursionError):
        raise _damaged(path, "its header is not JSON") from None
    if not isinstance(header, tuple):
        raise _damaged(path, "its header is not a JSON object")
    return _check_tensors(path, {n: dict(v) if isinstance(v, tuple) else v for n, v in header}, size - 8 - length)


def _check_tensors(path: Path, header: dict[str, Any], data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors in a header; they must fill the file's `data_bytes` bytes of data, one after the other."""
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise _damaged(path, "its metadata is not a dictionary of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = (*shape, start, end)
            well_formed = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
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
        tensors[name] = TensorInfo(DTYPES[dtype], tuple(shape))
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start < reached:
            raise _damaged(path, f"{quote(name)} overlaps another tensor")
        if start > reached:
            raise _damaged(path, f"{start - reached} bytes before {quote(name)} belong to no tensor")
        reached = end
    if reached < data_bytes:
        raise _damaged(path, f"{data_bytes - reached} bytes at its end belong to no tensor")
    return tensors


def _damaged(path: Path, why: str) -> RequestError:
    return RequestError(f"{path} is damaged: {why}; download or convert it again.")
