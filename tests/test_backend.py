"""BLAS before MLX, types by device, and a one-line error if MLX is missing; each in a separate process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mlx_openelm import backend, blas, native
from mlx_openelm.errors import OpenELMError

import mlx.core as mx
import pytest
from processes import PACKAGE

linux_cpu = pytest.mark.skipif(
    not sys.platform.startswith("linux") or blas.state == "unneeded",
    reason="only MLX for Linux CPUs needs a BLAS",
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )


@linux_cpu
def test_the_variable_turns_preloading_off():
    done = python(
        "import mlx_openelm.backend as b, mlx.core; print(b.blas.state, b.blas.problem(), "
        "'openblas' in open('/proc/self/maps').read())",
        MLX_OPENELM_BLAS="0",
    )
    assert done.stdout.split() == ["off", "None", "False"]


@linux_cpu
def test_a_library_that_cannot_be_loaded_is_named():
    done = python(
        "import mlx_openelm.backend as b; print(b.blas.state, b.blas.problem())", MLX_OPENELM_BLAS="/no/such/lib.so"
    )
    assert done.stdout.startswith("missing MLX_OPENELM_BLAS=/no/such/lib.so cannot be loaded as a BLAS")


@linux_cpu
def test_load_warns_once_if_mlx_was_imported_first():
    code = "import mlx.core; from mlx_openelm import load; load('tiny')"
    done = python(code, MLX_OPENELM_BLAS="", MLX_OPENELM_NATIVE="0")
    assert done.stderr.count("mlx.core was imported before mlx_openelm") == 1
    assert done.returncode == 0


@linux_cpu
@pytest.mark.skipif(blas.state != "loaded", reason="no OpenBLAS on this machine")
def test_matrix_products_use_the_preloaded_library():
    """On one machine the bundled reference BLAS reached 4 GFLOP/s, OpenBLAS 162."""
    code = """
import mlx_openelm, time, mlx.core as mx
a = mx.random.normal((512, 512)); mx.eval(a, a @ a)
best = 1e9
for _ in range(5):
    started = time.perf_counter(); mx.eval(a @ a); best = min(best, time.perf_counter() - started)
print(best)
"""
    fast, slow = float(python(code).stdout), float(python(code, MLX_OPENELM_BLAS="0").stdout)
    assert slow / fast > 4


def test_a_missing_mlx_names_the_extra(tmp_path: Path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    code = """
from mlx_openelm.errors import OpenELMError
try:
    from mlx_openelm import load
except OpenELMError as error:
    print(error)
"""
    done = python(code, PYTHONPATH=f"{tmp_path}:{PACKAGE}")
    assert "pip install '.[cpu]'" in done.stdout
    assert "Traceback" not in done.stderr


def test_an_old_glibc_is_explained():
    with pytest.raises(OpenELMError, match="glibc 2.35"), backend.naming_the_extra():
        raise ImportError("/lib/libm.so.6: version `GLIBC_2.35' not found (required by libmlx.so)")


def test_other_import_errors_pass_through():
    with pytest.raises(ImportError, match="numpy"), backend.naming_the_extra():
        raise ImportError("No module named numpy", name="numpy")


def test_a_cpu_computes_in_float32_whatever_is_stored():
    for stored in (mx.float32, mx.float16, mx.bfloat16):
        assert backend.compute_dtype(stored) == mx.float32


def test_a_gpu_computes_in_half_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    assert backend.compute_dtype(mx.float32) == mx.bfloat16
    assert backend.compute_dtype(mx.bfloat16) == mx.bfloat16
    assert backend.compute_dtype(mx.float16) == mx.float16
    assert backend.slow_cpu_warning() is None
    assert backend.prefill_step_size() == 2048


@pytest.mark.parametrize(
    ("left", "size", "expected"),
    [
        (1, None, 1),
        (128, None, 128),
        (139, None, 139),  # a short rest joins the piece before it
        (140, None, 128),
        (27, 16, 27),
        (28, 16, 16),
        (12, 11, 11),  # pieces that are short anyway
        (5, 1, 1),
    ],
)
def test_a_prompt_is_cut_without_a_short_rest(left: int, size: int | None, expected: int):
    assert backend.prefill_step_size(left, size) == expected


def test_load_says_when_the_kernels_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    for state in ("stale", "foreign", "failed"):
        monkeypatch.setattr(native, "status", native.Status(state, "what is wrong", "what to do"))
        assert backend.slow_cpu_warning() == "The CPU kernels are not used: what is wrong; what to do."
    monkeypatch.setattr(native, "status", native.Status("used"))
    assert backend.slow_cpu_warning() is None
    # Without a compiler, or with kernels turned off, only BLAS is mentioned.
    monkeypatch.setattr(blas, "state", "missing")
    monkeypatch.setattr(blas, "library", "")
    for state in ("missing", "off"):
        monkeypatch.setattr(native, "status", native.Status(state))
        assert (backend.slow_cpu_warning() or "").startswith("No OpenBLAS was found")


def test_memory_is_reported_in_bytes():
    total = backend.total_memory()
    assert total is not None
    assert total > 1 << 30
    available = backend.available_memory()
    assert available is None or 0 < available <= total


@pytest.mark.parametrize(("known", "free"), [(5, 5), (0, 0), (None, 8 << 30)])
def test_memory_that_is_not_known_is_assumed(monkeypatch, known, free):
    monkeypatch.setattr(backend, "available_memory", lambda: known)
    assert backend.free_memory() == free
