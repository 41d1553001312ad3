"""A GPU and the CPU in one process, for the tests that compare them.

Those tests need a GPU. With `MLX_OPENELM_TEST_DEVICE=cpu` the CPU stands in for one and takes the code path of
CUDA, which checks the tests themselves, and that path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_openelm import backend

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
SHAKESPEARE = FIXTURES / "shakespeare-hf"

STAND_IN = os.environ.get("MLX_OPENELM_TEST_DEVICE") == "cpu"
HAS_GPU = mx.metal.is_available() or mx.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU and not STAND_IN, reason="this machine has no GPU that MLX can use")
# For tests that are too slow if the CPU takes the GPU's path.
needs_real_gpu = pytest.mark.skipif(not HAS_GPU or STAND_IN, reason="this machine has no GPU that MLX can use")

# For tests that take some seconds there: all of their cases with --run-slow.
slow_on_a_stand_in = pytest.mark.slow if STAND_IN else pytest.mark.skipif(False, reason="there is no stand-in")

# Tolerances against the CPU's float32, relative to the largest number: CUDA multiplies float32 in TF32, which has
# 10 bits of mantissa like float16; bfloat16 has 7.
TOLERANCE = {"float32": 5e-3, "float16": 1e-2, "bfloat16": 5e-2}
# The same for gradients, relative to their norm: errors of the forward and the backward pass add up.
GRADIENT_TOLERANCE = {"float32": 0.02, "float16": 0.04, "bfloat16": 0.2}

# The facts about a CUDA device that the package reads.
H100 = {
    "device_name": "NVIDIA H100 80GB HBM3",
    "compute_capability_major": 9,
    "compute_capability_minor": 0,
    "free_memory": 84_000_000_000,
    "total_memory": 85_520_809_984,
}

_device = "cpu"
_multiply, _attend = mx.quantized_matmul, mx.fast.scaled_dot_product_attention


@contextmanager
def on(device: str) -> Iterator[None]:
    """Compute on "gpu" or "cpu" while the block runs."""
    before = _device
    _set(device)
    try:
        yield
    finally:
        _set(before)


def _set(device: str) -> None:
    global _device
    _device = device
    mx.set_default_device(mx.gpu if device == "gpu" and not STAND_IN else mx.cpu)


@contextmanager
def gpu_tests() -> Iterator[None]:
    """Compute on the GPU, or its stand-in, while the block runs; an inner block `on("cpu")` compiles nothing."""
    with pytest.MonkeyPatch.context() as patch, on("gpu"):
        if STAND_IN:
            patch.setattr(backend, "device", lambda: {"gpu": "CUDA", "cpu": "CPU"}[_device])
            patch.setattr(backend, "on_gpu", lambda: _device == "gpu")
            patch.setattr(mx.fast, "scaled_dot_product_attention", _attend_as_cuda)
            patch.setattr(mx, "device_info", lambda: H100)
            patch.setattr(mx, "quantized_matmul", lambda *a, **k: (cudas if _device == "gpu" else _multiply)(*a, **k))
        yield


def cudas(x: mx.array, weight: mx.array, scales: mx.array, *biases: Any, **packing: Any) -> mx.array:
    """`mx.quantized_matmul`, restricted to the cases that MLX's CUDA backend has a reliable kernel for.

    After `supports_qmv`, `supports_qmm_sm80` and `QuantizedMatmul::eval_gpu` of `backend/cuda/quantized`.
    """
    rows, in_dims, out_dims = x.size // x.shape[-1], x.shape[-1], weight.shape[0]
    assert weight.ndim == 2 and packing["transpose"], "[quantized_matmul] No implementation for problem shape"
    vector = rows < 8 and in_dims % 8 == 0
    tensor_cores = (
        x.dtype in (mx.float16, mx.bfloat16)
        and packing["bits"] in (4, 8)
        and out_dims % 128 == 0
        and in_dims % max(64, packing["group_size"]) == 0
    )
    assert vector or tensor_cores, f"no kernel for {rows} rows of {in_dims}, {out_dims} outputs, {packing}"
    return _multiply(x, weight, scales, *biases, **packing)


def _attend_as_cuda(queries: mx.array, *others: mx.array, mask: Any = None, **options: Any) -> mx.array:
    """Fused attention as cuDNN computes it, boolean masks turned into -inf: a fully masked row is NaN."""
    fused = _device == "gpu" and queries.dtype != mx.float32 and queries.shape[2] > 1
    if fused and isinstance(mask, mx.array) and mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, -mx.inf).astype(queries.dtype)
    return _attend(queries, *others, mask=mask, **options)


def computed(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) on a device, its arrays converted to NumPy in float32.

    On the CPU of a machine with a GPU nothing is compiled, since it may have no compiler.
    """
    with on(device):
        if device == "gpu" or not HAS_GPU:
            return _as_numpy(function(*arguments))
        mx.disable_compile()
        try:
            return _as_numpy(function(*arguments))
        finally:
            mx.enable_compile()


def _as_numpy(found: Any) -> Any:
    if isinstance(found, mx.array):
        return np.array(found.astype(mx.float32))
    if isinstance(found, dict):
        return {name: _as_numpy(value) for name, value in found.items()}
    return type(found)(map(_as_numpy, found)) if isinstance(found, list | tuple) else found


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal within `tolerance` times the largest expected number."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"off by {error:.2g} of the largest number, where {tolerance:.2g} is allowed"


def assert_close_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Each equal within `tolerance` times its norm, or a thousandth of the largest norm: some are sums that cancel."""
    assert found.keys() == expected.keys()
    longest = max(np.linalg.norm(value) for value in expected.values())
    assert longest > 0
    for name, value in expected.items():
        error = np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), longest / 1000)
        assert error < tolerance, f"{name} off by {error:.2g} of its length, where {tolerance:.2g} is allowed"
