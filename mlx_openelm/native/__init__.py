"""C++ kernels for MLX on a CPU: finding, checking and loading them.

`kernels` is the compiled module, or None where plain MLX is used; `status` says which, and why. Both are determined
on first use: by the first forward pass on a CPU, and never when a GPU computes. On Linux the kernels are compiled at
installation if there is a compiler; `python -m mlx_openelm.native` compiles them again. On a Mac only that does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from ..environment import says_off, thread_count
from .build import FACTS, KNOWN, LIBRARY, fingerprint

# Set to 0 to turn the kernels off.
VARIABLE = "MLX_OPENELM_NATIVE"
COMMAND = f"{Path(sys.executable).name} -m mlx_openelm.native"
REBUILD = f"compile them again: {COMMAND}"

# Set by `__getattr__`.
kernels: Any
status: Status


@dataclass(frozen=True)
class Status:
    """Whether the kernels are used.

    `state` is one of: used, off (by the environment variable), missing (not compiled), stale (compiled for another
    MLX, or from other sources), foreign (for another processor), failed (it does not load, or does not know MLX's
    arrays). `detail` says more in a few words, `advice` what to do, if anything.
    """

    state: str
    detail: str = ""
    advice: str | None = None


def missing_instructions(needed: list[str]) -> list[str]:
    """The instructions in `needed` that this processor lacks; empty if the system does not list them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, values = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return [instruction for instruction in needed if instruction not in values.split()]
    return []


def examine(folder: Path) -> Status | None:
    """Why the library in `folder` must not be loaded, judged from its description alone; None if it may be."""
    if says_off(os.environ.get(VARIABLE, "")):
        return Status("off", f"{VARIABLE} says so", f"unset {VARIABLE}, if the kernels are wanted")
    if not (folder / LIBRARY).is_file():
        return Status("missing", "not compiled", f"{COMMAND} compiles them; it says what it lacks")
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
        return Status("stale", f"compiled for MLX {built_for}, and {installed} is installed", REBUILD)
    try:
        is_ours = sources == fingerprint()
    except OSError as error:
        return Status("failed", f"the sources cannot be read: {error}", "install mlx-openelm again")
    if not is_ours:
        return Status("stale", "compiled from other sources", REBUILD)
    lacking = missing_instructions(needed)
    if machine != os.uname().machine or lacking:
        other = f"has no {', '.join(lacking)}" if lacking else f"is {os.uname().machine}, not {machine}"
        return Status("foreign", f"compiled for another processor: this one {other}", REBUILD)
    return None


def find_folder() -> Path:
    """Where the library is: beside this file, or, for a clone that was installed, where it was installed."""
    own = Path(__file__).parent
    if (own / LIBRARY).is_file():
        return own
    import sysconfig

    installed = (Path(sysconfig.get_path(name)) / "mlx_openelm" / "native" for name in ("platlib", "purelib"))
    return next((folder for folder in installed if (folder / LIBRARY).is_file()), own)


def _load() -> tuple[Any, Status]:
    folder = find_folder()
    if (status := examine(folder)) is not None:
        return None, status
    import mlx.core as mx

    try:
        spec = spec_from_file_location(f"{__name__}.kernels", folder / LIBRARY)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        # With another nanobind than MLX's the module does not recognize arrays.
        module.rms_norm(mx.ones(2), mx.ones(2), 1e-6)
    except (ImportError, TypeError) as error:
        reason = "it does not know MLX's arrays (nanobind differs)" if isinstance(error, TypeError) else str(error)
        return None, Status("failed", reason, REBUILD)
    module.set_threads(thread_count())
    count = module.threads()
    return module, Status("used", f"{count} thread{'s' * (count > 1)}, for {_instructions(folder)}")


def _instructions(folder: Path) -> str:
    used = json.loads((folder / FACTS).read_text())["instructions"]
    return ", ".join(name for name in used if name in KNOWN) or os.uname().machine


_loading = threading.Lock()


def __getattr__(name: str) -> Any:
    # Runs on first use only; from then on both are plain variables.
    if name not in ("kernels", "status"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    global kernels, status
    with _loading:
        if "status" not in globals():
            kernels, status = _load()
    return globals()[name]
