"""The kernels' C++ checks (`native/checks.cpp`), compiled and run for this machine and others."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

from mlx_openelm.native.build import FUSED, SOURCES, BuildError, find_compiler, native_flag, used_instructions

import pytest

CHECKS = Path(__file__).parent / "native" / "checks.cpp"
FLAGS = ("-std=c++20", "-pthread", "-Wno-psabi", "-Wno-ignored-attributes", f"-I{SOURCES}", f"-I{CHECKS.parent}")
# The flags of the library; sanitizers need fewer.
FAST = ("-O2", "-fno-math-errno", "-fno-trapping-math", *FUSED)
TRACED = ("-O1", "-g1", "-fno-sanitize-recover=all")
# Products and attention take a minute to compile; `test_native.py` checks them in the compiled library.
QUICK = ("-Og", "-DOPENELM_QUICK")
EMULATED_AVX512 = "-DOPENELM_EMULATE_AVX512"
EMULATED_AMX = "-DOPENELM_EMULATE_AMX"

on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="for x86 machines")


def a_compiler(name: str | None = None) -> list[str]:
    """The command of this compiler, or of the one that compiles the library."""
    if name is not None:
        return [name] if shutil.which(name) else pytest.skip(f"there is no {name}")
    try:
        return find_compiler()
    except BuildError as error:
        pytest.skip(str(error))


def compile_checks(program: Path, compiler: list[str], *flags: str) -> None:
    command = [*compiler, *FLAGS, *flags, str(CHECKS), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]


def run_checks(*command: str | Path) -> str:
    """Run the program, whose checks must pass; returns its output."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.splitlines()[-1].endswith(" passed, 0 failed")
    return done.stdout


def sanitized(tmp_path: Path, sanitizers: str, *flags: str) -> Path:
    """The program with these sanitizers, if the compiler has them; `flags` instead of those for this machine."""
    compiler, empty = a_compiler(), tmp_path / "empty.cpp"
    flag = f"-fsanitize={sanitizers}"
    empty.write_text("int main() {}\n")
    trial = subprocess.run([*compiler, flag, str(empty), "-o", str(tmp_path / "empty")], capture_output=True)
    if trial.returncode or subprocess.run([str(tmp_path / "empty")], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} has no working {flag}")
    compile_checks(tmp_path / "checks", compiler, *TRACED, flag, *(flags or [native_flag(compiler)]))
    return tmp_path / "checks"


@pytest.mark.parametrize("some", [QUICK, pytest.param((), marks=pytest.mark.slow)])
def test_on_this_machine(some: tuple[str, ...], tmp_path: Path) -> None:
    compiler = a_compiler()
    compile_checks(tmp_path / "checks", compiler, *FAST, native_flag(compiler), *some)
    output = run_checks(tmp_path / "checks")
    assert "split_heads" in output and "fork" in output
    assert all((name in output) == (not some) for name in ("few_rows", "attention_gradient"))


@pytest.mark.slow
def test_with_other_seeds(tmp_path: Path) -> None:
    compiler = a_compiler()
    compile_checks(tmp_path / "checks", compiler, *FAST, native_flag(compiler))
    for seed in range(1, 6):
        run_checks(tmp_path / "checks", "--seed", str(seed))


@pytest.mark.slow
def test_memory_and_undefined_behavior(tmp_path: Path) -> None:
    run_checks(sanitized(tmp_path, "address,undefined"))


@pytest.mark.slow
@on_x86
def test_memory_with_shorter_vectors(tmp_path: Path) -> None:
    """Where the machine has AVX-512: the code for AVX2 divides the rows of a matrix in another way."""
    if "avx512f" not in used_instructions(a_compiler()):
        pytest.skip("test_memory_and_undefined_behavior covers it")
    run_checks(sanitized(tmp_path, "address,undefined", "-march=haswell"), "few_rows", "extreme_rows")


@pytest.mark.slow
def test_races(tmp_path: Path) -> None:
    run_checks(sanitized(tmp_path, "thread"), "pool")


@pytest.mark.slow
@on_x86
def test_without_avx2(tmp_path: Path) -> None:
    compile_checks(tmp_path / "checks", a_compiler(), *FAST, "-march=x86-64")
    assert run_checks(tmp_path / "checks").startswith("4 lanes")


@pytest.mark.slow
@on_x86
def test_avx512(tmp_path: Path) -> None:
    compiler = a_compiler()
    instructions = used_instructions(compiler)
    if "avx512f" in instructions:
        pytest.skip("this machine has AVX-512, so test_on_this_machine covers it")
    if "avx2" not in instructions:
        pytest.skip("AVX-512 is emulated on top of AVX2")
    compile_checks(tmp_path / "checks", compiler, *FAST, native_flag(compiler), EMULATED_AVX512)
    assert run_checks(tmp_path / "checks").startswith("16 lanes, 32 registers")


@pytest.mark.slow
def test_amx(tmp_path: Path) -> None:
    compiler = a_compiler()
    if "amx_bf16" in used_instructions(compiler):
        pytest.skip("this machine has AMX, so test_on_this_machine covers it")
    compile_checks(tmp_path / "checks", compiler, *FAST, native_flag(compiler), EMULATED_AMX)
    run_checks(tmp_path / "checks", "few_rows", "extreme_plain_rows", "pool")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["armv8-a", "armv8.2-a+dotprod+fp16"])
def test_arm(architecture: str, tmp_path: Path) -> None:
    compiler, emulator = a_compiler("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("needs qemu-aarch64")
    compile_checks(tmp_path / "checks", compiler, *FAST, "-static", f"-march={architecture}")
    run_checks(emulator, tmp_path / "checks")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("g++", "-march=sapphirerapids"),
        ("g++", "-march=znver4"),
        ("clang++", "-march=sapphirerapids"),
        ("clang++", "-march=x86-64-v3"),
        ("clang++", "--target=aarch64-linux-gnu -march=armv8.2-a+dotprod+fp16"),  # as on macOS
    ],
)
def test_compiles_without_warnings_for(compiler: str, flags: str, tmp_path: Path) -> None:
    """For platforms this machine cannot run: the instructions exist and the source compiles."""
    command = [*a_compiler(compiler), *FLAGS, *flags.split(), "-Wall", "-Wextra", "-fsyntax-only"]
    library = tmp_path / "library.cpp"
    library.write_text("#include <algorithm>\n#include <thread>\n")
    if subprocess.run([*command, str(library)], capture_output=True).returncode:
        pytest.skip(f"{compiler} cannot compile with {flags}, or lacks that machine's headers")
    done = subprocess.run([*command, str(CHECKS)], capture_output=True, text=True)
    assert (done.returncode, done.stderr[-4000:]) == (0, "")
