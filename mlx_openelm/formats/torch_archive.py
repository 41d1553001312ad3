"""The zip archives that PyTorch has written since 1.6: the offset of each member, and reading its content.

Members are found through the archive's directory and the local header of each one; whatever PyTorch would reject or
read differently is refused. Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx

from ..errors import RequestError, quote
from .raw import Span

LOCAL_HEADER = b"PK\x03\x04"  # the first bytes of a member, and so of an archive
_END, _END_BYTES = b"PK\x05\x06", 22  # the record at the end of an archive, and its size without a comment
_END64, _END64_BYTES = b"PK\x06\x06", 76  # the same for archives beyond 4 GB, with its locator
_MAX_COMMENT = 65_535
_MAX_DIRECTORY = 1 << 22
_CHUNK = 1 << 20
_HEADER = struct.Struct("<4s5H3I2H")  # a member's local header
_ENCRYPTED = 0x41  # flags of a member
_UTF8 = 0x800
_FOLDER = 0x10  # in a member's external attributes


@dataclass(frozen=True)
class Place:
    """A range of bytes in a file, in an archive or not; `nbytes` is its size after decompression."""

    start: int
    nbytes: int
    member: zipfile.ZipInfo | None = None

    @property
    def is_compressed(self) -> bool:
        return self.member is not None and self.member.compress_type != zipfile.ZIP_STORED


def damaged(path: Path, reason: str) -> RequestError:
    """The error for a file that is damaged or of another kind."""
    return RequestError(f"{path} is damaged or is not a plain PyTorch checkpoint ({reason}); download it again.")


def read_places(path: Path, file: BinaryIO, size: int) -> dict[str, Place]:
    """The content of each member by its name, in the directory's order.

    Args:
        file: `path`, open for reading.
        size: of the file, in bytes.

    Raises:
        RequestError: the archive is damaged, encrypted, or has members that PyTorch cannot read.
    """
    archive = _directory(path, file, size)
    members = archive.infolist()
    places = _places(path, file, members, archive.start_dir)
    return {member.filename: places[member.filename] for member in members}


def _directory(path: Path, file: BinaryIO, size: int) -> zipfile.ZipFile:
    """The archive's directory; its length is checked first, since `zipfile` reads it whole."""
    file.seek(max(0, size - _END_BYTES - _MAX_COMMENT))
    end = file.read()
    has_comment = end[-_END_BYTES : 4 - _END_BYTES] != _END or end[-2:] != bytes(2)
    place = end.rfind(_END) if has_comment else len(end) - _END_BYTES
    length = int.from_bytes(end[place + 12 : place + 16], "little")
    wide = end[max(0, place - _END64_BYTES) : max(0, place)]
    if wide.startswith(_END64):
        length = int.from_bytes(wide[40:48], "little")
    if place < 0 or length > _MAX_DIRECTORY:
        raise damaged(path, "its directory is missing or too long")
    try:
        return zipfile.ZipFile(file)
    except OSError:
        raise
    except Exception as error:  # zipfile raises all kinds of errors on damaged files
        raise damaged(path, f"its directory cannot be read: {error}") from None


def _places(path: Path, file: BinaryIO, members: Iterable[zipfile.ZipInfo], end: int) -> dict[str, Place]:
    """The content of each member by name; members must neither overlap nor share a name.

    Args:
        end: the offset of the directory, in bytes.
    """
    places: dict[str, Place] = {}
    names: set[str] = set()
    free = 0  # where the last member ends
    for member in sorted(members, key=lambda member: member.header_offset):
        name = quote(member.filename)
        if member.filename.lower() in names:  # PyTorch ignores case when it looks names up
            raise damaged(path, f"it has {name} twice")
        names.add(member.filename.lower())
        if member.header_offset < free:
            raise damaged(path, f"{name} overlaps another member")
        file.seek(member.header_offset)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(LOCAL_HEADER):
            raise damaged(path, f"{name} is not at its offset in the zip directory")
        _, _, flags, method, *_, name_length, extra_length = _HEADER.unpack(header)
        encoding = "utf-8" if member.flag_bits & _UTF8 else "cp437"
        if file.read(name_length) != member.orig_filename.encode(encoding, "replace"):
            raise damaged(path, f"{name} is not at its offset in the zip directory")
        if (flags | member.flag_bits) & _ENCRYPTED:
            raise RequestError(f"{path} is encrypted; unzip it, and zip it again without a password.")
        if method != member.compress_type or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged(path, f"{name} is compressed in a way that PyTorch cannot read")
        start = member.header_offset + _HEADER.size + name_length + extra_length
        free = start + member.compress_size
        if free > end:
            raise damaged(path, f"{name} is cut off")
        if method == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise damaged(path, f"{name} has contradictory sizes")
        # PyTorch rejects a member on another disk, and silently skips the content of one marked as a folder.
        if member.volume or (member.external_attr & _FOLDER and member.file_size):
            raise damaged(path, f"{name} is not a regular file in this archive")
        places[member.filename] = Place(start, member.file_size, member)
    return places


def content(path: Path, place: Place, name: str) -> Iterator[bytes]:
    """The bytes of a place in chunks, decompressed if necessary.

    Raises:
        RequestError: at the end, if bytes are missing or the checksum does not match; `name` is for the message.
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
    # `torch.serialization.set_crc32_options(False)` makes every checksum 0; the older files have none.
    expected = place.member.CRC if place.member is not None else 0
    if left or (expected and checksum != expected):
        raise RequestError(
            f"{path} is damaged or was changed while it was being read: {name} does not match its size or checksum; "
            "download it again."
        )


def inflate(path: Path, place: Place, name: str, span: Span) -> mx.array:
    """The part of a compressed member that `span` names as if the member were stored uncompressed; flat."""
    values = mx.zeros(span.nbytes, mx.uint8)
    mx.eval(values)
    target = memoryview(values)  # type: ignore[arg-type]
    start = place.start - span.offset  # where the next chunk goes; negative before the part begins
    for chunk in content(path, place, name):
        part = chunk[max(0, -start) : max(0, span.nbytes - start)]
        target[max(0, start) : max(0, start) + len(part)] = part
        start += len(chunk)
    return values.view(span.dtype)
