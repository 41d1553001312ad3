"""Training as on CUDA, with the CPU in place of the GPU: MLX's fused operations exist here too."""

from __future__ import annotations

from mlx_openelm import backend
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM
from mlx_openelm.training.data.batches import Batch
from mlx_openelm.training.options import LAYERS, NOTHING, PARTS
from mlx_openelm.training.step import attention as attention_module
from mlx_openelm.training.step import forward as forward_module
from mlx_openelm.training.step import strategy
from mlx_openelm.training.step.evaluation import evaluate
from mlx_openelm.training.step.forward import hidden_states
from mlx_openelm.training.step.swiglu import swiglu
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from devices import pretend
from gpu_devices import H100
from mlx.utils import tree_flatten


@pytest.fixture
def cuda(monkeypatch) -> None:
    """Make the package see a GPU, which also uses MLX's attention gradient in float32, for comparison."""
    pretend(monkeypatch, "CUDA")
    for module in (attention_module, forward_module):
        monkeypatch.setattr(module, "fuses_attention_gradient", lambda dtype, head_dim: True)


@pytest.fixture(scope="module")
def model() -> OpenELM:
    return make_model()


def make_model() -> OpenELM:
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": 3, "model_dim": 128, "head_dim": 32, "vocab_size": 300,
            "ffn_multipliers": [0.5, 4.0], "qkv_multipliers": [0.5, 1.0], "max_context_length": 512,
            "rope_max_length": 1024, "share_input_output_layers": True,
        }
    )  # fmt: skip
    model = OpenELM(config)
    mx.eval(model.parameters())
    return model


def batch_of(rows: int, length: int, examples: int = 1) -> Batch:
    """Random tokens, in `examples` segments a row if there are several."""
    tokens = mx.random.randint(3, 300, (rows, length + 1), key=mx.random.key(length))
    segments = None
    if examples > 1:
        segments = mx.minimum(mx.arange(length) * examples // (length - 5), examples)
        segments = mx.broadcast_to(mx.where(segments == examples, -1, segments), (rows, length))
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, tuple(range(rows)), rows * length, rows * length)


def plain(model: OpenELM, batch: Batch) -> tuple[float, dict[str, mx.array]]:
    """Loss and gradients of the plain model's own attention."""
    mask = None
    if batch.segments is not None:
        positions = mx.arange(batch.segments.shape[1])
        mask = (batch.segments[:, :, None] == batch.segments[:, None]) & (positions[:, None] >= positions)
        mask = mask[:, None]

    def loss(model: OpenELM) -> mx.array:
        return nn.losses.cross_entropy(model(batch.inputs, mask=mask), batch.targets, reduction="mean")

    value, gradients = nn.value_and_grad(model, lambda: loss(model))()
    mx.eval(value, gradients)
    return value.item(), dict(tree_flatten(gradients))


def ours(model: OpenELM, batch: Batch, recompute: str) -> tuple[float, dict[str, mx.array]]:
    before = dict(tree_flatten(model.trainable_parameters()))
    updater = Updater(model, optim.SGD(1.0), recompute=recompute)
    loss = updater.update([batch], batch.num_targets, 1.0, 0).loss.item()
    after = dict(tree_flatten(model.trainable_parameters()))
    gradients = {name: before[name] - after[name] for name in before}
    mx.eval(gradients)
    model.load_weights(list(before.items()), strict=False)
    return loss, gradients


# Whole tiles, less than one, more than one; one example per row, and several.
@pytest.mark.parametrize(("length", "examples"), [(128, 1), (40, 1), (200, 1), (128, 3), (200, 3), (1, 1)])
@pytest.mark.parametrize("recompute", [NOTHING, PARTS, LAYERS])
def test_gradients_equal_the_plain_models(model, monkeypatch, request, length, examples, recompute):
    model.unfreeze()
    batch = batch_of(2, length, examples)
    value, expected = plain(model, batch)
    request.getfixturevalue("cuda")
    loss, gradients = ours(model, batch, recompute)
    assert loss == pytest.approx(value, rel=1e-5)
    for name, gradient in expected.items():
        difference = mx.abs(gradients[name] - gradient).max().item()
        assert difference <= 2e-4 * mx.abs(gradient).max().item() + 2e-7, name
    assert evaluate(model, [batch]).loss == pytest.approx(value, rel=1e-5)


def test_queries_fill_whole_tiles(model, cuda, monkeypatch):
    """MLX's fused gradient requires that, and additive masks shared by all heads."""
    seen = []
    fused = mx.fast.scaled_dot_product_attention

    def noted(queries, keys, values, *, scale, mask):
        seen.append((queries.shape[2], keys.shape[2], mask if isinstance(mask, str) else (mask.shape, mask.dtype)))
        return fused(queries, keys, values, scale=scale, mask=mask)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noted)
    model.freeze()
    for length, examples in ((200, 1), (256, 1), (200, 2)):
        batch = batch_of(2, length, examples)
        mx.eval(hidden_states(model, batch.inputs, batch.segments))
    assert set(seen) == {(256, 256, "causal"), (256, 256, ((2, 1, 256, 256), mx.float32))}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_masks_have_no_infinities(dtype):
    segments = mx.array([[0, 0, 1, -1]])
    mask = attention_module.fused_mask(segments, dtype)
    assert mask.shape == (1, 1, 128, 128) and mask.dtype == dtype
    assert mx.all(mx.isfinite(mask)).item()
    visible = mask[0, 0, :5, :5].tolist()
    assert [[value == 0 for value in row] for row in visible] == [
        [True, False, False, False, False],
        [True, True, False, False, False],
        [False, False, True, False, False],
        [False, False, False, True, False],
        [False, False, False, True, True],
    ]
    # Every row sees something, even padding.
    assert mx.all(mx.max(mask, axis=-1) == 0).item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_of_swiglu(cuda, dtype):
    x = mx.random.normal((7, 64), key=mx.random.key(1)).astype(dtype)
    weight = mx.random.normal((7, 32), key=mx.random.key(2))

    def reference(x: mx.array) -> mx.array:
        gate, up = mx.split(x.astype(mx.float32), 2, axis=-1)
        return mx.sum(weight * (nn.silu(gate) * up))

    expected = mx.grad(reference)(x.astype(mx.float32))
    found = mx.grad(lambda x: mx.sum(weight * swiglu(x).astype(mx.float32)))(x)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    assert mx.abs(found.astype(mx.float32) - expected).max().item() < tolerance


def test_dropout_and_adapters_agree_at_all_levels(cuda):
    model = make_model()
    attach_new(model, rank=4, dropout=0.3, seed=0)
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            model.load_weights([(name, mx.random.normal(value.shape, key=mx.random.key(3)) * 0.1)], strict=False)
    model.train()
    batch = batch_of(2, 150)
    results = [ours(model, batch, level) for level in (NOTHING, PARTS, LAYERS)]
    for loss, gradients in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        for name, gradient in results[0][1].items():
            scale = mx.abs(gradient).max().item()
            assert mx.abs(gradients[name] - gradient).max().item() <= 1e-4 * scale + 2e-7, name


def test_the_fused_gradient_is_for_half_precision_on_new_enough_gpus(monkeypatch):
    fuses = strategy.fuses_attention_gradient
    assert not fuses(mx.bfloat16, 64)  # a CPU
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setattr(strategy.mx, "device_info", lambda: H100)
    assert fuses(mx.bfloat16, 64) and fuses(mx.float16, 128)
    assert not fuses(mx.float32, 64) and not fuses(mx.bfloat16, 20) and not fuses(mx.bfloat16, 160)
    monkeypatch.setattr(strategy.mx, "device_info", lambda: H100 | {"compute_capability_major": 7})
    assert not fuses(mx.bfloat16, 64)


def test_metal_and_cpus_use_the_careful_strategy(monkeypatch):
    for gpu in (False, True):
        pretend(monkeypatch, "Metal" if gpu else "CPU")
        assert strategy.here() == strategy.Strategy(False, PARTS, 128, 200_000_000)
        assert not strategy.fuses_attention_gradient(mx.bfloat16, 64)


def test_available_memory_is_the_gpus(monkeypatch):
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: H100)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1_000_000_000)
    assert backend.total_memory() == 85_520_809_984
    assert backend.available_memory() == 85_000_000_000  # buffers that MLX keeps for reuse count as free
