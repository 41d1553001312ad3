"""Functions under other names: a shared library that is nothing but a table of symbols, made in memory.

The OpenBLAS of PyPI (`scipy-openblas32`) calls its functions `scipy_cblas_sgemm` and so on, so that it gets in nobody's
way, and MLX asks the dynamic linker for `cblas_sgemm`. A library with that symbol, at the address of the other, is all
that is missing. Its symbols are absolute (SHN_ABS), which glibc has not moved since 2.28, so it holds no code and is
the same on every processor but for the number that names it. Layouts: the ELF specification, chapters 4 and 5
(https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html), and DT_GNU_HASH, which glibc reads faster than DT_HASH.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Mapping

_MACHINES = {"x86_64": 62, "aarch64": 183}  # EM_X86_64, EM_AARCH64
_SHARED_OBJECT, _ABSOLUTE, _GLOBAL_FUNCTION = 3, 0xFFF1, 0x12
_LOAD, _DYNAMIC, _STACK, _READ_WRITE = 1, 2, 0x6474E551, 6
_STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE, _GNU_HASH, _END = 5, 6, 10, 11, 0x6FFFFEF5, 0
_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES = 64, 56, 24
_CLOSED_ON_EXEC = 1  # MFD_CLOEXEC
_PAGE = 1 << 16  # the largest page of any of these machines


def publish(addresses: Mapping[str, int]) -> None:
    """Let these names mean the functions at these addresses, for every library that is loaded from now on.

    Raises:
        OSError: the system does not load it, or is none that this is made for.
    """
    image = symbol_table(addresses, os.uname().machine)
    # The C library's own: a Python that was built for older ones has no os.memfd_create.
    file = ctypes.CDLL(None, use_errno=True).memfd_create(b"mlx-openelm-symbols", _CLOSED_ON_EXEC)
    if file < 0:
        raise OSError(ctypes.get_errno(), "memfd_create failed")
    os.write(file, image)
    # It stays open: the linker takes a name that it has seen before for the library it then was.
    ctypes.CDLL(f"/proc/{os.getpid()}/fd/{file}", mode=ctypes.RTLD_GLOBAL)


def symbol_table(addresses: Mapping[str, int], machine: str) -> bytes:
    """The library's bytes: headers, symbols, their hash table, their names, and where these are.

    Raises:
        OSError: `machine` is none that this is made for.
    """
    if machine not in _MACHINES:
        raise OSError(f"no symbol tables are made for {machine}")
    strings, symbols = b"\0", bytes(_SYMBOL_BYTES)  # the first symbol is none
    for name, address in addresses.items():
        symbols += struct.pack("<IBBHQQ", len(strings), _GLOBAL_FUNCTION, 0, _ABSOLUTE, address, 0)
        strings += name.encode() + b"\0"
    # One bucket for all, a filter that lets everything through, then the hashes; a lowest bit says which is the last.
    hashes = [_hash(name) & ~1 for name in addresses]
    if hashes:
        hashes[-1] |= 1
    table = struct.pack(f"<4IQI{len(hashes)}I", 1, 1, 1, 0, 2**64 - 1, min(1, len(hashes)), *hashes)

    at_symbols = _HEADER_BYTES + 3 * _SEGMENT_BYTES
    at_table = at_symbols + len(symbols)  # a multiple of 8, as the filter needs it
    at_strings = at_table + len(table)
    at_dynamic = -(-(at_strings + len(strings)) // 8) * 8
    entries = {_GNU_HASH: at_table, _STRINGS: at_strings, _SYMBOLS: at_symbols, _STRINGS_SIZE: len(strings),
               _SYMBOL_SIZE: _SYMBOL_BYTES, _END: 0}  # fmt: skip
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries.items())
    size = at_dynamic + len(dynamic)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", _SHARED_OBJECT, _MACHINES[machine], 1, 0, _HEADER_BYTES, 0, 0,
        _HEADER_BYTES, _SEGMENT_BYTES, 3, 0, 0, 0,
    )  # fmt: skip
    # Without the last one the linker would make the program's stack executable.
    segments = ((_LOAD, 0, size, _PAGE), (_DYNAMIC, at_dynamic, len(dynamic), 8), (_STACK, 0, 0, 16))
    for kind, start, length, alignment in segments:
        header += struct.pack("<IIQQQQQQ", kind, _READ_WRITE, start, start, start, length, length, alignment)
    return (header + symbols + table + strings).ljust(at_dynamic, b"\0") + dynamic


def _hash(name: str) -> int:
    number = 5381
    for byte in name.encode():
        number = (number * 33 + byte) & 0xFFFF_FFFF
    return number
