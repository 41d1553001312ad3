"""Our caches in place of mlx-lm's: the same calls give the same keys, values, masks, positions and states.

The calls are drawn at random; mlx-lm's classes are the oracle, of the version whose cache state ours follows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_openelm import cache as ours
from mlx_openelm import load
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

theirs = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
their_generate = pytest.importorskip("mlx_lm.generate", reason="mlx-lm is not installed")

HEADS, DIM = 2, 32
QUICK = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SINGLE = {
    "plain": lambda m: m.KVCache(),
    "quantized": lambda m: m.QuantizedKVCache(32, 8),
    "sliding": lambda m: m.RotatingKVCache(8),
    "sliding, some kept": lambda m: m.RotatingKVCache(8, keep=2),
    "sliding, large": lambda m: m.RotatingKVCache(300),
}


class Numbers:
    """Keys and values, different in each update."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, rows: int, length: int) -> tuple[mx.array, mx.array]:
        self.count += 2
        keys = (mx.random.key(self.count), mx.random.key(self.count + 1))
        return tuple(mx.random.normal((rows, HEADS, length, DIM), key=key) for key in keys)  # type: ignore[return-value]


def equal(a: Any, b: Any) -> bool:
    """Whether two trees of arrays and plain values are the same."""
    a, b = tree_flatten(a), tree_flatten(b)
    return [name for name, _ in a] == [name for name, _ in b] and all(
        mx.array_equal(x, y).item() if isinstance(x, mx.array) else x == y for (_, x), (_, y) in zip(a, b, strict=True)
    )


def as_array(mask: Any, length: int, total: int) -> np.ndarray:
    if mask is None or isinstance(mask, str):
        mask = mx.arange(total - length, total)[:, None] >= (mx.arange(total) if mask else 0)
    return np.broadcast_to(np.array(mask), (*mask.shape[:-2], length, total))


STEP = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 3, 7, 8, 9, 17])),
    st.tuples(st.just("trim"), st.integers(0, 12)),
    st.tuples(st.just("reload"), st.none()),
)


@pytest.mark.parametrize("kind", SINGLE)
@QUICK
@given(steps=st.lists(STEP, max_size=14), window=st.sampled_from([None, 3, 5, 8, 20]))
def test_one_sequence(kind: str, steps: list[tuple[str, Any]], window: int | None) -> None:
    numbers, (a, b) = Numbers(), (SINGLE[kind](m) for m in (ours, theirs))
    kept = getattr(a, "keep", 0) > 0
    for name, value in steps:
        if name == "update":
            keys, values = numbers(1, value)
            masks = [c.make_mask(value, return_array=False, window_size=window) for c in (a, b)]
            got, expected = (c.update_and_fetch(keys, values) for c in (a, b))
            assert equal(got, expected)
            assert equal(a.keys_and_values(), b.keys_and_values())
            total = (got[0] if kind != "quantized" else got[0][0]).shape[2]
            if not kept or masks[1] is None:  # mlx-lm hides the kept positions outside of the window
                assert np.array_equal(*(as_array(mask, value, total) for mask in masks)), (value, window)
        elif name == "trim":
            assert a.is_trimmable() == b.is_trimmable()
            if a.is_trimmable():
                assert a.trim(value) == b.trim(value)
        elif not a.empty():
            a, b = (type(c).from_state(c.state) for c in (b, a))  # each continues from the state of the other
            a, b = (getattr(m, type(a).__name__).from_state(c.state) for m, c in ((ours, a), (theirs, b)))
        assert (a.offset, a.empty(), a.step) == (b.offset, b.empty(), b.step)
        assert equal(a.state[2:], b.state[2:])
        if not a.empty():
            assert equal(a.keys_and_values(), b.keys_and_values())


@pytest.mark.parametrize("kind", SINGLE)
def test_buffers_grow_by_the_step_set_on_the_class(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in mlx-lm."""
    shapes = []
    for module in (ours, theirs):
        cache = SINGLE[kind](module)
        monkeypatch.setattr(type(cache), "step", 4)
        for n in range(6):
            cache.update_and_fetch(*Numbers()(1, 1 + n % 2))
        shapes.append([value.shape for _, value in tree_flatten(cache.state) if isinstance(value, mx.array)])
    assert shapes[0] == shapes[1]


def test_a_sliding_cache_is_never_quantized_silently() -> None:
    with pytest.raises(RequestError, match="kv_bits cannot be combined with a sliding cache"):
        their_generate.maybe_quantize_kv_cache([ours.RotatingKVCache(8)], 0, 32, 8)


# Batches.


def batch(module: Any, kind: str, left_padding: list[int]) -> Any:
    return module.BatchKVCache(left_padding) if kind == "plain" else module.BatchRotatingKVCache(SIZE, left_padding)


SIZE = 9


def seen(cache: Any, keys: mx.array, values: mx.array) -> list[list[list[bytes]]]:
    """What attention sees, for each row and new position: the columns, sorted, since their order does not matter."""
    length = keys.shape[2]
    mask = cache.make_mask(length)
    both = mx.concatenate(cache.update_and_fetch(keys, values), axis=-1)
    both = np.array(both.swapaxes(1, 2))
    visible = np.broadcast_to(np.array(mask)[:, 0], (both.shape[0], length, both.shape[1]))
    return [
        [sorted(both[b, t].tobytes() for t in np.flatnonzero(visible[b, i])) for i in range(length)]
        for b in range(both.shape[0])
    ]


def from_state(kind: type, state: Any) -> Any:
    cache = kind.from_state(state)  # type: ignore[attr-defined]
    cache._lengths = None  # mlx-lm's from_state does not set it
    return cache


BATCH_STEP = st.one_of(
    st.tuples(st.just("update"), st.sampled_from([1, 1, 1, 2, 4, 9, 12])),
    st.tuples(st.just("filter"), st.lists(st.integers(0, 10), min_size=1, max_size=4)),
    st.tuples(st.just("extend"), st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=2), st.integers(0, 3))),
    st.tuples(st.just("trim"), st.integers(0, 12)),
    st.tuples(st.just("extract"), st.integers(0, 10)),
    st.tuples(st.just("reload"), st.none()),
)


@pytest.mark.parametrize("kind", ["plain", "sliding"])
@QUICK
@given(padding=st.lists(st.integers(0, 3), min_size=1, max_size=3), steps=st.lists(BATCH_STEP, max_size=12))
def test_a_batch(kind: str, padding: list[int], steps: list[tuple[str, Any]]) -> None:
    numbers, (a, b) = Numbers(), (batch(m, kind, padding) for m in (ours, theirs))
    started = False  # mlx-lm cannot filter, extend or extract before the first update
    for name, value in steps:
        rows = a.left_padding.size
        if name == "update":
            # The first piece contains all the padding, as in mlx-lm's own generator.
            length = value if started else max(value, 5)
            keys, values = numbers(rows, length)
            got, expected = seen(a, keys, values), seen(b, keys, values)
            columns = a.left_padding.tolist()
            first = [max(0, p) for p in columns] if not started else [0] * rows
            # mlx-lm's mask for several positions is wrong once the window has slid over padding; test_cache compares
            # ours with the definition.
            assert (kind == "sliding" and length > 1) or [row[p:] for row, p in zip(got, first, strict=True)] == [
                row[p:] for row, p in zip(expected, first, strict=True)
            ]
            started = True
        elif not started:
            continue
        elif name == "filter":
            kept = [row % rows for row in value]
            a.filter(kept)
            b.filter(mx.array(kept))
        elif name == "extend":
            more_padding, length = value
            others = [batch(m, kind, more_padding) for m in (ours, theirs)]
            keys, values = numbers(len(more_padding), 5 + length)
            for cache, other in zip((a, b), others, strict=True):
                other.update_and_fetch(keys, values)
                cache.extend(other)
        elif name == "trim" and a.is_trimmable() and b.is_trimmable():
            # A row must keep at least one position.
            count = min(value, min(a.offset.tolist()) - 1)
            if count > 0:
                assert a.trim(count) == b.trim(count)
        elif name == "extract":
            single, other = a.extract(value % rows), b.extract(value % rows)
            assert type(single).__name__ == type(other).__name__
            assert single.offset == other.offset
            assert equal(single.keys_and_values(), other.keys_and_values())
        elif name == "reload":
            states = a.state, b.state
            assert len(states[0]) == len(states[1])
            a = type(a).from_state(states[1])  # each continues from the state of the other
            b = from_state(type(b), states[0])
        assert a.offset.tolist() == b.offset.tolist()
        assert a.empty() == b.empty()


@pytest.mark.parametrize("kind", ["plain", "sliding"])
@QUICK
@given(lengths=st.lists(st.sampled_from([1, 1, 1, 1, 2, 5, 9]), max_size=14))
def test_a_batch_has_the_same_columns_as_mlx_lms(kind: str, lengths: list[int]) -> None:
    """Including the layout, and all of the state except the count of columns ever held."""
    numbers, (a, b) = Numbers(), (batch(m, kind, [2, 0, 3]) for m in (ours, theirs))
    for length in [5, *lengths]:
        keys, values = numbers(3, length)
        assert equal(a.update_and_fetch(keys, values), b.update_and_fetch(keys, values))
        assert equal(a.keys_and_values(), b.keys_and_values())
        assert equal(a.state[2:5] + a.state[6:], b.state[2:5] + b.state[6:])
        assert kind == "plain" or (a.rotated, a.size()) == (b.rotated, b.size())
        assert a.is_trimmable() == b.is_trimmable()
        assert a.step == b.step


@pytest.mark.parametrize("kind", ["plain", "sliding"])
class TestEdges:
    """Empty batches, one row, no rows, repeated or reordered rows, and rows that do not exist."""

    def test_filtering_before_the_first_update_keeps_pending_padding(self, kind: str) -> None:
        a, whole = batch(ours, kind, [2, 3]), batch(ours, kind, [2])
        a.filter([0])
        assert (a.size(), a.left_padding.tolist(), a.offset.tolist()) == (0, [2], [-2])
        keys, values = Numbers()(1, 6)
        assert seen(a, keys, values)[0][2:] == seen(whole, keys, values)[0][2:]
        assert a.offset.tolist() == [4]

    def test_filtering_while_padding_is_pending(self, kind: str) -> None:
        a, alone = batch(ours, kind, [5, 0]), batch(ours, kind, [5])
        numbers = Numbers()
        keys, values = numbers(2, 3)
        a.update_and_fetch(keys, values)
        alone.update_and_fetch(keys[:1], values[:1])
        a.filter([0])
        assert (a.size(), a.left_padding.tolist(), a.offset.tolist()) == (0, [2], [-2])
        keys, values = numbers(1, 4)
        assert seen(a, keys, values)[0][2:] == seen(alone, keys, values)[0][2:]

    def test_filtering_repeats_and_reorders_rows(self, kind: str) -> None:
        a, numbers = batch(ours, kind, [0, 1, 2]), Numbers()
        a.update_and_fetch(*numbers(3, 6))
        singles = [a.extract(row) for row in range(3)]
        a.filter([2, 0, 2, -2])
        for row, source in enumerate([2, 0, 2, 1]):
            single = a.extract(row)
            assert equal(single.keys_and_values(), singles[source].keys_and_values())
            assert single.offset == singles[source].offset

    def test_all_rows_removed_and_others_added(self, kind: str) -> None:
        for none in ([], mx.array([], mx.int32), mx.array([])):
            a, numbers = batch(ours, kind, [0, 1]), Numbers()
            a.update_and_fetch(*numbers(2, 4))
            a.filter(none)
            assert (a.size(), a.offset.tolist(), a.left_padding.tolist()) == (0, [], [])
            more = batch(ours, kind, [1])
            more.update_and_fetch(*numbers(1, 4))
            single = more.extract(0)
            a.extend(more)
            assert a.offset.tolist() == [3]
            assert equal(a.extract(0).keys_and_values(), single.keys_and_values())

    def test_filtering_to_rows_that_do_not_exist_is_refused(self, kind: str) -> None:
        a = batch(ours, kind, [0, 1])
        for _ in range(2):
            for wrong in ([2], [0, -3], mx.array([7])):
                with pytest.raises(IndexError, match="2 rows; there is no row"):
                    a.filter(wrong)
            with pytest.raises(IndexError, match="2 rows; there is no row 2"):
                a.extract(2)
            assert a.left_padding.tolist() == [0, 1]
            a.update_and_fetch(*Numbers()(2, 4))

    def test_extracting_from_an_empty_batch_gives_an_empty_cache(self, kind: str) -> None:
        single = batch(ours, kind, [0, 1]).extract(1)
        assert single.empty()
        assert (single.offset, single.size()) == (0, 0)
        keys, values = Numbers()(1, 3)
        assert equal(single.update_and_fetch(keys, values), (keys, values))

    def test_extracting_a_row_of_padding_alone(self, kind: str) -> None:
        a = batch(ours, kind, [6, 0])
        a.update_and_fetch(*Numbers()(2, 4))
        single = a.extract(0)
        assert single.offset == 0
        keys, values = Numbers()(1, 3)
        assert equal(single.update_and_fetch(keys, values), (keys, values))

    def test_forgotten_positions_do_not_come_back(self, kind: str) -> None:
        """Trimming a negative number, more than there is, or a cache that has slid."""
        a, numbers = batch(ours, kind, [0]), Numbers()
        assert a.trim(3) == 0
        a.update_and_fetch(*numbers(1, 4))
        assert (a.trim(-2), a.trim(9), a.offset.tolist()) == (0, 4, [0])
        a.update_and_fetch(*numbers(1, 12))
        a.update_and_fetch(*numbers(1, 1))
        assert a.trim(2) == (2 if kind == "plain" else 0)

    def test_a_row_alone_behaves_as_in_a_batch(self, kind: str) -> None:
        make = ours.KVCache if kind == "plain" else lambda: ours.RotatingKVCache(SIZE)
        numbers, singles = Numbers(), [make() for _ in range(3)]
        for single, length in zip(singles, (3, 0, 8), strict=True):
            if length:
                single.update_and_fetch(*numbers(1, length))
        merged = singles[0].merge(singles)
        merged.filter([1])
        assert (merged.size(), merged.offset.tolist(), merged.left_padding.tolist()) == (0, [0], [0])
        keys, values = numbers(1, 2)
        assert seen(merged, keys, values) == seen(singles[0].merge([make()]), keys, values)


def test_rows_with_different_windows_cannot_share_a_batch() -> None:
    with pytest.raises(ValueError, match="maximum size"):
        ours.BatchRotatingKVCache(8, [0]).extend(ours.BatchRotatingKVCache(9, [0]))


@pytest.mark.parametrize("kind", ["plain", "sliding"])
def test_rows_removed_while_others_are_padded_on_the_right(kind: str) -> None:
    numbers, a = Numbers(), batch(ours, kind, [0, 0, 0])
    alone = batch(ours, kind, [0])
    a.prepare(lengths=[4, 2, 3], right_padding=[0, 2, 1])
    keys, values = numbers(3, 4)
    a.update_and_fetch(keys, values)
    empty = type(a).from_state(a.state)
    empty.prepare(lengths=[1, 2, 3], right_padding=[2, 1, 0])
    empty.filter([])
    a.filter([0, 2])
    a.finalize()
    alone.update_and_fetch(keys[2:, :, :3], values[2:, :, :3])
    assert a.offset.tolist() == [4, 3]
    assert equal(a.extract(1).keys_and_values(), alone.extract(0).keys_and_values())


# Files of batches, and the model with every kind of cache.


@pytest.mark.parametrize("kind", ["plain", "sliding"])
@pytest.mark.parametrize("updates", [[4], [6, 1, 1], [6, 9, 1, 1], [6, 9]], ids=str)
def test_saved_batches_are_exchanged_with_mlx_lm(tmp_path: Path, kind: str, updates: list[int]) -> None:
    numbers, caches = Numbers(), [batch(m, kind, [2, 0]) for m in (ours, theirs)]
    for length in updates:
        keys, values = numbers(2, length)
        for cache in caches:
            cache.update_and_fetch(keys, values)
    file = str(tmp_path / "cache.safetensors")
    theirs.save_prompt_cache(file, caches)
    # mlx-lm reads both files, into its classes and ours; twice, since its caches write into the arrays.
    kinds = [getattr(m, type(caches[0]).__name__) for m in (theirs, ours)]
    every = caches + [from_state(kind, c.state) for kind in kinds for c in theirs.load_prompt_cache(file)]
    for _ in range(4):
        keys, values = numbers(2, 1)
        first, *others = [seen(cache, keys, values) for cache in every]
        assert all(other == first for other in others)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return load(Path(__file__).parent / "fixtures" / "shakespeare-hf")[0]


PROMPT = [1, 969, 308, 1996, 536, 327, 12, 345, 678]
KINDS = {
    "KVCache": lambda m: m.KVCache(),
    "QuantizedKVCache": lambda m: m.QuantizedKVCache(32, 8),
    "RotatingKVCache": lambda m: m.RotatingKVCache(64),
    "BatchKVCache": lambda m: m.BatchKVCache([0]),
    "BatchRotatingKVCache": lambda m: m.BatchRotatingKVCache(64, [0]),
    "ConcatenateKVCache": lambda m: m.ConcatenateKVCache(),
    "ChunkedKVCache": lambda m: m.ChunkedKVCache(512),
}


@pytest.fixture(scope="module")
def expected(model: OpenELM) -> list[int]:
    return [token for token, _ in generate_step(model, PROMPT, max_tokens=16)]


@pytest.mark.covering
@pytest.mark.parametrize("size", [None, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_works_with_every_cache_of_keys_and_values(
    model: OpenELM, expected: list[int], kind: str, size: int | None
) -> None:
    """In our decoding and in mlx-lm's, with its class and with our class of the same name."""
    modules = [module for module in (theirs, ours) if kind in vars(module)]
    assert len(modules) == (1 if kind in ("ConcatenateKVCache", "ChunkedKVCache") else 2)
    for module in modules:
        cache = [KINDS[kind](module) for _ in model.layers]
        steps = generate_step(model, PROMPT, max_tokens=16, cache=cache, prefill_step_size=size)
        assert [token for token, _ in steps] == expected
        cache = [KINDS[kind](module) for _ in model.layers]
        their_steps = their_generate.generate_step(
            mx.array(PROMPT), model, max_tokens=16, prompt_cache=cache, prefill_step_size=size or 2048
        )
        assert [int(token) for token, _ in their_steps] == expected


def test_caches_of_other_kinds_are_refused(model: OpenELM) -> None:
    for make in (lambda: theirs.CacheList(theirs.KVCache()), lambda: theirs.ArraysCache(2)):
        with pytest.raises(RequestError, match="which holds no keys and values"):
            generate_step(model, PROMPT, cache=[make() for _ in model.layers])


def test_mlx_lms_speculative_decoding_works_with_our_caches(model: OpenELM, expected: list[int]) -> None:
    """Speculative decoding trims the cache; so do `trim_prompt_cache` and programs that edit a prompt."""
    caches = ours.make_cache(2 * len(model.layers))
    steps = their_generate.speculative_generate_step(
        mx.array(PROMPT), model, model, max_tokens=16, prompt_cache=caches, num_draft_tokens=3
    )
    assert [int(token) for token, _, _ in steps] == expected
    cache = ours.make_cache(len(model.layers))
    list(generate_step(model, PROMPT, max_tokens=8, cache=cache))
    assert theirs.can_trim_prompt_cache(cache)
    assert theirs.trim_prompt_cache(cache, 8) == 8
    assert cache[0].offset == len(PROMPT) - 1
    assert [token for token, _ in generate_step(model, PROMPT[-1:], max_tokens=16, cache=cache)] == expected
    sliding = ours.make_cache(len(model.layers), 16)
    list(generate_step(model, PROMPT, max_tokens=16, cache=sliding))
    assert not theirs.can_trim_prompt_cache(sliding)
    assert theirs.trim_prompt_cache(sliding, 3) == 0
