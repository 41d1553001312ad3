"""What this machine is (Metal, CUDA, CPU) and what follows from it: types, memory, warnings.

This module is imported before `blas.preload`, so it does not import MLX at the top.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import blas, native
from .errors import OpenELMError
from .wording import install

if TYPE_CHECKING:
    import mlx.core as mx

# Our CPU kernels multiply as in a prompt from this many positions of a sequence on, and with fewer as in a step.
MANY_POSITIONS = 12

_GIB = 1 << 30

# `mlx.core`, from the first `on_gpu` on.
_mlx: Any = None


def on_gpu() -> bool:
    """Whether MLX's default device is a GPU (Metal or CUDA), which has MLX's fused kernels."""
    global _mlx
    if _mlx is None:  # an import statement takes longer than the rest, and this runs many times per token
        import mlx.core as _mlx
    return _mlx.default_device().type is _mlx.DeviceType.gpu


def device() -> str:
    """MLX's default device: `Metal`, `CUDA` or `CPU`."""
    if not on_gpu():
        return "CPU"
    return "CUDA" if _mlx.cuda.is_available() else "Metal"


def on_cuda() -> bool:
    """Whether MLX's default device is an NVIDIA GPU."""
    return device() == "CUDA"


def has_kernels() -> bool:
    """Whether matrix products use our own CPU kernels, which take weights in their stored type."""
    return not on_gpu() and native.kernels is not None


def multiplies_packed(mode: str) -> bool:
    """Whether to leave weights packed in `mode` packed at load: on a GPU always, on a CPU if our kernels support it."""
    return on_gpu() or (mode == "affine" and has_kernels())


def slow_cpu_warning() -> str | None:
    """A one-line warning if the CPU is slower than it could be and this was not requested; else None."""
    if on_gpu() or native.status.state == "used":
        return None
    if native.status.state in ("missing", "off"):
        return blas.problem()
    return f"The CPU kernels are not used: {native.status.detail}; {native.status.advice}."


def slow_training_warning() -> str | None:
    """A one-line warning if only training and learned quantization are slow, because no BLAS was found; else None.

    If loading a model already warns (`slow_cpu_warning`), there is no second warning.
    """
    return blas.problem() if slow_cpu_warning() is None else None


@contextlib.contextmanager
def naming_the_extra() -> Iterator[None]:
    """A block in which a failed import of MLX becomes a one-line error that says what to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] != "mlx" and "libmlx" not in str(error) and "mlx.core" not in str(error):
            raise
        if "GLIBC" in str(error):
            raise OpenELMError(f"MLX needs a Linux with glibc 2.35 or newer: {error}.") from None
        raise OpenELMError(
            f"MLX is not installed ({error}); on Linux install one of the extras cpu, cuda12 and cuda13: "
            f"{install('cpu')}."
        ) from None


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """The type to compute in, for weights stored as `stored`.

    On a GPU bfloat16, or the stored half precision; on a CPU float32, since half precision products are 10 to 100 times
    slower there.
    """
    import mlx.core as mx

    if not on_gpu():
        return mx.float32
    return stored if stored in (mx.float16, mx.bfloat16) else mx.bfloat16


def prefill_step_size(left: float = math.inf, size: int | None = None) -> int:
    """Prompt tokens to process next.

    On a CPU, 128 rows are nearly as fast per row as 512 (270M in bfloat16: 7% slower, and 12% faster than 64), and
    other texts wait less. A rest of a few tokens joins the piece before it: alone, it would take almost as long, since
    all weights are read for it, and on the CPU kernels have the arithmetic of single tokens.

    Args:
        left: the number of tokens that are left.
        size: the usual number at a time; by default what suits the device.
    """
    size = size or (2048 if on_gpu() else 128)
    if left > size and (size < MANY_POSITIONS or left >= size + MANY_POSITIONS):
        return size
    return int(left)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, on CUDA in the GPU's memory; None if unknown."""
    if on_cuda():
        import mlx.core as mx

        # Memory that MLX keeps for reuse is not counted as free.
        return int(mx.device_info()["free_memory"]) + mx.get_cache_memory()
    if sys.platform == "darwin":
        total = total_memory()
        import mlx.core as mx

        return None if total is None else max(0, total - mx.get_active_memory() - 4 * _GIB)
    values = _meminfo()
    available = values.get("MemAvailable")
    limit = _cgroup_headroom()
    return min((v for v in (available, limit) if v is not None), default=None)


def free_memory() -> int:
    """`available_memory`, or 8 GiB where it is not known."""
    known = available_memory()
    return 8 * _GIB if known is None else known


def total_memory() -> int | None:
    """Bytes of memory in this machine, on CUDA in the GPU; None if unknown."""
    if on_cuda():
        import mlx.core as mx

        return int(mx.device_info()["total_memory"])
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _meminfo() -> dict[str, int]:
    """The entries of /proc/meminfo in bytes."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return {}


def _cgroup_headroom() -> int | None:
    """Bytes a container may still use (cgroup v2); None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup")
        used = int((folder / "memory.current").read_text())
        # Cached files count as used, but are dropped when memory is needed.
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / "memory.max").read_text()) - used + int(statistics.get("inactive_file", 0))
    return None


class _Wired:
    """How many need Metal's memory resident now, and the limit before the first of them."""

    lock = threading.Lock()
    users, previous = 0, 0


@contextlib.contextmanager
def wired_limit() -> Iterator[None]:
    """Let Metal keep the model's memory resident while generating, as macOS 15 and newer allow.

    Generators and threads may hold it at the same time and end in any order.
    """
    import mlx.core as mx

    if not (mx.metal.is_available() and on_gpu()):
        yield
        return
    with _Wired.lock:
        if not _Wired.users:
            _Wired.previous = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        _Wired.users += 1
    try:
        yield
    finally:
        mx.synchronize()
        with _Wired.lock:
            _Wired.users -= 1
            if not _Wired.users:
                mx.set_wired_limit(_Wired.previous)


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
