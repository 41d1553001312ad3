"""The radix tree of prompt caches: the logits of plain prefill, shared memory, a budget, what is dropped first."""

from __future__ import annotations

import gc
import random
from typing import Any

from mlx_openelm import backend
from mlx_openelm.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.options import CacheOptions
from mlx_openelm.generation.prefix_tree import PrefixTree

import mlx.core as mx
import pytest
from test_engine import shortened

PLAIN = CacheOptions()
KINDS = {
    "growing": PLAIN,
    "8 bits": CacheOptions(kv_bits=8),
    "4 bits": CacheOptions(kv_bits=4),
    "sliding": CacheOptions(max_kv_size=12),
    "wide": CacheOptions(max_kv_size=40),
}
MUCH = 1 << 40


@pytest.fixture(scope="module")
def model() -> Any:
    return shortened("tiny", dtype="float32")[0]


def new(model: Any, options: CacheOptions) -> list[Any]:
    """Empty caches of the kind that a tree gives."""
    if options.kv_bits:
        return [QuantizedKVCache(options.group_size(model.config.head_dim), options.kv_bits) for _ in model.layers]
    if options.max_kv_size:
        return [RotatingKVCache(options.max_kv_size, keep=4) for _ in model.layers]
    return [KVCache() for _ in model.layers]


def process(model: Any, ids: list[int], cache: list[Any], piece: int = 1 << 20) -> mx.array:
    """The logits after the last of the ids."""
    for start in range(0, len(ids), piece):
        logits = model(mx.array([ids[start : start + piece]]), cache)[0, -1]
    mx.eval(logits)
    return logits


def put(model: Any, tree: PrefixTree, ids: list[int], options: CacheOptions = PLAIN, **key: str) -> None:
    cache = new(model, options)
    process(model, ids, cache)
    tree.insert(ids, cache, **key)


def contents(tree: PrefixTree) -> int:
    return sum(node.content.nbytes for node in tree._order if node.content is not None)


def per_token(model: Any) -> int:
    return sum(2 * 4 * heads * model.config.head_dim for heads in model.config.num_kv_heads)


def requests(seed: int, count: int) -> list[tuple[list[int], int]]:
    """Prompts that begin alike, end alike, repeat or are short, each with a number of tokens to generate."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(3, 1500) for _ in range(rng.randrange(5, 60))] for _ in range(4)]
    found = []
    for _ in range(count):
        start = rng.choice(beginnings)[: rng.randrange(0, 60)]
        found.append(([1, *start, *(rng.randrange(3, 6) for _ in range(rng.randrange(0, 9)))], rng.randrange(0, 5)))
    return found


# Correctness.


BUDGETS = {"all": MUCH, "some": 33_000, "little": 1_700}
QUICK = {("growing", "all"), ("growing", "some"), ("8 bits", "little"), ("sliding", "all")}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        pytest.param(kind, BUDGETS[size], id=f"{kind}-{size}", marks=[] if (kind, size) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for size in BUDGETS
    ],
)
def test_random_requests_give_the_logits_of_plain_prefill(model: Any, kind: str, budget: int) -> None:
    options, tree, reused = KINDS[kind], PrefixTree(model, budget), 0
    # A difference in rounding can move a value to the next step of a quantized cache.
    tolerance = {"8 bits": 0.05, "4 bits": 1.0}.get(kind, 1e-4)
    for ids, count in requests(7, 30):
        ids = list(ids)
        cache, length = tree.fetch(ids, options)
        assert {int(layer.offset) for layer in cache} == {length} and length < len(ids)
        assert [type(layer) for layer in cache] == [type(layer) for layer in new(model, options)]
        reused += length
        plain = new(model, options)
        logits, expected = process(model, ids[length:], cache, piece=16), process(model, ids, plain, piece=16)
        for step in range(count + 1):
            assert mx.abs(logits - expected).max().item() < tolerance
            if step < count:
                ids.append(int(mx.argmax(expected).item()))
                logits, expected = process(model, ids[-1:], cache), process(model, ids[-1:], plain)
        tree.insert(ids, cache)
        assert tree.nbytes == contents(tree) <= budget
    assert reused > {MUCH: 150, BUDGETS["some"]: 20}.get(budget, -1)


def test_every_length_of_a_held_prefix_is_found(model: Any) -> None:
    tree, ids = PrefixTree(model, MUCH), list(range(3, 43))
    put(model, tree, ids)
    for count in range(len(ids)):
        assert tree.fetch([*ids[:count], 2000, 2001])[1] == count
    assert tree.fetch(ids)[1] == len(ids) - 1  # one token is left to process
    assert tree.fetch([]) == tree.fetch([7]) or tree.fetch([])[1] == tree.fetch([7])[1] == 0


def test_a_sliding_cache_that_dropped_positions_serves_its_whole_prefix_only(model: Any) -> None:
    options, tree, ids = KINDS["sliding"], PrefixTree(model, MUCH), list(range(3, 33))
    cache = new(model, options)
    process(model, ids, cache, piece=8)
    tree.insert(ids, cache)
    assert [tree.fetch([*ids[:n], 9, 9], options)[1] for n in (29, 30)] == [0, 30]
    put(model, tree, ids[:12], options)  # nothing dropped yet: any part of it serves
    assert [tree.fetch([*ids[:n], 9, 9], options)[1] for n in (5, 12, 29, 30)] == [5, 12, 12, 30]
    again, length = tree.fetch([*ids, 50], options)
    assert mx.allclose(process(model, [50], again), process(model, [50], cache), atol=1e-4) and length == 30


def test_a_request_does_not_change_what_is_held(model: Any) -> None:
    for options in KINDS.values():
        tree, ids = PrefixTree(model, MUCH), list(range(3, 43))
        cache = new(model, options)
        process(model, ids, cache, piece=8)
        tree.insert(ids, cache)
        process(model, [1500] * 20, cache)  # the caller goes on with its own
        expected = None
        for other in (700, 800):
            fetched, length = tree.fetch([*ids, 5], options)
            assert length == 40
            logits = process(model, [5], fetched)
            expected = logits if expected is None else expected
            assert mx.array_equal(logits, expected)
            for token in range(other, other + 20):
                process(model, [token], fetched)


def test_kinds_and_keys_are_apart(model: Any) -> None:
    tree, ids = PrefixTree(model, MUCH), list(range(3, 33))
    put(model, tree, ids)
    put(model, tree, ids, KINDS["8 bits"])
    put(model, tree, ids[:20], key="an adapter")
    found = [tree.fetch(ids, options)[1] for options in KINDS.values()]
    assert found == [29, 29, 0, 0, 0]
    assert tree.fetch(ids, key="an adapter")[1] == 20 and tree.fetch(ids, key="another")[1] == 0
    later = CacheOptions(kv_bits=8, quantized_kv_start=100)  # growing until then
    assert tree.fetch(ids, later)[1] == 29 and isinstance(tree.fetch(ids, later)[0][0], KVCache)


# Memory.


def test_a_common_beginning_is_held_once(model: Any) -> None:
    tree, shared = PrefixTree(model, MUCH), list(range(100, 200))
    for n in range(20):
        put(model, tree, [*shared, 300 + n, 301 + n, 5])
    assert tree.nbytes == contents(tree) == (100 + 20 * 3) * per_token(model)
    put(model, tree, shared[:50])  # held already
    assert tree.nbytes == (100 + 20 * 3) * per_token(model)


def test_the_memory_in_use_is_what_is_counted(model: Any) -> None:
    """Also after splits: no half keeps the buffer of the whole alive."""
    gc.collect()
    before, tree = mx.get_active_memory(), PrefixTree(model, MUCH)
    for ids, _ in requests(3, 40):
        put(model, tree, ids)
    gc.collect()
    assert mx.get_active_memory() - before == pytest.approx(tree.nbytes, rel=0.25, abs=70_000)
    full, tree.max_bytes = tree.nbytes, tree.nbytes // 4
    put(model, tree, [9, 9])
    gc.collect()
    assert tree.nbytes <= full // 4
    assert mx.get_active_memory() - before == pytest.approx(tree.nbytes, rel=0.5, abs=70_000)
    tree.clear()
    gc.collect()
    assert tree.nbytes == 0 and mx.get_active_memory() - before < 35_000
    assert tree.fetch([1, 2, 3])[1] == 0


def test_a_hit_copies_nothing_until_it_is_used(model: Any) -> None:
    tree, ids = PrefixTree(model, MUCH), [n % 1500 + 3 for n in range(400)]
    for count in (100, 200, 300, 400):
        put(model, tree, ids[:count])
    gc.collect()
    before = mx.get_active_memory()
    hits = [tree.fetch(ids) for _ in range(50)]
    assert mx.get_active_memory() - before < 10_000 and {length for _, length in hits} == {399}
    cache, _ = hits[0]
    process(model, ids[399:], cache)
    assert cache[0].keys.shape[2] == 512  # with room for what follows, so that the copy is the only one


def test_the_least_recently_used_goes_first(model: Any) -> None:
    size = per_token(model)
    tree = PrefixTree(model, 60 * size)
    ids = {name: [start, *range(start * 10, start * 10 + 19)] for name, start in (("a", 50), ("b", 60), ("c", 70))}
    for name in "abc":
        put(model, tree, ids[name])
    tree.fetch([*ids["a"], 5])
    put(model, tree, [80, *range(1100, 1119)])
    held = {name: tree.fetch([*ids[name], 5])[1] for name in "abc"}
    assert held == {"a": 20, "b": 0, "c": 20}


def test_the_end_of_a_prefix_goes_before_its_beginning(model: Any) -> None:
    size, ids = per_token(model), list(range(100, 160))
    tree = PrefixTree(model, 60 * size)
    for count in (20, 40, 60):
        put(model, tree, ids[:count])
    put(model, tree, list(range(500, 530)))
    assert tree.fetch([*ids, 5])[1] == 20 and tree.nbytes == 50 * size


def test_what_does_not_fit_is_not_held(model: Any) -> None:
    tree = PrefixTree(model, 10 * per_token(model))
    put(model, tree, list(range(100, 111)))
    assert tree.nbytes == 0 and tree.fetch(list(range(100, 111)))[1] == 0 and not tree._root("", ("growing",)).children
    nothing = PrefixTree(model, 0)
    put(model, nothing, [1, 2, 3])
    assert nothing.nbytes == 0


def test_the_default_budget_is_a_share_of_the_free_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, budget in ((8 << 30, 2 << 30), (None, 2 << 30)):
        monkeypatch.setattr(backend, "available_memory", lambda free=free: free)
        assert PrefixTree(model).max_bytes == budget
    for wrong in (-1, 1.5, "1GB"):
        with pytest.raises(RequestError, match="max_bytes must be a whole number of bytes, 0 or above, got"):
            PrefixTree(model, wrong)  # type: ignore[arg-type]


def test_nothing_is_left_of_many_dropped_sequences(model: Any) -> None:
    """Neither nodes nor places in the order."""
    tree = PrefixTree(model, 50 * per_token(model))
    for ids, _ in requests(11, 60):
        put(model, tree, ids)
    nodes, todo = 0, list(tree._root("", ("growing",)).children.values())
    while todo:
        node = todo.pop()
        assert node in tree._order
        nodes, todo = nodes + 1, [*todo, *node.children.values()]
    assert nodes == len(tree._order) <= 50


# Requests that are refused.


def test_caches_that_cannot_be_held(model: Any) -> None:
    tree, cache = PrefixTree(model, MUCH), new(model, PLAIN)
    process(model, [5, 6, 7], cache)
    with pytest.raises(RequestError, match="There are 2 ids, and the prompt cache has seen 3 tokens"):
        tree.insert([5, 6], cache)
    with pytest.raises(RequestError, match="for 1 layers, and the model has 2"):
        tree.insert([5, 6, 7], cache[:1])
    batch = [BatchKVCache([0]) for _ in model.layers]
    process(model, [5, 6, 7], batch)
    with pytest.raises(RequestError, match="A BatchKVCache cannot be shared"):
        tree.insert([5, 6, 7], batch)
    tree.insert([1, 2], new(model, PLAIN))  # seen nothing yet
    tree.insert([5, 6, 7, 8], cache)  # the last id is not processed yet
    assert tree.nbytes == 3 * per_token(model)
