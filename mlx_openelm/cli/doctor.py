"""`mlx-openelm doctor`: what this machine offers, and what to do about what is slow or missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .. import backend, blas, console
from ..errors import OpenELMError
from ..hub import catalog
from ..version import __version__
from ..wording import size
from . import flags

_MLX_GLIBC = (2, 35)  # what MLX's Linux wheels are built against
_MLX_WHEELS = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_REQUIRED = ("rich", "tokenizers", "sentencepiece", "huggingface_hub", "jinja2", "pyyaml")
# Optional packages: what they are for, and the extra that installs them.
_OPTIONAL = {
    "gguf": ("reads and writes llama.cpp's files", "gguf"),
    "matplotlib": ("draws quantize --report-plot, bench --plot and the losses of a training run", "plots"),
    "llguidance": ("constrains text: generate --json-schema, --regex, --grammar", "constraints"),
    "pyarrow": ("reads training data in parquet files", "data"),
    "tensorboardX": ("shows a training run in TensorBoard", "trackers"),
    "wandb": ("shows a training run at Weights & Biases", "trackers"),
    "mlx-lm": ("bench --compare and the benchmarks measure it", "dev"),
}


@dataclass(frozen=True)
class Finding:
    """One fact. `advice` says what to do about it; `failed` means that nothing works without it."""

    name: str
    value: str
    advice: str | None = None
    failed: bool = False


MAIN_FLAGS = ("--json",)
EXAMPLES = """\
  mlx-openelm doctor"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `doctor` to its parser."""
    flags.add_shared(parser.groups["Common flags"], "--json")


def run(args: Namespace) -> int:
    """Show what this machine offers, and what to do about what is slow or missing."""
    findings = list(examine())
    failed = any(finding.failed for finding in findings)
    if args.json:
        console.print_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    else:
        console.print_rows(row for finding in findings for row in _rows(finding))
    return 1 if failed else 0


def _rows(finding: Finding) -> Iterator[tuple[str, str]]:
    yield finding.name, finding.value
    if finding.advice:
        yield "", f"-> {finding.advice}"


def examine() -> Iterator[Finding]:
    """Every finding; without MLX, those that need it are left out."""
    yield Finding("mlx-openelm", __version__)
    yield Finding("Python", f"{platform.python_version()} on {platform.platform(terse=True)}, {platform.machine()}")
    yield from _glibc()
    yield from _mlx()
    yield from _packages()
    yield from _hub()


def _glibc() -> Iterator[Finding]:
    name, text = platform.libc_ver()
    if not sys.platform.startswith("linux"):
        return
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    needs = (
        f"MLX's wheels need glibc {'.'.join(map(str, _MLX_GLIBC))} or newer: use a newer Linux or a container of one"
    )
    is_enough = name == "glibc" and numbers >= _MLX_GLIBC
    yield Finding("C library", f"{name or 'not glibc'} {text}".strip(), None if is_enough else needs)


def _mlx() -> Iterator[Finding]:
    try:
        with backend.naming_the_extra():
            facts = backend.describe()
    # A wheel for another platform can raise anything.
    except Exception as error:
        reason = str(error) if isinstance(error, OpenELMError) else f"MLX cannot be imported: {error}"
        yield Finding("MLX", "missing", " ".join(reason.split()), failed=True)
        return
    wheels = [name for name in _MLX_WHEELS if _version(name)]
    several = f"{' and '.join(wheels)} overwrite each other: uninstall all, then install one" if wheels[1:] else None
    yield Finding("MLX", f"{facts['mlx_version']} ({', '.join(wheels) or 'mlx'})", several)
    yield Finding("Device", f"{facts['device']}, {facts['device_name']}")
    total, available = (
        "unknown" if facts[key] is None else size(facts[key]) for key in ("memory_total", "memory_available")
    )
    yield Finding("Memory", f"{total}, {available} available")
    if facts["device"] == "CPU":
        yield _kernels()
        yield _blas(facts["blas"], facts["blas_library"])
        yield _compiler()
    elif facts["device"] == "CUDA":
        yield _cuda_kernels()
    yield _packed_weights()


def _cuda_kernels() -> Finding:
    """Whether our kernel decodes the tokens."""
    from ..cuda.decoding import obstacle

    reason = obstacle()
    return Finding("CUDA kernels", "used" if reason is None else f"not used: {reason}")


def _packed_weights() -> Finding:
    """The quantization modes that this machine multiplies as stored, and those that it unpacks at load."""
    from ..ops.packed import MODES

    kept, rest = ([mode for mode in MODES if backend.multiplies_packed(mode) is wanted] for wanted in (True, False))
    parts = [f"{', '.join(kept)}: multiplied as stored"] if kept else []
    parts += [f"{', '.join(rest)}: unpacked at load, while memory allows"] if rest else []
    return Finding("Packed weights", "; ".join(parts))


def _kernels() -> Finding:
    """Whether the model runs on our own kernels, and how to get them if not."""
    from ..native import status

    names = {"used": "used", "off": "off", "missing": "missing"}
    name = names.get(status.state, "not used")
    return Finding("CPU kernels", f"{name}: {status.detail}", status.advice)


def _blas(state: str, library: str) -> Finding:
    """Which BLAS multiplies matrices, how fast it is, and how to get a faster one."""
    names = {
        "loaded": library,
        "off": f"the one in MLX's wheel, because {blas.VARIABLE} is set",
        "unneeded": "the system's",
    }
    name = names.get(state, "the slow one in MLX's wheel")
    return Finding("BLAS", f"{name}, {_gigaflops():.0f} GFLOP/s in float32", _blas_advice(state, library))


def _blas_advice(state: str, library: str) -> str | None:
    """How to get a fast BLAS, and what that makes faster; None if there is one."""
    from ..native import status

    if state in ("loaded", "unneeded"):
        return None
    ways = {"off": f"unset {blas.VARIABLE}", "late": "import mlx_openelm before mlx.core"}
    way = ways.get(state) or (f"correct or unset {blas.VARIABLE}={library}" if library else blas.ADVICE)
    slow = "everything is slow with it"
    if status.state == "used":
        slow = "training and learned quantization are slow with it, generating is not"
    return f"{slow}: {way}"


def _gigaflops(size: int = 512) -> float:
    """The speed of multiplying two float32 matrices, the best of three runs."""
    import mlx.core as mx

    matrix = mx.ones((size, size))
    mx.eval(matrix @ matrix)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        mx.eval(matrix @ matrix)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds) / 1e9


def _compiler() -> Finding:
    found = shutil.which("g++")
    advice = "install g++ (Debian and Ubuntu: apt-get install g++): MLX compiles element-wise kernels with it"
    return Finding("Compiler", found or "no g++", None if found else advice)


def _packages() -> Iterator[Finding]:
    missing = [name for name in _REQUIRED if not _version(name)]
    present = ", ".join(f"{name} {_version(name)}" for name in _REQUIRED if name not in missing)
    advice = f"pip install {' '.join(missing)}" if missing else None
    yield Finding("Packages", present, advice)
    for name, (purpose, extra) in _OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed ({purpose}: pip install '.[{extra}]')")


def _version(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hub() -> Iterator[Finding]:
    missing = [name for name, folder in catalog.PACKAGED.items() if not (folder / "config.json").is_file()]
    found = ", ".join(name for name in catalog.PACKAGED if name not in missing)
    advice = f"{', '.join(missing)} missing: install mlx-openelm again" if missing else None
    yield Finding("In the package", found or "no models", advice)
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return
    yield Finding("Hub token", "present" if get_token() else "none (not needed for OpenELM)")
    if os.environ.get("HF_HUB_OFFLINE"):
        yield Finding("Hub", "offline, since HF_HUB_OFFLINE is set")
    cache = Path(constants.HF_HUB_CACHE)
    models = sorted(path for path in cache.glob("models--*") if "openelm" in path.name.lower())
    held = [f"{path.name.removeprefix('models--').replace('--', '/')} ({size(_bytes_in(path))})" for path in models]
    yield Finding("Hub cache", f"{cache}: {', '.join(held) or 'no OpenELM models'}")


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("blobs/*"))
