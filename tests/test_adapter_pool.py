"""Rows with different adapters: each equals its adapter alone; adapters are held, dropped and refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from mlx_openelm import backend, native
from mlx_openelm.adapters.attaching import attach, attach_new, target_paths
from mlx_openelm.adapters.files import read_adapter
from mlx_openelm.adapters.pool import AdapterHandle, AdapterPool, PoolFullError
from mlx_openelm.adapters.switching import read_mixture
from mlx_openelm.cache import KVCache, make_cache
from mlx_openelm.config import EMBEDDING
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.adapter import TARGET_MODULES, Adapter, LowRank
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
PEFT = ["peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding"]
BASES = {"float32": None, "8bit": Quantization(32, 8), "4bit": Quantization(32, 4)}
# Numbers of rows. From 12 on the CPU kernels change their arithmetic with the number of rows.
ROWS = [1, pytest.param(2, marks=pytest.mark.slow), 5, 11]

needs_kernels = pytest.mark.skipif(native.kernels is None, reason="a BLAS rounds a row of several differently")


def load_model(packing: Quantization | None = None) -> OpenELM:
    """With few bits, activations of decoding steps are rounded, as `load` does it."""
    checkpoint = mlx_format.read(FIXTURES / "shakespeare-hf")
    if packing is not None:
        checkpoint.quantization = dict.fromkeys(checkpoint.config.matrix_shapes(), packing)
        checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return build_model(checkpoint, dtype="float32", expand=False, exact_activations=False)


def low_rank(model: OpenELM, rank: int, seed: int, **selected: object) -> Adapter:
    """A random adapter that changes much."""
    shapes, changes = model.config.matrix_shapes(), {}
    for number, path in enumerate(target_paths(model.config, **selected)):  # type: ignore[arg-type]
        inputs, outputs = shapes[path] if path == EMBEDDING else shapes[path][::-1]
        keys = mx.random.split(mx.random.key(100 * seed + number))
        a = mx.random.normal((inputs, rank), key=keys[0]) / inputs**0.5
        changes[path] = LowRank(a, mx.random.normal((rank, outputs), key=keys[1]), 0.3, output_side=path == EMBEDDING)
    return Adapter(changes)


def whole_weights(model: OpenELM) -> Adapter:
    """Every tensor that full fine-tuning saves, changed."""
    draws = enumerate(model.config.tensor_shapes().items())
    return Adapter(
        weights={
            name: (1.0 if len(shape) == 1 else 0.0) + mx.random.normal(shape, key=mx.random.key(number)) / 16
            for number, (name, shape) in draws
        }
    )


MADE: dict[str, Callable[[OpenELM], Adapter]] = {
    "rank 3, last layers": lambda model: low_rank(model, 3, 1, num_layers=2, target_modules=["proj_2", "out_proj"]),
    "rank 8, both sides": lambda model: low_rank(model, 8, 2, target_modules=TARGET_MODULES),
    "rank 8": lambda model: low_rank(model, 8, 3),
    "full": whole_weights,
}
NAMES = [None, *PEFT, *MADE]


def read(name: str, model: OpenELM) -> Adapter:
    return MADE[name](model) if name in MADE else read_adapter(FIXTURES / name, model.config)


def make_pool(model: OpenELM, **options: int) -> AdapterPool:
    return AdapterPool(model, read=lambda name: read(name, model), **options)


def alone(name: str | None, packing: Quantization | None) -> OpenELM:
    model = load_model(packing)
    if name is not None:
        attach(model, read(name, model))
    return model


class Lone:
    """Each adapter attached to a model of its own: logits of a prompt, and of a step after it."""

    def __init__(self, packing: Quantization | None, prompt: list[int]):
        self.packing, self.prompt = packing, prompt
        self.read: dict[str | None, tuple[OpenELM, mx.array, list[Any]]] = {}

    def __call__(self, name: str | None, token: int) -> tuple[mx.array, mx.array, mx.array]:
        if name not in self.read:
            model = alone(name, self.packing)
            cache = make_cache(model.config.num_transformer_layers)
            self.read[name] = model, model(mx.array([self.prompt]), cache), cache
        model, first, cache = self.read[name]
        cache = [copy(layer) for layer in cache]
        hidden = model.hidden_states(mx.array([[token]]), cache)
        return first, hidden, model.logits(hidden)


@pytest.fixture(scope="module", params=BASES)
def packing(request: pytest.FixtureRequest) -> Quantization | None:
    return BASES[request.param]


@pytest.fixture(scope="module")
def lone(packing: Quantization | None) -> Lone:
    return Lone(packing, [1, 33, 7, 500, 12])


def same(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one, other).item())


def merged_step(
    pool: AdapterPool, lone: Lone, rows: list[AdapterHandle | None], tokens: list[int]
) -> tuple[list[mx.array], mx.array, mx.array]:
    """The prompt for each row alone, then one step of all rows: logits of the prompts, hidden states, logits."""
    model, firsts, caches = pool.model, [], []
    for handle in rows:
        caches.append(make_cache(model.config.num_transformer_layers))
        with pool.rows([handle]):
            firsts.append(model(mx.array([lone.prompt]), caches[-1]))
    cache = [KVCache.merge(layer) for layer in zip(*caches, strict=True)]
    with pool.rows(rows):
        hidden = model.hidden_states(mx.array(tokens)[:, None], cache)
        return firsts, hidden, model.logits(hidden)


# Rows.


@pytest.mark.covering
@needs_kernels
@pytest.mark.parametrize("count", ROWS)
def test_each_row_equals_its_adapter_alone_bit_for_bit(count: int, packing: Quantization | None, lone: Lone) -> None:
    pool = make_pool(load_model(packing))
    handles = {name: name and pool.acquire(name) for name in NAMES}
    for start in range(0, len(NAMES), 2 if count < len(NAMES) else 5):  # in a few orders, if all fit
        names = [NAMES[(start + 3 * row) % len(NAMES)] for row in range(count)]
        tokens = [40 + 7 * row + start for row in range(count)]
        firsts, hidden, logits = merged_step(pool, lone, [handles[name] for name in names], tokens)
        for row, (name, token) in enumerate(zip(names, tokens, strict=True)):
            first, lone_hidden, lone_logits = lone(name, token)
            assert same(firsts[row], first), name
            assert same(hidden[row], lone_hidden[0]), name
            assert same(logits[row], lone_logits[0]), name


@needs_kernels
def test_other_neighbors_and_other_orders_change_no_bit() -> None:
    pool = make_pool(load_model(BASES["4bit"]))
    lone = Lone(BASES["4bit"], [1, 5])
    handles = [pool.acquire(name) for name in ("peft-dora", "rank 3, last layers", "peft-lora")]
    expected = lone("peft-dora", 9)[2]
    for others in ([None], [handles[1]], [handles[2], None, handles[0]], [handles[1], handles[2], handles[1]]):
        for rows in ([handles[0], *others], [*others, handles[0]]):
            logits = merged_step(pool, lone, rows, [9] * len(rows))[2]
            assert same(logits[rows.index(handles[0])], expected[0])


def test_rows_equal_what_peft_and_the_published_code_compute() -> None:
    """Position by position through one batch, against logits of PyTorch and PEFT."""
    pool = make_pool(load_model())
    with np.load(FIXTURES / "adapters-reference.npz") as arrays:
        expected = {name: arrays[name] for name in PEFT}
    with np.load(FIXTURES / "shakespeare-reference.npz") as arrays:
        expected_base = arrays["logits_0"]
    ids = json.loads((FIXTURES / "shakespeare-reference.json").read_text())["ids"][0]
    names = [None, *PEFT]
    rows = [name and pool.acquire(name) for name in names]
    cache = [KVCache.merge([KVCache() for _ in names]) for _ in pool.model.layers]
    with pool.rows(rows):
        steps = [pool.model(mx.full((len(rows), 1), token), cache)[:, 0] for token in ids]
    got = np.array(mx.stack(steps, axis=1))
    for row, name in enumerate(names):
        assert np.abs(got[row] - (expected_base if name is None else expected[name])).max() < 2e-3, name
    assert np.abs(got[1:] - got[0]).max(axis=(1, 2)).min() > 0.1  # the adapters do something


def test_the_operations_of_a_gpu_give_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, tokens = make_pool(load_model()), mx.array([[7], [8], [9], [10], [11]])
    rows = [None, *(pool.acquire(name) for name in ("peft-lora", "peft-dora", "rank 8, both sides", "full"))]
    with pool.rows(rows):
        expected = pool.model(tokens)
        mx.eval(expected)
        monkeypatch.setattr(backend, "on_gpu", lambda: True)
        assert np.allclose(np.array(pool.model(tokens)), np.array(expected), atol=2e-4)


def test_several_positions_with_one_adapter_and_none() -> None:
    model = load_model()
    pool, tokens = make_pool(model), mx.array([[1, 5, 9], [1, 7, 8]])
    base, modules = model(tokens), dict(model.named_modules())
    handle = pool.acquire("peft-lora")
    with pool.rows([handle]):
        assert same(model(tokens), alone("peft-lora", None)(tokens))
    with pool.rows([None, None]):
        assert dict(model.named_modules()) == modules  # so that kernels for whole layers apply
        assert same(model(tokens), base)
    with pool.rows([handle, None]), pytest.raises(ValueError, match="2 rows of one position each.* with 6 positions"):
        model(tokens)
    with pool.rows([handle, None]), pytest.raises(ValueError, match="for 2 rows"):
        model(mx.array([[1], [2], [3]]))


def test_the_model_is_the_base_again_after_the_block_and_after_an_error() -> None:
    model = load_model()
    pool, tokens = make_pool(model), mx.array([[4], [5]])
    base, modules = model(tokens), dict(model.named_modules())
    rows = [pool.acquire("peft-dora"), pool.acquire("full")]
    with pool.rows(rows):
        assert not same(model(tokens), base)
        with pytest.raises(RuntimeError, match="cannot be nested"), pool.rows([None]):
            pass
        assert not same(model(tokens), base)
    with pytest.raises(KeyError), pool.rows(rows):
        raise KeyError
    after = dict(model.named_modules())
    assert all(after[path] is module for path, module in modules.items())
    assert same(model(tokens), base)


# Memory.


def test_adapters_are_read_once_and_the_least_recently_used_is_dropped() -> None:
    model, reads = load_model(), []

    def reading(name: str) -> Adapter:
        reads.append(name)
        return low_rank(model, 4, int(name))

    each = AdapterPool(model, read=reading).acquire("0").nbytes
    pool = AdapterPool(model, read=reading, max_bytes=3 * each)
    reads.clear()
    for name in "1231":
        pool.release(pool.acquire(name))
    assert (reads, pool.held, pool.nbytes) == (["1", "2", "3"], ["2", "3", "1"], 3 * each)
    two = pool.acquire("2")
    pool.release(pool.acquire("4"))  # 3 was used longest ago
    assert pool.held == ["1", "2", "4"]
    one, again = pool.acquire("1"), pool.acquire("2")
    pool.acquire("5")
    assert pool.held == ["1", "2", "5"]
    reads.clear()
    for _ in range(2):
        with pytest.raises(PoolFullError, match="The adapter 6 takes .* others in use take .*; release one"):
            pool.acquire("6")
    assert len(reads) == 1  # its size is known from then on
    pool.release(two)
    with pytest.raises(PoolFullError):  # another row uses it still
        pool.acquire("6")
    pool.release(again)
    with pool.rows([one, pool.acquire("6")]):
        model(mx.array([[1], [2]]))
    assert set(pool.held) == {"1", "5", "6"} and pool.nbytes == 3 * each
    with pytest.raises(ValueError, match="The adapter 2 was released"), pool.rows([two]):
        pass
    with pytest.raises(ValueError, match="was released"):
        pool.release(two)


def test_dropped_adapters_leave_no_memory() -> None:
    model = load_model()

    def read(name: str) -> Adapter:
        return low_rank(model, 16, int(name), num_layers=2, target_modules=["proj_2", "out_proj"])

    size = AdapterPool(model, read=read).acquire("0").nbytes
    pool = AdapterPool(model, read=read, max_bytes=9 * size)

    def use(number: int) -> int:
        rows = [pool.acquire(str(number)), pool.acquire(str(number + 1))]
        with pool.rows(rows):
            mx.eval(model(mx.array([[1], [2]])))
        for handle in rows:
            pool.release(handle)
        return mx.get_active_memory()

    levels = [use(number) for number in range(0, 54, 2)]
    assert max(levels[18:]) <= max(levels[9:18]) + size


def test_an_adapter_that_alone_is_too_large_is_refused() -> None:
    pool = make_pool(load_model(), max_bytes=100_000)
    with pytest.raises(RequestError, match=r"peft-lora takes .* kB of memory, .* may take 100.0 kB; raise max_bytes"):
        pool.acquire("peft-lora")
    assert (pool.held, pool.nbytes) == ([], 0)


# Names and mixtures.


def test_names_paths_and_mixtures() -> None:
    pool = AdapterPool(load_model())
    pool.add("bard", FIXTURES / "peft-lora")
    assert (pool.names, pool.held) == (["bard"], [])
    by_name, by_path = pool.acquire("bard"), pool.acquire(FIXTURES / "peft-lora")
    assert by_name.digest == by_path.digest and len(pool.held) == 1
    mixture = pool.acquire({"bard": 0.5, str(FIXTURES / "peft-rslora-attention"): 2.0})
    assert mixture.digest != by_name.digest
    model, tokens = load_model(), mx.array([[1, 2, 3]])
    paths = {str(FIXTURES / "peft-lora"): 0.5, str(FIXTURES / "peft-rslora-attention"): 2.0}
    attach(model, read_mixture(paths, model.config))
    with pool.rows([mixture]):
        assert same(pool.model(tokens), model(tokens))
    with pytest.raises(RequestError, match="already an adapter named 'bard'"):
        pool.add("bard", "elsewhere")
    with pytest.raises(RequestError, match="There is no adapter 'nobody'"):
        pool.acquire("nobody")
    with pytest.raises(RequestError, match="is DoRA, which can only be used alone"):
        pool.acquire({"bard": 1, str(FIXTURES / "peft-dora"): 1})


def test_the_digest_is_that_of_the_values() -> None:
    model = load_model()
    adapters = {"a": low_rank(model, 4, 1), "b": low_rank(model, 4, 1), "c": low_rank(model, 4, 2)}
    path, change = next(iter(adapters["a"].modules.items()))
    scaled = LowRank(change.a, change.b, 2 * change.scale)
    adapters["d"] = Adapter(adapters["a"].modules | {path: scaled})
    pool = AdapterPool(model, read=adapters.__getitem__)
    digests = [pool.acquire(name).digest for name in adapters]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_adapters_that_do_not_fit_and_models_that_have_one_are_refused() -> None:
    model = load_model()
    odd = Adapter({"transformer.layers.9.attn.qkv_proj": LowRank(mx.zeros((2, 1)), mx.zeros((1, 2)), 1)})
    with pytest.raises(RequestError, match="The adapter odd changes transformer.layers.9"):
        AdapterPool(model, read=lambda name: odd).acquire("odd")
    for wrong in (-1, 1.5, "1GB"):
        with pytest.raises(RequestError, match="max_bytes must be a whole number of bytes, 0 or above, got"):
            AdapterPool(model, max_bytes=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="No rows"), AdapterPool(model).rows([]):
        pass
    attach_new(model, rank=2)
    with pytest.raises(RequestError, match="was loaded with an adapter, which all rows would have"):
        AdapterPool(model)


# Threads.


def test_other_threads_may_read_adapters_while_the_model_runs() -> None:
    model = load_model(BASES["4bit"])
    pool = make_pool(model, max_bytes=8_000_000)
    handle = pool.acquire("peft-lora")
    tokens = mx.array([[1], [2]])
    with pool.rows([handle, None]):
        expected = model(tokens)
        mx.eval(expected)
    failures: list[BaseException] = []

    def acquire_and_release(names: list[str]) -> None:
        try:
            for _ in range(5):
                for name in names:
                    pool.release(pool.acquire(name))
        except BaseException as error:  # also what pytest raises
            failures.append(error)

    threads = [threading.Thread(target=acquire_and_release, args=([*PEFT[n:], *PEFT[:n]],)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with pool.rows([handle, None]):
            assert same(model(tokens), expected)
    assert not failures
    assert all(held.users == (held.paths[0][0] == "peft-lora") for held in pool._held.values())
