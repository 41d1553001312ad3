"""Loading a fast BLAS ahead of MLX, whose Linux wheel for CPUs bundles the slow reference BLAS.

MLX calls `cblas_sgemm`, and the dynamic linker binds it to the first library with that global symbol. Measured:
4 GFLOP/s with the bundled BLAS, 162 with OpenBLAS; loading one after MLX was imported has no effect. Nothing here
imports MLX.

PyPI's OpenBLAS (`scipy-openblas32`) prefixes its functions (`scipy_cblas_sgemm`), so as not to clash with others.
To give them their plain names we load a shared library made in memory: a table of symbols at the addresses of the
prefixed functions. The symbols are absolute (SHN_ABS), which glibc has not relocated since 2.28, so the library has no
code and only its machine number depends on the processor. Layouts: the ELF specification, chapters 4 and 5
(https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html), and DT_GNU_HASH, which glibc reads faster than DT_HASH.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from .native import OFF, thread_count

# Set to 0 to leave MLX with the BLAS of its wheel, or to the path of another library with cblas_sgemm.
VARIABLE = "MLX_OPENELM_BLAS"
# PyPI's OpenBLAS, which the extra `cpu` installs, and its prefix; then the system's library, if there is no package.
_PACKAGE, _PREFIX = "scipy_openblas32", "scipy_"
_NAMES = ("libopenblas.so.0", "libopenblas.so")
ADVICE = "pip install scipy-openblas32"
# How long OpenBLAS's threads spin before they sleep, as a power of 2 in cycles. The default of 26 costs our kernels'
# threads 25 ms after each product, and each program 25 ms at its start.
_SPINNING = "18"
# The BLAS and LAPACK functions that MLX's libraries call.
FUNCTIONS = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("sgeev_", "dgeev_", "cgeev_", "sgeqrf_", "dgeqrf_", "sgesdd_", "dgesdd_", "cgesdd_", "sgetrf_", "dgetrf_"),
    *("sgetri_", "dgetri_", "sorgqr_", "dorgqr_", "spotrf_", "dpotrf_", "ssyevd_", "dsyevd_", "cheevd_"),
    *("strtri_", "dtrtri_"),
)

# Which BLAS serves MLX's float32 matrix products on a CPU: loaded, off (by the environment variable), late (MLX was
# imported first), missing (no library was found), or unneeded (macOS, or an MLX built for a GPU).
state = "unneeded"
library = ""  # the path or name of the library that was loaded or requested

# ELF constants.
_MACHINES = {"x86_64": 62, "aarch64": 183}  # EM_X86_64, EM_AARCH64
_SHARED_OBJECT, _ABSOLUTE, _GLOBAL_FUNCTION = 3, 0xFFF1, 0x12
_LOAD, _DYNAMIC, _STACK, _READ_WRITE = 1, 2, 0x6474E551, 6
_STRINGS, _SYMBOLS, _STRINGS_SIZE, _SYMBOL_SIZE, _GNU_HASH, _END = 5, 6, 10, 11, 0x6FFFFEF5, 0
_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES = 64, 56, 24
_CLOSED_ON_EXEC = 1  # MFD_CLOEXEC
_PAGE = 1 << 16  # the largest page of any of these machines


def preload() -> None:
    """Load an OpenBLAS if MLX needs one, and set `state` and `library`. Call it before MLX is imported."""
    global state, library
    requested = os.environ.get(VARIABLE, "")
    library = ""
    if not sys.platform.startswith("linux") or _mlx_is_for_cuda():
        state = "unneeded"
    elif requested.lower() in OFF:
        state = "off"
    elif "mlx.core" in sys.modules:
        state = "late"
    else:
        state, library = "missing", requested
        for name in (requested,) if requested else (*_packaged(), *_NAMES):
            with contextlib.suppress(OSError):
                _open(name)
                state, library = "loaded", name
                break


def problem() -> str | None:
    """A one-line warning if MLX uses its slow BLAS on a CPU and this was not requested; else None."""
    if state == "late":
        return "mlx.core was imported before mlx_openelm, so MLX uses its slow bundled BLAS; import mlx_openelm first."
    if state == "missing" and library:
        return f"{VARIABLE}={library} cannot be loaded as a BLAS, so MLX uses its slow bundled BLAS."
    if state == "missing":
        return f"No OpenBLAS was found, so MLX uses its slow bundled BLAS; {ADVICE}."
    return None


def _packaged() -> list[str]:
    """The library of the PyPI package, if that is installed; importing the package would take longer."""
    spec = find_spec(_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return [str(file) for folder in folders for file in Path(folder, "lib").glob("libscipy_openblas*.so")]


def _open(name: str) -> None:
    """Open a library so that MLX will call it.

    Raises:
        OSError: it does not load, or is not a BLAS.
    """
    with _set_by_default("OPENBLAS_THREAD_TIMEOUT", _SPINNING):
        opened = ctypes.CDLL(name)
    if hasattr(opened, FUNCTIONS[0]):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        return
    addresses = {
        plain: ctypes.cast(getattr(opened, _PREFIX + plain), ctypes.c_void_p).value or 0
        for plain in FUNCTIONS
        if hasattr(opened, _PREFIX + plain)
    }
    if FUNCTIONS[0] not in addresses:
        raise OSError(f"{name} has no {FUNCTIONS[0]}")
    publish(addresses)
    # OpenBLAS counts the machine's processors, but a container may use fewer.
    if opened.scipy_openblas_get_num_threads() > (count := thread_count()):
        opened.scipy_openblas_set_num_threads(count)


@contextlib.contextmanager
def _set_by_default(variable: str, value: str) -> Iterator[None]:
    """A block in which an environment variable is set, unless it already is."""
    if variable in os.environ:
        yield
        return
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]


def _mlx_is_for_cuda() -> bool:
    """Whether a CUDA wheel of MLX is installed, judged by file names, since MLX must not be imported yet."""
    spec = find_spec("mlx")
    for folder in (spec and spec.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            if any(name.startswith("mlx_cuda_") for name in os.listdir(Path(folder).parent)):
                return True
    return False


def publish(addresses: Mapping[str, int]) -> None:
    """Bind names to functions at these addresses, for every library that is loaded from now on.

    Raises:
        OSError: the system refuses the library, or its processor is not supported.
    """
    image = symbol_table(addresses, os.uname().machine)
    # Through the C library: a Python built for an older one has no os.memfd_create.
    file = ctypes.CDLL(None, use_errno=True).memfd_create(b"mlx-openelm-symbols", _CLOSED_ON_EXEC)
    if file < 0:
        raise OSError(ctypes.get_errno(), "memfd_create failed")
    with open(file, "wb", closefd=False) as stream:  # writes all of it, or fails: half a library would crash MLX
        stream.write(image)
    # The file stays open: the linker identifies libraries by name, and a closed descriptor's name would be reused.
    ctypes.CDLL(f"/proc/{os.getpid()}/fd/{file}", mode=ctypes.RTLD_GLOBAL)


def symbol_table(addresses: Mapping[str, int], machine: str) -> bytes:
    """The library's bytes: headers, symbols, their hash table, their names, and the dynamic section.

    Raises:
        OSError: `machine` is not supported.
    """
    if machine not in _MACHINES:
        raise OSError(f"symbol tables are not supported for {machine}")
    strings, symbols = b"\0", bytes(_SYMBOL_BYTES)  # the first symbol is empty by definition
    for name, address in addresses.items():
        symbols += struct.pack("<IBBHQQ", len(strings), _GLOBAL_FUNCTION, 0, _ABSOLUTE, address, 0)
        strings += name.encode() + b"\0"
    # One bucket, a filter that passes everything, then the hashes; the lowest bit marks the last one.
    hashes = [_hash(name) & ~1 for name in addresses]
    if hashes:
        hashes[-1] |= 1
    table = struct.pack(f"<4IQI{len(hashes)}I", 1, 1, 1, 0, 2**64 - 1, min(1, len(hashes)), *hashes)

    at_symbols = _HEADER_BYTES + 3 * _SEGMENT_BYTES
    at_table = at_symbols + len(symbols)  # a multiple of 8, as the filter requires
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
    # Without the last segment the linker would make the program's stack executable.
    segments = ((_LOAD, 0, size, _PAGE), (_DYNAMIC, at_dynamic, len(dynamic), 8), (_STACK, 0, 0, 16))
    for kind, start, length, alignment in segments:
        header += struct.pack("<IIQQQQQQ", kind, _READ_WRITE, start, start, start, length, length, alignment)
    return (header + symbols + table + strings).ljust(at_dynamic, b"\0") + dynamic


def _hash(name: str) -> int:
    """The hash of a symbol's name in DT_GNU_HASH."""
    number = 5381
    for byte in name.encode():
        number = (number * 33 + byte) & 0xFFFF_FFFF
    return number
