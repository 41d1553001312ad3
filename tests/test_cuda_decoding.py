"""The CUDA kernel that decodes a token, on a CPU: `cuda/emulation.h` stands in for the GPU, with a few blocks."""

from __future__ import annotations

import copy
import ctypes
import itertools
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm.adapters.layers import LoRALinear
from mlx_openelm.cache import KVCache, RotatingKVCache
from mlx_openelm.cuda import compiler, decoding
from mlx_openelm.formats.adapter import LowRank
from mlx_openelm.model import OpenELM, TransformerLayer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from decoding_models import ALL_PACKINGS, make_model, plain_logits
from test_replaced_modules import CHANGES

EMULATION = Path(__file__).parent / "cuda" / "emulation.h"


class Emulation:
    """The kernel for one shape, compiled for this CPU; called like `mx.fast.precompiled_cuda_kernel`."""

    def __init__(self, shape: decoding.Shape, folder: Path, number: int):
        text = decoding.source(shape)
        parameters = text[text.rindex("decode_token(") + len("decode_token(") : text.rindex(") {\n  extern")]
        names = [part.split()[-1].lstrip("*") for part in parameters.split(",")]
        kinds = [part.strip().rsplit(" ", 1)[0] for part in parameters.split(",")]
        text = text.replace("extern __shared__ uint4 shared[];", "uint4* const shared = emulated_shared;")
        half = int(shape.half)
        arguments = ", ".join(f"({kind})arrays[{i}]" if "*" in kind else "capacity" for i, kind in enumerate(kinds))
        text = "\n".join(
            [
                f'#include "{EMULATION}"',
                text.replace(
                    "typedef unsigned int word_t;",
                    "typedef unsigned int word_t;\n"
                    f"inline float to_float(half_t x) {{ return half_to_float(x, {half}); }}\n"
                    f"inline half_t to_half(float x) {{ return float_to_half(x, {half}); }}",
                ),
                'extern "C" __attribute__((visibility("default"))) void run(void** arrays, int capacity) {',
                f"  emulation::launch({shape.grid}, THREADS, [=] {{ decode_token({arguments}); }});",
                "}",
            ]
        )
        assert len(names) == len(kinds)
        source, library = folder / f"kernel{number}.cpp", folder / f"kernel{number}.so"
        source.write_text(text)
        # Several such libraries must not share variables. C++20's headers take twice as long.
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-fno-gnu-unique", "-fvisibility=hidden"]
        subprocess.run(["g++", *options, "-o", library, source], check=True)
        self._run = ctypes.CDLL(str(library)).run

    def __call__(
        self, *, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, scalars: Any, **_: Any
    ) -> Any:
        mx.eval(inputs)
        outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        mx.eval(outputs)
        # The buffers themselves: the kernel writes into them.
        views = [memoryview(array) for array in (*inputs, *outputs)]
        addresses = (ctypes.c_void_p * len(views))(*(_address(view) for view in views))
        self._run(addresses, ctypes.c_int(scalars[0]))
        return outputs


def _address(view: memoryview) -> int:
    return np.frombuffer(view.cast("B"), np.uint8).ctypes.data


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[decoding.Shape, Emulation]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulation")

    class Kernels(dict[decoding.Shape, Emulation]):
        def __missing__(self, shape: decoding.Shape) -> Emulation:
            self[shape] = Emulation(shape, folder, len(self))
            return self[shape]

    return Kernels()


def use(kernel: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[decoding.Shape]:
    """Call `kernel`, with a shape and the kernel's arguments, for 5 blocks; the list gets the shape of each call."""
    made: list[decoding.Shape] = []

    def call(*, compiled_source: decoding.Shape, **arguments: Any) -> list[mx.array]:
        made.append(compiled_source)
        return kernel(compiled_source, **arguments)

    monkeypatch.setattr(decoding, "is_allowed", lambda: True)
    monkeypatch.setattr(decoding, "machine_code", lambda shape: shape)
    monkeypatch.setattr(compiler, "multiprocessors", lambda: 5)
    monkeypatch.setattr(decoding, "THREADS", 128)  # threads of a block; a GPU has 512
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", call)
    return made


@pytest.fixture
def calls(compiled, monkeypatch: pytest.MonkeyPatch) -> list[decoding.Shape]:
    """Run the kernel here."""
    return use(lambda shape, **arguments: compiled[shape](**arguments), monkeypatch)


@pytest.fixture
def empty_calls(monkeypatch: pytest.MonkeyPatch) -> list[decoding.Shape]:
    """The kernel gives zeros, for tests of when it is called."""

    def zeros(_: decoding.Shape, *, output_shapes: Any, output_dtypes: Any, **__: Any) -> list[mx.array]:
        return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

    return use(zeros, monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "packings", "head_dim"),
    [
        pytest.param(mx.bfloat16, [None], 64, marks=pytest.mark.slow),
        pytest.param(mx.float16, [None], 128, marks=pytest.mark.slow),
        (mx.bfloat16, [(4, 64)], 128),
        pytest.param(mx.float16, ALL_PACKINGS, 64, marks=pytest.mark.slow),
    ],
)
def test_steps_give_the_reference_logits(calls, dtype, packings, head_dim):
    model = make_model(dtype, packings, head_dim)
    ids = np.random.default_rng(1).integers(0, 64, 20).tolist()
    cache = [KVCache() for _ in model.layers]
    model(mx.array([ids[:16]]), cache)
    found = [model(mx.array([[token]]), cache)[0, -1] for token in ids[16:]]
    assert len(calls) == len(found)
    expected = plain_logits(model, ids)[16:]
    error = np.abs(np.array(mx.stack(found).astype(mx.float32)) - expected).max() / np.abs(expected).max()
    assert error < (0.03 if dtype == mx.bfloat16 else 0.005)


def test_blocks_share_the_work_of_a_long_cache(calls, monkeypatch):
    monkeypatch.setattr(compiler, "multiprocessors", lambda: 13)  # 3 blocks for each of 4 heads, 1 for each of 8
    model = make_model(mx.float16, [None], 64)
    ids = np.random.default_rng(1).integers(0, 64, 302).tolist()
    cache = [KVCache() for _ in model.layers]
    model(mx.array([ids[:300]]), cache)
    found = [model(mx.array([[token]]), cache)[0, -1] for token in ids[300:]]
    expected = plain_logits(model, ids)[300:]
    assert np.abs(np.array(mx.stack(found).astype(mx.float32)) - expected).max() < 0.005 * np.abs(expected).max()
    assert [layer.offset for layer in cache] == [302] * 2


def steps(model: OpenELM, cache: list[KVCache], ids: list[int]) -> np.ndarray:
    return np.array(mx.concatenate([model(mx.array([[token]]), cache)[0] for token in ids]).astype(mx.float32))


@pytest.fixture
def model() -> OpenELM:
    return make_model(mx.float16, [None], 64)


def prefilled(model: OpenELM, ids: list[int]) -> list[KVCache]:
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([ids]), cache))
    return cache


def held(cache: list[KVCache]) -> list[np.ndarray]:
    return [np.array(part.astype(mx.float32)) for layer in cache for part in layer.keys_and_values()]


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(found - expected).max() < 0.006 * np.abs(expected).max())


def test_a_cache_holds_the_same_as_on_the_plain_path(calls, model, monkeypatch):
    cache = prefilled(model, [5, 6, 7])
    steps(model, cache, [8, 9])
    found = held(cache)
    assert len(calls) == 2
    monkeypatch.setattr(decoding, "is_allowed", lambda: False)
    plain = prefilled(model, [5, 6, 7])
    steps(model, plain, [8, 9])
    assert all(close(a, b) for a, b in zip(found, held(plain), strict=True))
    # The plain path continues from there.
    assert close(steps(model, cache, [10]), steps(model, plain, [10]))


def test_copies_of_a_cache_are_independent(calls, model):
    cache = prefilled(model, [5, 6, 7])
    steps(model, cache, [8])
    other = copy.deepcopy(cache)
    shallow = [copy.copy(layer) for layer in cache]
    state = [layer.state for layer in cache]
    first, second, third = steps(model, cache, [9]), steps(model, other, [20]), steps(model, shallow, [30])
    fourth = steps(model, [KVCache.from_state(part) for part in state], [40])
    for logits, token in ((first, 9), (second, 20), (third, 30), (fourth, 40)):
        assert close(logits[-1], plain_logits(model, [5, 6, 7, 8, token])[-1])
    again = steps(model, cache, [10])
    assert close(again[-1], plain_logits(model, [5, 6, 7, 8, 9, 10])[-1])
    assert len(calls) == 6


def test_a_trimmed_cache_forgets(calls, model):
    cache = prefilled(model, [5, 6, 7])
    steps(model, cache, [8, 9])
    for layer in cache:
        layer.trim(2)
    assert close(steps(model, cache, [30])[-1], plain_logits(model, [5, 6, 7, 30])[-1])
    assert len(calls) == 3


def test_buffers_grow(calls, model, monkeypatch):
    monkeypatch.setattr(KVCache, "step", 2)
    ids = [5, 6, 7, 8, 9, 10, 11]
    cache = prefilled(model, ids[:3])
    assert close(steps(model, cache, ids[3:]), plain_logits(model, ids)[3:])
    assert len(calls) == 4


def test_steps_follow_each_other(empty_calls, model):
    """Each step waits for the previous one, even if that one's result is not read: it takes it as an input."""
    inputs = []
    call = mx.fast.precompiled_cuda_kernel

    def keeping(**arguments: Any) -> list[mx.array]:
        outputs = call(**arguments)
        inputs.append((arguments["inputs"], outputs))
        return outputs

    mx.fast.precompiled_cuda_kernel = keeping  # the fixture restores it
    steps(model, prefilled(model, [5]), [8, 9])
    steps(model, prefilled(model, [6]), [7])
    for (_, before), (after, _) in itertools.pairwise(inputs):
        assert after[3] is before[0]


def test_other_threads_run_without_the_kernel_while_the_first_thread_lives(calls, model):
    steps(model, prefilled(model, [5]), [8])
    results = []

    def work() -> None:
        # Each thread has its own streams, so it also needs its own model.
        results.append(steps(own, prefilled(own, [5]), [8]))

    own = make_model(mx.float16, [None], 64)
    mx.eval(own.parameters())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(calls) == 2
    assert close(results[0][-1], plain_logits(model, [5, 8])[-1])


@pytest.mark.parametrize(
    "change", ["float32", "layer", "attention", "norm", "projection", "adapter", "rows", "sliding"]
)
def test_other_models_and_caches_take_the_plain_path(empty_calls, model, change):
    cache: list[Any] = [KVCache() for _ in model.layers]
    tokens = [[7]]
    if change == "float32":
        model.set_dtype(mx.float32)
    elif change == "layer":
        model.layers[1].__class__ = type("Mine", (TransformerLayer,), {})
    elif change == "attention":
        model.layers[1].attn.qkv_proj = nn.Linear(256, 16 * 64, bias=False)
        model.set_dtype(mx.float16)
    elif change == "norm":
        model.layers[0].ffn_norm.weight = model.layers[0].ffn_norm.weight.astype(mx.float32)
    elif change == "projection":
        layer = model.layers[0].ffn
        layer.proj_2 = layer.proj_2.to_quantized(group_size=32, mode="mxfp4")
    elif change == "adapter":
        model.layers[1].attn.out_proj = LoRALinear(
            model.layers[1].attn.out_proj, LowRank(mx.zeros((512, 4)), mx.zeros((4, 256)), 1.0)
        )
    elif change == "rows":
        tokens = [[7], [8]]
    elif change == "sliding":
        cache = [RotatingKVCache(8) for _ in model.layers]
    mx.eval(model(mx.array(tokens), cache))
    assert not empty_calls


@pytest.mark.covering
@pytest.mark.parametrize("length", [1, pytest.param(3, marks=pytest.mark.slow), 40])
@pytest.mark.parametrize("name", CHANGES)
def test_a_replaced_module_is_used_from_the_next_call_on(empty_calls, model, name, length):
    cache = prefilled(model, [5, 6, 7])
    mx.eval(model(mx.array([[8]]), cache))
    assert len(empty_calls) == 1
    changed = CHANGES[name](model)
    mx.eval(model(mx.array([[*range(length)]]), cache))
    assert changed.calls == 1 and len(empty_calls) == 1


def test_caches_do_not_write_into_the_arrays_of_a_given_state(calls, model):
    first = prefilled(model, [5, 6, 7])
    steps(model, first, [8])
    state = [[mx.array(part) if isinstance(part, mx.array) else part for part in layer.state] for layer in first]
    used = [prefilled(model, [9]) for _ in range(3)]
    for cache in used:
        steps(model, cache, [10])
    for cache in used[:2]:
        for layer, part in zip(cache, state, strict=True):
            layer.state = part
    one, two = steps(model, used[0], [20]), steps(model, used[1], [30])
    assert close(one[-1], plain_logits(model, [5, 6, 7, 8, 20])[-1])
    assert close(two[-1], plain_logits(model, [5, 6, 7, 8, 30])[-1])
    for layer, part in zip(used[2], state, strict=True):  # arrays without spare room, as in a saved prompt cache
        layer.state = (part[0][:, :, :4], part[1][:, :, :4], 4)
    assert close(steps(model, used[2], [40])[-1], plain_logits(model, [5, 6, 7, 8, 40])[-1])
    for layer in used[2]:
        layer.state = None, None, 0
    assert close(steps(model, used[2], [50])[-1], plain_logits(model, [50])[-1])


def test_a_weight_that_changes_in_place_is_checked_again(calls, model):
    steps(model, prefilled(model, [5, 6]), [8])
    weight = model.layers[0].attn_norm.weight
    weight *= mx.array(1.5)  # the same object, of another type
    made = len(calls)
    found = steps(model, prefilled(model, [5, 6]), [8])
    assert len(calls) == made and weight.dtype == mx.float32
    assert close(found[-1], plain_logits(model, [5, 6, 8])[-1])


def test_the_kernel_is_chosen_by_the_type_of_the_activations(empty_calls):
    model = make_model(mx.bfloat16, [None], 64)
    steps(model, prefilled(model, [5, 6]), [8])
    made = len(empty_calls)
    model.transformer.norm.weight = model.transformer.norm.weight.astype(mx.float32)  # activations take its dtype
    assert np.isfinite(steps(model, prefilled(model, [5, 6]), [8])).all()
    assert len(empty_calls) == made
    model.transformer.norm.weight = model.transformer.norm.weight.astype(mx.bfloat16)
    steps(model, prefilled(model, [5, 6]), [8])
    assert len(empty_calls) == made + 1


def test_another_thread_gets_the_kernel_after_the_first_has_ended():
    turns = decoding._KernelLock()
    first = threading.Thread(target=lambda: owned.append(turns.is_mine()))
    owned: list[bool] = []
    first.start()
    first.join()
    assert turns.is_mine() and owned == [True]
