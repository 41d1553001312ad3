"""The CUDA kernel that decodes a token, on a GPU that can run it; `test_cuda_decoding.py` has the rest, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from mlx_openelm.cache import KVCache
from mlx_openelm.cuda import decoding
from mlx_openelm.generation.generate_step import generate_step
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from decoding_models import ALL_PACKINGS, make_model, plain_logits
from gpu_devices import STAND_IN, gpu_tests

pytestmark = pytest.mark.skipif(
    STAND_IN or decoding.obstacle() is not None, reason=f"the kernel does not run here: {decoding.obstacle()}"
)


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with gpu_tests():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    call = mx.fast.precompiled_cuda_kernel

    def noted(**arguments: object) -> list[mx.array]:
        made.append(str(arguments["name"]))
        return call(**arguments)

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", noted)
    return made


def steps(model: OpenELM, cache: list[KVCache], ids: list[int]) -> np.ndarray:
    """The logits of each of these tokens, all requested before any is computed."""
    return np.array(mx.concatenate([model(mx.array([[token]]), cache)[0] for token in ids]).astype(mx.float32))


@pytest.mark.parametrize("past", [1, 200, 700])
@pytest.mark.parametrize(
    ("dtype", "packings", "head_dim", "norms"),
    [
        (mx.bfloat16, [None], 64, True),
        (mx.float16, [None], 128, True),
        (mx.float16, [None], 64, False),
        (mx.bfloat16, [(4, 64)], 128, True),
        (mx.float16, ALL_PACKINGS, 64, True),
    ],
)
def test_logits_equal_the_reference(calls, dtype, packings, head_dim, norms, past):
    model = make_model(dtype, packings, head_dim, norms)
    ids = np.random.default_rng(1).integers(0, 64, past + 8).tolist()
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([ids[:past]]), cache))
    before = len(calls)
    found = steps(model, cache, ids[past:])
    assert len(calls) - before == 8
    expected = plain_logits(model, ids)[past:]
    tolerance = 0.05 if dtype == mx.bfloat16 else 0.01
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def test_decoding_is_deterministic(calls):
    model = make_model(mx.bfloat16, [(4, 64)], 64)
    texts = {tuple(token for token, _ in generate_step(model, [5, 6, 7], max_tokens=300)) for _ in range(3)}
    assert len(texts) == 1
    assert len(calls) >= 3 * 299


def test_steps_that_are_never_evaluated_do_not_disturb_others(calls):
    model = make_model(mx.float16, [None], 64)
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(mx.array([[5, 6, 7]]), cache))
    wrong = model(mx.array([[30]]), cache)
    for layer in cache:
        layer.trim(1)
    right = model(mx.array([[8]]), cache)
    next_ = model(mx.array([[9]]), cache)
    mx.eval(next_, wrong, right)
    expected = plain_logits(model, [5, 6, 7, 8, 9])
    for found, row in ((right, expected[3]), (next_, expected[4])):
        assert np.abs(np.array(found[0, -1].astype(mx.float32)) - row).max() < 0.01 * np.abs(row).max()
