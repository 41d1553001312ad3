"""PyTorch's checkpoint files, zip archives since 1.6 and the older format: their content, and reading tensors.

Each storage's size is compared with what the pickle describes, and its checksum when its values are read. PyTorch is
not needed, and nothing in a file is run. Source: torch/serialization.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from ..errors import RequestError, quote
from ..inputs import check_file
from . import raw, torch_archive, torch_pickle
from .raw import Span
from .safetensors import WEIGHT_DTYPES, Tensor
from .torch_archive import Place, damaged
from .torch_tensors import DamagedPickle, ForbiddenGlobal, StoredTensor

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # magic number and protocol version of files before 1.6
# An archive's records besides its storages; only the first two are used, but all must be intact.
_RECORDS = ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
_MAX_PICKLE = 1 << 24  # read whole; a checkpoint's pickle takes about 100 KB per hundred layers
_MAX_INFLATED = 1 << 26  # the largest expansion of a compressed member beyond the file's size
_MAX_ARRAY = (1 << 31) - 1  # MLX's limit on the elements of an array


@dataclass
class _Checkpoint:
    path: Path
    state: Any
    places: Mapping[str, Place]  # by the storages' keys
    is_big_endian: bool = False
    checked: set[str] = field(default_factory=set)  # the storages whose checksums have been compared


def read(path: Path) -> Any:
    """The content of a `.pt` file: usually a dictionary of tensors, each as `StoredTensor`; no value is read yet.

    Raises:
        RequestError: the file cannot be read, is damaged or of another kind, or asks for more than plain data.
    """
    return _open(path).state


def dtype_of(path: Path, name: str, tensor: StoredTensor) -> mx.Dtype:
    """MLX's type for a tensor that `path` holds under `name`.

    Raises:
        RequestError: an unsupported type, or a tensor that is not a plain array.
    """
    if tensor.dtype not in WEIGHT_DTYPES:
        raise RequestError(f"{path} stores {name} as {tensor.dtype}; expected {', '.join(WEIGHT_DTYPES)}.")
    return WEIGHT_DTYPES[tensor.dtype]


def tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Some of a file's tensors, given as `read` describes them; each is read when it is used.

    Reading one raises RequestError on a checksum mismatch, and RuntimeError, like MLX, if the file has become
    unreadable.

    Raises:
        RequestError: as `read`; a tensor has an unsupported type, repeats its values, or is not wholly in the file.
    """
    checkpoint = _open(path)
    return {name: _tensor(checkpoint, name, tensor) for name, tensor in stored.items()}


# Opening files.


def _open(path: Path) -> _Checkpoint:
    size = check_file(path)
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(torch_archive.LOCAL_HEADER)) == torch_archive.LOCAL_HEADER
            file.seek(0)
            return _open_zip(path, file, size) if is_zip else _open_old(path, file, size)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    except DamagedPickle as error:
        raise damaged(path, f"its pickle cannot be read: {error}") from None
    except ForbiddenGlobal as error:
        raise RequestError(
            f"{path} is refused: it names {error}, and anything but tensors could run code. Download it again, "
            "or save the weights alone, with torch.save(model.state_dict(), ...)."
        ) from None


def _open_zip(path: Path, file: BinaryIO, size: int) -> _Checkpoint:
    places = torch_archive.read_places(path, file, size)
    prefix = next(iter(places), "").partition("/")[0] + "/"  # of every name: the folder that PyTorch packed
    if f"{prefix}constants.pkl" in places:
        raise RequestError(
            f"{path} is a TorchScript archive, which is a program; save the weights alone, with "
            "torch.save(model.state_dict(), ...)."
        )
    if f"{prefix}data.pkl" not in places:
        raise damaged(path, "it has no data.pkl")
    records = {name: _read_whole(path, places, f"{prefix}{name}") for name in _RECORDS if f"{prefix}{name}" in places}
    order = records.get("byteorder", b"little")
    if order not in (b"little", b"big"):
        raise damaged(path, f"its byte order is {quote(order)}")
    state, storages = torch_pickle.load(BytesIO(records["data.pkl"]))
    found = {key: places[f"{prefix}data/{key}"] for key in storages if f"{prefix}data/{key}" in places}
    return _Checkpoint(path, state, found, is_big_endian=order == b"big")


def _read_whole(path: Path, places: Mapping[str, Place], name: str) -> bytes:
    if places[name].nbytes > _MAX_PICKLE:
        raise damaged(path, f"its {name} has {places[name].nbytes} bytes")
    return b"".join(torch_archive.content(path, places[name], name))


def _open_old(path: Path, file: BinaryIO, size: int) -> _Checkpoint:
    """A file of PyTorch before 1.6: five pickles, then the storages, each after its size (64 bits, in values)."""
    data = file.read(_MAX_PICKLE)
    if data[257:262] == b"ustar":
        raise RequestError(f"{path} is a tar archive from PyTorch before 0.1.10; load it there and save it again.")
    head = BytesIO(data)
    first, _ = torch_pickle.load(head)
    if first != _MAGIC or torch_pickle.load(head)[0] != _PROTOCOL:
        raise damaged(path, "its magic number is wrong")
    torch_pickle.load(head)  # the sizes of C types on the machine that wrote it
    state, storages = torch_pickle.load(head)
    keys, _ = torch_pickle.load(head)
    places: dict[str, Place] = {}
    start = head.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in storages or key in places:
            raise damaged(path, "its storages do not match its tensors")
        file.seek(start)
        places[key] = Place(start + 8, storages[key].nbytes)
        if int.from_bytes(file.read(8), "little") != storages[key].size:
            raise damaged(path, f"the storage {quote(key)} has contradictory sizes")
        start += 8 + storages[key].nbytes
        if start > size:
            raise damaged(path, f"the storage {quote(key)} is cut off")
    return _Checkpoint(path, state, places)


# Reading values.


def _tensor(checkpoint: _Checkpoint, name: str, tensor: StoredTensor) -> Tensor:
    path = checkpoint.path
    dtype = dtype_of(path, name, tensor)
    place = checkpoint.places.get(tensor.storage.key)
    storage = f"the storage {quote(tensor.storage.key)} of {name}"
    if place is None:
        raise damaged(path, f"{storage} is missing")
    if place.nbytes != tensor.storage.nbytes:
        raise damaged(path, f"{storage} is {'cut off' if place.nbytes < tensor.storage.nbytes else 'too long'}")
    if max(tensor.shape, default=0) > _MAX_ARRAY:
        raise damaged(path, f"{name} has shape {quote(list(tensor.shape))}")
    if tensor.repeats:
        raise RequestError(
            f"{path} stores {name} as a view that repeats its values (shape {quote(list(tensor.shape))}, strides "
            f"{quote(list(tensor.strides))}): save tensor.contiguous()."
        )
    extent = tensor.extent
    span = Span(dtype, (extent,), place.start + tensor.offset * dtype.size)
    if (tensor.offset + extent) * dtype.size > tensor.storage.nbytes or extent > _MAX_ARRAY:
        raise damaged(path, f"{name} is larger than its storage")
    stored = None if place.is_compressed else raw.tensors(path, {name: span})[name]
    if place.is_compressed and place.nbytes > path.stat().st_size + _MAX_INFLATED:
        raise damaged(path, f"the storage of {name} is many times as large as the file")

    def read() -> mx.array:
        try:
            if tensor.storage.key not in checkpoint.checked:
                for _ in torch_archive.content(path, place, name):
                    pass  # the checksum is compared at the end
                checkpoint.checked.add(tensor.storage.key)
            values = stored.read() if stored is not None else torch_archive.inflate(path, place, name, span)
        except OSError as error:
            raise RuntimeError(f"{path}: {error.strerror}") from None
        return _arrange(values, tensor, checkpoint.is_big_endian)

    return Tensor(dtype, tensor.shape, read)


def _arrange(values: mx.array, tensor: StoredTensor, is_big_endian: bool) -> mx.array:
    """A tensor's values in its shape, row by row, from the part of its storage that it reaches over [extent]."""
    if is_big_endian:  # [extent * itemsize] -> [extent, itemsize], reversed
        octets = values.view(mx.uint8).reshape(-1, values.dtype.size)
        values = mx.contiguous(octets[:, ::-1]).view(values.dtype).reshape(-1)
    if tensor.is_contiguous:
        return values.reshape(tensor.shape)
    return mx.contiguous(mx.as_strided(values, tensor.shape, tensor.strides, 0))
