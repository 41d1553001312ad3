"""C++ kernels for MLX on a CPU: finding, checking and loading them.

`kernels` is the compiled module, or None where plain MLX is used; `status` says which, and why. Both are determined
on first use: by the first forward pass on a CPU, and never when a GPU computes. On Linux the kernels are compiled at
installation if there is a compiler; `python -m mlx_openelm.native` compiles them again. On a Mac only that command
compiles them.

This file imports the standard library alone at its top: it is loaded before MLX, and by setup.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import zlib
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "src"
LIBRARY = f"kernels{EXTENSION_SUFFIXES[0]}"
# What the library was compiled for. This file is read first, since merely loading the library may execute instructions
# that this processor lacks.
FACTS = f"{LIBRARY}.json"
# The instructions that the kernels are written for, by their names in /proc/cpuinfo.
KNOWN = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "amx_bf16", "asimddp")

# Set to 0 to turn the kernels off.
VARIABLE = "MLX_OPENELM_NATIVE"
# Values of an environment variable that turn its feature off, in lower case.
OFF = ("0", "off", "false", "no")
COMMAND = f"{Path(sys.executable).name} -m mlx_openelm.native"
REBUILD = f"compile them again: {COMMAND}"
# The first of these that is set gives the number of threads.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# Set by `__getattr__`.
kernels: Any
status: Status


@dataclass(frozen=True)
class Status:
    """Whether the kernels are used.

    `state` is one of: used, off (by the environment variable), missing (not compiled), stale (compiled for another
    MLX, or from other sources), foreign (for another processor), failed (the library does not load, or does not
    recognize MLX's arrays). `detail` gives the reason in a few words, `advice` what to do, if anything.
    """

    state: str
    detail: str = ""
    advice: str | None = None


def fingerprint() -> int:
    """A checksum of the sources and the compiler flags: a library of other sources may have other functions."""
    number = zlib.crc32(SOURCES.with_name("build.py").read_bytes())
    for file in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        number = zlib.crc32(file.read_bytes(), number)
    return number


def thread_count() -> int:
    """The number of threads for arithmetic: from the environment, else the processors this process may use.

    `OMP_NUM_THREADS` may be a list with one number for each nesting level; the first is used.
    """
    for name in THREAD_VARIABLES:
        with contextlib.suppress(ValueError):
            if (count := int(os.environ.get(name, "").split(",")[0])) > 0:
                return count
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A container may use fewer processors than it sees (cgroup v2: microseconds of each period).
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(1, round(int(quota) / int(period))))
    return count


def examine(folder: Path) -> Status | None:
    """Why the library in `folder` must not be loaded, from its description alone; None if it may be."""
    if os.environ.get(VARIABLE, "").lower() in OFF:
        return Status("off", f"disabled by {VARIABLE}", f"unset {VARIABLE} to use them")
    if not (folder / LIBRARY).is_file():
        return Status("missing", "not compiled", f"run {COMMAND} to compile them")
    try:
        facts = json.loads((folder / FACTS).read_text())
        built_for, sources, machine = facts["mlx"], facts["sources"], facts["machine"]
        needed, is_whole = list(facts["instructions"]), facts["bytes"] == (folder / LIBRARY).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return Status("failed", f"{FACTS} is missing or damaged", REBUILD)
    if not is_whole:
        return Status("failed", f"{LIBRARY} is damaged", REBUILD)
    import mlx.core as mx

    installed: str = mx.__version__  # type: ignore[attr-defined]
    if built_for != installed:
        return Status("stale", f"compiled for MLX {built_for}, but {installed} is installed", REBUILD)
    try:
        is_ours = sources == fingerprint()
    except OSError as error:
        return Status("failed", f"the sources cannot be read: {error}", "install mlx-openelm again")
    if not is_ours:
        return Status("stale", "compiled from other sources", REBUILD)
    if machine != os.uname().machine:
        detail = f"compiled for another processor: this one is {os.uname().machine}, not {machine}"
        return Status("foreign", detail, REBUILD)
    # Only Linux lists a processor's instructions.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        offered = next(line for line in lines if line.startswith(("flags", "Features"))).split()
        if lacking := [instruction for instruction in needed if instruction not in offered]:
            return Status("foreign", f"compiled for another processor: this one lacks {', '.join(lacking)}", REBUILD)
    return None


def _load() -> tuple[Any, Status]:
    """The module, or None, and the status that says why."""
    folder = Path(__file__).parent
    if not (folder / LIBRARY).is_file():  # a clone may use the library that was compiled when it was installed
        import sysconfig

        installed = (Path(sysconfig.get_path(name), "mlx_openelm", "native") for name in ("platlib", "purelib"))
        folder = next((found for found in installed if (found / LIBRARY).is_file()), folder)
    if (reason := examine(folder)) is not None:
        return None, reason
    import mlx.core as mx

    try:
        spec = spec_from_file_location(f"{__name__}.kernels", folder / LIBRARY)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        # With another nanobind than MLX's the module does not recognize arrays.
        module.rms_norm(mx.ones(2), mx.ones(2), 1e-6)
    except ImportError as error:
        return None, Status("failed", str(error), REBUILD)
    except TypeError:
        return None, Status("failed", "it does not recognize MLX's arrays (nanobind differs)", REBUILD)
    module.set_threads(thread_count())
    count = module.threads()
    used = json.loads((folder / FACTS).read_text())["instructions"]
    names = ", ".join(name for name in used if name in KNOWN) or os.uname().machine
    return module, Status("used", f"{count} thread{'s' * (count > 1)}, for {names}")


_loading = threading.Lock()


def __getattr__(name: str) -> Any:
    """`kernels` and `status`, on first use only: from then on both are plain variables."""
    if name not in ("kernels", "status"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    global kernels, status
    with _loading:
        if "status" not in globals():
            kernels, status = _load()
    return globals()[name]
