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
from mlx_openelm.training.step import gradients as gradients_module
from mlx_openelm.training.step import loss as loss_module
from mlx_openelm.training.step import strategy
from mlx_openelm.training.step.evaluation import evaluate
from mlx_openelm.training.step.forward import hidden_states
from mlx_openelm.training.step.gradients import swiglu
from mlx_openelm.training.step.updater import Updater

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from devices import pretend
from gpu_devices import H100
from graphs import operations
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
@pytest.mark.covering
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


def test_attentions_gradient_has_the_memory_order_of_its_output(model, cuda, monkeypatch):
    """On CUDA MLX's gradient is wrong otherwise, without an error."""
    seen = []
    fused = mx.fast.scaled_dot_product_attention

    def noted(queries, keys, values, *, scale, mask):
        @mx.custom_function
        def attend(*heads):
            return fused(*heads, scale=scale, mask=mask)

        @attend.vjp
        def _(heads, cotangent, _):
            seen.append((cotangent.shape, np.array(cotangent, copy=False).strides))
            return mx.vjp(lambda *heads: [fused(*heads, scale=scale, mask=mask)], heads, [cotangent])[1]

        return attend(queries, keys, values)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", noted)
    model.unfreeze()
    for length, examples in ((256, 1), (200, 1), (200, 2), (40, 1)):
        ours(model, batch_of(2, length, examples), NOTHING)
    for (_, heads, length, dim), strides in seen:
        assert strides == (4 * length * heads * dim, 4 * dim, 4 * heads * dim, 4)  # [B, L, H, D] in memory
    assert {shape[2] for shape, _ in seen} == {128, 256} and len(seen) == 4 * len(model.layers)


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


@pytest.mark.compiled
def test_the_gradient_of_swiglu_is_one_kernel(tmp_path):
    arrays = mx.ones((3, 16), mx.bfloat16), mx.ones((3, 8), mx.bfloat16)
    mx.eval(arrays)
    found = operations([gradients_module._swiglu_gradient(*arrays)], tmp_path)
    fused = [name for name in found if name.startswith("Compiled")]
    assert len(fused) == 1
    assert set(found) - set(fused) <= {"Reshape", "Slice", "ExpandDims", "Split"}  # these compute nothing


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("adds", [False, True])
def test_the_gradients_of_products(cuda, dtype, adds):
    x, weight, residual, slope = (
        mx.random.normal(shape, key=mx.random.key(n)).astype(dtype)
        for n, shape in enumerate([(7, 64), (32, 64), (7, 32), (7, 32)])
    )
    given = [x, weight, residual] if adds else [x, weight]

    def exact(x: mx.array, weight: mx.array, residual: mx.array | float = 0.0) -> mx.array:
        return x.astype(mx.float32) @ weight.astype(mx.float32).T + residual

    expected = mx.vjp(lambda *a: [exact(*a)], given, [slope.astype(mx.float32)])
    found = mx.vjp(lambda *a: [gradients_module.linear(*a)], given, [slope])
    for parts, others in zip(found, expected, strict=True):
        for part, other in zip(parts, others, strict=True):
            assert part.dtype == dtype and part.shape == other.shape
            assert mx.abs(part - other).max().item() < (1e-4 if dtype == mx.float32 else 0.2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gradient_of_a_frozen_norm(dtype):
    x, slope = (mx.random.normal((7, 64), key=mx.random.key(n)).astype(dtype) for n in range(2))
    weight = mx.random.uniform(0.5, 2, (64,)).astype(dtype)
    expected = mx.vjp(lambda x: [mx.fast.rms_norm(x, weight, 1e-6)], [x], [slope])
    found = mx.vjp(lambda x: [gradients_module.frozen_rms_norm(x, weight, 1e-6)], [x], [slope])
    assert mx.array_equal(found[0][0], expected[0][0]).item()
    assert mx.allclose(found[1][0], expected[1][0], atol=1e-5 if dtype == mx.float32 else 0.05).item()


@pytest.mark.parametrize("trains", [False, True])
def test_only_frozen_norms_have_a_gradient_of_their_own(model, cuda, monkeypatch, trains):
    calls = []
    own = gradients_module.frozen_rms_norm
    monkeypatch.setattr(gradients_module, "frozen_rms_norm", lambda *a: calls.append(a) or own(*a))
    (model.unfreeze if trains else model.freeze)()
    model.layers[0].attn.qkv_proj.unfreeze()
    batch = batch_of(1, 9)
    mx.eval(hidden_states(model, batch.inputs, None))
    assert len(calls) == (0 if trains else 2 * len(model.layers))


def test_the_fused_loss_equals_our_own():
    logits = 3 * mx.random.normal((9, 40), key=mx.random.key(0))
    index, learned = mx.arange(9)[:, None], (mx.arange(9) % 4 > 0)[:, None]
    logits[0, 0] = float("nan")  # a row that is not learned
    (found, likelihood), slope = loss_module._fused_chunk(logits[1:], index[1:], learned[1:])
    (expected, _), other = loss_module._chunk(logits[1:], index[1:], learned[1:], 0.0, 0.0)
    assert found.item() == likelihood.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.allclose(slope, other, atol=1e-6).item()
    assert loss_module._fused_chunk(logits.astype(mx.bfloat16), index, learned)[1].dtype == mx.bfloat16
    assert mx.isfinite(loss_module._fused_chunk(logits, index, learned)[0][0]).item()


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
        assert strategy.here() == strategy.Strategy(False, PARTS, 128, 200_000_000, False)
        assert not strategy.fuses_attention_gradient(mx.bfloat16, 64)


def test_available_memory_is_the_gpus(monkeypatch):
    monkeypatch.setattr(backend, "on_cuda", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: H100)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 1_000_000_000)
    assert backend.total_memory() == 85_520_809_984
    assert backend.available_memory() == 85_000_000_000  # buffers that MLX keeps for reuse count as free
