"""A training step on a GPU, if there is one: MLX's gradient of attention against the block-wise one."""

from __future__ import annotations

import itertools

from mlx_openelm import backend, load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.model import OpenELM
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS, TrainOptions
from mlx_openelm.training.run.planning import plan
from mlx_openelm.training.step import attention as attention_module
from mlx_openelm.training.step import forward as forward_module
from mlx_openelm.training.step.evaluation import evaluate
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from gpu_devices import STAND_IN, needs_gpu, needs_real_gpu
from mlx.utils import tree_flatten
from quantization_models import tiny_model

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]


def batch_of(length: int, examples: int) -> Batch:
    tokens = mx.random.randint(3, 2000, (2, length + 1), key=mx.random.key(length))
    segments = mx.broadcast_to(mx.arange(length) * examples // length, (2, length)) if examples > 1 else None
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, (0, 1), 2 * length, 2 * length)


def bfloat16_model() -> OpenELM:
    """`tiny`; on a stand-in, which is slow, two layers with heads of the same size."""
    if not STAND_IN:
        return load("tiny", expand=True, dtype="bfloat16")[0]
    model = tiny_model(head_dim=32, vocab_size=2048)
    model.set_dtype(mx.bfloat16)
    return model


def step(batch: Batch, recompute: str) -> tuple[float, mx.array]:
    """The loss and all gradients of a nonzero adapter, in bfloat16."""
    model = bfloat16_model()
    attach_new(model, rank=4, seed=0)
    names = [name for name, _ in tree_flatten(model.trainable_parameters()) if name.endswith("lora_b")]
    for name, key in zip(names, mx.random.split(mx.random.key(1), len(names)), strict=True):
        shape = dict(tree_flatten(model.trainable_parameters()))[name].shape
        model.load_weights([(name, 0.02 * mx.random.normal(shape, key=key))], strict=False)
    before = [value for _, value in tree_flatten(model.trainable_parameters())]
    updater = Updater(model, optim.SGD(1.0), recompute=recompute)
    loss = updater.update([batch], batch.num_targets, 1.0, 0).loss.item()
    after = [value for _, value in tree_flatten(model.trainable_parameters())]
    return loss, mx.concatenate([(a - b).reshape(-1) for a, b in zip(before, after, strict=True)])


# Whole and padded tiles of queries, single and packed examples; few of them where a CPU stands in.
CASES = [*itertools.product((256, 136), (1, 3), (NOTHING, PARTS, LAYERS)), (72, 3, PARTS)]
MARKS = {(72, 3, PARTS): [], (136, 3, PARTS): [pytest.mark.slow], (256, 1, NOTHING): [pytest.mark.slow]}


@pytest.mark.parametrize(
    ("length", "examples", "recompute"),
    [pytest.param(*case, marks=MARKS.get(case, [needs_real_gpu])) for case in CASES],
)
def test_mlxs_attention_gradient_equals_the_block_wise_one(monkeypatch, length, examples, recompute):
    batch = batch_of(length, examples)
    loss, gradients = step(batch, recompute)
    for module in (attention_module, forward_module):
        monkeypatch.setattr(module, "fuses_attention_gradient", lambda dtype, head_dim: False)
    expected_loss, expected = step(batch, PARTS)
    assert mx.all(mx.isfinite(gradients)).item()
    assert loss == pytest.approx(expected_loss, rel=5e-3)
    assert (mx.linalg.norm(gradients - expected) / mx.linalg.norm(expected)).item() < 0.05


def test_a_small_run_recomputes_nothing_and_knows_the_gpus_memory():
    model = bfloat16_model()
    attach_new(model, rank=4)
    if backend.device() == "Metal":
        pytest.skip("only on CUDA is the choice made by free memory")
    chosen = plan(Updater(model, make_optimizer(TrainOptions())), TrainOptions(), (4, 256))
    assert chosen.recompute == NOTHING and chosen.warning() is None
    assert backend.total_memory() == mx.device_info()["total_memory"]
    batch = batch_of(200, 1)
    assert evaluate(model, [batch]).tokens == 400
