"""What is recomputed, as decided by the options or on CUDA by free memory, and how it is reported."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

from mlx_openelm import backend, load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.model import OpenELM
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS, FineTuneOptions, TrainOptions
from mlx_openelm.training.run import planning
from mlx_openelm.training.run.activations import Shape
from mlx_openelm.training.run.folder import compare
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import pytest
import training_runs
from in_process import run_here


@pytest.fixture
def cuda(monkeypatch) -> None:
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setattr(planning, "total_memory", lambda: 80_000_000_000)
    monkeypatch.setattr(planning, "fuses_attention_gradient", lambda dtype, head_dim: True)


@cache
def adapted() -> OpenELM:
    """A model with an adapter, which no plan changes."""
    model, _ = load("tiny", expand=True)
    attach_new(model, rank=4)
    return model


def plan(**options: object) -> planning.Plan:
    chosen = TrainOptions(**options)  # type: ignore[arg-type]
    return planning.plan(Updater(adapted(), make_optimizer(chosen)), chosen, (16, 1024))


def give(monkeypatch, free: float | None) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: free)


def test_as_little_as_fits_is_recomputed(monkeypatch, cuda):
    give(monkeypatch, None)  # unknown, so it is assumed to fit
    peaks = {level: plan(recompute=level).memory.peak for level in (NOTHING, PARTS, LAYERS)}
    assert peaks[NOTHING] > peaks[PARTS]
    assert plan().recompute == NOTHING
    model = plan().memory.model
    for level, free in ((NOTHING, peaks[NOTHING]), (PARTS, peaks[PARTS]), (LAYERS, peaks[PARTS] - 1000)):
        give(monkeypatch, math.ceil(free / 0.9) - model)
        assert plan().recompute == level
        assert plan().memory.peak == peaks[level]


# Peak memory of steps that follow others, above masters (or frozen weights) and optimizer state, in GB, on an H200 with
# MLX 0.32.4: rows, length, then with nothing, parts and whole layers recomputed.
MEASURED = {
    ("full", "270M"): (8, 1024, 18.84, 15.92, 13.95),
    ("full", "1_1B"): (2, 1024, 25.25, 24.15, 23.26),
    ("lora", "270M"): (8, 512, 11.87, 9.76, 9.15),
    ("lora", "1_1B"): (4, 1024, 21.50, 17.50, 16.23),
    ("lora", "3B"): (2, 1024, 19.87, 16.45, 14.30),
}


@pytest.mark.parametrize(("method", "size"), MEASURED)
def test_estimates_are_close_to_measurements_on_a_gpu(cuda, method, size):
    config = ModelConfig.from_name(f"OpenELM-{size}")
    if method == "full":
        trained = {name: 4 * math.prod(shape) for name, shape in config.tensor_shapes().items()}
        held = {"model_bytes": sum(trained.values()), "optimizer_bytes": 2 * sum(trained.values())}
    else:  # adapters of rank 8 are too small to show
        trained = {name: 4000 for name in config.tensor_shapes() if "proj" in name}
        held = {"model_bytes": 2 * config.num_parameters, "optimizer_bytes": 0}
    rows, length, *peaks = MEASURED[method, size]
    for level, measured in zip((NOTHING, PARTS, LAYERS), peaks, strict=True):
        shape = Shape(rows, length, 2, level, fused=True)
        found = planning.estimate(config, shape, trained=trained, casts=method == "full", **held)
        assert found.peak == pytest.approx(measured * 1e9 + sum(held.values()), rel=0.10)


def test_an_explicit_choice_is_never_overridden(monkeypatch, cuda):
    for free in (1000, None):
        give(monkeypatch, free)
        for level in (NOTHING, PARTS, LAYERS):
            assert plan(recompute=level).recompute == level
        assert plan(grad_checkpoint=True).recompute == LAYERS


def test_parts_is_the_default_off_cuda(monkeypatch):
    for free in (1000, None):
        give(monkeypatch, free)
        assert plan().recompute == PARTS
    assert plan(recompute=NOTHING).recompute == NOTHING
    assert plan(recompute=NOTHING).memory.peak > plan().memory.peak > plan(recompute=LAYERS).memory.peak


def test_the_plan_says_what_is_recomputed(monkeypatch):
    give(monkeypatch, None)
    assert str(plan(recompute=NOTHING)).endswith("; nothing is recomputed")
    assert str(plan(grad_checkpoint=True)).endswith("; whole layers are recomputed")
    usual = plan()
    assert str(usual) == str(usual.memory)


def test_two_names_must_not_contradict():
    TrainOptions(recompute=LAYERS, grad_checkpoint=True).check()
    with pytest.raises(RequestError, match="grad_checkpoint is recompute layers, not nothing"):
        TrainOptions(recompute=NOTHING, grad_checkpoint=True).check()
    with pytest.raises(RequestError, match="recompute must be auto, nothing, parts or layers, got 'some'"):
        TrainOptions(recompute="some").check()


def test_a_run_may_be_resumed_with_another_choice():
    options = FineTuneOptions(train=True, data="x")
    record = {"model": "m", "options": {**json.loads(json.dumps(vars(options)))}}
    assert compare("m", replace(options, recompute=NOTHING), {}, record) == []


def test_the_choice_is_kept_in_the_runs_record(tmp_path: Path):
    training_runs.write_run_folder(tmp_path)
    words = ["--model", "model", "--train", "--data", "data", "--iters", 2, "--batch-size", 2, "--val-batches", 0]
    losses = {}
    for level in ("auto", NOTHING):
        done = run_here("lora", *words, "--recompute", level, "--adapter-path", level, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert ("nothing is recomputed" in done.stderr) == (level == NOTHING)
        record = json.loads((tmp_path / level / "run.json").read_text())
        assert record["recompute"] == {"auto": PARTS}.get(level, level)
        assert record["options"]["recompute"] == level
        losses[level] = json.loads((tmp_path / level / "metrics.jsonl").read_text().splitlines()[-1])["train_loss"]
    assert losses["auto"] == pytest.approx(losses[NOTHING], rel=1e-5)
