"""Compiles the kernels for the machine it runs on: `python -m mlx_openelm.native`, and setup.py on Linux.

It imports the standard library alone, since setup.py loads it before anything is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import FACTS, LIBRARY, SOURCES, fingerprint

# The instruction sets that `-march=native` may enable: the compiler's macro and the name in /proc/cpuinfo. All of them
# are listed, since the library crashes on a processor that lacks one it was compiled with.
INSTRUCTIONS = {
    **{f"__{name.upper()}__": name for name in (
        "avx", "avx2", "fma", "f16c", "bmi2", "movbe", "adx", "gfni", "vaes",
        "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512ifma", "avx512vbmi",
    )},
    "__POPCNT__": "popcnt", "__LZCNT__": "abm", "__BMI__": "bmi1", "__VPCLMULQDQ__": "vpclmulqdq",
    "__AVXVNNI__": "avx_vnni", "__AVX512VBMI2__": "avx512_vbmi2", "__AVX512VNNI__": "avx512_vnni",
    "__AVX512BITALG__": "avx512_bitalg", "__AVX512VPOPCNTDQ__": "avx512_vpopcntdq", "__AVX512BF16__": "avx512_bf16",
    "__AVX512FP16__": "avx512_fp16", "__AMX_TILE__": "amx_tile", "__AMX_BF16__": "amx_bf16", "__AMX_INT8__": "amx_int8",
    "__ARM_FEATURE_DOTPROD": "asimddp", "__ARM_FEATURE_QRDMX": "asimdrdm",
    "__ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp", "__ARM_FEATURE_ATOMICS": "atomics", "__ARM_FEATURE_SVE": "sve",
    "__ARM_FEATURE_BF16": "bf16", "__ARM_FEATURE_MATMUL_INT8": "i8mm", "__ARM_FEATURE_SVE2": "sve2",
}  # fmt: skip

# Always fuse multiply and add, even where the tuning for a processor avoids it: then a row's result does not depend on
# how many rows are computed with it, nor on the number of threads. (Clang always does, and ignores the parameter.)
FUSED = ("--param=avoid-fma-max-bits=0", "-Wno-unused-command-line-argument")

# The version that MLX 0.32 was built with: modules built with another one do not recognize its arrays.
NANOBIND = "3.1.0"


class BuildError(Exception):
    """Why the kernels cannot be compiled; one line that says what to do."""


def build(folder: Path, *, flags: tuple[str, ...] = ()) -> Path:
    """Compile the library into `folder`, where it appears only when complete; returns its path.

    Args:
        flags: more flags for the compiler, after all others.

    Raises:
        BuildError: the compiler, nanobind or MLX is missing, or the compiler failed.
    """
    compiler = find_compiler()
    mlx, nanobind = find_mlx(), find_nanobind()
    options = [
        *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread"),
        *("-Wno-psabi", "-Wno-ignored-attributes", "-DNB_DOMAIN=mlx", "-DNDEBUG", native_flag(compiler)),
        *FUSED,
        *(f"-isystem{path}" for path in (mlx / "include", nanobind / "include", sysconfig.get_path("include"))),
        f"-isystem{nanobind / 'ext' / 'robin_map' / 'include'}",
        *flags,
    ]
    # Those that take longest first.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: (not source.stem.startswith("packed"), source))
    sources.append(nanobind / "src" / "nb_combined.cpp")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as temporary:
        partial = Path(temporary)
        objects = [partial / f"{source.stem}.o" for source in sources]
        commands = [
            [*compiler, *options, "-c", str(source), "-o", str(target)]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, commands))
        if sys.platform == "darwin":
            linking = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path/../../mlx/lib"]
        else:
            linking = ["-shared", "-Wl,-rpath,$ORIGIN/../../mlx/lib"]
        library = partial / LIBRARY
        linking += [*map(str, objects), f"-L{mlx / 'lib'}", "-lmlx", "-pthread", "-o", str(library)]
        _run([*compiler, *flags, *linking])
        facts = {
            "mlx": _mlx_version(mlx),
            "nanobind": _nanobind_version(nanobind),
            "sources": fingerprint(),
            "machine": os.uname().machine,
            "instructions": used_instructions(compiler),
            "bytes": library.stat().st_size,
        }
        (partial / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        # The old description goes first: if this is interrupted, none lies beside a library it does not describe.
        (folder / FACTS).unlink(missing_ok=True)
        for name in (LIBRARY, FACTS):
            os.replace(partial / name, folder / name)
    return folder / LIBRARY


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX if set, else g++, clang++ or c++; it must be new enough for the sources."""
    named = os.environ.get("CXX")
    too_old = []
    for words in [named.split()] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(words[0]) is None:
            continue
        # The newest feature that the sources use: GCC 12 and Clang 14 have it.
        probe = "#if !__has_builtin(__builtin_shufflevector)\n#error\n#endif\n"
        command = [*words, "-std=c++20", "-fsyntax-only", "-xc++", "-"]
        if subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0:
            return words
        too_old.append(words[0])
    if too_old:
        names = " and ".join(too_old)
        # Without Xcode's tools a Mac still has programs of these names, which only ask to install them.
        way = "run xcode-select --install" if sys.platform == "darwin" else "install GCC 12 or Clang 14, or newer"
        raise BuildError(f"{names} cannot compile them; {way}, or name another compiler in CXX.")
    if named:
        raise BuildError(f"CXX names {named!r}, which was not found.")
    ways = "Debian and Ubuntu: apt-get install g++; macOS: xcode-select --install"
    raise BuildError(f"There is no C++ compiler; install one ({ways}).")


def find_mlx() -> Path:
    """The folder of the MLX that the library will run with.

    pip builds in an isolated environment; if the one it installs into already has MLX, that is used.
    """
    for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path):
        folder = Path(path) / "mlx"
        if (folder / "include" / "mlx" / "mlx.h").is_file() and list((folder / "lib").glob("libmlx.*")):
            return folder
    raise BuildError("MLX is not installed; on Linux: pip install 'mlx[cpu]'.")


def find_nanobind() -> Path:
    """The folder of nanobind, with its sources."""
    for path in sys.path:
        folder = Path(path) / "nanobind"
        if (folder / "src" / "nb_combined.cpp").is_file():
            if (version := _nanobind_version(folder)) == NANOBIND:
                return folder
            found = f"nanobind {version} is installed"
            break
    else:
        found = "nanobind is not installed"
    raise BuildError(f"{found}; pip install nanobind=={NANOBIND} (what MLX 0.32 was built with).")


def native_flag(compiler: list[str]) -> str:
    """The flag that compiles for this processor; compilers for x86 and older ones for ARM name it differently."""
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        return "-mcpu=apple-m1"  # runs on every M-series chip
    for flag in ("-march=native", "-mcpu=native"):
        if not subprocess.run([*compiler, flag, "-E", "-xc++", os.devnull], capture_output=True).returncode:
            return flag
    return "-O3"


def used_instructions(compiler: list[str]) -> list[str]:
    """The instruction sets that the compiler uses on this processor, by their names in /proc/cpuinfo."""
    command = [*compiler, native_flag(compiler), "-dM", "-E", "-xc++", os.devnull]
    macros = {line.split()[1] for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()}
    return [name for macro, name in INSTRUCTIONS.items() if macro in macros]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command[:1])} failed:\n{done.stderr.strip()[-2000:]}")


def _mlx_version(folder: Path) -> str:
    lines = (folder / "include" / "mlx" / "version.h").read_text().splitlines()
    numbers = {line.split()[1]: line.split()[2] for line in lines if line.startswith("#define MLX_VERSION_")}
    return ".".join(numbers[f"MLX_VERSION_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))


def _nanobind_version(folder: Path) -> str:
    lines = (folder / "include" / "nanobind" / "nanobind.h").read_text().splitlines()
    numbers = {line.split()[1]: line.split()[2] for line in lines if line.startswith("#define NB_VERSION_")}
    return ".".join(numbers[f"NB_VERSION_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))


def main() -> None:
    try:
        find_nanobind()
        print("Compiling for this processor, which takes a minute or two.", file=sys.stderr, flush=True)
        print(build(Path(__file__).parent))
    except (BuildError, OSError) as error:
        sys.exit(f"Error: {error}")
