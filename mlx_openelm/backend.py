"""What this machine is (Metal, CUDA, CPU) and what follows from it: BLAS, types, memory.

`preload_blas` runs before MLX is imported, so nothing here imports MLX at the top of the module.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import interposing
from .environment import says_off, thread_count
from .errors import OpenELMError

if TYPE_CHECKING:
    import mlx.core as mx

# Set to 0 to leave MLX with the BLAS of its wheel, or to the path of another library with cblas_sgemm.
BLAS_VARIABLE = "MLX_OPENELM_BLAS"
# PyPI's OpenBLAS, which comes with the extra `cpu`: its functions have a prefix. Then the system's, where it lacks.
_BLAS_PACKAGE, _PREFIX = "scipy_openblas32", "scipy_"
_BLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
BLAS_ADVICE = "pip install scipy-openblas32"
# For how long OpenBLAS's threads look out for more work before they sleep, as a power of 2 in cycles. By default 26,
# which is 25 ms that our kernels' threads lose after a product, and every start of a program.
_SPINNING = "18"
# What MLX's libraries ask of a BLAS and a LAPACK.
BLAS_FUNCTIONS = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"),
    *("sgeev_", "dgeev_", "cgeev_", "sgeqrf_", "dgeqrf_", "sgesdd_", "dgesdd_", "cgesdd_", "sgetrf_", "dgetrf_"),
    *("sgetri_", "dgetri_", "sorgqr_", "dorgqr_", "spotrf_", "dpotrf_", "ssyevd_", "dsyevd_", "cheevd_"),
    *("strtri_", "dtrtri_"),
)

_GIB = 1 << 30


@dataclass
class Blas:
    """Which BLAS serves MLX's float32 matrix products on a CPU.

    `state` is one of: loaded, off (by the environment variable), late (MLX came first),
    missing (no library found), unneeded (macOS, or an MLX built for a GPU).
    """

    state: str
    library: str = ""


blas = Blas("unneeded")


def preload_blas() -> None:
    """Load an OpenBLAS ahead of MLX, whose Linux wheel for CPUs bundles the slow reference BLAS.

    MLX calls `cblas_sgemm`; the dynamic linker binds it to whichever library with global symbols came
    first. Measured: 4 GFLOP/s with the bundled one, 162 with OpenBLAS, nothing gained after the import.
    """
    global blas
    wanted = os.environ.get(BLAS_VARIABLE, "")
    if not sys.platform.startswith("linux") or _mlx_is_for_cuda():
        blas = Blas("unneeded")
    elif says_off(wanted):
        blas = Blas("off")
    elif "mlx.core" in sys.modules:
        blas = Blas("late")
    else:
        blas = Blas("missing", wanted)
        for name in (wanted,) if wanted else (*_packaged_blas(), *_BLAS_NAMES):
            with contextlib.suppress(OSError):
                _open_blas(name)
                blas = Blas("loaded", name)
                break


def _packaged_blas() -> list[str]:
    """The library of the package from PyPI, if that is installed; the package is not imported, which takes longer."""
    spec = find_spec(_BLAS_PACKAGE)
    folders = (spec and spec.submodule_search_locations) or ()
    return [str(file) for folder in folders for file in Path(folder, "lib").glob("libscipy_openblas*.so")]


def _open_blas(name: str) -> None:
    """Open this library so that MLX will call it.

    Raises:
        OSError: it does not load, or is none of a BLAS.
    """
    with _set("OPENBLAS_THREAD_TIMEOUT", _SPINNING):
        library = ctypes.CDLL(name)
    if hasattr(library, BLAS_FUNCTIONS[0]):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        return
    addresses = {
        plain: ctypes.cast(getattr(library, _PREFIX + plain), ctypes.c_void_p).value or 0
        for plain in BLAS_FUNCTIONS
        if hasattr(library, _PREFIX + plain)
    }
    if BLAS_FUNCTIONS[0] not in addresses:
        raise OSError(f"{name} has no {BLAS_FUNCTIONS[0]}")
    interposing.publish(addresses)
    # It counts processors, whatever a container may use of them.
    if library.scipy_openblas_get_num_threads() > (count := thread_count()):
        library.scipy_openblas_set_num_threads(count)


@contextlib.contextmanager
def _set(variable: str, value: str) -> Iterator[None]:
    """An environment variable that is set for a while, unless it is set already."""
    if variable in os.environ:
        yield
        return
    os.environ[variable] = value
    try:
        yield
    finally:
        del os.environ[variable]


def _mlx_is_for_cuda() -> bool:
    """Whether a CUDA wheel of MLX is installed; asked of the file names, since MLX must not be imported yet."""
    spec = find_spec("mlx")
    for folder in (spec and spec.submodule_search_locations) or ():
        with contextlib.suppress(OSError):
            if any(name.startswith("mlx_cuda_") for name in os.listdir(Path(folder).parent)):
                return True
    return False


def slow_cpu_warning() -> str | None:
    """One line when a CPU is slower than it could be though nobody asked for that, else None."""
    from . import native

    if on_gpu() or native.status.state == "used":
        return None
    if native.status.state in ("missing", "off"):
        return blas_problem()
    return f"The CPU kernels are not used: {native.status.detail}; {native.status.advice}."


def slow_training_warning() -> str | None:
    """One line when training and learned quantization are slower than they could be though loading a model says nothing
    (`slow_cpu_warning`): beside the kernels they need a BLAS, too."""
    return blas_problem() if slow_cpu_warning() is None else None


def blas_problem() -> str | None:
    """One line when MLX's own products on a CPU go to the slow BLAS though nobody asked for that, else None."""
    if blas.state == "late":
        return "mlx.core was imported before mlx_openelm, so MLX uses its slow bundled BLAS; import mlx_openelm first."
    if blas.state == "missing" and blas.library:
        return f"{BLAS_VARIABLE}={blas.library} cannot be loaded as a BLAS, so MLX uses its slow bundled BLAS."
    if blas.state == "missing":
        return f"No OpenBLAS was found, so MLX uses its slow bundled BLAS; {BLAS_ADVICE}."
    return None


@contextlib.contextmanager
def naming_the_extra() -> Iterator[None]:
    """Turn a failed import of MLX into one line that says what to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "mlx" and "libmlx" not in str(error) and "mlx.core" not in str(error):
            raise
        if "GLIBC" in str(error):
            raise OpenELMError(f"MLX needs a Linux with glibc 2.35 or newer: {error}.") from None
        raise OpenELMError(
            f"MLX is not installed ({error}); on Linux install one of the extras: "
            "pip install 'mlx-openelm[cpu]', 'mlx-openelm[cuda12]' or 'mlx-openelm[cuda13]'."
        ) from None


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU (Metal or CUDA); its fused kernels exist only there."""
    return device() != "CPU"


def device() -> str:
    """What MLX's default device is: Metal, CUDA or CPU. All that is chosen by device asks here, many times a token."""
    mx, gpu = _mlx()
    if mx.default_device().type is not gpu:
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


@lru_cache(maxsize=1)
def _mlx() -> tuple[Any, Any]:
    """MLX, and the type of its devices that are GPUs: to import and look up both takes longer than to ask for one."""
    import mlx.core as mx

    return mx, mx.DeviceType.gpu


def on_cuda() -> bool:
    """Whether that is an NVIDIA GPU."""
    return device() == "CUDA"


def has_kernels() -> bool:
    """Whether matrix products go through our own kernels for CPUs, which take weights as they are stored."""
    from . import native

    return not on_gpu() and native.kernels is not None


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in, for weights stored as `stored`.

    On a GPU bfloat16, unless the file already holds half precision; on a CPU float32, since half
    precision products are 10 to 100 times slower there.
    """
    import mlx.core as mx

    if not on_gpu():
        return mx.float32
    return stored if stored in (mx.float16, mx.bfloat16) else mx.bfloat16


def prefill_step_size() -> int:
    """Prompt tokens to process at a time.

    A CPU multiplies 64 rows as fast as 512, computes masked scores like any other, and then holds a third of
    the memory (measured on the 270M size: 225 tokens/s either way, 43 MB against 125).
    """
    return 2048 if on_gpu() else 64


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, on CUDA in the GPU; None where the system does not say."""
    if on_cuda():
        import mlx.core as mx

        # What MLX keeps for reuse counts as taken there.
        return int(mx.device_info()["free_memory"]) + mx.get_cache_memory()
    if sys.platform == "darwin":
        total = total_memory()
        import mlx.core as mx

        return None if total is None else max(0, total - mx.get_active_memory() - 4 * _GIB)
    values = _meminfo()
    available = values.get("MemAvailable")
    limit = _cgroup_headroom()
    return min((v for v in (available, limit) if v is not None), default=None)


def total_memory() -> int | None:
    """Bytes of memory in this machine, with CUDA in its GPU."""
    if on_cuda():
        import mlx.core as mx

        return int(mx.device_info()["total_memory"])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _meminfo() -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return {}


def _cgroup_headroom() -> int | None:
    """What a container may still use, where it is limited (cgroup v2)."""
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        used = int((folder / "memory.current").read_text())
        # Files that were read count as used, but are given up when memory is needed.
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / "memory.max").read_text()) - used + int(statistics.get("inactive_file", 0))
    return None


@contextlib.contextmanager
def wired_limit() -> Iterator[None]:
    """Let Metal keep the model's memory resident while generating, as macOS 15 and newer allow."""
    import mlx.core as mx

    if not (mx.metal.is_available() and on_gpu()):
        yield
        return
    previous = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(previous)


def describe() -> dict[str, Any]:
    """The facts `doctor` prints: device, MLX's version, memory in bytes, BLAS."""
    from importlib.metadata import version

    import mlx.core as mx

    return {
        "device": device(),
        "device_name": mx.device_info().get("device_name", "unknown"),
        "mlx_version": version("mlx"),
        "memory_total": total_memory(),
        "memory_available": available_memory(),
        "blas": blas.state,
        "blas_library": blas.library,
    }
