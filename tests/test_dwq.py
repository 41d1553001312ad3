"""Distilled scales and biases: gradients against finite differences, and a divergence that falls."""

from __future__ import annotations

from mlx_openelm.config import EMBEDDING
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.perplexity import kl_divergence
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.rounding import Grid
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.loading import build_model
from mlx_openelm.modules import module_at
from mlx_openelm.quantization import dwq, learned
from mlx_openelm.quantization.calibration import Teacher
from mlx_openelm.quantization.dwq import Distilled, DistilledEmbedding, Packed
from mlx_openelm.quantization.recipes import plan

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from quantization_models import is_bfloat16, random_windows, tiny_model, unpack_levels


def packed_matrix(rows: int, columns: int, choice: Quantization, seed: int = 0) -> Packed:
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    levels, scales, biases = mx.quantize(mx.array(weight), choice.group_size, choice.bits)
    return Packed(levels, Grid(scales, biases), choice)


def full_matrix(packed: Packed, slope: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """scale * (level + slope * (level / middle - 1) + shift) + bias in float64: what the two parameters mean."""
    level = unpack_levels(np.array(packed.levels), packed.choice.bits).astype(np.float64)
    size, middle = packed.choice.group_size, (2**packed.choice.bits - 1) / 2
    scales, biases, slope, shift = (
        np.repeat(np.array(part, dtype=np.float64), size, axis=1)
        for part in (packed.grid.scales, packed.grid.biases, slope, shift)
    )
    return scales * (level + slope * (level / middle - 1) + shift) + biases


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", [Distilled, DistilledEmbedding])
def test_gradients_agree_with_finite_differences(kind, bits):
    packed = packed_matrix(6, 64, Quantization(32, bits))
    module = kind(packed)
    generator = np.random.default_rng(bits)
    slope, shift = generator.normal(0, 0.2, (2, 6, 2)).astype(np.float32)
    module.slope, module.shift = mx.array(slope), mx.array(shift)
    tokens, x = np.array([0, 3, 3, 5]), generator.normal(size=(4, 64)).astype(np.float32)

    def loss(module: Distilled) -> mx.array:
        if kind is Distilled:
            return mx.square(module(mx.array(x))).mean()
        return (
            mx.square(module(mx.array(tokens)) - mx.array(x)).mean() + mx.square(mx.array(x) @ module.full().T).mean()
        )

    def expected(slope: np.ndarray, shift: np.ndarray) -> float:
        matrix = full_matrix(packed, slope, shift)
        product = np.square(x.astype(np.float64) @ matrix.T).mean()
        return product if kind is Distilled else product + np.square(matrix[tokens] - x).mean()

    value, gradients = nn.value_and_grad(module, loss)(module)
    assert set(gradients) == {"slope", "shift"}  # levels and the initial grid stay
    assert value.item() == pytest.approx(expected(slope, shift), rel=1e-4)
    for name, index in (("slope", 0), ("shift", 1)):
        for row in range(6):
            for group in range(2):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [slope.astype(np.float64), shift.astype(np.float64)]
                    moved[index][row, group] += step
                    ends.append(expected(*moved))
                difference = (ends[0] - ends[1]) / 2e-5
                assert gradients[name][row, group].item() == pytest.approx(difference, rel=2e-3, abs=2e-4)


def rounded(model, bits: int = 2):
    """A tiny model's matrices on MLX's own grids, the model itself changed accordingly."""
    choices, _ = plan(model.config, Quantization(32, bits))
    packed = {}
    for path, choice in choices.items():
        module = module_at(model, path)
        levels, scales, biases = mx.quantize(module["weight"], 32, bits)
        packed[path] = Packed(levels, Grid(scales, biases).stored(mx.bfloat16), choice)
        module["weight"] = packed[path].full()
    return packed


def with_grids(packed, grids, **changes):
    """The tiny model with its matrices on these grids, in plain matrices."""
    model = tiny_model(**changes)
    for path, part in packed.items():
        module_at(model, path)["weight"] = part.full(grids[path])
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param({name: False}, marks=pytest.mark.slow)
            for name in ("share_input_output_layers", "ffn_with_glu")
        ),
    ],
)
def test_the_divergence_falls_on_unseen_text(changes):
    windows = random_windows(32, 17)
    batches = [mx.array(windows[i : i + 2])[:, :-1] for i in range(0, 32, 2)]
    model = tiny_model(**changes)
    teacher = Teacher(model, batches)
    packed = rounded(model)
    seen = []
    grids = dwq.distill(model, packed, teacher, batches, mx.bfloat16, progress=lambda *at: seen.append(at))
    assert set(grids) == set(packed) and ("lm_head" in packed) == (not changes.get("share_input_output_layers", True))
    assert all(is_bfloat16(grid.scales) and is_bfloat16(grid.biases) for grid in grids.values())
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and seen[-1][1] == len(seen)
    unseen, full = random_windows(8, 33, seed=9), tiny_model(**changes)
    before = kl_divergence(full, with_grids(packed, {p: part.grid for p, part in packed.items()}, **changes), unseen)
    after = kl_divergence(full, with_grids(packed, grids, **changes), unseen)
    assert after < 0.97 * before
    assert kl_divergence(full, with_grids(packed, grids, **changes), windows[16:]) < 0.97 * before


@pytest.mark.covering
@pytest.mark.parametrize("rate", [0.002, 5.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_result_is_never_worse_than_the_start_on_held_out_text(bits, rate):
    # At the higher rate training ruins the model, so only the start can be chosen.
    windows = random_windows(11, 17)
    batches = [mx.array([window])[:, :-1] for window in windows]
    model = tiny_model()
    teacher = Teacher(model, batches)
    packed = rounded(model, bits)
    grids = dwq.distill(model, packed, teacher, batches, mx.bfloat16, learning_rate=rate)
    held_out = [windows[0], windows[8]]
    start = kl_divergence(tiny_model(), with_grids(packed, {p: part.grid for p, part in packed.items()}), held_out)
    end = kl_divergence(tiny_model(), with_grids(packed, grids), held_out)
    assert end <= start * (1 + 1e-4)
    if rate > 1:
        assert end == pytest.approx(start, rel=1e-4)


def test_without_held_out_text_the_last_state_is_kept(monkeypatch):
    # 7 batches are too few to hold one out: 14 steps, with a check every third step.
    batches = [mx.array([window]) for window in random_windows(7, 16)]
    model = tiny_model()
    teacher = Teacher(model, batches)
    packed = rounded(model)
    states = []
    update = dwq.optimizers.Adam.update

    def spy(self, model, gradients):
        update(self, model, gradients)
        states.append(np.array(model.transformer.token_embeddings.shift))

    monkeypatch.setattr(dwq.optimizers.Adam, "update", spy)
    grids = dwq.distill(model, packed, teacher, batches, mx.float32)
    assert len(states) == 14 and not np.array_equal(states[-1], states[-3])
    slope_and_shift = model.transformer.token_embeddings
    assert np.array_equal(np.array(slope_and_shift.shift), states[-1])
    assert np.array_equal(np.array(slope_and_shift.grid().scales), np.array(grids[EMBEDDING].scales))


def test_a_loss_that_is_not_finite_is_an_error():
    batches = [mx.array([window]) for window in random_windows(2, 8)]
    model = tiny_model()
    teacher = Teacher(model, batches)
    packed = rounded(model)
    packed[EMBEDDING].grid.scales[0] = float("nan")
    with pytest.raises(OpenELMError, match="leave dwq out"):
        dwq.distill(model, packed, teacher, batches, mx.bfloat16)


def test_the_training_loss_is_the_models_divergence():
    batches = [mx.array(random_windows(2, 12))]
    model = tiny_model()
    teacher = Teacher(model, batches)
    rounded(model)
    windows = [[*row, 0] for row in batches[0].tolist()]
    expected = kl_divergence(tiny_model(), model, windows)
    assert dwq.divergence(model, teacher, batches, 0).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("methods", [pytest.param(("dwq",), marks=pytest.mark.slow), ("awq", "gptq", "dwq")])
def test_the_whole_pipeline_with_an_untied_head_and_mixed_bits(methods):
    config = tiny_model(share_input_output_layers=False).config
    choices, _ = plan(config, lambda path: Quantization(32, 3 if "ffn" in path else 4))
    batches = [mx.array(random_windows(2, 24, seed=seed)) for seed in range(4)]
    held_out = random_windows(4, 33, seed=99)
    full = tiny_model(share_input_output_layers=False)
    divergences = []
    for names in ((), methods):
        tensors = learned.quantize_model(
            tiny_model(share_input_output_layers=False), choices, names, batches, mx.float32, mx.bfloat16
        )
        for path, choice in choices.items():
            shapes = choice.packed_shapes(config.matrix_shapes()[path])
            assert {part: tensors[f"{path}.{part}"].shape for part in shapes} == shapes
            assert tensors[f"{path}.scales"].dtype == tensors[f"{path}.biases"].dtype == mx.bfloat16
        model = build_model(Checkpoint(config, Weights.of_arrays(tensors), choices), dtype="float32")
        divergences.append(kl_divergence(full, model, held_out))
    assert divergences[1] < 0.98 * divergences[0]
