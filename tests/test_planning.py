"""The memory that is told before a run, beside what MLX's buffers take at most while it runs."""

from __future__ import annotations

import json
import subprocess
import sys

from mlx_openelm import load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.training import planning
from mlx_openelm.training.optimizers import make_optimizer
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.step import Updater

import pytest

# Layers, width, vocabulary or a published size; what is trained; rows, length, gradient checkpointing.
SHAPES = [
    ([6, 192, 2048], "lora", 4, 256, False),
    ([6, 192, 2048], "full", 4, 256, False),
    ([8, 512, 8000], "lora", 4, 512, True),
    ([8, 512, 8000], "full", 4, 256, True),
    ([4, 768, 32000], "dora", 2, 256, False),
    ([4, 256, 32000], "lora", 1, 2048, False),
]
LARGE = [("270M", "lora", 2, 512, False), ("270M", "lora", 2, 512, True), ("270M", "full", 1, 256, False)]

# In a process of its own, where nothing else is held.
MEASURE = """
import json, sys
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM
from mlx_openelm.training import planning
from mlx_openelm.training.batches import Batch
from mlx_openelm.training.optimizers import make_optimizer
from mlx_openelm.training.options import TrainOptions
from mlx_openelm.training.step import Updater
import mlx.core as mx

size, method, rows, length, grad_checkpoint = json.loads(sys.argv[1])
if isinstance(size, str):
    config = ModelConfig.from_name(size)
else:
    layers, width, vocab = size
    config = ModelConfig.from_dict({"num_transformer_layers": layers, "model_dim": width, "head_dim": 64,
        "vocab_size": vocab, "ffn_multipliers": [0.5, 4.0], "qkv_multipliers": [0.5, 1.0],
        "max_context_length": 2048, "rope_max_length": 4096, "share_input_output_layers": True})
model = OpenELM(config)
attach_new(model, rank=8, dora=method == "dora") if method != "full" else model.unfreeze()
options = TrainOptions(grad_checkpoint=grad_checkpoint)
updater = Updater(model, make_optimizer(options), grad_checkpoint=grad_checkpoint)
mx.eval(model.parameters(), updater.state())
planned = planning.plan(updater, options, (rows, length)).memory.peak
tokens = mx.random.randint(3, 1000, (rows, length + 1))
batch = Batch(tokens[:, :-1], tokens[:, 1:], None, tuple(range(rows)), rows * length, rows * length)
for step in range(2):
    mx.clear_cache()
    mx.reset_peak_memory()
    update = updater.update([batch], batch.num_targets, 1e-5, step)
    mx.eval(update.loss, updater.state())
print(json.dumps([planned, mx.get_peak_memory()]))
"""


def measured(shape: tuple) -> float:
    """The estimate over the measured peak."""
    command = [sys.executable, "-c", MEASURE, json.dumps(shape)]
    planned, peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout.splitlines()[-1])
    return planned / peak


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimates_are_within_15_percent(shape):
    assert measured(shape) == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_estimates_of_the_270m_size_are_within_15_percent(shape):
    assert measured(shape) == pytest.approx(1, abs=0.15)


def planned(**options: object) -> planning.Plan:
    model, _ = load("tiny", expand=True)
    attach_new(model, rank=4)
    chosen = TrainOptions(**options)  # type: ignore[arg-type]
    return planning.plan(Updater(model, make_optimizer(chosen)), chosen, (chosen.batch_size, 512))


def test_a_run_that_fits_is_not_warned_about(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 8_000_000_000)
    assert planned().warning() is None
    monkeypatch.setattr(planning, "available_memory", lambda: None)
    assert planned().warning() is None


def test_a_run_that_does_not_fit_is_told_what_would(monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda: 10_000_000)
    plan = planned(batch_size=4, grad_accumulation_steps=2)
    warning = plan.warning()
    assert warning is not None
    flags = [flags for flags, _ in plan.alternatives]
    assert flags == ["--grad-checkpoint", "that and --batch-size 1 --grad-accumulation-steps 8"]
    assert all(name in warning for name in flags)
    peaks = [plan.memory.peak, *(memory.peak for _, memory in plan.alternatives)]
    assert peaks == sorted(peaks, reverse=True)


def test_the_parts_are_told():
    text = str(planned().memory)
    assert text.startswith("about ")
    for part in ("the model 10 MB", "the optimizer 0.5 MB", "gradients 0.2 MB", "activations up to"):
        assert part in text
