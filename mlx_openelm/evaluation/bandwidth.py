"""The bandwidth of the memory that models are in, measured by copying."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from .. import backend, native

# Bytes to copy: more than the caches of processors hold.
_BYTES = 1 << 28
# Copies that a GPU makes before it is waited for.
_GPU_COPIES = 16
_TURNS = 3


def copier() -> Callable[[], int]:
    """A function that copies a large buffer, and returns the bytes it read and wrote.

    On a GPU, MLX copies (and changes signs, at no extra cost); on a CPU, as many threads as arithmetic has.
    """
    return _gpu_copier() if backend.on_gpu() else _cpu_copier(_BYTES, native.thread_count())


def _gpu_copier() -> Callable[[], int]:
    values = mx.ones(_BYTES // 4)
    mx.eval(values)

    def copy() -> int:
        copied = values
        for _ in range(_GPU_COPIES):
            copied = -copied
        mx.eval(copied)
        return 2 * values.nbytes * _GPU_COPIES

    return copy


def _cpu_copier(size: int, threads: int) -> Callable[[], int]:
    part = size // threads
    sources, targets = ([ctypes.create_string_buffer(part) for _ in range(threads)] for _ in range(2))
    for source in sources:
        ctypes.memset(source, 1, part)  # pages never written to would all be one page of zeros
    pool = ThreadPoolExecutor(threads)  # ctypes lets other threads run during a call

    def copy() -> int:
        list(pool.map(ctypes.memmove, targets, sources, [part] * threads))
        return 2 * part * threads

    return copy


def rate(copy: Callable[[], int], clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second of the fastest of several copies."""
    best = 0.0
    for _ in range(_TURNS):
        started = clock()
        count = copy()
        best = max(best, count / (clock() - started))
    return best
