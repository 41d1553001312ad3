"""Our caches against mlx-lm's of the same names, over random sequences of operations."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import cache as ours
from mlx_openelm.errors import RequestError

import mlx.core as mx
import numpy as np
import pytest

theirs = pytest.importorskip("mlx_lm.models.cache")

HEADS, DIM = 2, 32


def fresh(rng: random.Random, batch: int, length: int) -> tuple[mx.array, mx.array]:
    """Random keys and values, different in each call."""
    return tuple(mx.random.normal((batch, HEADS, length, DIM), key=mx.random.key(rng.getrandbits(32))) for _ in "kv")


def full_mask(mask: Any, length: int, total: int, batch: int) -> np.ndarray:
    """A mask of any form as booleans [batch, length, total]."""
    if mask is None:
        mask = mx.ones((length, total), mx.bool_)
    elif isinstance(mask, str):
        assert mask == "causal"
        mask = mx.arange(total - length, total)[:, None] >= mx.arange(total)
    mask = np.array(mask)
    mask = mask[:, 0] if mask.ndim == 4 else mask[None]
    return np.broadcast_to(mask, (batch, length, total))


def seen(cache: Any, keys: mx.array, values: mx.array) -> list[list[frozenset]]:
    """What attention sees: the set of visible (key, value) vectors of each row and new position."""
    batch, _, length, _ = keys.shape
    mask = cache.make_mask(length, return_array=False, window_size=None)
    all_keys, all_values = cache.update_and_fetch(keys, values)
    if isinstance(all_keys, tuple | list):
        packing = {"group_size": cache.group_size, "bits": cache.bits}
        all_keys, all_values = (mx.dequantize(*x, **packing) for x in (all_keys, all_values))
    both = np.array(mx.concatenate([all_keys, all_values], axis=-1).swapaxes(1, 2))
    visible = full_mask(mask, length, both.shape[1], batch)
    names = [[both[b, t].tobytes() for t in range(both.shape[1])] for b in range(batch)]
    return [
        [frozenset(names[b][t] for t in np.flatnonzero(visible[b, i])) for i in range(length)] for b in range(batch)
    ]


def offsets(cache: Any) -> list[int]:
    return [cache.offset] if isinstance(cache.offset, int) else cache.offset.tolist()


PAIRS = {
    "KVCache": lambda m: m.KVCache(),
    "QuantizedKVCache-8": lambda m: m.QuantizedKVCache(32, 8),
    "QuantizedKVCache-4": lambda m: m.QuantizedKVCache(32, 4),
    "RotatingKVCache-20": lambda m: m.RotatingKVCache(20),
    "RotatingKVCache-300": lambda m: m.RotatingKVCache(300),
}


@pytest.mark.covering
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PAIRS)
def test_single_sequences(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    a, b = PAIRS[name](ours), PAIRS[name](theirs)
    assert a.empty() and b.empty()
    assert a.nbytes == 0
    for step in range(25):
        choice = rng.random()
        if choice < 0.7 or step == 0:
            length = rng.choice([1, 1, 1, 2, 7, 19, 20, 21, 60] + ([255, 256, 300] if step % 5 == 0 else []))
            keys, values = fresh(rng, 1, length)
            assert seen(a, keys, values) == seen(b, keys, values), (step, length)
        elif choice < 0.8:
            assert a.is_trimmable() == b.is_trimmable()
            if a.is_trimmable():
                count = rng.choice([0, 1, 3, 1000])
                assert a.trim(count) == b.trim(count)
        elif choice < 0.9:
            a, b = type(a).from_state(a.state), type(b).from_state(b.state)
        else:
            a = copy.deepcopy(a)
        assert offsets(a) == offsets(b)
        assert a.size() == (b.size() if not name.startswith("Quantized") else b.offset)
        assert not a.empty()
        assert a.nbytes > 0
    for length in (1, 2, 5):
        total = seen_total(a, length)
        expected = full_mask(b.make_mask(length, return_array=True, window_size=None), length, total, 1)
        assert np.array_equal(
            full_mask(a.make_mask(length, return_array=True, window_size=None), length, total, 1), expected
        )


def seen_total(cache: Any, length: int) -> int:
    """How many columns an update of `length` would return."""
    limit = getattr(cache, "max_size", None)
    if limit is None:
        return cache.offset + length
    return min(cache.offset, limit - 1) + length if length > 1 else min(cache.offset + 1, limit)


@pytest.mark.covering
@pytest.mark.parametrize("keep", [0, 1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_rotating_with_keep_sees_the_first_and_the_latest(keep: int, seed: int) -> None:
    """Against the definition; mlx-lm's mask hides the kept positions from the later ones of a chunk."""
    rng = random.Random(seed)
    size = 16
    cache, history = ours.RotatingKVCache(size, keep=keep), []
    for _ in range(60):
        length = rng.choice([1, 1, 1, 2, 5, 15, 16, 17, 30])
        keys, values = fresh(rng, 1, length)
        got = seen(cache, keys, values)[0]
        start = len(history)
        both = np.array(mx.concatenate([keys, values], axis=-1).swapaxes(1, 2))[0]
        history += [both[i].tobytes() for i in range(length)]
        for i in range(length):
            p = start + i
            latest = history[max(0, p + 1 - (size - keep)) : p + 1]
            assert got[i] == frozenset(history[: min(keep, p + 1)] + latest), p
        assert cache.offset == len(history)
        assert cache.size() == min(len(history), size)


@pytest.mark.parametrize("keep", [0, 4])
def test_rotating_with_keep_one_token_at_a_time_equals_mlx_lms(keep: int) -> None:
    rng = random.Random(keep)
    a, b = ours.RotatingKVCache(16, keep=keep), theirs.RotatingKVCache(16, keep=keep)
    for length in [9, *[1] * 40]:
        keys, values = fresh(rng, 1, length)
        assert seen(a, keys, values) == seen(b, keys, values)


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [7, 1], [3, 5], [8, 1], [9], [1] * 9, [4, 5]], ids=str)
@pytest.mark.parametrize("keep", [0, 2])
def test_a_rotating_cache_at_exactly_its_limit(pieces: list[int], keep: int) -> None:
    """Filled to its size and one beyond: what it holds, sees, forgets and overwrites next."""
    rng, size = random.Random(0), 8
    cache, history = ours.RotatingKVCache(size, keep=keep), []
    total = sum(pieces)
    for length in pieces:
        keys, values = fresh(rng, 1, length)
        cache.update_and_fetch(keys, values)
        both = np.array(mx.concatenate([keys, values], axis=-1).swapaxes(1, 2))[0]
        history += [vector.tobytes() for vector in both]
        if cache.offset == size - 1:
            assert cache.is_trimmable()
            twin = copy.deepcopy(cache)
            assert (twin.trim(2), twin.offset, twin.size()) == (2, 5, 5)
            assert seen(twin, *fresh(rng, 1, 1))[0][0] > set(history[:5])
    assert (cache.offset, cache.size()) == (total, size)
    assert not cache.is_trimmable()
    assert (cache.trim(3), cache.offset) == (0, total)
    if pieces[-1] == 1:  # single positions are written in place
        assert cache.keys.shape[2] == size
    # One more position sees everything held except the position that it overwrites.
    for length in (1, 3):
        twin = copy.deepcopy(cache)
        keys, values = fresh(rng, 1, length)
        both = np.array(mx.concatenate([keys, values], axis=-1).swapaxes(1, 2))[0]
        longer = history + [vector.tobytes() for vector in both]
        for i, visible in enumerate(seen(twin, keys, values)[0]):
            latest = longer[total + i + 1 - (size - keep) : total + i + 1]
            assert visible == frozenset(longer[:keep] + latest)
        if length == 1:
            assert twin.keys.shape[2] == size


@pytest.mark.parametrize(("past", "visible"), [(4, 5), (5, 5), (6, 5), (15, 5), (16, 5)])
def test_a_mask_window_smaller_than_a_rotating_cache(past: int, visible: int) -> None:
    """A new position sees the latest `window` columns, itself included."""
    rng, cache = random.Random(0), ours.RotatingKVCache(16)
    cache.update_and_fetch(*fresh(rng, 1, past))
    mask = cache.make_mask(1, window_size=5)
    total = min(past + 1, 16)
    assert full_mask(mask, 1, total, 1).sum() == visible


@pytest.mark.parametrize("length", [7, 8, 9])
def test_rotating_caches_at_their_limit_merge_and_extract(length: int) -> None:
    rng, singles = random.Random(1), [ours.RotatingKVCache(8) for _ in range(3)]
    for single, count in zip(singles, (length, 3, 0), strict=True):
        if count:
            single.update_and_fetch(*fresh(rng, 1, count))
    merged = ours.RotatingKVCache.merge(singles)
    assert (merged.size(), merged.offset.tolist()) == (min(length, 8), [length, 3, 0])
    for row, single in enumerate(singles):
        keys, values = fresh(rng, 1, 1)
        assert seen(merged.extract(row), keys, values) == seen(copy.deepcopy(single), keys, values)
    keys, values = fresh(rng, 3, 1)
    expected = [seen(c, keys[i : i + 1], values[i : i + 1])[0] for i, c in enumerate(singles)]
    assert seen(merged, keys, values) == expected
    assert merged.is_trimmable() == (length < 7)


def test_writing_after_a_trim_replaces_the_trimmed_positions() -> None:
    rng = random.Random(0)
    cache = ours.KVCache()
    keys, values = fresh(rng, 1, 10)
    cache.update_and_fetch(keys, values)
    assert cache.trim(4) == 4
    new_keys, new_values = fresh(rng, 1, 2)
    got_keys, got_values = cache.update_and_fetch(new_keys, new_values)
    assert mx.array_equal(got_keys, mx.concatenate([keys[:, :, :6], new_keys], axis=2))
    assert mx.array_equal(got_values, mx.concatenate([values[:, :, :6], new_values], axis=2))


def test_a_copy_is_independent() -> None:
    rng = random.Random(0)
    for make in PAIRS.values():
        cache = make(ours)
        cache.update_and_fetch(*fresh(rng, 1, 5))
        twin = copy.deepcopy(cache)
        keys, values = fresh(rng, 1, 1)
        first = seen(twin, keys, values)
        seen(twin, *fresh(rng, 1, 3))
        assert seen(cache, keys, values) == first


# Kernels that write straight into a growing cache's buffers.


def write_in_place(cache: Any, number: float) -> mx.array:
    """Fill one more position with a number, without MLX knowing, as a kernel does."""
    for buffer in cache.acquire_buffers(HEADS, DIM, mx.float32):
        assert buffer.shape[2] > cache.offset
        np.array(buffer, copy=False)[:, :, cache.offset] = number
    result = mx.array(number) + 1
    cache.advance(result)
    return result


def numbers(cache: Any) -> list[list[float]]:
    """The numbers written in place, of keys and values."""
    return [x[0, 0, :, 0].tolist() for x in cache.keys_and_values()]


def test_positions_written_in_place_are_in_the_cache() -> None:
    cache = ours.KVCache()
    for number in range(600):  # the buffers grow twice
        write_in_place(cache, number)
    assert cache.offset == 600
    assert numbers(cache) == [list(range(600))] * 2


HANDED_OUT = {
    "keys": lambda cache: [cache.keys],
    "values": lambda cache: [cache.values],
    "state": lambda cache: cache.state[:2],
    "keys_and_values": lambda cache: cache.keys_and_values(),
    "a copy": lambda cache: copy.copy(cache).state[:2],
    "a deep copy": lambda cache: copy.deepcopy(cache).state[:2],
    "reserve": lambda cache: [x + 0 for x in cache.reserve(1, HEADS, 0, DIM, mx.float32)[:2]],
}


@pytest.mark.parametrize("name", HANDED_OUT)
def test_buffers_that_were_handed_out_are_not_written_into(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ours.KVCache()
    write_in_place(cache, 1)
    result, evaluated, evaluate = write_in_place(cache, 2), [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *x: (evaluated.extend(x), evaluate(*x)))
    arrays = HANDED_OUT[name](cache)
    assert any(x is result for x in evaluated)  # waits for the kernel's write
    write_in_place(cache, 3)
    assert all(x[0, 0, :4, 0].tolist() in ([1, 2, 0, 0], [1, 2]) for x in arrays)
    assert numbers(cache) == [[1, 2, 3]] * 2


@pytest.mark.parametrize("names", [["keys"], ["values"], ["keys", "values"], ["state"]], ids=str)
def test_arrays_given_to_a_cache_are_not_written_into(names: list[str]) -> None:
    cache = ours.KVCache()
    write_in_place(cache, 1)
    given = {name: mx.full((1, HEADS, 256, DIM), 7.0) for name in ("keys", "values")}
    for name in names:
        setattr(cache, name, (given["keys"], given["values"], 1) if name == "state" else given[name])
    write_in_place(cache, 2)
    assert all((x == 7).all().item() for x in given.values())
    assert numbers(cache) == [[7 if name in names or names == ["state"] else 1, 2] for name in given]


def test_a_cache_keeps_the_dtype_of_its_keys_and_values() -> None:
    cache = ours.KVCache()
    assert cache.has_dtype(mx.float32)
    assert cache.has_dtype(mx.bfloat16)
    cache.update_and_fetch(mx.zeros((1, HEADS, 3, DIM)), mx.zeros((1, HEADS, 3, DIM)))
    assert cache.has_dtype(mx.float32)
    assert not cache.has_dtype(mx.bfloat16)
    for name in ("keys", "values"):
        mixed = copy.copy(cache)
        setattr(mixed, name, getattr(mixed, name).astype(mx.bfloat16))
        assert not mixed.has_dtype(mx.float32)
        assert not mixed.has_dtype(mx.bfloat16)


def test_a_quantized_cache_from_a_plain_one() -> None:
    rng = random.Random(0)
    a, b = ours.KVCache(), theirs.KVCache()
    assert a.to_quantized(group_size=32, bits=8).empty()
    for length in (7, 1, 300):
        keys, values = fresh(rng, 1, length)
        a.update_and_fetch(keys, values)
        b.update_and_fetch(keys, values)
    a, b = (c.to_quantized(group_size=32, bits=8) for c in (a, b))
    assert (a.offset, a.bits, a.group_size) == (308, 8, 32)
    for length in (1, 4):
        keys, values = fresh(rng, 1, length)
        assert seen(a, keys, values) == seen(b, keys, values)
    assert a.nbytes < 308 * HEADS * DIM * 4 * 2


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_quantized_caches_of_other_bits(bits: int) -> None:
    rng = random.Random(bits)
    cache = ours.QuantizedKVCache(32, bits)
    keys, values = (mx.concatenate(x, axis=2) for x in zip(*[fresh(rng, 1, n) for n in (3, 1)], strict=True))
    cache.update_and_fetch(keys[:, :, :3], values[:, :, :3])
    got_keys, got_values = cache.update_and_fetch(keys[:, :, 3:], values[:, :, 3:])
    for got, exact in ((got_keys, keys), (got_values, values)):
        back = mx.dequantize(*got, group_size=32, bits=bits)
        assert mx.array_equal(back, mx.dequantize(*mx.quantize(exact, 32, bits), group_size=32, bits=bits))


# Batches.

SIZE = 12  # of the rotating caches


class Rows:
    """A batch in our cache, in mlx-lm's, and by the definition: a row sees its latest tokens."""

    def __init__(self, rng: random.Random, kind: str, prompts: list[int]) -> None:
        self.rng, self.kind, self.limit = rng, kind, SIZE if kind == "rotating" else 10**9
        self.histories: list[list[bytes]] = []
        singles: list[list[Any]] = [[], []]
        for length in prompts:
            caches = [m.RotatingKVCache(SIZE) if kind == "rotating" else m.KVCache() for m in (ours, theirs)]
            self.histories.append([])
            if length:
                keys, values = fresh(rng, 1, length)
                self._remember(len(self.histories) - 1, keys[0], values[0], length)
                for cache in caches:
                    cache.update_and_fetch(keys, values)
            for single, cache in zip(singles, caches, strict=True):
                single.append(cache)
        self.ours, self.theirs = (single[0].merge(single) for single in singles)

    def _remember(self, row: int, keys: mx.array, values: mx.array, length: int) -> list[frozenset]:
        both = np.array(mx.concatenate([keys, values], axis=-1).swapaxes(0, 1))
        visible = []
        for t in range(length):
            self.histories[row].append(both[t].tobytes())
            visible.append(frozenset(self.histories[row][-self.limit :]))
        return visible

    def step(self, lengths: list[int], total: int) -> None:
        """`total` columns, the first `lengths[row]` of them real, the rest padding."""
        keys, values = fresh(self.rng, len(self.histories), total)
        mine = seen(self.ours, keys, values)
        other = seen(self.theirs, keys, values)
        for row, length in enumerate(lengths):  # what padding attends to does not matter
            expected = self._remember(row, keys[row], values[row], length)
            assert mine[row][:length] == expected
            if self.kind == "plain":
                assert other[row][:length] == expected

    def prompt(self, chunk: int) -> None:
        """Rows of different lengths as mlx-lm feeds them: padded on the right, in chunks, then finalized."""
        lengths = [self.rng.choice([1, 2, 5, 9, 14]) for _ in self.histories]
        longest = max(lengths)
        padding = [longest - n for n in lengths]
        if max(padding):
            self.both("prepare", lengths=lengths, right_padding=padding)
        for start in range(0, longest, chunk):
            size = min(chunk, longest - start)
            self.step([min(size, max(0, n - start)) for n in lengths], size)
        if max(padding):
            self.both("finalize")

    def both(self, name: str, *args: Any, **kwargs: Any) -> None:
        for cache in (self.ours, self.theirs):
            getattr(cache, name)(*args, **kwargs)

    def extract(self, row: int) -> None:
        single = copy.deepcopy(self.ours).extract(row)
        assert type(single) is (ours.RotatingKVCache if self.kind == "rotating" else ours.KVCache)
        assert single.offset == len(self.histories[row])
        history = list(self.histories[row])
        for length in (1, 4, 1):
            keys, values = fresh(self.rng, 1, length)
            expected = self._remember(row, keys[0], values[0], length)
            assert seen(single, keys, values)[0] == expected
        self.histories[row] = history


@pytest.mark.covering(2)
@pytest.mark.parametrize("chunk", [100, 3], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("kind", ["plain", "rotating"])
@pytest.mark.parametrize("seed", range(6))
def test_batches(kind: str, seed: int, chunk: int) -> None:
    """Random prompts, steps, filters, extensions and extractions, as continuous batching does them."""
    rng = random.Random(f"{kind} {seed} {chunk}")
    rows = Rows(rng, kind, [0, 3, 7])
    for _ in range(30):
        choice, batch = rng.random(), len(rows.histories)
        if choice < 0.5:
            rows.step([1] * batch, 1)
        elif choice < 0.65:
            rows.prompt(chunk)
        elif choice < 0.75 and batch > 1:
            kept = sorted(rng.sample(range(batch), rng.randint(1, batch - 1)))
            rows.both("filter", kept if rng.random() < 0.5 else mx.array(kept))
            rows.histories = [rows.histories[row] for row in kept]
        elif choice < 0.9 and batch < 6:
            more = Rows(rng, kind, rng.choice([[4], [15, 1], [0, 2]]))
            rows.ours.extend(more.ours)
            rows.theirs.extend(more.theirs)
            rows.histories += more.histories
        else:
            rows.extract(rng.randrange(batch))
        if rng.random() < 0.2:
            rows.ours = copy.deepcopy(rows.ours)
        if rng.random() < 0.2:
            rows.ours = type(rows.ours).from_state(rows.ours.state)
        assert offsets(rows.ours) == [len(history) for history in rows.histories]
        assert offsets(rows.theirs) == offsets(rows.ours)
        assert rows.ours.nbytes > 0


def test_an_empty_batch() -> None:
    for m in (ours, theirs):
        merged = m.KVCache.merge([m.KVCache(), m.KVCache()])
        assert type(merged).__name__ == "BatchKVCache"
        assert merged.empty()
        assert merged.nbytes == 0
        rotating = m.RotatingKVCache.merge([m.RotatingKVCache(8), m.RotatingKVCache(8)])
        assert type(rotating).__name__ == "BatchRotatingKVCache"
    a, b = (m.KVCache.merge([m.KVCache()]) for m in (ours, theirs))
    rng = random.Random(1)
    for m, batch in ((ours, a), (theirs, b)):
        batch.extend(m.KVCache.merge([m.KVCache()]))
        assert batch.offset.tolist() == [0, 0]
        assert type(m.KVCache.merge([m.KVCache()])) is type(batch)
    keys, values = fresh(rng, 2, 3)
    assert seen(a, keys, values) == seen(b, keys, values)


def test_left_padding_and_trim() -> None:
    rng = random.Random(2)
    a, b = ours.BatchKVCache([0, 2]), theirs.BatchKVCache([0, 2])
    for cache in (a, b):
        cache.prepare(left_padding=[1, 0])
    assert offsets(a) == offsets(b) == [-1, -2]
    keys, values = fresh(rng, 2, 6)
    mine, other = seen(a, keys, values), seen(b, keys, values)
    assert mine[0][1:] == other[0][1:]
    assert mine[1][2:] == other[1][2:]
    assert a.trim(2) == b.trim(2) == 2
    assert offsets(a) == offsets(b) == [3, 2]
    keys, values = fresh(rng, 2, 2)
    assert seen(a, keys, values) == seen(b, keys, values)
    assert a.trim(100) == b.trim(100) == 6
    for cache in (a, b):
        with pytest.raises(ValueError, match="empty"):
            cache.prepare(left_padding=[1, 0])


def test_rotating_caches_of_different_sizes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="size"):
        ours.RotatingKVCache.merge([ours.RotatingKVCache(8), ours.RotatingKVCache(9)])


def test_make_cache() -> None:
    caches = ours.make_cache(3)
    assert [type(c) for c in caches] == [ours.KVCache] * 3
    caches = ours.make_cache(2, 8)
    assert [(type(c), c.max_size, c.keep) for c in caches] == [(ours.RotatingKVCache, 8, 4)] * 2
    for size in (7, 0, -1):
        with pytest.raises(RequestError, match="max_kv_size"):
            ours.make_cache(2, size)


# Files.


@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("name", [*PAIRS, "RotatingKVCache-keep"])
def test_saved_prompt_caches_are_exchanged_with_mlx_lm(tmp_path: Path, name: str, direction: str) -> None:
    make = PAIRS.get(name) or (lambda m: m.RotatingKVCache(20, keep=4))
    writer, reader = (ours, theirs) if direction == "ours to theirs" else (theirs, ours)
    rng = random.Random(name)
    cache, untouched = make(writer), make(writer)
    for length in (7, 1, 4, *[1] * 15):
        keys, values = fresh(rng, 1, length)
        cache.update_and_fetch(keys, values)
        untouched.update_and_fetch(keys, values)
    file = str(tmp_path / "cache.safetensors")
    theirs.save_prompt_cache(file, [cache], {"model": "x"})
    # mlx-lm looks classes up by name, and ours have the same names; this uses its code and our classes.
    loaded, metadata = theirs.load_prompt_cache(file, return_metadata=True)
    assert metadata == {"model": "x"}
    if reader is ours:
        loaded = [getattr(ours, type(c).__name__).from_state(c.state) for c in loaded]
    assert type(loaded[0]).__module__.startswith(reader.__name__)
    assert offsets(loaded[0]) == [27]
    for _ in range(3):
        keys, values = fresh(rng, 1, 1)
        assert seen(loaded[0], keys, values) == seen(untouched, keys, values)
    if "keep" not in name:
        keys, values = fresh(rng, 1, 3)
        assert seen(loaded[0], keys, values) == seen(untouched, keys, values)


@pytest.mark.parametrize(
    "make",
    [
        ours.KVCache,
        ours.QuantizedKVCache,
        lambda: ours.RotatingKVCache(8, keep=2),
        lambda: ours.BatchKVCache([0]),
    ],
)
def test_a_shallow_copy_is_independent(make: Callable[[], Any]) -> None:
    def one(value: float) -> mx.array:
        return mx.full((1, 2, 1, 64), value)

    cache = make()
    cache.update_and_fetch(one(1.0), one(1.0))
    twin = copy.copy(cache)
    cache.update_and_fetch(one(5.0), one(5.0))
    twin.update_and_fetch(one(7.0), one(7.0))

    def last(cache: Any) -> float:
        keys = cache.keys_and_values()[0] if hasattr(cache, "keys_and_values") else cache.keys[:, :, :2]
        keys = mx.dequantize(*keys, group_size=64, bits=8) if isinstance(keys, tuple) else keys
        return keys[0, 0, 1, 0].item()

    assert (last(cache), last(twin), cache.offset == twin.offset) == (5.0, 7.0, True)
