"""A decoding step of several sequences gives each of them what its lone step gives, bit for bit on the CPU kernels.

Without them it is equal to within rounding, which may change a level of a quantized cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

from mlx_openelm import native
from mlx_openelm.cache import KVCache, QuantizedKVCache, RotatingKVCache, RowCaches, rewind, step_caches
from mlx_openelm.model import OpenELM, QuantizedEmbedding, QuantizedLinear

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from devices import pretend
from mlx.utils import tree_flatten
from test_model import make_config, make_model

needs_kernels = pytest.mark.skipif(native.kernels is None, reason="exact only with the CPU kernels")

Make = Callable[[], Any]
GROWING, QUANTIZED = KVCache, lambda: QuantizedKVCache(32, 8)
SLIDING, LARGE = lambda: RotatingKVCache(8, keep=2), lambda: RotatingKVCache(300, keep=4)
KINDS: dict[str, list[Make]] = {
    "growing": [GROWING],
    "quantized": [QUANTIZED],
    "sliding": [SLIDING],
    "mixed": [GROWING, QUANTIZED, SLIDING, LARGE],
}


def a_model(**changes: Any) -> OpenELM:
    sizes = {"model_dim": 64, "head_dim": 32, "num_query_heads": [2, 4, 4], "ffn_dim_divisor": 32, "vocab_size": 67}
    return make_model(make_config(**sizes, **changes))


def packed(model: OpenELM, bits: int, *, rounds: bool) -> OpenELM:
    nn.quantize(model, 32, bits)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            module.rounds_activations = rounds
    return model


def in_bfloat16(model: OpenELM) -> OpenELM:
    """As `build_model` reads it for a CPU: matrices as they are stored, norms in float32."""
    for path, value in tree_flatten(model.parameters()):
        if value.ndim == 2:
            model.load_weights([(path, value.astype(mx.bfloat16))], strict=False)
    return model


MODELS: dict[str, Callable[[], OpenELM]] = {
    "float32": a_model,
    "bfloat16": lambda: in_bfloat16(a_model()),
    "4 bits": lambda: packed(a_model(), 4, rounds=True),
    "8 bits": lambda: packed(a_model(), 8, rounds=True),
    "head of its own": lambda: packed(a_model(share_input_output_layers=False), 4, rounds=True),
    "without the whole-layer kernel": lambda: a_model(ffn_with_glu=False, activation_fn_name="gelu"),
}


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    rng = np.random.default_rng(count)
    return [rng.integers(1, 67, 1 + 5 * row % 17).tolist() for row in range(count)]


def filled(model: OpenELM, prompt: Sequence[int], make: Make) -> list[Any]:
    """A sequence's caches after its prompt."""
    caches = [make() for _ in model.layers]
    mx.eval(model.hidden_states(mx.array([list(prompt)]), caches))
    return caches


def step(model: OpenELM, tokens: Sequence[int], rows: Sequence[list[Any]], lengths: Any = None) -> np.ndarray:
    """The logits [N, vocab] of one step."""
    hidden = model.hidden_states(mx.array([[token] for token in tokens]), step_caches(rows, lengths))
    return np.array(model.logits(hidden)[:, 0])


def alone(model: OpenELM, tokens: Sequence[int], caches: list[Any]) -> list[np.ndarray]:
    """The logits [vocab] of single steps of one sequence."""
    return [np.array(model(mx.array([[token]]), caches)[0, 0]) for token in tokens]


def check(model: OpenELM, kinds: list[Make], count: int, exact: bool = True) -> None:
    """Four steps of `count` rows, in which rows join and leave, against lone runs."""
    rows = [filled(model, prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts(count))]
    lone = [deepcopy(caches) for caches in rows]
    rng = np.random.default_rng(count)
    for number in range(4):
        chosen = [i for i in range(count) if number % 2 == 0 or i % 3 != number % 3] or [0]
        tokens = rng.integers(1, 67, len(chosen)).tolist()
        found = step(model, tokens, [rows[i] for i in chosen])
        for logits, i, token in zip(found, chosen, tokens, strict=True):
            expected = alone(model, [token], lone[i])[0]
            if exact:
                assert np.array_equal(logits, expected), (number, i)
            else:
                np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-3)


@pytest.mark.covering
@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 11, 12, 16, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_lone_steps(kind: str, count: int) -> None:
    check(packed(a_model(), 4, rounds=True), KINDS[kind], count)


@pytest.mark.covering
@needs_kernels
@pytest.mark.parametrize("count", [2, 16, 33])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_every_type_equal_lone_steps(name: str, count: int) -> None:
    check(MODELS[name](), [GROWING], count)
    check(MODELS[name](), KINDS["mixed"], count)


@pytest.fixture(params=["kernels", "plain", "fused"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every form of attention; the fused one is for GPUs, but also runs on a CPU."""
    if request.param == "kernels" and native.kernels is None:
        pytest.skip(f"the kernels are not used: {native.status.detail}")
    if request.param != "kernels":
        monkeypatch.setattr(native, "kernels", None)
        pretend(monkeypatch, "Metal" if request.param == "fused" else "CPU")
    return request.param


@pytest.mark.covering(2)
@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_without_kernels_rows_equal_lone_steps_to_within_rounding(kind: str, count: int, form: str) -> None:
    check(a_model(), KINDS[kind], count, exact=False)


@pytest.mark.covering
@pytest.mark.parametrize("kind", KINDS)
def test_several_positions_of_a_sequence_equal_single_steps(kind: str, form: str) -> None:
    """As for checking drafted tokens; a full sliding cache overwrites positions within the step."""
    model, kinds = a_model(), KINDS[kind]
    lengths = [3, 1, 9, 4, 1]
    rows = [filled(model, prompt, kinds[i % len(kinds)]) for i, prompt in enumerate(prompts(5))]
    lone = [deepcopy(caches) for caches in rows]
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(1, 67, sum(lengths)).tolist()
        rest = iter(zip(step(model, tokens, rows, lengths), tokens, strict=True))
        for caches, length in zip(lone, lengths, strict=True):
            for _ in range(length):
                logits, token = next(rest)
                expected = alone(model, [token], caches)[0]
                if form == "kernels":
                    assert np.array_equal(logits, expected)
                else:
                    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-3)


@pytest.mark.covering
@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "before", [1, 7, 8, pytest.param(6, marks=pytest.mark.slow), 9, pytest.param(20, marks=pytest.mark.slow)]
)
def test_rejected_positions_are_taken_back_exactly(kind: str, before: int) -> None:
    model = a_model()
    rng = np.random.default_rng(before)
    for make in KINDS[kind]:
        caches = filled(model, rng.integers(1, 67, before).tolist(), make)
        for length in (2, 5, 3):
            for taken in (length, 1, length - 1, 0):
                expected = deepcopy(caches)
                tokens = rng.integers(1, 67, length).tolist()
                step(model, [9, *tokens], [filled(model, [3, 4], GROWING), caches], [1, length])
                for layer in caches:
                    rewind(layer, taken)
                alone(model, tokens[: length - taken], expected)
                after = [9, 8, 7, 6, 5]
                # What follows, single steps and a longer piece, is the same.
                one, other = deepcopy(caches), deepcopy(expected)
                assert all(map(np.array_equal, alone(model, after, one), alone(model, after, other)))
                one, other = deepcopy(caches), deepcopy(expected)
                assert mx.array_equal(model(mx.array([after]), one), model(mx.array([after]), other))


def test_positions_that_a_sliding_cache_overwrote_before_cannot_be_taken_back() -> None:
    model = a_model()
    caches = filled(model, range(1, 10), SLIDING)
    step(model, [1, 2], [caches], [2])
    step(model, [3], [caches])
    with pytest.raises(ValueError, match="1 positions cannot be taken back"):
        rewind(caches[0], 1)
    with pytest.raises(ValueError, match="holds 12 positions; 13 cannot"):
        rewind(caches[0], 13)
    step(model, [4, 5], [caches], [2])
    rewind(caches[0], 2)
    with pytest.raises(ValueError, match="cannot be taken back"):
        rewind(caches[0], 1)


def test_caches_of_mlx_lm_can_be_rows() -> None:
    theirs = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
    model = a_model()
    kinds: list[Make] = [theirs.KVCache, lambda: theirs.QuantizedKVCache(32, 8), lambda: theirs.RotatingKVCache(8, 2)]
    rows = [filled(model, range(1, 12), make) for make in kinds]
    lone = [deepcopy(caches) for caches in rows]
    for tokens in ([[1], [2, 3], [4, 5, 6]], [[7], [8, 9], [10, 11, 12]]):
        lengths = [*map(len, tokens)]
        found = step(model, [*chain(*tokens)], rows, lengths)
        expected = [alone(model, some, deepcopy(caches)) for some, caches in zip(tokens, lone, strict=True)]
        np.testing.assert_allclose(found, [*chain(*expected)], rtol=0, atol=5e-3)
        for some, caches, other in zip(tokens, rows, lone, strict=True):  # keep the first position of each
            for layer in caches:
                rewind(layer, len(some) - 1)
            alone(model, some[:1], other)


@needs_kernels
def test_a_step_writes_only_into_buffers_of_its_own() -> None:
    """A copy, an array taken before, and steps that are evaluated late or out of order see what they should."""
    model = a_model()
    rows = [filled(model, [1, 2, 3], GROWING), filled(model, [4, 5], GROWING)]
    step(model, [6, 7], rows)
    taken, copied = rows[0][0].keys, deepcopy(rows[0])
    before = np.array(taken[:, :, :5])
    hidden = [model.hidden_states(mx.array([[token], [token]]), step_caches(rows)) for token in (8, 9, 10)]
    late = np.array(model.logits(hidden[2])[0, 0])
    mx.eval(hidden)
    assert np.array_equal(np.array(taken[:, :, :5]), before)
    assert np.array_equal(alone(model, [8, 9, 10], copied)[-1], late)
    for caches, kept in zip(rows[:1], [copied], strict=True):  # a single step may follow
        assert np.array_equal(alone(model, [11], caches)[0], alone(model, [11], kept)[0])


@needs_kernels
def test_a_batch_of_short_rows_equals_each_alone() -> None:
    """The arithmetic follows from the length of the rows, not from their number."""
    model = packed(a_model(), 4, rounds=True)
    tokens = np.random.default_rng(0).integers(1, 67, (7, 5))
    together = np.array(model(mx.array(tokens)))
    for row, logits in zip(tokens, together, strict=True):
        assert np.array_equal(np.array(model(mx.array(row[None])))[0], logits)


def test_a_step_knows_its_positions() -> None:
    caches = [KVCache(), KVCache(), RotatingKVCache(8)]
    for cache, offset in zip(caches, (3, 0, 20), strict=True):
        cache.offset = offset
    rows = RowCaches(caches, [2, 1, 3])
    assert rows.positions == rows.offset.tolist() == [3, 4, 0, 20, 21, 22]
    assert [(part.start, part.stop) for _, part in rows.sequences()] == [(0, 2), (2, 3), (3, 6)]
    assert RowCaches(caches).positions == [3, 0, 20]


@pytest.mark.parametrize(("caches", "lengths"), [([], None), ([KVCache()], [1, 1]), ([KVCache()], [0])])
def test_a_step_without_positions_is_refused(caches: list[Any], lengths: list[int] | None) -> None:
    with pytest.raises(ValueError, match="length of 1 or more"):
        RowCaches(caches, lengths)
