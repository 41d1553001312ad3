"""PyPI's OpenBLAS under MLX: the symbol table that redirects to it, its results, threads and substitutes."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from mlx_openelm import blas
from mlx_openelm.blas import symbol_table

import mlx.core as mx
import numpy as np
import pytest

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the Linux linker")
loaded = pytest.mark.skipif(blas.state != "loaded", reason=f"no OpenBLAS: {blas.state}")


def python(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# The symbol table.


@on_linux
def test_functions_are_renamed():
    """Twice, since the linker tells libraries apart by name; and without any name."""
    code = """
import ctypes
from mlx_openelm import blas
def address(function): return ctypes.cast(function, ctypes.c_void_p).value
libm = ctypes.CDLL("libm.so.6")
blas.publish({"openelm_cosine": address(libm.cos), "openelm_root": address(libm.sqrt)})
blas.publish({"openelm_sine": address(libm.sin)})
blas.publish({})
everywhere = ctypes.CDLL(None)
for name in ("openelm_cosine", "openelm_root", "openelm_sine"):
    function = everywhere[name]
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    print(function(2.0))
"""
    assert np.allclose([float(x) for x in python(code).split()], [np.cos(2.0), np.sqrt(2.0), np.sin(2.0)])


@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize(("machine", "name"), [("x86_64", "Advanced Micro Devices X86-64"), ("aarch64", "AArch64")])
def test_readelf_reads_the_symbol_table(machine, name, tmp_path):
    (tmp_path / "table.so").write_bytes(symbol_table({"one": 0x1234, "two": 0x7FFF_0000_5678}, machine))
    command = ["readelf", "--wide", "--file-header", "--program-headers", "--dynamic", str(tmp_path / "table.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"})
    assert done.stderr == ""
    assert re.search(rf"Machine:\s+{name}\n", done.stdout) and "DYN (Shared object file)" in done.stdout
    assert not re.search(r"LOAD.*E 0x", done.stdout)  # no part of it is executable
    assert re.search(r"GNU_STACK.* RW ", done.stdout)


def test_no_table_is_made_for_other_processors():
    with pytest.raises(OSError, match="symbol tables are not supported for abacus"):
        symbol_table({}, "abacus")


@pytest.mark.slow
def test_the_arm_linker_accepts_the_table(tmp_path):
    compiler, emulator = (shutil.which(name) for name in ("aarch64-linux-gnu-gcc", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("needs gcc for aarch64, and qemu")

    def build(name: str, source: str, *flags: str) -> None:
        (tmp_path / f"{name}.c").write_text(source)
        subprocess.run([compiler, f"{name}.c", "-o", name, *flags], cwd=tmp_path, check=True)

    build("libslow.so", "int cblas_sgemm(void) { return 1; }", "-shared", "-fPIC")
    build("libuser.so", "int cblas_sgemm(void); int use(void) { return cblas_sgemm(); }", "-shared", "-fPIC", "-L.",
          "-lslow", "-Wl,-rpath,$ORIGIN")  # fmt: skip
    program = """#include <dlfcn.h>
int fast(void) { return 42; }
int main(int count, char** paths) {
  if (count > 1 && !dlopen(paths[1], RTLD_NOW | RTLD_GLOBAL)) return 3;
  void* user = dlopen("./libuser.so", RTLD_NOW);
  return user ? ((int (*)(void))dlsym(user, "use"))() : 2;
}"""
    build("main", program, "-no-pie")
    names = subprocess.run(["aarch64-linux-gnu-nm", "main"], capture_output=True, text=True, cwd=tmp_path).stdout
    fast = next(int(line.split()[0], 16) for line in names.splitlines() if line.endswith(" fast"))
    (tmp_path / "table.so").write_bytes(symbol_table({"other": 1, "cblas_sgemm": fast, "another": 2}, "aarch64"))
    run = [emulator, "-L", "/usr/aarch64-linux-gnu", "./main"]
    assert subprocess.run(run, cwd=tmp_path).returncode == 1
    assert subprocess.run([*run, "./table.so"], cwd=tmp_path).returncode == 42


# The functions MLX uses.


@loaded
def test_the_functions_are_those_mlx_uses():
    library = Path(mx.__file__).parent / "lib" / "libmlx.so"
    names = set(re.findall(rb"(?<=\0)(?:cblas_[a-z0-9_]+|[sdcz][a-z]{4,5}_)(?=\0)", library.read_bytes()))
    assert names == {name.encode() for name in blas.FUNCTIONS}


@loaded
@pytest.mark.skipif("scipy_openblas" not in blas.library, reason="another BLAS")
def test_the_package_has_them_all():
    library = ctypes.CDLL(blas.library)
    assert [name for name in blas.FUNCTIONS if not hasattr(library, f"scipy_{name}")] == []


@pytest.mark.parametrize("size", [1, 7, 150])
def test_results_are_numpys(size):
    """Every MLX function that calls BLAS or LAPACK; a wrong name or calling convention would show."""
    rng = np.random.default_rng(size)
    plain = rng.standard_normal((size, size + 3)).astype(np.float32)
    positive = plain @ plain.T / size + np.eye(size, dtype=np.float32)
    x, square, linalg = mx.array(plain), mx.array(positive), mx.linalg
    with mx.stream(mx.cpu):
        lower, inverse, (q, r) = linalg.cholesky(square), linalg.inv(square), linalg.qr(x.T)
        triangular = linalg.tri_inv(lower)
        values, vectors = linalg.eigh(square)
        u, sizes, v = linalg.svd(x)
        *_, l_part, u_part = linalg.lu(square)
        rotations = linalg.eigvals(mx.array(plain[:, :size]))
        complexes = x.astype(mx.complex64) * (1 + 2j)
        outputs = (
            (x @ x.T, plain @ plain.T),
            (complexes @ complexes.T, (1 + 2j) ** 2 * (plain @ plain.T)),
            (lower, np.linalg.cholesky(positive)),
            (inverse, np.linalg.inv(positive)),
            (linalg.cholesky_inv(lower), np.linalg.inv(positive)),
            (triangular @ lower, np.eye(size)),
            (q @ r, plain.T),
            (q.T @ q, np.eye(size)),
            (values, np.linalg.eigvalsh(positive)),
            ((vectors * values) @ vectors.T, positive),
            (sizes, np.linalg.svd(plain, compute_uv=False)),
            ((u * sizes) @ v[:size], plain),
            (mx.sort(mx.abs(rotations)), np.sort(np.abs(np.linalg.eigvals(plain[:, :size].astype(np.float64))))),
            (mx.sum(mx.abs(l_part @ u_part)), np.abs(positive).sum()),
        )
        for place, (ours, theirs) in enumerate(outputs):
            assert np.abs(np.array(ours) - theirs).max() < 2e-4 * max(1, np.abs(theirs).max()), place


@loaded
def test_lapack_is_fast_too():
    """GPTQ factors a matrix of an input's size for every matrix of a model."""
    code = """
import mlx_openelm, time, mlx.core as mx
x = mx.random.normal((500, 500)); x = x @ x.T / 500 + mx.eye(500); mx.eval(x)
best = 1e9
for _ in range(3):
    started = time.process_time()
    mx.eval(mx.linalg.cholesky_inv(mx.linalg.cholesky(x, stream=mx.cpu), stream=mx.cpu))
    best = min(best, time.process_time() - started)
print(best)
"""
    fast = float(python(code, OPENBLAS_NUM_THREADS="1"))
    assert float(python(code, MLX_OPENELM_BLAS="0")) / fast > 2


# Which library is used.

STATE = "import mlx_openelm.backend as b; print(b.blas.state, b.blas.library, b.blas.problem())"


@loaded
def test_a_library_path_is_used_whatever_its_function_names():
    assert python(STATE, MLX_OPENELM_BLAS=blas.library) == f"loaded {blas.library} None"


@loaded
def test_where_files_may_not_be_large_it_is_not_used():
    """Half of a table of symbols would end the process when MLX is loaded."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024)); import mlx_openelm.model; "
    state, *_ = python(limit + STATE).split()
    assert state in ("missing", "loaded")  # a library that has the plain names needs no table


@loaded
def test_a_library_without_sgemm_is_reported():
    assert "MLX_OPENELM_BLAS=libm.so.6 cannot be loaded as a BLAS" in python(STATE, MLX_OPENELM_BLAS="libm.so.6")


@loaded
def test_numpys_openblas_with_64_bit_integers_is_not_used():
    found = list((Path(np.__file__).parent.parent / "numpy.libs").glob("libscipy_openblas64_*"))
    if not found:
        pytest.skip("this NumPy bundles no OpenBLAS")
    assert python(STATE, MLX_OPENELM_BLAS=str(found[0])).startswith("missing ")


@on_linux
@pytest.mark.skipif(blas.state == "unneeded", reason="MLX for a GPU")
def test_without_the_package_the_systems_is_used_or_the_package_suggested():
    state = python(f"import sys; sys.modules['scipy_openblas32'] = None; {STATE}", MLX_OPENELM_BLAS="")
    assert state.startswith("loaded libopenblas.so") or state.endswith(
        "No OpenBLAS was found, so MLX uses its slow bundled BLAS; pip install scipy-openblas32."
    )


@loaded
@pytest.mark.skipif("scipy_openblas" not in blas.library, reason="another BLAS")
def test_it_has_no_more_threads_than_this_process_may_use():
    code = """
import ctypes, sys
from mlx_openelm import blas
library = ctypes.CDLL(blas.library)
library.scipy_openblas_set_num_threads(3)
blas.thread_count = lambda: 2  # as in a container that may use two of many processors
sys.modules.pop("mlx.core", None)  # preload() does nothing once MLX is there
blas.preload()
print(library.scipy_openblas_get_num_threads())
library.scipy_openblas_set_num_threads(1)  # as with OPENBLAS_NUM_THREADS=1
blas.preload()
print(library.scipy_openblas_get_num_threads())
"""
    assert python(code, OPENBLAS_NUM_THREADS="").split() == ["2", "1"]


@loaded
@pytest.mark.skipif("scipy_openblas" not in blas.library, reason="another BLAS")
def test_its_threads_sleep_soon_and_the_environment_is_unchanged():
    """Spinning threads would cost 25 ms of processor time after the import."""
    code = """
import os, time
import mlx_openelm
started = time.process_time()
time.sleep(0.1)
print(os.environ.get("OPENBLAS_THREAD_TIMEOUT"), time.process_time() - started < 0.01)
"""
    assert python(code, OPENBLAS_NUM_THREADS="2").split() == ["None", "True"]
    assert python(code, OPENBLAS_THREAD_TIMEOUT="20").split()[0] == "20"


@on_linux
def test_mlx_for_cuda_is_left_alone(monkeypatch, tmp_path):
    (tmp_path / "mlx_cuda_12-0.32.4.dist-info").mkdir()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "mlx")])
    monkeypatch.setattr(blas, "find_spec", lambda name: spec)
    monkeypatch.setattr(blas, "state", "loaded")
    monkeypatch.setattr(blas, "library", blas.library)  # to be restored
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *_, **__: pytest.fail(f"{name} is opened"))
    blas.preload()
    assert (blas.state, blas.library) == ("unneeded", "")
