"""Reports on held-out text against the evaluation's own numbers, and the drawing read back."""

from __future__ import annotations

import importlib.util
from itertools import pairwise

from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.evaluation.perplexity import kl_divergence, mean_nll
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.quantization.recipes import plan, planner
from mlx_openelm.quantization.report import (
    Evaluator,
    Row,
    chart,
    check_picture,
    compare,
    estimate,
    letter,
    plain_choices,
)

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from quantization_models import random_windows, tiny_model

WINDOWS = random_windows(5, 40)


def row(name: str, bits: float, divergence: float) -> Row:
    return Row(name, bits, 1000, 9.0, divergence)


def packed(choices, model, dtype=mx.bfloat16):
    """A tiny model read back from what a checkpoint stores of it."""
    weights = {name: weight.astype(dtype) for name, weight in tree_flatten(tiny_model().parameters())}
    stored = quantize_weights(Weights.of_arrays(weights), choices)
    loaded = []
    for path, choice in choices.items():
        parts = {part: stored[f"{path}.{part}"] for part in choice.packed_shapes(model.config.matrix_shapes()[path])}
        loaded.append((f"{path}.weight", choice.unpack(parts, mx.float32)))
    model.load_weights(loaded, strict=False)
    return model


@pytest.mark.parametrize("share", [True, False])
def test_the_evaluator_equals_the_evaluation_package(share):
    full = tiny_model(share_input_output_layers=share)
    other = tiny_model(seed=1, share_input_output_layers=share)
    evaluator = Evaluator(full, WINDOWS, batch_size=2)
    assert evaluator.tokens == 5 * 39
    perplexity, divergence = evaluator.measure(other)
    assert perplexity == pytest.approx(mean_nll(other, WINDOWS).perplexity, rel=1e-5)
    assert divergence == pytest.approx(kl_divergence(full, other, WINDOWS), rel=1e-5)
    perplexity, divergence = evaluator.measure(full)
    assert perplexity == pytest.approx(mean_nll(full, WINDOWS).perplexity, rel=1e-5) and 0 <= divergence < 1e-6


def test_the_evaluator_keeps_the_original_models_logits():
    full = tiny_model()
    evaluator = Evaluator(full, WINDOWS)
    expected = evaluator.measure(tiny_model(seed=1))
    full.load_weights(list(tree_flatten(tiny_model(seed=2).parameters())))
    assert evaluator.measure(tiny_model(seed=1)) == pytest.approx(expected, rel=1e-6)


def test_rows_are_measured_on_models_as_stored():
    model = tiny_model()
    before = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    steps: list[tuple[int, int]] = []
    rows = list(compare(model, Evaluator(model, WINDOWS), mx.bfloat16, progress=lambda *at: steps.append(at)))
    after = dict(tree_flatten(model.parameters()))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert [r.name for r in rows] == [
        "not quantized", *(f"affine {bits}-bit" for bits in (2, 3, 4, 5, 6, 8)), "mxfp4", "nvfp4", "mxfp8",
        "mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6",
    ]  # fmt: skip
    assert steps[-1] == (14, 14) and steps == sorted(steps)
    parameters = model.config.num_parameters
    assert rows[0].bits_per_weight == 16 and rows[0].size == 2 * parameters and rows[0].kl_divergence == 0
    assert rows[0].perplexity == pytest.approx(mean_nll(tiny_model(), WINDOWS).perplexity, rel=1e-5)
    by_name = {r.name: r for r in rows}
    for name, choices in {
        "affine 3-bit": plan(model.config, Quantization(64, 3))[0],
        "mxfp4": plan(model.config, Quantization(32, 4, "mxfp4"))[0],
        "mixed_2_6": planner(recipe="mixed_2_6")(model.config)[0],
    }.items():
        quantized = packed(choices, tiny_model())
        assert by_name[name].kl_divergence == pytest.approx(kl_divergence(tiny_model(), quantized, WINDOWS), rel=1e-4)
        assert by_name[name].perplexity == pytest.approx(mean_nll(quantized, WINDOWS).perplexity, rel=1e-5)
        assert by_name[name].size == pytest.approx(by_name[name].bits_per_weight * parameters / 8, abs=1)
    kl = [by_name[f"affine {bits}-bit"].kl_divergence for bits in (2, 3, 4, 5, 6, 8)]
    assert kl == sorted(kl, reverse=True)


def test_every_plain_choice_covers_every_matrix_of_a_large_model():
    config = ModelConfig.from_name("270M")
    for name, choices in plain_choices(config).items():
        assert set(choices) == set(config.matrix_shapes())
        assert {choice.group_size for choice in choices.values()} == {
            {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}.get(name, 64)
        }


def test_the_time_of_a_report_grows_with_its_rows_and_with_the_output_layer():
    config = ModelConfig.from_name("270M")
    count, seconds = estimate(config, 2.0)
    assert count == len(plain_choices(config)) == 13
    layers = config.num_parameters - 32000 * 1280
    assert seconds == pytest.approx(14 * 2.0 * (1 + 2 * 32000 * 1280 / layers), rel=1e-3)


# The drawing.


def marks(lines: list[str]) -> dict[str, tuple[int, int]]:
    """Where each letter stands, as (line, column) of the field; a letter that stands twice is an error."""
    found: dict[str, tuple[int, int]] = {}
    for line, text in enumerate(lines[:-3]):
        label, _, field = text.partition("|")
        assert len(label) == 9
        for column, mark in enumerate(field):
            if mark != " ":
                assert mark not in found
                found[mark] = line, column
    return found


def test_every_row_is_drawn_once_at_its_place():
    rows = [row("full", 16, 0), row("two", 2, 1.0), row("four", 4, 0.01), row("six", 6, 1e-4)]
    lines = chart(rows)
    assert marks(lines) == {"b": (0, 0), "c": (8, 32), "d": (16, 63)}
    assert [line.split("|")[0].strip() for line in lines[:-3:4]] == ["1", "0.1", "0.01", "0.001", "0.0001"]
    assert all(line.startswith(" " * 9 + "|") for index, line in enumerate(lines[:-3]) if index % 4)
    assert [index - 10 for index, mark in enumerate(lines[-3]) if mark == "+"][1:] == [0, 16, 32, 47, 63]
    assert [lines[-2][index + 10] for index in (0, 16, 32, 47, 63)] == list("23456")
    assert lines[-1].strip() == "bits per weight"
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_the_drawing_fits_the_width(columns):
    rows = [row("two", 2.5, 1.0), row("four", 4.5, 0.01), row("full", 15.5, 1e-4)]
    lines = chart(rows, columns)
    assert max(map(len, lines)) == min(columns, 74)
    assert set(marks(lines)) == set("abc")
    numbers = [int(word) for word in lines[-2].split()]
    assert numbers == list(range(2, 17, numbers[1] - 2)) and len(lines[-2]) <= columns


def test_whole_numbers_of_bits_and_of_decades_are_readable_at_any_range():
    for high in range(-5, 3):
        lines = chart([row("low", 4.1, 1e-6), row("high", 4.2, 10.0**high)])
        numbers = [float(number) for line in lines[:-3] if (number := line.split("|")[0].strip())]
        assert numbers == pytest.approx([10.0**exponent for exponent in range(high, -7, -1)])
        assert not any("e" in line for line in lines[:-1]) and 8 <= len(lines) - 3 <= 17
        assert lines[-2].split() == ["4", "5"]


def test_between_the_ends_places_are_in_proportion():
    rows = [row(str(i), bits, kl) for i, (bits, kl) in enumerate([(2.5, 0.3), (3.1, 0.02), (4.7, 0.004), (8.5, 3e-5)])]
    for (mark, (line, column)), r in zip(marks(chart(rows)).items(), rows, strict=True):
        # Bits from 2 to 9, divergences from 1 down to 1e-5, three lines each.
        assert mark == "abcd"[rows.index(r)]
        assert abs(column - (r.bits_per_weight - 2) / 7 * 63) <= 0.5
        assert abs(line + np.log10(r.kl_divergence) * 3) <= 0.5


@pytest.mark.parametrize("bits", [2.0, 3.4, 4.0])
def test_coinciding_rows_are_drawn_side_by_side_and_do_not_touch(bits):
    rows = [row("low", 2.0, 1.0), row("high", 4.0, 0.5), *(row(str(i), bits, 0.02) for i in range(5))]
    places = marks(chart(rows))
    assert set(places) == set("abcdefg")
    line = {places[mark][0] for mark in "cdefg"}
    columns = sorted(places[mark][1] for mark in "cdefg")
    assert len(line) == 1 and [b - a for a, b in pairwise(columns)] == [2, 2, 2, 2]
    assert columns[0] <= round((bits - 2) / 2 * 63) <= columns[-1]


def test_more_rows_than_places_apart_are_all_drawn():
    rows = [row(str(index), 4.0, 0.02) for index in range(52)]
    assert len(marks(chart(rows))) == 52


def test_drawings_of_nothing_of_one_point_and_of_noise():
    assert chart([]) == [] and chart([row("full", 16, 0.0)]) == []
    assert chart([row("broken", 4, float("nan"))]) == []
    assert list(marks(chart([row("one", 4.5, 0.1)]))) == ["a"]
    assert list(marks(chart([row("noise", 8.5, 1e-9), row("more", 8.0, 1e-6)]))) == ["b", "a"]
    assert list(marks(chart([row("finite", 2.5, 3.0), row("infinite", 2, float("inf"))]))) == ["a"]


def test_letters_continue_after_z():
    assert [letter(index) for index in (0, 25, 26, 51)] == ["a", "z", "A", "Z"]


@pytest.mark.parametrize("name", ["report.xyz", "missing/report.png", "report"])
def test_an_invalid_picture_name_is_refused(name, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(RequestError, match="must end in .png, .svg|does not exist"):
        check_picture(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install '\.\[plots\]'"):
        check_picture(tmp_path / "report.png")


def test_an_existing_picture_is_kept(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "report.png").write_bytes(b"mine")
    with pytest.raises(RequestError, match="exists"):
        check_picture(tmp_path / "report.png")
