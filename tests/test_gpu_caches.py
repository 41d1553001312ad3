"""Every cache on a GPU: prompts in chunks and single tokens give the same as the whole sequence on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_openelm import load
from mlx_openelm.cache import BatchKVCache, BatchRotatingKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from gpu_devices import SHAKESPEARE, TOLERANCE, assert_close, computed, needs_gpu
from quantization_models import tiny_model

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

HEAD_DIMS = (64, 128)


def model_of(dtype: str = "float32", head_dim: int = 64) -> OpenELM:
    """Two layers, of two and four query heads, whose logits depend strongly on attention."""
    model = tiny_model(seed=2, head_dim=head_dim, model_dim=128)
    model.set_dtype(getattr(mx, dtype))
    return model


def tokens(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, 256, (rows, length))


def in_pieces(model: OpenELM, cache: Sequence[Any], ids: np.ndarray, pieces: Sequence[int]) -> mx.array:
    """Logits [rows, length, vocab] from chunks of these lengths, then token by token."""
    parts, start = [], 0
    for piece in (*pieces, *[1] * (ids.shape[1] - sum(pieces))):
        parts.append(model(mx.array(ids[:, start : start + piece]), cache))
        mx.eval(parts[-1])
        start += piece
    return mx.concatenate(parts, axis=1)


def answer(device: str, dtype: str, head_dim: int, make: Any, ids: np.ndarray, pieces: Sequence[int]) -> np.ndarray:
    """`in_pieces` on a device, with a cache from `make` for each layer; all at once if that is None."""

    def run() -> mx.array:
        model = model_of(dtype, head_dim)
        if make is None:
            return model(mx.array(ids))
        return in_pieces(model, [make() for _ in model.layers], ids, pieces)

    return computed(device, run)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_growing_cache(head_dim, dtype):
    """Across the steps by which its buffers grow."""
    ids = tokens(2, 262)
    expected = answer("cpu", "float32", head_dim, None, ids, ())
    assert_close(answer("gpu", dtype, head_dim, KVCache, ids, (150, 100, 5)), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pieces", [(), (5,), (30, 3)], ids=str)
def test_a_sliding_cache(pieces, dtype):
    ids, make = tokens(1, 40), lambda: RotatingKVCache(12, keep=4)
    expected = answer("cpu", "float32", 64, make, ids, pieces)
    assert np.abs(expected - answer("cpu", "float32", 64, None, ids, ())).max() > 0.1  # positions are dropped
    assert_close(answer("gpu", dtype, 64, make, ids, pieces), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(64, 32), (64, 64), (128, 32), (128, 64), (128, 128)], ids=lambda x: str(x)
)
def test_a_quantized_cache(head_dim, group_size, bits):
    """The error is that of the CPU: a number between two levels may be rounded either way."""
    ids, pieces, make = tokens(1, 30), (17, 9), lambda: QuantizedKVCache(group_size, bits)
    exact = answer("cpu", "float32", head_dim, None, ids, ())
    lost = np.linalg.norm(answer("cpu", "float32", head_dim, make, ids, pieces) - exact)
    assert lost > 0
    for dtype in ("float32", "bfloat16"):
        found = answer("gpu", dtype, head_dim, make, ids, pieces)
        assert np.isfinite(found).all()
        assert np.linalg.norm(found - exact) < 1.25 * lost + TOLERANCE[dtype] * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_cache_quantized_on_a_cpu_is_continued_on_a_gpu(dtype):
    """A prompt cache whose keys and values are float32, in a model that computes in another type."""
    ids = tokens(1, 24)

    def begin() -> list[Any]:
        model = model_of()
        cache = [QuantizedKVCache(64, 8) for _ in model.layers]
        mx.eval(model(mx.array(ids[:, :20]), cache))
        return [layer.state for layer in cache]

    def go_on(states: list[Any], dtype: str) -> mx.array:
        cache = [QuantizedKVCache.from_state(state) for state in states]
        return in_pieces(model_of(dtype), cache, ids[:, 20:], (2,))

    def all_of_it() -> mx.array:
        return go_on(begin(), "float32")

    expected = computed("cpu", all_of_it)
    states = computed("cpu", lambda: begin_as_lists(begin()))
    found = computed("gpu", lambda: go_on(from_lists(states), dtype))
    assert_close(found, expected, TOLERANCE[dtype])


def begin_as_lists(states: list[Any]) -> list[Any]:
    """Packed levels as 16-bit halves, which float32 holds exactly."""
    halves = lambda x: [x & 0xFFFF, x >> 16] if x.dtype == mx.uint32 else [x]  # noqa: E731
    return [[[halves(x) for x in part] for part in state[:2]] + list(state[2:]) for state in states]


def from_lists(states: list[Any]) -> list[Any]:
    def join(parts: list[np.ndarray]) -> mx.array:
        low, *high = (part.astype(np.uint32) for part in parts) if len(parts) == 2 else parts
        return mx.array(low | high[0] << 16) if high else mx.array(low)

    return [[*(tuple(join(x) for x in part) for part in state[:2]), *state[2:]] for state in states]


# Rows at different offsets.


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 16], ids=["growing", "sliding"])
def test_rows_of_a_batch_equal_single_sequences(window, dtype):
    lengths = (3, 20, 6, 1)
    rows = [tokens(1, length + 6)[0] for length in lengths]
    padding = [max(lengths) - length for length in lengths]

    def cache_of(rows: Sequence[int]) -> Any:
        return BatchKVCache(rows) if window is None else BatchRotatingKVCache(window, rows)

    def together() -> mx.array:
        model = model_of(dtype)
        cache = [cache_of(padding) for _ in model.layers]
        filled = [np.pad(row, (p, 0)) for row, p in zip(rows, padding, strict=True)]
        return in_pieces(model, cache, np.stack(filled), (max(lengths), 2))

    def alone(row: np.ndarray, length: int) -> mx.array:
        model = model_of()
        cache = [KVCache() if window is None else RotatingKVCache(window) for _ in model.layers]
        return in_pieces(model, cache, row[None], (length, 2))

    found = computed("gpu", together)
    for logits, row, length, p in zip(found, rows, lengths, padding, strict=True):
        assert_close(logits[p:], computed("cpu", alone, row, length)[0], TOLERANCE[dtype])


def test_rows_leave_and_join_a_batch():
    """Caches of rows with different histories, merged, filtered and extended."""
    pasts, following = [tokens(1, length)[0] for length in (5, 12, 9)], tokens(3, 4)

    def together() -> list[mx.array]:
        model = model_of()
        caches = []
        for past in pasts:
            caches.append([KVCache() for _ in model.layers])
            model(mx.array(past[None]), caches[-1])
        first = [KVCache.merge([cache[i] for cache in caches[:2]]) for i in range(2)]
        parts = [model(mx.array(following[:2, :1]), first)]
        for i, layer in enumerate(first):
            layer.filter(mx.array([1]))
            layer.extend(KVCache.merge([caches[2][i]]))
        return [*parts, model(mx.array(following[1:, 1:3]), first)]

    def alone(ids: np.ndarray) -> mx.array:
        return model_of()(mx.array(ids[None]))

    before, after = computed("gpu", together)
    for number, (logits, start, end) in enumerate([(before[0], 0, 1), (before[1], 0, 1)]):
        expected = computed("cpu", alone, np.concatenate([pasts[number], following[number, start:end]]))[0, -1:]
        assert_close(logits, expected, TOLERANCE["float32"])
    row = np.concatenate([pasts[1], following[1, :1], following[1, 1:3]])
    assert_close(after[0], computed("cpu", alone, row)[0, -2:], TOLERANCE["float32"])
    row = np.concatenate([pasts[2], following[2, 1:3]])
    assert_close(after[1], computed("cpu", alone, row)[0, -2:], TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", [{}, {"prefill_batch_size": 2, "prefill_step_size": 5}], ids=str)
def test_mlx_lms_batch_generator(reference, sizes):
    generate = pytest.importorskip("mlx_lm.generate")
    model, _ = load(SHAKESPEARE, dtype="float32")
    prompts = [reference["ids"][number] for number in range(4)]
    generator = generate.BatchGenerator(model, **sizes)
    uids = generator.insert(prompts, max_tokens=[8, 12, 8, 12])
    given: dict[int, list[int]] = {uid: [] for uid in uids}
    left = len(uids)
    while left:
        for response in generator.next_generated():
            given[response.uid].append(int(response.token))
            left -= response.finish_reason is not None
    generator.close()
    for number, uid in enumerate(uids):
        assert given[uid][:8] == reference["greedy"][number][:8]
