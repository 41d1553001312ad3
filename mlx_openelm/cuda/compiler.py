"""Compiles CUDA source for this GPU with the compiler (nvrtc) that comes with MLX; the results are cached on disk.

MLX's own `mx.fast.cuda_kernel` compiles again in every process, with headers that take a second to read.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ..errors import OpenELMError

# Attributes of the driver's cuDeviceGetAttribute.
_MULTIPROCESSORS, _MAJOR, _MINOR, _SHARES_GPU = 16, 75, 76, 133


@cache
def multiprocessors() -> int:
    """How many multiprocessors the GPU has."""
    return _attribute(_MULTIPROCESSORS)


@cache
def is_shared() -> bool:
    """Whether several programs use the GPU's multiprocessors at the same time (MPS), so that none can rely on all."""
    return _attribute(_SHARES_GPU) != 0


@cache
def capability() -> tuple[int, int]:
    """The GPU's compute capability, (9, 0) for Hopper."""
    return _attribute(_MAJOR), _attribute(_MINOR)


def _attribute(number: int) -> int:
    """An attribute of the first GPU, 0 if the driver does not know it."""
    driver = ctypes.CDLL("libcuda.so.1")
    value = ctypes.c_int(0)
    driver.cuInit(0)
    driver.cuDeviceGetAttribute(ctypes.byref(value), number, 0)
    return value.value


def compiled(source: str) -> bytes:
    """The machine code of `source` for this GPU, from the cache if possible.

    Raises:
        OpenELMError: nvrtc is missing, or rejects the source.
    """
    architecture = "sm_{}{}".format(*capability())
    # Machine code of a newer compiler may be refused by an older driver.
    key = f"{architecture} {_versions()}\n{source}"
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    file = _cache_folder() / f"{name}.cubin"
    with contextlib.suppress(OSError):
        return file.read_bytes()
    code = _compile(source, architecture)
    with contextlib.suppress(OSError):  # if the cache cannot be written, the next run compiles again
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_bytes(code)
        partial.replace(file)
    return code


def _versions() -> str:
    """The versions of the compiler and of the driver."""
    major, minor, driver = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return f"{major.value}.{minor.value} {driver.value}"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mlx-openelm" / "cuda"


def _compile(source: str, architecture: str) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mlx_openelm.cu", 0, None, None))
    try:
        options = [
            f"--gpu-architecture={architecture}".encode(),
            b"--std=c++17",
            b"--device-as-default-execution-space",
        ]
        result = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if result:
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise OpenELMError(f"The CUDA kernels do not compile for {architecture}: {log.decode(errors='replace')}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: Callable[..., int], read: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    read(program, buffer)
    return buffer.raw


def _nvrtc() -> ctypes.CDLL:
    """MLX has already loaded it, so its name without a path is enough."""
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OpenELMError("libnvrtc, which comes with MLX for CUDA, was not found.")


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise OpenELMError(f"nvrtc: {nvrtc.nvrtcGetErrorString(result).decode()}")
