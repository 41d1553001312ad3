"""`quantize` from folder to folder: outputs, refusals, and what failures leave behind."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.evaluation.perplexity import kl_divergence
from mlx_openelm.evaluation.windows import load_documents, make_windows
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats import rounding
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.jobs.quantize import QuantizeOptions, quantize
from mlx_openelm.jobs.summary import summarize
from mlx_openelm.quantization import awq, dwq, learned, report, sensitivity
from mlx_openelm.quantization.text import read_text

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import FIXTURES, SHAKESPEARE, measure_few_choices, search_little, write_tiny

TEXT = "\n".join(load_documents(FIXTURES / "valid.jsonl"))
# A few short windows: quality is not tested here.
SMALL: dict[str, Any] = {"num_samples": 2, "sequence_length": 32}
# One layer is enough here; the tests of each method have more.
ONE_LAYER: dict[str, Any] = {
    "num_transformer_layers": 1,
    "num_query_heads": 2,
    "num_kv_heads": 1,
    "ffn_multipliers": 1.5,
}


@pytest.fixture(scope="module", autouse=True)
def little_search() -> Iterator[None]:
    """Grids are improved once, AWQ tries one exponent, and few rows are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_REFITS", 1)
        patch.setattr(awq, "_EXPONENTS", (0.5,))
        patch.setattr(sensitivity, "_ROWS", 32)
        yield from search_little()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("quantizing") / "tiny", **ONE_LAYER)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "play.txt"
    path.write_text(TEXT[:6000])
    return path


@pytest.fixture(scope="module")
def budgeted(source, text, tmp_path_factory):
    """A model quantized to a budget, shared by the tests."""
    target = tmp_path_factory.mktemp("budgeted") / "out"
    return quantize(source, target, QuantizeOptions(target_bpw=4.2, calibration=str(text), **SMALL))


@pytest.fixture
def measured(budgeted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sensitivities are those of `budgeted`, as if they had been measured again."""
    known = sensitivity.read(budgeted.path / "sensitivities.json", mlx_format.read_config(budgeted.path)[0])
    monkeypatch.setattr(sensitivity, "measure", lambda *_, **__: known)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the card, which names the command and so the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def options(text: Path, **values: Any) -> QuantizeOptions:
    """A few short windows of `text`, if the other options need text at all."""
    small = SMALL | {"calibration": str(text)}
    if not values.get("method") and values.get("target_bpw") is None:
        small.pop("num_samples")
        if "report_data" in values:
            small.pop("calibration")
    return QuantizeOptions(**small | values)


# Outputs.


def test_a_budget_is_kept_and_the_size_is_reported_correctly(budgeted, source):
    assert 4.0 < budgeted.bits_per_weight <= 4.2
    stored = mlx_format.read(budgeted.path)
    assert stored.quantization == budgeted.choices and len(set(budgeted.choices.values())) > 2
    assert stored.bits_per_weight == pytest.approx(budgeted.bits_per_weight, rel=1e-9)
    assert summarize(budgeted.path).bits_per_weight == pytest.approx(budgeted.bits_per_weight, rel=1e-9)
    size = sum(array.nbytes for array in mx.load(str(budgeted.path / "model.safetensors")).values())
    assert size * 8 / stored.config.num_parameters == pytest.approx(budgeted.bits_per_weight, rel=1e-9)
    assert set(budgeted.costs) == set(stored.config.matrix_shapes())
    assert "--target-bpw 4.2" in (budgeted.path / "README.md").read_text()


@pytest.mark.parametrize("values", [{"target_bpw": 4.2}, {"recipe": "mixed_3_6", "method": ("awq", "gptq")}])
def test_mlx_lm_reads_it_and_gives_the_same_logits(values, budgeted, source, text, tmp_path):
    mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
    path = budgeted.path
    if "method" in values:
        path = quantize(source, tmp_path / "out", options(text, **values)).path
    theirs, _ = mlx_lm_utils.load_model(path)
    theirs.apply(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)
    tokens = mx.array(np.random.default_rng(0).integers(3, 2048, (2, 24)))
    expected = np.array(theirs(tokens))
    for expand in (True, False):
        ours = np.array(load(path, dtype="float32", expand=expand)[0](tokens))
        assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def test_saved_sensitivities_give_the_same_choices_without_measuring(budgeted, source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "measure", lambda *_, **__: pytest.fail("measured again"))
    file = budgeted.path / "sensitivities.json"
    again = quantize(source, tmp_path / "out", options(text, target_bpw=4.2, sensitivities=str(file)))
    assert again.choices == budgeted.choices and again.costs == budgeted.costs
    assert contents(again.path) == contents(budgeted.path)
    other = quantize(source, tmp_path / "other", options(text, target_bpw=5, sensitivities=str(file)))
    assert 4.2 < other.bits_per_weight <= 5


def test_plain_bits_equal_the_output_of_convert(source, tmp_path):
    for name, values in {
        "bits": {"q_bits": 3, "q_group_size": 32}, "mode": {"q_mode": "mxfp4"}, "recipe": {"recipe": "mixed_2_6"},
    }.items():  # fmt: skip
        result = quantize(source, tmp_path / name, QuantizeOptions(**values))
        converted = convert(source, tmp_path / f"{name}-converted", quantize=True, **values)
        assert contents(result.path) == contents(converted.path)
        assert result.bits_per_weight == converted.bits_per_weight
    assert contents(quantize(source, tmp_path / "nothing").path) == contents(
        convert(source, tmp_path / "plain", quantize=True).path
    )


@pytest.mark.parametrize("dtype", [None, pytest.param("float16", marks=pytest.mark.slow), "float32"])
def test_a_report_changes_nothing_of_what_is_written(dtype, source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plain_choices", lambda _: {})
    plain = quantize(source, tmp_path / "plain", QuantizeOptions(q_bits=4), dtype=dtype)
    reported = quantize(source, tmp_path / "out", options(text, q_bits=4, report=True), dtype=dtype)
    first, second = (mx.load(str(result.path / "model.safetensors")) for result in (plain, reported))
    assert set(first) == set(second)
    for key in first:
        assert first[key].dtype == second[key].dtype and mx.array_equal(first[key], second[key])
    name, last = reported.report[-1].name, reported.report[-1]
    assert name.startswith("this: --q-bits 4") and last.bits_per_weight == plain.bits_per_weight
    documents = load_documents(text)
    full, tokenizer = load(source, dtype="float32")
    windows = make_windows(tokenizer, documents, 32)
    random.Random(0).shuffle(windows)
    expected = kl_divergence(full, load(plain.path, dtype="float32")[0], windows[::8][:32])
    assert last.kl_divergence == pytest.approx(expected, rel=5e-3)
    card = (reported.path / "README.md").read_text()
    assert "a held-out part of " in card and f"{last.perplexity:.2f}"[:3] in card


def test_a_report_alone_writes_nothing(source, text, tmp_path, monkeypatch):
    some = dict(list(report.plain_choices(mlx_format.read_config(source)[0]).items())[:2])
    monkeypatch.setattr(report, "plain_choices", lambda _: some)
    monkeypatch.chdir(tmp_path)
    result = quantize(source, tmp_path / "out", options(text, report=True))
    assert result.path is None and result.bits_per_weight is None
    assert [row.name for row in result.report] == ["not quantized", *some]
    assert list(tmp_path.iterdir()) == []


def test_a_report_reads_the_text_it_is_given(source, text, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plain_choices", lambda _: {})
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": TEXT[i : i + 900]}) + "\n" for i in (20000, 30000)))
    result = quantize(source, tmp_path / "out", options(text, report=True, report_data=str(other)))
    full, tokenizer = load(source, dtype="float32")
    windows = make_windows(tokenizer, load_documents(other), 32)
    assert len(windows) <= 32
    from mlx_openelm.evaluation.perplexity import mean_nll

    assert result.report[0].perplexity == pytest.approx(mean_nll(full, windows).perplexity, rel=1e-4)


def test_text_for_the_report_is_never_calibrated_on(source, text):
    _, tokenizer = load(source)
    config = mlx_format.read_config(source)[0]
    for size in (6000, 700, 300):
        text = text.parent / "part.txt"
        text.write_text(TEXT[:size])
        with pytest.warns(UserWarning, match="windows to learn from, not 1000"):
            read = read_text(tokenizer, config, options(text, num_samples=1000, report=True, method=("gptq",)))
        held_out = {tuple(window) for window in read.held_out}
        windows = make_windows(tokenizer, load_documents(text), 32)
        assert held_out and read.windows
        assert not held_out & {tuple(window) for window in read.windows}
        assert len(read.held_out) + len(read.windows) == len(windows)
        assert {len(window) for window in read.windows} == {33}


def test_calibration_text_may_be_plain_or_json_lines(source, text, tmp_path):
    lines = tmp_path / "text.jsonl"
    lines.write_text(json.dumps({"text": text.read_text()}) + "\n")
    first, second = (
        contents(quantize(source, tmp_path / path.suffix, options(path, q_bits=3, method=("gptq",))).path)
        for path in (text, lines)
    )
    assert first == second


def test_the_bundled_text_is_the_default(source, tmp_path):
    result = quantize(source, tmp_path / "out", QuantizeOptions(q_bits=4, method=("gptq",), **SMALL))
    assert set(result.choices.values()) == {Quantization(64, 4), Quantization(32, 4)}
    assert result.calibrated_on == "2 windows of 32 tokens of the bundled text"


# Methods.


def test_methods_are_applied_in_a_fixed_order(source, text, tmp_path):
    folders = []
    for spelling in (("dwq,gptq", "awq"), ("awq", "gptq", "dwq", "gptq"), (" AWQ , gptq,dwq",)):
        assert options(text, q_bits=3, method=spelling).method == ("awq", "gptq", "dwq")
    for number, spelling in enumerate((("gptq", "awq"), ("awq", "gptq", "awq"))):
        chosen = options(text, q_bits=3, method=spelling)
        folders.append(contents(quantize(source, tmp_path / str(number), chosen).path))
    assert folders[0] == folders[1]
    assert "AWQ + GPTQ" in (tmp_path / "0" / "README.md").read_text()


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> dict[str, bytes]:
    return contents(quantize(source, tmp_path_factory.mktemp("plain") / "out", QuantizeOptions(q_bits=3)).path)


@pytest.mark.parametrize("method", learned.METHODS)
def test_each_method_changes_the_model_and_is_deterministic(method, source, text, tmp_path, plain):
    few = {"num_samples": 2, "sequence_length": 16}
    first, again, other = (
        contents(quantize(source, tmp_path / name, options(text, q_bits=3, method=(method,), seed=seed, **few)).path)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first == again
    assert first["model.safetensors"] not in (plain["model.safetensors"], other["model.safetensors"])


def test_dwq_changes_only_the_parts_it_trains(source, text, tmp_path):
    results = [
        quantize(source, tmp_path / ",".join(methods), options(text, q_bits=3, method=methods)).path
        for methods in (("gptq",), ("gptq", "dwq"))
    ]
    first, trained = (mx.load(str(path / "model.safetensors")) for path in results)
    differing = {name for name in first if not np.array_equal(np.array(first[name].astype(mx.float32)),
                                                              np.array(trained[name].astype(mx.float32)))}  # fmt: skip
    assert differing and {name.rpartition(".")[2] for name in differing} <= {"scales", "biases"}


@pytest.mark.parametrize("changes", [{"ffn_with_glu": False}, {"share_input_output_layers": False}])
@pytest.mark.slow
def test_other_shapes_of_model_are_quantized_too(changes, text, tmp_path):
    folder = write_tiny(tmp_path / "model", **changes)
    result = quantize(folder, tmp_path / "out", options(text, target_bpw=4.5, method=("awq", "gptq", "dwq")))
    assert result.bits_per_weight <= 4.5
    assert ("lm_head" in result.choices) == ("share_input_output_layers" in changes)
    tokens = mx.array([[1, 20, 300, 7]])
    assert np.isfinite(np.array(load(result.path)[0](tokens))).all()


# Quality, on the trained checkpoint.


@pytest.mark.slow
def test_methods_keep_the_trained_model_closer_than_plain_rounding(tmp_path, monkeypatch):
    # Fewer choices to measure; a benchmark has bars for the whole play.
    every = sensitivity.candidates
    monkeypatch.setattr(
        sensitivity,
        "candidates",
        lambda config: {
            path: [o for o in options if o.group_size == max(c.group_size for c in options if c.group_size <= 64)]
            for path, options in every(config).items()
        },
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:16000])
    full, tokenizer = load(SHAKESPEARE, dtype="float32")
    held_out = make_windows(tokenizer, [TEXT[60000:75000]], 128)[:16]

    def cost(**values: Any) -> tuple[float, float]:
        name = "-".join(f"{k}{v}" for k, v in values.items() if k != "calibration")
        result = quantize(SHAKESPEARE, tmp_path / name, QuantizeOptions(**values))
        return kl_divergence(full, load(result.path, dtype="float32")[0], held_out), result.bits_per_weight

    learning = {"calibration": str(text), "num_samples": 16, "sequence_length": 128}
    plain, bits = cost(q_bits=3)
    by_gptq, same = cost(q_bits=3, method=("gptq",), **learning)
    under_budget, fewer = cost(target_bpw=bits, method=("gptq",), **learning)
    assert same == bits and fewer <= bits
    assert by_gptq < 0.8 * plain, by_gptq / plain
    assert under_budget < 0.65 * plain, under_budget / plain


@pytest.mark.slow
def test_awq_and_distillation_add_to_gptq_on_the_trained_model(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:16000])
    full, tokenizer = load(SHAKESPEARE, dtype="float32")
    held_out = make_windows(tokenizer, [TEXT[60000:75000]], 128)[:8]
    learning = {"calibration": str(text), "num_samples": 20, "sequence_length": 64}
    costs = []
    for values in ({}, {"method": ("gptq",)} | learning, {"method": ("awq", "gptq", "dwq")} | learning):
        path = quantize(SHAKESPEARE, tmp_path / str(len(costs)), QuantizeOptions(q_bits=2, **values)).path
        costs.append(kl_divergence(full, load(path, dtype="float32")[0], held_out))
    assert costs[1] < 0.8 * costs[0] and costs[2] < min(0.6 * costs[0], costs[1]), costs


# Refusals, before anything is read.


@pytest.mark.parametrize(
    "values,message",
    [
        ({"target_bpw": 4.0, "q_bits": 4}, "leave q_bits out"),
        ({"target_bpw": 4.0, "q_group_size": 32}, "leave q_group_size out"),
        ({"target_bpw": 4.0, "q_mode": "affine"}, "leave q_mode out"),
        ({"target_bpw": 4.0, "recipe": "mixed_3_6"}, "leave recipe out"),
        ({"q_mode": "mxfp4", "method": ("gptq",)}, "method needs scales to learn"),
        ({"recipe": "mixed_3_6", "q_bits": 4}, "leave q_bits and q_mode out"),
        ({"recipe": "mixed_1_2"}, "recipe must be one of"),
        ({"q_bits": 7}, "q_bits must be"),
        ({"q_bits": 3, "q_mode": "mxfp4"}, "q_bits must be 4 in mode mxfp4"),
        ({"q_group_size": 48}, "q_group_size must be"),
        ({"q_mode": "int8"}, "q_mode must be one of"),
        ({"method": ("hqq",)}, "method must be one or more of awq, gptq, dwq, got 'hqq'"),
        ({"sensitivities": "s.json"}, "sensitivities needs target_bpw"),
        ({"sensitivities": "s.json", "q_bits": 4}, "sensitivities needs target_bpw"),
        ({"report_data": "t.txt", "q_bits": 4}, "report_data needs report"),
        ({"calibration": "t.txt", "q_bits": 4}, "calibration needs target_bpw, method or report"),
        ({"method": ("gptq",), "num_samples": 0}, "num_samples must be 1 or more"),
        ({"method": ("gptq",), "sequence_length": -1}, "sequence_length must be 16 or more"),
        ({"method": ("gptq",), "sequence_length": 15}, "sequence_length must be 16 or more"),
        ({"report": True, "num_samples": 8}, "num_samples needs target_bpw or method"),
        (
            {"report": True, "calibration": "t.txt", "report_data": "t.txt"},
            "only target_bpw and method read calibration",
        ),
        ({"target_bpw": math.nan}, "target_bpw must be a positive number"),
    ],
)
def test_contradictory_flags_are_refused(values, message):
    with pytest.raises(RequestError, match=message) as raised:
        QuantizeOptions(**values)
    assert "\n" not in str(raised.value)


def test_windows_longer_than_the_context_are_refused(source, text, tmp_path):
    with pytest.raises(RequestError, match="sequence_length must be at most"):
        quantize(source, tmp_path / "out", options(text, method=("gptq",), sequence_length=100_000))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_asked(source, text, tmp_path):
    target = tmp_path / "out"
    quantize(source, target, QuantizeOptions(q_bits=8))
    before = contents(target)
    for values in ({"q_bits": 4, "method": ("gptq",)}, {"target_bpw": 4.5}, {"q_bits": 4, "report": True}):
        with pytest.raises(RequestError, match="exists; choose another mlx_path"):
            quantize("no-such-model", target, QuantizeOptions(**values))
    assert contents(target) == before
    quantize(source, target, options(text, q_bits=4, method=("gptq",)), overwrite=True)
    assert contents(target) != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("values", [{"q_bits": 4}, {"q_bits": 4, "method": ("gptq",)}, {"target_bpw": 4.5}])
def test_the_source_cannot_be_the_target(values, source, text, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    values = values if values == {"q_bits": 4} else values | {"calibration": str(text)}
    for target in (folder, tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(RequestError, match="choose another mlx_path"):
            quantize(folder, target, QuantizeOptions(**values), overwrite=True)
    assert contents(folder) == contents(source)


@pytest.mark.parametrize("values", [{"q_bits": 4}, {"method": ("gptq",)}, {"target_bpw": 4.5}, {"report": True}])
def test_a_quantized_source_is_refused(values, budgeted, tmp_path):
    with pytest.raises(RequestError, match="already quantized"):
        quantize(budgeted.path, tmp_path / "out", QuantizeOptions(**values))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content,message",
    [("Too short.", "fewer than a window of 32; give a shorter sequence_length"), ("", "contains no text"),
     (None, "must name a file")],
)  # fmt: skip
@pytest.mark.parametrize("field", ["calibration", "report_data"])
def test_text_that_is_too_short_or_missing_is_refused(field, content, message, source, text, tmp_path):
    path = tmp_path / "short.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message):
        quantize(source, tmp_path / "out", options(text, **{"report": True, "method": ("gptq",), field: str(path)}))
    assert not (tmp_path / "out").exists()


def test_a_budget_that_is_too_small_and_a_strange_type_are_refused(source, text, budgeted, tmp_path):
    file = budgeted.path / "sensitivities.json"
    with pytest.raises(RequestError, match="target_bpw 2 is too small"):
        quantize(source, tmp_path / "out", options(text, target_bpw=2.0, sensitivities=str(file)))
    with pytest.raises(RequestError, match="dtype must be one of"):
        quantize(source, tmp_path / "out", options(text, method=("gptq",)), dtype="int8")
    with pytest.raises(RequestError, match="a model of another shape"):
        quantize(SHAKESPEARE, tmp_path / "out", options(text, target_bpw=4.0, sensitivities=str(file)))
    assert list(tmp_path.iterdir()) == []


# Failures during the work.


@pytest.mark.parametrize("place", ["weights", "sensitivities", "distilling"])
def test_a_failure_in_the_middle_leaves_no_model(place, source, text, tmp_path, measured, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    expected: type[Exception] = OpenELMError
    if place == "weights":
        monkeypatch.setattr(mlx_format, "write", fail)
    elif place == "sensitivities":
        monkeypatch.setattr(sensitivity.Sensitivities, "save", fail)
    else:
        monkeypatch.setattr(dwq, "kl_divergence", lambda *_: mx.array(float("nan")))
    method = ("dwq",) if place == "distilling" else ()
    with pytest.raises(expected, match="leave dwq out" if place == "distilling" else "No space left"):
        quantize(source, tmp_path / "out", options(text, target_bpw=4.5, method=method))
    # Sensitivities take long to measure, so they are saved if possible.
    kept = [] if place == "sensitivities" else ["out-sensitivities.json"]
    assert [path.name for path in tmp_path.iterdir()] == kept
    if kept:
        config = mlx_format.read_config(source)[0]
        assert sensitivity.read(tmp_path / kept[0], config).text == "play.txt"


def test_a_failure_is_reported_if_sensitivities_cannot_be_saved(source, text, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(dwq, "kl_divergence", lambda *_: mx.array(float("nan")))
    with pytest.raises(OpenELMError, match="leave dwq out"):
        quantize(source, tmp_path / "new" / "out", options(text, target_bpw=4.5, method=("dwq",)))
    assert list(tmp_path.iterdir()) == []


def test_sensitivities_of_an_earlier_failure_are_not_replaced(source, text, tmp_path, measured, monkeypatch):
    monkeypatch.setattr(dwq, "kl_divergence", lambda *_: mx.array(float("nan")))
    earlier = tmp_path / "out-sensitivities.json"
    earlier.write_text("measured on more text")
    with pytest.raises(OpenELMError, match="leave dwq out"):
        quantize(source, tmp_path / "out", options(text, target_bpw=4.5, method=("dwq",)))
    assert earlier.read_text() == "measured on more text"


@pytest.mark.parametrize(
    ("on_gpu", "memory", "dtype"), [(True, 1 << 40, "float32"), (True, 1 << 10, None), (False, 1 << 10, "float32")]
)
def test_calibration_is_in_float32_unless_a_gpu_lacks_the_memory(
    on_gpu, memory, dtype, source, text, tmp_path, monkeypatch
):
    def build_model(checkpoint, dtype):
        raise OpenELMError(f"built in {dtype}")

    monkeypatch.setattr("mlx_openelm.backend.on_gpu", lambda: on_gpu)
    monkeypatch.setattr("mlx_openelm.backend.available_memory", lambda: memory)
    monkeypatch.setattr("mlx_openelm.jobs.quantize.build_model", build_model)
    with pytest.raises(OpenELMError, match=f"built in {dtype}"):
        quantize(source, tmp_path / "out", options(text, method=("gptq",)))


def test_progress_reaches_the_total_in_every_stage(source, text, tmp_path, monkeypatch):
    measure_few_choices(monkeypatch)
    some = dict(list(report.plain_choices(mlx_format.read_config(source)[0]).items())[:2])
    monkeypatch.setattr(report, "plain_choices", lambda _: some)
    reported: dict[str, list[tuple[int, int]]] = {}
    quantize(
        source,
        tmp_path / "out",
        options(text, target_bpw=4.5, method=("gptq", "dwq"), report=True),
        progress=lambda stage, done, total: reported.setdefault(stage, []).append((done, total)),
    )
    stages = [
        stage
        for stage in reported
        if stage in ("Comparing", "Measuring sensitivities", "Quantizing", "Distilling", "Writing")
    ]
    assert stages == ["Comparing", "Measuring sensitivities", "Quantizing", "Distilling", "Writing"]
    for steps in reported.values():
        assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert reported["Quantizing"][-1] == (5, 5)


def test_a_long_report_says_before_how_long_it_takes(source, text, monkeypatch):
    for seconds, expected in (
        (9.0, []),
        (44.0, ["The report compares 13 quantizations, which takes about 40 seconds."]),
        (700.0, ["The report compares 13 quantizations, which takes about 12 minutes."]),
        (9000.0, ["The report compares 13 quantizations, which takes about 2.5 hours."]),
    ):
        monkeypatch.setattr(report, "estimate", lambda config, reading, seconds=seconds: (13, seconds))
        monkeypatch.setattr(report, "compare", lambda *_, **__: iter([report.Row("not quantized", 16, 8, 9.0, 0.0)]))
        said: list[str] = []
        done = quantize(
            source, options=QuantizeOptions(report=True, calibration=str(text), sequence_length=32), say=said.append
        )
        assert said == expected
        assert done.measured_on is not None and done.measured_on.endswith("of a held-out part of play.txt")
