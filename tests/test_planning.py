"""The memory estimate of a run, compared with the peak of MLX's buffers while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

from mlx_openelm import load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.errors import RequestError, name_options
from mlx_openelm.model import OpenELM
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.run import planning
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import pytest
from processes import environment

# Layers, width, vocabulary or a published size; what is trained; rows, length, gradient checkpointing.
SHAPES = [
    pytest.param(([6, 192, 2048], "lora", 4, 256, False), marks=pytest.mark.slow),
    ([6, 192, 2048], "full", 4, 256, False),
    pytest.param(([6, 384, 8000], "lora", 2, 384, True), marks=pytest.mark.slow),
    pytest.param(([6, 384, 8000], "full", 2, 192, True), marks=pytest.mark.slow),
    pytest.param(([3, 512, 32000], "dora", 2, 256, False), marks=pytest.mark.slow),
    ([3, 192, 16000], "lora", 1, 512, False),
    ([6, 192, 2048], "last", 4, 256, False),
    ([6, 192, 2048], "compact", 2, 128, False),
    pytest.param(([3, 1024, 2048], "compact", 2, 128, False), marks=pytest.mark.slow),
    ([6, 192, 8000], "lora", 1, 24, False),
    ([1, 64, 2048], "packed", 2, 1024, False),
    ([1, 64, 4096], "full", 4, 64, False),
]
LARGE = [("270M", "lora", 2, 512, False), ("270M", "lora", 2, 512, True), ("270M", "full", 1, 256, False)]

# In a separate process, where nothing else holds memory.
MEASURE = """
import gc, json, sys
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM
from mlx_openelm.training.run import planning
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.step.updater import Updater
import mlx.core as mx

def measure(size, method, rows, length, grad_checkpoint):
    if isinstance(size, str):
        config = ModelConfig.from_name(size)
    else:
        layers, width, vocab = size
        config = ModelConfig.from_dict({"num_transformer_layers": layers, "model_dim": width, "head_dim": 64,
            "vocab_size": vocab, "ffn_multipliers": [0.5, 4.0], "qkv_multipliers": [0.5, 1.0],
            "max_context_length": 2048, "rope_max_length": 4096, "share_input_output_layers": True})
    model = OpenELM(config)
    layers = 1 if method == "last" else -1
    is_full, is_compact = method in ("full", "compact", "packed"), method == "compact"
    packed = method == "packed"
    attach_new(model, rank=8, dora=method == "dora", num_layers=layers) if not is_full else model.unfreeze()
    if is_compact:
        model.set_dtype(mx.bfloat16)
    options = TrainOptions(grad_checkpoint=grad_checkpoint, packing=packed)
    updater = Updater(model, make_optimizer(options), recompute="layers" if grad_checkpoint else "parts",
                      compute_dtype=mx.bfloat16 if is_compact else None, is_compact=is_compact)
    mx.eval(model.parameters(), updater.held())
    planned = planning.plan(updater, options, (rows, length)).memory.peak
    tokens = mx.random.randint(3, 1000, (rows, length + 1))
    segments = mx.zeros((rows, length), dtype=mx.int32) if packed else None
    batch = Batch(tokens[:, :-1], tokens[:, 1:], segments, tuple(range(rows)), rows * length, rows * length)
    for step in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        update = updater.update([batch], batch.num_targets, 1e-5, step)
        mx.eval([update.loss, update.objective, update.grad_norm], updater.held())
    return planned, mx.get_peak_memory()

for line in sys.stdin:
    gc.collect()
    assert mx.get_active_memory() < 500_000  # of the shapes before, tables of positions alone are left
    print(json.dumps(measure(*json.loads(line))), flush=True)
"""


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=environment()) as process:  # fmt: skip
        yield process


def measured(process: subprocess.Popen[str], shape: tuple) -> float:
    """The estimate over the measured peak."""
    assert process.stdin is not None and process.stdout is not None
    print(json.dumps(shape), file=process.stdin, flush=True)
    planned, peak = json.loads(process.stdout.readline())
    return planned / peak


@pytest.mark.compiled  # the estimates are of compiled updates
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimates_are_within_15_percent(process, shape):
    assert measured(process, shape) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_estimates_of_the_270m_size_are_within_15_percent(process, shape):
    assert measured(process, shape) == pytest.approx(1, abs=0.15)


@cache
def adapted() -> OpenELM:
    """A model with an adapter, which no plan changes."""
    model, _ = load("tiny", expand=True)
    attach_new(model, rank=4)
    return model


def planned(**options: object) -> planning.Plan:
    chosen = TrainOptions(**options)  # type: ignore[arg-type]
    return planning.plan(Updater(adapted(), make_optimizer(chosen)), chosen, (chosen.batch_size, 512))


def test_a_run_that_fits_is_not_warned_about(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 8_000_000_000)
    assert planned().warning() is None
    monkeypatch.setattr(planning, "available_memory", lambda: None)
    assert planned().warning() is None


def test_a_run_that_does_not_fit_gets_advice(monkeypatch):
    plan = planned(batch_size=4, grad_accumulation_steps=2)
    needs = dict(plan.alternatives)
    assert list(needs) == [
        "--grad-checkpoint",
        "--grad-checkpoint --batch-size 2 --grad-accumulation-steps 4",
        "--grad-checkpoint --batch-size 1 --grad-accumulation-steps 8",
    ]
    peaks = [plan.memory.peak, *(memory.peak for memory in needs.values())]
    assert peaks == sorted(peaks, reverse=True)
    smaller = [name_options(flags) for flags in needs]
    # Enough for two of the three: those that cost least time come first.
    free = round(peaks[2] / 0.9) - plan.memory.model + 1000
    monkeypatch.setattr(planning, "available_memory", lambda: free)
    warning = plan.warning()
    assert warning is not None and f"with {smaller[1]}: " in warning and f" or {smaller[2]}: " in warning
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    warning = plan.warning()  # nothing fits, so the smallest need is named
    assert warning is not None and f"with {smaller[2]}: " in warning and " or " not in warning


def test_a_run_larger_than_total_memory_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 1000)
    monkeypatch.setattr(planning, "total_memory", lambda: 10_000_000)
    with pytest.raises(RequestError, match="The run needs about .* with grad_checkpoint"):
        planned().warning()


def test_activations_below_the_trained_layers_are_not_counted():
    last = planned_layers(num_layers=1)
    assert last < 0.8 * planned_layers(num_layers=-1)
    embedding = planned_layers(num_layers=1, target_modules=("token_embeddings", "qkv_proj"))
    assert embedding == pytest.approx(planned_layers(target_modules=("token_embeddings", "qkv_proj")), rel=0.02)


def planned_layers(**what: object) -> int:
    model, _ = load("tiny", expand=True)
    attach_new(model, rank=4, **what)  # type: ignore[arg-type]
    options = TrainOptions()
    return planning.plan(Updater(model, make_optimizer(options)), options, (4, 256)).memory.activations


def test_the_estimate_lists_its_parts():
    text = str(planned().memory)
    assert text.startswith("about ")
    for part in ("the model 16.7 MB", "the optimizer 641.0 kB", "gradients 320.5 kB", "activations up to"):
        assert part in text
