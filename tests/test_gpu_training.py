"""Adapters and training on a GPU: logits, gradients, updates and resumed runs against the CPU's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_openelm import load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.errors import OpenELMError
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.model import OpenELM
from mlx_openelm.ops.packed import MODES
from mlx_openelm.training import finetune as finetune_module
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.finetune import finetune
from mlx_openelm.training.options import LAYERS, PARTS, FineTuneOptions
from mlx_openelm.training.run.metrics import Metrics
from mlx_openelm.training.step.optimizers import make_optimizer
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from gpu_devices import (
    FIXTURES,
    GRADIENT_TOLERANCE,
    SHAKESPEARE,
    TOLERANCE,
    assert_close,
    assert_close_gradients,
    computed,
    needs_gpu,
    on,
    slow_on_a_stand_in,
)
from mlx.utils import tree_flatten, tree_unflatten
from quantization_models import tiny_model
from test_training_step import packed, rows_of, sequences
from training_runs import metrics, write_run_folder

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

VOCAB = 256
EVERYTHING = ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"dora": True},
    "lora, embeddings too": {"target_modules": EVERYTHING},
    "dora, embeddings too": {"target_modules": EVERYTHING, "dora": True},
}
BASES = {
    "plain": None,
    **{mode: Quantization.make(mode, group_size=32 if mode == "affine" else None) for mode in MODES},
}


def base(dtype: str, packing: Quantization | None = None) -> OpenELM:
    """Two layers of random weights, the same on every device, packed or not."""
    with on("cpu"):
        model = tiny_model(seed=4, head_dim=64)
        if packing is not None:
            _pack(model, packing)
        mx.eval(model.parameters())
    for module in model.modules():
        for name, value in list(module.items()):
            if isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating):
                module[name] = value.astype(getattr(mx, dtype))
    return model


def _pack(model: OpenELM, packing: Quantization) -> None:
    nn.quantize(model, packing.group_size, packing.bits, mode=packing.mode)


def adapted(dtype: str, packing: Quantization | None, **options: Any) -> OpenELM:
    """With a nonzero adapter."""
    model = base(dtype, packing)
    attach_new(model, **{"rank": 4, "scale": 2.0, "seed": 1, **options})
    for number, (name, value) in enumerate(tree_flatten(model.trainable_parameters())):
        if name.endswith("lora_b"):
            drawn = np.random.default_rng(number).normal(0, 0.1, value.shape)
            model.update(tree_unflatten([(name, mx.array(drawn.astype(np.float32)))]))
    return model


def ids() -> mx.array:
    return mx.array(np.random.default_rng(5).integers(3, VOCAB, (2, 41)))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind == "lora, embeddings too" else ()) for kind in KINDS]
)
@pytest.mark.parametrize("packing", BASES)
def test_adapters(kind, packing):
    """Logits of a prompt and of a few tokens, and the gradients of all trained parameters."""

    def logits(dtype: str) -> list[mx.array]:
        model = adapted(dtype, BASES[packing], **KINDS[kind])
        return [model(ids()), model(ids()[:, :3])]

    def gradients(dtype: str) -> dict[str, mx.array]:
        model = adapted(dtype, BASES[packing], **KINDS[kind])
        model.train()

        def loss(model: OpenELM) -> mx.array:
            logits = model(ids()[:, :-1]).astype(mx.float32)
            return nn.losses.cross_entropy(logits, ids()[:, 1:], reduction="mean")

        return dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))

    whole, few = computed("cpu", logits, "float32")
    slopes = computed("cpu", gradients, "float32")
    for dtype in ("float32", "bfloat16"):
        found = computed("gpu", logits, dtype)
        assert_close(found[0], whole, 2 * TOLERANCE[dtype])
        assert_close(found[1], few, 2 * TOLERANCE[dtype])
        assert_close_gradients(computed("gpu", gradients, dtype), slopes, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["lora", "rslora-attention", "dora", "lora-embedding"])
def test_peft_adapters_give_pefts_logits(name, reference):
    with np.load(FIXTURES / "adapters-reference.npz") as arrays:
        expected = arrays[f"peft-{name}"]
    model, _ = load(SHAKESPEARE, FIXTURES / f"peft-{name}", "float32")
    found = np.array(model(mx.array([reference["ids"][0]]))[0])
    assert_close(found, expected, 2 * TOLERANCE["float32"])


# One update.


def batches() -> dict[str, Batch]:
    return {
        "rows": rows_of(sequences([60, 33, 5], VOCAB), masked=1),
        "packed": packed(sequences([40, 20, 30], VOCAB), 128),
    }


METHODS: dict[str, Any] = {
    "lora": lambda dtype, packing: adapted(dtype, packing, target_modules=EVERYTHING, dropout=0.2),
    "dora": lambda dtype, packing: adapted(dtype, packing, dora=True),
    "full": lambda dtype, _: unfrozen(base(dtype)),
}


def unfrozen(model: OpenELM) -> OpenELM:
    model.unfreeze()
    return model


def updated(method: str, dtype: str, batch: str, packing: str = "plain", **options: Any) -> dict[str, mx.array]:
    """The loss of one SGD update, and the change of each trained weight: minus the gradient."""
    model = METHODS[method](dtype, BASES[packing])
    compute = None if dtype == "float32" else getattr(mx, dtype)
    before = {name: value.astype(mx.float32) for name, value in tree_flatten(model.trainable_parameters())}
    updater = Updater(model, optim.SGD(1.0), compute_dtype=compute, seed=3, **options)
    given = batches()[batch]
    update = updater.update([given], given.num_targets, 1.0, 0)
    after = dict(tree_flatten(model.trainable_parameters()))
    return {"loss": update.loss, **{name: after[name] - before[name] for name in before}}


@pytest.mark.parametrize(("batch", "dtype"), [("rows", "float32"), ("packed", "float32"), ("rows", "bfloat16")])
@pytest.mark.parametrize("method", METHODS)
def test_one_update(method, batch, dtype):
    """Dropout uses the same masks on both devices."""
    expected, found = computed("cpu", updated, method, "float32", batch), computed("gpu", updated, method, dtype, batch)
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=TOLERANCE[dtype] / 2)
    assert_close_gradients(found, expected, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointing_changes_nothing(method):
    plain, again = (
        computed("gpu", lambda x=x: updated(method, "float32", "rows", recompute=x)) for x in (PARTS, LAYERS)
    )
    assert again.pop("loss") == pytest.approx(plain.pop("loss"), rel=1e-4)
    assert_close_gradients(again, plain, GRADIENT_TOLERANCE["float32"])


@pytest.mark.parametrize("packing", MODES)
def test_an_update_of_an_adapter_on_packed_weights(packing):
    expected = computed("cpu", updated, "lora", "float32", "rows", packing)
    for dtype in ("float32", "bfloat16"):
        found = computed("gpu", updated, "lora", dtype, "rows", packing)
        assert found.pop("loss") == pytest.approx(expected["loss"], rel=TOLERANCE[dtype])
        wanted = {name: value for name, value in expected.items() if name != "loss"}
        assert_close_gradients(found, wanted, GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_learns_the_same_text(name):
    """Signs of small gradients may differ; the final loss does not."""

    def losses() -> list[mx.array]:
        model = METHODS["full"]("float32", None)
        rate = {"adamw": 3e-3, "muon": 1e-2}[name]
        options = FineTuneOptions(train=True, data="data", optimizer=name, learning_rate=rate)
        updater, given = Updater(model, make_optimizer(options)), batches()["rows"]
        return [updater.update([given], given.num_targets, rate, step).loss for step in range(8)]

    expected, found = (np.array(computed(device, losses)) for device in ("cpu", "gpu"))
    assert expected[-1] < 0.95 * expected[0]
    assert np.abs(found - expected).max() < 0.02 * expected[0]


# Whole runs.

RUN = FineTuneOptions(train=True, data="data", iters=8, batch_size=4, learning_rate=1e-2, max_seq_length=48,
                      steps_per_report=2, steps_per_eval=4, val_batches=1, save_every=2, rank=4, dropout=0.1,
                      optimizer="adamw", max_grad_norm=1.0)  # fmt: skip


def learned(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(folder / "adapters.safetensors")).items()}


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"fine_tune_type": "dora"}, marks=pytest.mark.slow), {"packing": True}], ids=str
)
@slow_on_a_stand_in
def test_a_resumed_run_equals_an_uninterrupted_one(changes, tmp_path, monkeypatch):
    """Up to rounding: a GPU may sum in varying order."""
    write_run_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_module, "Metrics", partial(Metrics, plot=False))
    options = replace(RUN, **changes)
    finetune("model", replace(options, adapter_path="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "update", _until(4, Updater.update))
        with pytest.raises(OpenELMError, match="stopped"):
            finetune("model", replace(options, adapter_path="parts"))
    finetune("model", replace(options, adapter_path="parts", resume=True))
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert whole.keys() == parts.keys() and any(np.abs(value).max() > 0.01 for value in whole.values())
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, atol=1e-3 * np.abs(value).max(), err_msg=name)
    rows = [[row.get("train_loss", row.get("val_loss")) for row in metrics(tmp_path / x)] for x in ("whole", "parts")]
    assert _numbers(rows[1]) == pytest.approx(_numbers(rows[0]), rel=1e-3)


def _until(last: int, update: Any) -> Any:
    def stop(self: Updater, given: Sequence[Batch], num_targets: int, learning_rate: float, step: int) -> Any:
        if step == last:
            raise OpenELMError("stopped")
        return update(self, given, num_targets, learning_rate, step)

    return stop


def _numbers(values: Sequence[Any]) -> list[float]:
    found = [value for value in values if value is not None]
    assert found
    return found
