"""PyTorch's checkpoint files: zip archives since 1.6, and the older files; where in them the values of tensors lie.

Places come from the zip's own directory and the header in front of each member, sizes are compared with what the
pickle describes, and checksums with the values when they are read. PyTorch is not needed, and nothing is run.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx

from ..errors import RequestError, quote
from ..inputs import check_file
from . import raw, torch_pickle
from .raw import Span
from .safetensors import WEIGHT_DTYPES, Tensor
from .torch_pickle import StoredTensor

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which the older files begin
# What an archive holds beside its storages; only the first two are needed, but all must be whole.
_RECORDS = ("data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id")
# Bounds of what is read whole; a checkpoint's pickle has some 100 KB for each hundred layers.
_MAX_PICKLE, _MAX_DIRECTORY = 1 << 24, 1 << 22
# What a compressed member may have beyond the size of its file.
_MAX_INFLATED = 1 << 26
_CHUNK = 1 << 20
_MAX_ARRAY = (1 << 31) - 1  # what MLX counts with

_HEADER = struct.Struct("<4s5H3I2H")  # in front of each member
_ENCRYPTED = 0x41


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a storage lie in a file."""

    start: int
    nbytes: int
    member: zipfile.ZipInfo | None = None

    @property
    def is_compressed(self) -> bool:
        return self.member is not None and self.member.compress_type != zipfile.ZIP_STORED


@dataclass
class _Checkpoint:
    path: Path
    state: Any
    places: Mapping[str, _Place]  # by the keys of storages
    is_big_endian: bool = False
    checked: set[str] = field(default_factory=set)


def read(path: Path) -> Any:
    """What a `.pt` file holds, its tensors as `StoredTensor`.

    Raises:
        RequestError: the file cannot be read, is damaged or of another kind, or asks for more than plain data.
    """
    return _open(path).state


def dtype_of(path: Path, name: str, tensor: StoredTensor) -> mx.Dtype:
    """MLX's type of a tensor, which `path` holds under `name`.

    Raises:
        RequestError: a type that weights do not have, or a tensor that is not a plain array.
    """
    if tensor.dtype not in WEIGHT_DTYPES:
        raise RequestError(f"{path} stores {name} as {tensor.dtype}; expected {', '.join(WEIGHT_DTYPES)}.")
    return WEIGHT_DTYPES[tensor.dtype]


def tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
    """Some of a file's tensors, as `read` describes them, to be read when they are used.

    Reading one raises RequestError where its values do not fit the checksum that the file has of them, and
    RuntimeError, as MLX does, where the file cannot be read any more.

    Raises:
        RequestError: as `read`; a tensor of another type than weights have, one that repeats its values, or one that
            does not lie within the file.
    """
    checkpoint = _open(path)
    return {name: _tensor(checkpoint, name, tensor) for name, tensor in stored.items()}


def _damaged(path: Path, what: str) -> RequestError:
    return RequestError(f"{path} is damaged, or no PyTorch checkpoint of plain tensors ({what}): download it again.")


# Files.


def _open(path: Path) -> _Checkpoint:
    size = check_file(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            return _open_zip(path, file, size) if start == b"PK\x03\x04" else _open_old(path, file, size)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}.") from None
    except torch_pickle.DamagedPickle as error:
        raise _damaged(path, f"its pickle cannot be read: {error}") from None
    except torch_pickle.ForbiddenGlobal as error:
        raise RequestError(
            f"{path} is refused: it asks for {error}, and anything but tensors could run code. Download it again, "
            "or save the weights alone, with torch.save(model.state_dict(), ...)."
        ) from None


def _open_zip(path: Path, file: BinaryIO, size: int) -> _Checkpoint:
    archive = _directory(path, file, size)
    members = archive.infolist()
    prefix = members[0].filename.partition("/")[0] + "/" if members else ""
    places = _places(path, file, members, archive.start_dir)
    if f"{prefix}constants.pkl" in places:
        raise RequestError(
            f"{path} is a TorchScript archive, a program: save the weights alone, with "
            "torch.save(model.state_dict(), ...)."
        )
    if f"{prefix}data.pkl" not in places:
        raise _damaged(path, "it has no data.pkl")
    records = {name: _read_whole(path, places, f"{prefix}{name}") for name in _RECORDS if f"{prefix}{name}" in places}
    order = records.get("byteorder", b"little")
    if order not in (b"little", b"big"):
        raise _damaged(path, f"its byte order is {quote(order)}")
    state, storages = torch_pickle.load(BytesIO(records["data.pkl"]))
    found = {key: places[f"{prefix}data/{key}"] for key in storages if f"{prefix}data/{key}" in places}
    return _Checkpoint(path, state, found, is_big_endian=order == b"big")


def _read_whole(path: Path, places: Mapping[str, _Place], name: str) -> bytes:
    if places[name].nbytes > _MAX_PICKLE:
        raise _damaged(path, f"its {name} has {places[name].nbytes} bytes")
    return b"".join(_content(path, places[name], name))


def _directory(path: Path, file: BinaryIO, size: int) -> zipfile.ZipFile:
    """The members of a zip, whose list must not be so long that it fills the memory."""
    file.seek(max(0, size - 65_557))  # the record at the end, with the longest comment
    end = file.read()
    has_comment = end[-22:-18] != b"PK\x05\x06" or end[-2:] != bytes(2)
    place = end.rfind(b"PK\x05\x06") if has_comment else len(end) - 22
    length = int.from_bytes(end[place + 12 : place + 16], "little")
    wide = end[max(0, place - 76) : max(0, place)]  # of files beyond 4 GB
    if wide.startswith(b"PK\x06\x06"):
        length = int.from_bytes(wide[40:48], "little")
    if place < 0 or length > _MAX_DIRECTORY:
        raise _damaged(path, "its list of members is not there or too long")
    try:
        return zipfile.ZipFile(file)
    except OSError:
        raise
    except Exception as error:  # of every kind, on damaged files
        raise _damaged(path, f"its list of members cannot be read: {error}") from None


def _places(path: Path, file: BinaryIO, members: Iterable[zipfile.ZipInfo], end: int) -> dict[str, _Place]:
    """Where the content of each member lies; they must neither overlap nor share a name."""
    places: dict[str, _Place] = {}
    names: set[str] = set()
    free = 0  # up to here the file is taken
    for member in sorted(members, key=lambda member: member.header_offset):
        name = quote(member.filename)
        if member.filename.lower() in names:  # PyTorch looks names up without regard to case
            raise _damaged(path, f"it has {name} twice")
        names.add(member.filename.lower())
        if member.header_offset < free:
            raise _damaged(path, f"{name} overlaps with what is in front of it")
        file.seek(member.header_offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise _damaged(path, f"{name} is not where the list of members says")
        _, _, flags, method, *_, name_length, extra_length = _HEADER.unpack(header)
        encoding = "utf-8" if member.flag_bits & 0x800 else "cp437"
        if file.read(name_length) != member.orig_filename.encode(encoding, "replace"):
            raise _damaged(path, f"{name} is not where the list of members says")
        if (flags | member.flag_bits) & _ENCRYPTED:
            raise RequestError(
                f"{path} is encrypted, which PyTorch cannot read: unpack it and pack it without a password."
            )
        if method != member.compress_type or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _damaged(path, f"{name} is compressed in a way that PyTorch cannot read")
        start = member.header_offset + _HEADER.size + name_length + extra_length
        free = start + member.compress_size
        if free > end:
            raise _damaged(path, f"{name} is cut off")
        if method == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise _damaged(path, f"{name} has two sizes")
        # A folder by its attributes, or one on another disk: PyTorch reads neither, the first without an error.
        if member.volume or (member.external_attr & 0x10 and member.file_size):
            raise _damaged(path, f"{name} is not a regular file in this archive")
        places[member.filename] = _Place(start, member.file_size, member)
    return places


def _open_old(path: Path, file: BinaryIO, size: int) -> _Checkpoint:
    """Files of PyTorch before 1.6: five pickles, then the storages, each behind its size."""
    data = file.read(_MAX_PICKLE)
    if data[257:262] == b"ustar":
        raise RequestError(
            f"{path} is a tar archive, which PyTorch wrote before 0.1.10: load it there and save it again."
        )
    head = BytesIO(data)
    first, _ = torch_pickle.load(head)
    if first != _MAGIC or torch_pickle.load(head)[0] != _PROTOCOL:
        raise _damaged(path, "it does not begin like one")
    torch_pickle.load(head)  # the writing machine's sizes of numbers
    state, storages = torch_pickle.load(head)
    keys, _ = torch_pickle.load(head)
    places: dict[str, _Place] = {}
    start = head.tell()
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in storages or key in places:
            raise _damaged(path, "its list of storages is not that of its tensors")
        file.seek(start)
        places[key] = _Place(start + 8, storages[key].nbytes)
        if int.from_bytes(file.read(8), "little") != storages[key].size:
            raise _damaged(path, f"the storage {quote(key)} has two sizes")
        start += 8 + storages[key].nbytes
        if start > size:
            raise _damaged(path, f"the storage {quote(key)} is cut off")
    return _Checkpoint(path, state, places)


# Values.


def _tensor(checkpoint: _Checkpoint, name: str, tensor: StoredTensor) -> Tensor:
    path = checkpoint.path
    dtype = dtype_of(path, name, tensor)
    place = checkpoint.places.get(tensor.storage.key)
    if place is None or place.nbytes != tensor.storage.nbytes:
        what = (
            "is missing" if place is None else "is cut off" if place.nbytes < tensor.storage.nbytes else "is too long"
        )
        raise _damaged(path, f"the storage {quote(tensor.storage.key)} of {name} {what}")
    if max(tensor.shape, default=0) > _MAX_ARRAY:
        raise _damaged(path, f"{name} has the shape {quote(tensor.shape)}")
    if tensor.repeats:
        raise RequestError(
            f"{path} stores {name} as a view that repeats its values (shape {quote(list(tensor.shape))}, strides "
            f"{quote(list(tensor.strides))}): save tensor.contiguous()."
        )
    extent = tensor.extent
    span = Span(dtype, (extent,), place.start + tensor.offset * dtype.size)
    if (tensor.offset + extent) * dtype.size > tensor.storage.nbytes or extent > _MAX_ARRAY:
        raise _damaged(path, f"{name} is larger than its storage")
    stored = None if place.is_compressed else raw.tensors(path, {name: span})[name]
    if place.is_compressed and place.nbytes > path.stat().st_size + _MAX_INFLATED:
        raise _damaged(path, f"the storage of {name} is many times as large as the file")

    def read() -> mx.array:
        try:
            if tensor.storage.key not in checkpoint.checked:
                for _ in _content(path, place, name):
                    pass
                checkpoint.checked.add(tensor.storage.key)
            values = stored.read() if stored is not None else _inflate(path, place, name, span)
        except OSError as error:
            raise RuntimeError(f"{path}: {error.strerror}") from None
        return _arrange(values, tensor, checkpoint.is_big_endian)

    return Tensor(dtype, tensor.shape, read)


def _arrange(values: mx.array, tensor: StoredTensor, is_big_endian: bool) -> mx.array:
    """A tensor's values in its shape, row by row."""
    if is_big_endian:
        octets = values.view(mx.uint8).reshape(-1, values.dtype.size)
        values = mx.contiguous(octets[:, ::-1]).view(values.dtype).reshape(-1)
    if tensor.is_contiguous:
        return values.reshape(tensor.shape)
    return mx.contiguous(mx.as_strided(values, tensor.shape, tensor.strides, 0))


def _inflate(path: Path, place: _Place, name: str, span: Span) -> mx.array:
    """A part of a compressed storage."""
    values = mx.zeros(span.nbytes, mx.uint8)
    mx.eval(values)
    target = memoryview(values)  # type: ignore[arg-type]
    start = place.start - span.offset  # negative: that much comes before it
    for chunk in _content(path, place, name):
        wanted = chunk[max(0, -start) : max(0, span.nbytes - start)]
        target[max(0, start) : max(0, start) + len(wanted)] = wanted
        start += len(chunk)
    return values.view(span.dtype)


def _content(path: Path, place: _Place, name: str) -> Iterator[bytes]:
    """The bytes of an entry, piece by piece, decompressed if necessary.

    Raises:
        RequestError: it is shorter than it should be, or does not fit its checksum, once all is read.
    """
    packed = place.member.compress_size if place.member is not None else place.nbytes
    unpack = zlib.decompressobj(-zlib.MAX_WBITS) if place.is_compressed else None
    left, checksum = place.nbytes, 0
    with path.open("rb") as file:
        file.seek(place.start)
        while left:
            data = unpack.unconsumed_tail if unpack is not None else b""
            if not data:
                data = file.read(min(packed, _CHUNK))
                packed -= len(data)
                if not data:
                    break
            if unpack is not None:
                try:
                    data = unpack.decompress(data, min(left, _CHUNK))
                except zlib.error:
                    break
            checksum = zlib.crc32(data, checksum)
            left -= len(data)
            yield data
    # `torch.serialization.set_crc32_options(False)` makes all checksums 0; the older files have none.
    expected = place.member.CRC if place.member is not None else 0
    if left or (expected and checksum != expected):
        raise RequestError(
            f"{path} is damaged, or was changed while it was being read: {name} does not fit its size or checksum; "
            "download it again."
        )
