"""The cost of rounding a matrix, against whole models; bit assignments against brute force."""

from __future__ import annotations

import itertools
import json
import math

from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation.perplexity import kl_divergence
from mlx_openelm.formats import rounding
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import bits_per_weight
from mlx_openelm.quantization.sensitivity import assign, candidates, measure, read

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from quantization_models import measure_few_choices, random_windows, search_little, tiny_config, tiny_model

WINDOWS = random_windows(4, 21)
BATCHES = [mx.array(WINDOWS[i : i + 2])[:, :-1] for i in (0, 2)]
BITS = (2, 3, 4, 5, 6, 8)


little_search = pytest.fixture(scope="module", autouse=True)(search_little)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def measured(model):
    before = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    calls: list[tuple[int, int]] = []
    result = measure(model, BATCHES, text="a text", progress=lambda *at: calls.append(at))
    after = dict(tree_flatten(model.parameters()))
    assert set(after) == set(before) and all(np.array_equal(after[name], before[name]) for name in before)
    assert calls == [(done, 9) for done in range(1, 10)]
    return result


def inputs_of(path: str) -> np.ndarray:
    """The inputs of a matrix of layer 0 or 1, recorded in the running model."""
    model, caught = tiny_model(), []
    module = model
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else getattr(module, name)

    class Spy(type(module)):
        def __call__(self, x, residual=None, before=None):
            x = x if before is None else before(x)
            caught.append(np.array(x, dtype=np.float64))
            return super().__call__(x, residual)

    module.__class__ = Spy
    for batch in BATCHES:
        model(batch)
    assert len(caught) == len(BATCHES)
    return np.concatenate([rows.reshape(-1, rows.shape[-1]) for rows in caught])


def test_every_choice_of_every_matrix_has_a_cost(measured, model):
    assert measured.text == "a text" and measured.tokens == 80
    assert {path: set(options) for path, options in measured.costs.items()} == {
        path: {Quantization(size, bits) for bits in BITS for size in (32, 64, 128) if in_dims % size == 0}
        for path, (_, in_dims) in model.config.matrix_shapes().items()
    }
    for options in measured.costs.values():
        assert all(math.isfinite(cost) and cost >= 0 for cost in options.values())
        for size in {option.group_size for option in options}:
            costs = [options[Quantization(size, bits)] for bits in (2, 4, 8)]
            assert costs[0] > costs[1] > costs[2]


@pytest.mark.covering
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(
    "path",
    ["transformer.layers.0.attn.qkv_proj", "transformer.layers.0.attn.out_proj", "transformer.layers.1.ffn.proj_1",
     "transformer.layers.1.ffn.proj_2"],
)  # fmt: skip
def test_the_cost_equals_the_divergence_with_that_matrix_rounded(measured, path, bits):
    model = tiny_model()
    parameters = dict(tree_flatten(model.parameters()))
    weight = parameters[f"{path}.weight"]
    size = max(size for size in (32, 64) if weight.shape[1] % size == 0)
    x = inputs_of(path)
    importance = mx.array(np.square(x).mean(axis=0).astype(np.float32))
    grid = rounding.search(weight, importance, Quantization(size, bits), mx.bfloat16)
    grouped = np.array(weight).reshape(len(weight), -1, size)
    scales, biases = np.array(grid.scales)[..., None], np.array(grid.biases)[..., None]
    rounded = np.clip(np.round((grouped - biases) / scales), 0, 2**bits - 1) * scales + biases
    model.load_weights([(f"{path}.weight", mx.array(rounded.reshape(weight.shape)))], strict=False)
    expected = kl_divergence(tiny_model(), model, WINDOWS)
    assert measured.costs[path][Quantization(size, bits)] == pytest.approx(expected, rel=0.02)


def test_costs_scale_with_the_rounding_error(measured):
    path = "transformer.layers.1.ffn.proj_2"
    weight = dict(tree_flatten(tiny_model().parameters()))[f"{path}.weight"]
    x = inputs_of(path)
    moments = mx.array((x.T @ x / len(x)).astype(np.float32))
    errors = {}
    for choice in (Quantization(64, 4), Quantization(32, 4), Quantization(64, 6)):
        change = np.array(rounding.round_nearest(weight, moments, choice, mx.bfloat16)) - np.array(weight)
        errors[choice] = np.square(x @ change.T).sum(axis=1).mean()
    costs = measured.costs[path]
    for choice, error in errors.items():
        expected = costs[Quantization(64, 4)] * error / errors[Quantization(64, 4)]
        assert costs[choice] == pytest.approx(expected, rel=0.02)


def test_an_untied_head_is_measured_too(monkeypatch):
    measure_few_choices(monkeypatch)
    model = tiny_model(share_input_output_layers=False)
    costs = measure(model, BATCHES[:1], text="").costs
    assert "lm_head" in costs and costs["lm_head"][Quantization(32, 2)] > 0
    assert list(costs)[:2] == ["transformer.token_embeddings", "lm_head"]


# Optimal choices under a budget.


def size_of(choice: Quantization, shape: tuple[int, int]) -> int:
    """Bits of a packed matrix: its levels, and a scale and a bias of 16 bits for each group."""
    return shape[0] * shape[1] * choice.bits + 32 * shape[0] * shape[1] // choice.group_size


@pytest.mark.parametrize("seed", range(6))
def test_assignments_are_optimal(seed):
    config = tiny_config(num_transformer_layers=1, num_query_heads=4, num_kv_heads=2, ffn_multipliers=1.0)
    generator = np.random.default_rng(seed)
    options = [Quantization(64, 2), Quantization(64, 3), Quantization(32, 4), Quantization(64, 6)]
    shapes = config.matrix_shapes()
    costs = {
        path: dict(zip(options, sorted(generator.exponential(1, 4) ** 2, reverse=True), strict=True)) for path in shapes
    }
    fixed = 16 * (config.num_parameters - sum(math.prod(shape) for shape in shapes.values()))
    results = []
    for picked in itertools.product(options, repeat=len(shapes)):
        bits = fixed + sum(size_of(choice, shapes[path]) for choice, path in zip(picked, shapes, strict=True))
        results.append((bits, sum(costs[path][choice] for choice, path in zip(picked, shapes, strict=True))))
    for target in (2.8, 3.3, 4.1, 5.0, 6.6, 9.0):
        chosen = assign(costs, config, target, mx.bfloat16)
        assert list(chosen) == list(shapes)
        budget = target * config.num_parameters
        assert bits_per_weight(config, chosen, 2) <= target
        cost = sum(costs[path][choice] for path, choice in chosen.items())
        best = min(cost for bits, cost in results if bits <= budget)
        # The budget is divided into 4000 steps, and each matrix may waste one.
        spare = budget - min(bits for bits, _ in results)
        nearly = min(cost for bits, cost in results if bits <= budget - len(shapes) * spare / 4000)
        assert best * (1 - 1e-5) <= cost <= nearly * (1 + 1e-5)


def test_a_large_budget_gives_every_matrix_the_most_bits(measured, model):
    chosen = assign(measured.costs, model.config, 16, mx.bfloat16)
    for path, options in measured.costs.items():
        assert chosen[path] == min(options, key=options.get)


@pytest.mark.parametrize("target", [2.9, 3.0, 3.25, 3.75, 4.2, 4.25, 5.5, 7.0])
def test_budgets_are_never_exceeded_and_well_used(measured, model, target):
    chosen = assign(measured.costs, model.config, target, mx.bfloat16)
    bits = bits_per_weight(model.config, chosen, 2)
    assert target - 0.1 < bits <= target


def test_a_budget_one_bit_too_small_rules_a_choice_out():
    config = tiny_config()
    expected = dict.fromkeys(config.matrix_shapes(), Quantization(32, 4))
    # Only these choices, and larger ones, reduce the cost.
    costs = {
        path: {
            option: float(size_of(option, shape) < size_of(expected[path], shape))
            for option in candidates(config)[path]
        }
        for path, shape in config.matrix_shapes().items()
    }
    needed = bits_per_weight(config, expected, 2)
    chosen = assign(costs, config, needed - 1 / config.num_parameters, mx.bfloat16)
    assert bits_per_weight(config, chosen, 2) < needed
    assert sum(costs[path][choice] for path, choice in chosen.items()) == 1


def test_the_most_sensitive_matrix_gets_the_bits():
    config = tiny_config()
    shapes = config.matrix_shapes()
    dear = "transformer.layers.1.attn.out_proj"
    costs = {
        path: {Quantization(32, bits): (100.0 if path == dear else 1.0) * 4.0**-bits for bits in (2, 3, 4, 8)}
        for path in shapes
    }
    chosen = assign(costs, config, 4.6, mx.bfloat16)
    assert chosen[dear].bits == 8 and {choice.bits for choice in chosen.values()} > {8}


def test_a_wider_dtype_for_the_rest_leaves_fewer_bits(measured, model):
    narrow, wide = (assign(measured.costs, model.config, 4, dtype) for dtype in (mx.bfloat16, mx.float32))
    assert bits_per_weight(model.config, wide, 4) <= 4
    assert bits_per_weight(model.config, wide, 2) < bits_per_weight(model.config, narrow, 2)


def test_too_small_a_budget_is_refused_with_the_minimum(measured, model):
    with pytest.raises(RequestError, match=r"target_bpw 2 is too small: this model needs at least \d\.\d\d"):
        assign(measured.costs, model.config, 2, mx.bfloat16)
    with pytest.raises(RequestError, match="too small"):
        assign(measured.costs, model.config, -1, mx.bfloat16)


# Files.


def test_a_saved_file_round_trips(measured, model, tmp_path):
    measured.save(tmp_path / "s.json")
    assert read(tmp_path / "s.json", model.config) == measured
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["calibration"] == "a text" and content["tokens"] == 80
    first = content["sensitivities"]["transformer.token_embeddings"][0]
    assert set(first) == {"bits", "group_size", "kl_divergence"}


@pytest.mark.parametrize(
    "content",
    ["{}", '{"sensitivities": []}', '{"sensitivities": {"a": [{"bits": 4}]}, "calibration": "", "tokens": 1}',
     '{"sensitivities": {"a": 3}, "calibration": "", "tokens": 1}', "[1]", "{", ""],
)  # fmt: skip
def test_a_damaged_file_is_refused(content, model, tmp_path):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(RequestError, match=r"s\.json"):
        read(tmp_path / "s.json", model.config)


@pytest.mark.parametrize("value", ["nan", "NaN", "Infinity", "-1", "7"])
def test_invalid_numbers_are_refused(value, measured, model, tmp_path):
    measured.save(tmp_path / "s.json")
    content = json.loads((tmp_path / "s.json").read_text())
    first = content["sensitivities"]["transformer.token_embeddings"][0]
    first["bits" if value == "7" else "kl_divergence"] = float(value) if value != "7" else 7
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match="s.json has no sensitivities"):
        read(tmp_path / "s.json", model.config)


def test_the_file_of_another_model_and_a_missing_one_are_refused(measured, tmp_path):
    measured.save(tmp_path / "s.json")
    with pytest.raises(RequestError, match="a model of another shape"):
        read(tmp_path / "s.json", tiny_config(num_transformer_layers=1, num_query_heads=2, num_kv_heads=1,
                                              ffn_multipliers=1.0))  # fmt: skip
    with pytest.raises(RequestError, match="does not exist"):
        read(tmp_path / "other.json", tiny_config())


def test_a_matrix_that_no_group_fits_has_no_choices():
    config = tiny_config(model_dim=48, num_query_heads=4, num_kv_heads=2)
    paths = set(candidates(config))
    assert paths == {f"transformer.layers.{i}.attn.out_proj" for i in (0, 1)} | {
        f"transformer.layers.{i}.ffn.proj_2" for i in (0, 1)
    }
    costs = {path: {o: 0.0 for o in options} for path, options in candidates(config).items()}
    chosen = assign(costs, config, 13, mx.bfloat16)
    assert set(chosen) == paths and bits_per_weight(config, chosen, 2) <= 13
