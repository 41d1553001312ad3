"""Products with packed weights on each backend: which stay packed, and that unpacking gives the same numbers.

A CPU stands in for the others: it computes their products, and refuses those that CUDA has no kernel for.
"""

from __future__ import annotations

from typing import Any

from mlx_openelm import backend
from mlx_openelm import cache as ours
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.adapters.layers import _columns_times
from mlx_openelm.cli import doctor, info
from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.jobs.summary import summarize_config
from mlx_openelm.model import QuantizedLinear
from mlx_openelm.ops import attention, layers, packed
from mlx_openelm.ops.packed import MODES
from mlx_openelm.quantization.recipes import plan

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from devices import pretend
from gpu_devices import cudas
from mlx.utils import tree_flatten
from quantization_models import tiny_model

PACKINGS = [(mode, bits, size) for mode, (all_bits, sizes) in MODES.items() for bits in all_bits for size in sizes]
multiply = mx.quantized_matmul


@pytest.fixture(params=["CUDA", "Metal"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device the model sees; for CUDA, products without a kernel are refused."""
    pretend(monkeypatch, request.param)
    if request.param == "CUDA":
        monkeypatch.setattr(mx, "quantized_matmul", cudas)
    return request.param


def layer_of(mode: str, bits: int, group_size: int, shape: tuple[int, int], dtype: mx.Dtype) -> QuantizedLinear:
    weight = mx.random.normal(shape, key=mx.random.key(0)) / shape[1] ** 0.5
    layer = nn.Linear(*reversed(shape), bias=False)
    layer.weight = weight.astype(dtype)
    quantized = QuantizedLinear.__new__(QuantizedLinear)
    nn.Module.__init__(quantized)
    quantized.weight, quantized.scales, *biases = mx.quantize(layer.weight, group_size, bits, mode)
    quantized.biases = biases[0] if biases else None
    quantized.mode, quantized.bits, quantized.group_size = mode, bits, group_size
    return quantized


def exact(layer: QuantizedLinear) -> np.ndarray:
    """The weight in float32."""
    parts = [part if part is None or part.dtype == mx.uint8 else part.astype(mx.float32)
             for part in (layer["scales"], layer.get("biases"))]  # fmt: skip
    full = mx.dequantize(layer["weight"], *parts, layer.group_size, layer.bits, layer.mode, dtype=mx.float32)
    return np.array(full)


def close(found: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    found = np.array(found.astype(mx.float32))
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < {mx.float32: 1e-5, mx.float16: 0.01, mx.bfloat16: 0.04}[dtype] * scale


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [mx.float32, pytest.param(mx.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("mode", "bits", "group_size"), PACKINGS)
def test_products_and_gradients_of_any_packing(
    gpu: str, mode: str, bits: int, group_size: int, dtype: mx.Dtype
) -> None:
    """Of any number of rows, including sizes that do not fill a tile."""
    for shape, counts in (((128, 128), (1, 3, 7, 8, 127, 128)), ((72, 384), (1, 8))):
        layer = layer_of(mode, bits, group_size, shape, dtype)
        weight = exact(layer)
        for rows in counts:
            x = mx.random.normal((rows, shape[1]), key=mx.random.key(rows)).astype(dtype)
            close(layers.quantized_linear(x, layer), np.array(x.astype(mx.float32)) @ weight.T, dtype)
        x = mx.random.normal((64, shape[1])).astype(dtype)
        slope = mx.grad(lambda x, layer=layer: layers.quantized_linear(x, layer).astype(mx.float32).sum())(x)
        assert slope.dtype == dtype
        close(slope, np.broadcast_to(weight.sum(axis=0), slope.shape), dtype)


def test_cuda_chooses_the_kernel_by_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every case above could pass by always unpacking."""
    pretend(monkeypatch, "CUDA")
    rows_seen: list[int] = []
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **k: rows_seen.append(x.shape[0]) or multiply(x, *a, **k))
    for bits, out_dims, dtype, expected in (
        (4, 128, mx.bfloat16, [1, 8, 8, 8, 8, 255]),  # two to seven rows are padded to eight
        (8, 128, mx.float16, [1, 8, 8, 8, 8, 255]),
        (4, 128, mx.float32, [1, 2, 3, 7]),
        (3, 128, mx.bfloat16, [1, 2, 3, 7]),
        (4, 96, mx.bfloat16, [1, 2, 3, 7]),
    ):
        rows_seen.clear()
        layer = layer_of("affine", bits, 64, (out_dims, 128), dtype)
        for rows in (1, 2, 3, 7, 8, 255, 256, 500):
            packed.product(mx.zeros((rows, 128), dtype), layer)
        assert rows_seen == expected


@pytest.mark.parametrize("shape", [(4, 128), (1, 5, 128), (2, 2, 128), (3, 1, 128), (3, 4, 128)], ids=str)
def test_rows_keep_their_shape(gpu: str, shape: tuple[int, ...]) -> None:
    layer = layer_of("affine", 4, 64, (256, 128), mx.float16)
    x = mx.random.normal(shape, key=mx.random.key(1)).astype(mx.float16)
    close(packed.product(x, layer), np.array(x.astype(mx.float32)) @ exact(layer).T, mx.float16)


def test_few_unpacked_weights_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither within a forward pass nor between it and the backward pass."""
    pretend(monkeypatch, "CUDA")

    def peak(count: int, way: Any) -> int:
        layers = [layer_of("affine", 4, 64, (512, 512), mx.float32) for _ in range(count)]
        x = mx.random.normal((64, 512))
        mx.eval(x, [part for layer in layers for part in (layer.weight, layer.scales, layer.biases)])

        def run(x: mx.array) -> mx.array:
            for layer in layers:
                x = packed.product(x, layer)
            return x.sum()

        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(way(run)(x))
        return mx.get_peak_memory() - before

    for way in (lambda run: run, mx.grad):
        assert peak(12, way) < peak(3, way) + 3 * 4 * 512**2


@pytest.mark.covering
@pytest.mark.parametrize(("mode", "bits", "group_size"), PACKINGS)
def test_an_embedding_read_by_columns(gpu: str, mode: str, bits: int, group_size: int) -> None:
    model = tiny_model(model_dim=128, ffn_dim_divisor=128)
    embedding = model.transformer.token_embeddings.to_quantized(group_size, bits, mode)
    a = mx.random.normal((256, 4), key=mx.random.key(1))
    close(_columns_times(embedding, a), np.array(a).T @ exact(embedding), mx.float32)


# Caches.


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 32), (64, 64), (128, 32), (128, 128)])
def test_attention_over_a_quantized_cache(
    gpu: str, monkeypatch: pytest.MonkeyPatch, head_dim: int, group_size: int, bits: int, dtype: mx.Dtype
) -> None:
    """Prompts, further chunks and single positions equal float32 attention over the dequantized cache."""
    if gpu == "Metal":
        monkeypatch.setattr(mx, "quantized_matmul", multiply)
    cache, shape = ours.QuantizedKVCache(group_size, bits), (4, 2)
    past = 0
    for length in (9, 3, 1, 1):
        qkv = mx.random.normal((length, 8 * head_dim), key=mx.random.key(length + past)).astype(dtype)
        attend = attention.choose(head_dim, 10000, past, length, "causal" if length > 1 else None)
        found = attend(qkv, shape, None, cache)
        queries = attend.heads(qkv, shape, None)[0]
        past += length
        held = [mx.dequantize(part[0], part[1].astype(mx.float32), part[2].astype(mx.float32), group_size, bits)
                for part in cache.keys_and_values()]  # fmt: skip
        expected = plain_attention(np.array(queries.astype(mx.float32)), *(np.array(x) for x in held))
        assert found.dtype == dtype
        close(found, expected, dtype)


def test_mlx_lms_quantized_cache_is_unpacked_the_same_way(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("mlx_lm.models.cache", reason="mlx-lm is not installed")
    if gpu == "Metal":
        monkeypatch.setattr(mx, "quantized_matmul", multiply)
    caches, past = (ours.QuantizedKVCache(32, 4), theirs.QuantizedKVCache(32, 4)), 0
    for length in (5, 300, 1):
        qkv = mx.random.normal((length, 8 * 64), key=mx.random.key(length))
        attend = attention.choose(64, 10000, past, length, "causal" if length > 1 else None)
        found = [attend(qkv, (4, 2), None, cache) for cache in caches]
        assert mx.array_equal(*found)
        past += length


def plain_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention of queries [1, H, L, D] over keys and values [1, K, T, D]: [L, H * D]."""
    keys, values = (np.repeat(x[0], queries.shape[1] // x.shape[1], axis=0) for x in (keys, values))
    scores = queries[0] @ keys.swapaxes(1, 2) / queries.shape[-1] ** 0.5
    length, total = scores.shape[1:]
    scores += np.where(np.arange(total) > np.arange(total - length, total)[:, None], -np.inf, 0)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ values
    return mixed.swapaxes(0, 1).reshape(length, -1)


def test_only_a_cpu_and_single_positions_on_metal_multiply_a_packed_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, expected in {"CPU": (True, True), "Metal": (True, False), "CUDA": (False, False)}.items():
        pretend(monkeypatch, device)
        assert (packed.attends_packed(1), packed.attends_packed(2)) == expected


def test_metal_multiplies_a_packed_cache_for_single_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Metal")
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(mx, "quantized_matmul", lambda x, *a, **k: shapes.append(x.shape) or multiply(x, *a, **k))
    cache = ours.QuantizedKVCache(32, 8)
    for past, length in ((0, 5), (5, 1)):
        attention.choose(32, 10000, past, length, None)(mx.ones((length, 8 * 32)), (4, 2), None, cache)
    assert shapes == [(1, 2, 2, 32), (1, 2, 2, 6)]


# The whole model.


@pytest.mark.covering
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_model_with_adapters_trains_and_predicts(gpu: str, mode: str) -> None:
    """The backend has a kernel for every product of a model, its adapters and their gradients."""
    model = tiny_model(seed=3)
    nn.quantize(model, group_size=None, bits=None, mode=mode, class_predicate=lambda _, m: fits(m, mode))
    attach_new(model, target_modules=("token_embeddings", "qkv_proj", "proj_1", "proj_2"), rank=2, scale=2.0, dora=True)
    ids = mx.array(np.random.default_rng(0).integers(0, 256, (2, 33)))

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    assert all(mx.isfinite(x).all() for _, x in tree_flatten(gradients)) and mx.isfinite(value)
    assert any(mx.abs(x).max() > 1e-4 for _, x in tree_flatten(gradients))
    model.eval()
    cache = ours.make_cache(2)
    parts = [model(ids[:, :20], cache), model(ids[:, 20:21], cache)]
    assert mx.allclose(mx.concatenate(parts, axis=1), model(ids[:, :21]), atol=1e-3)


def fits(module: nn.Module, mode: str) -> Any:
    size = MODES[mode][1][0]
    return hasattr(module, "to_quantized") and module.weight.shape[1] % size == 0


# Reports.


def test_doctor_reports_what_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = {
        (False, False): "affine, mxfp4, nvfp4, mxfp8: unpacked at load, while memory allows",
        (False, True): "affine: multiplied as stored; mxfp4, nvfp4, mxfp8: unpacked at load, while memory allows",
        (True, False): "affine, mxfp4, nvfp4, mxfp8: multiplied as stored",
    }
    for (gpu, kernels), expected in messages.items():
        monkeypatch.setattr(backend, "on_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(backend, "has_kernels", lambda kernels=kernels: kernels)
        assert doctor._packed_weights().value == expected


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_info_reports_what_is_unpacked(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    config = ModelConfig.from_name("270M")
    choices = plan(config, Quantization.make(mode, group_size=32))[0]
    for gpu, kernels in ((False, False), (False, True), (True, False)):
        monkeypatch.setattr(backend, "on_gpu", lambda gpu=gpu: gpu)
        monkeypatch.setattr(backend, "has_kernels", lambda kernels=kernels: kernels)
        summary = summarize_config(config, choices, name="270m", source="config", dtype="bfloat16")
        line = info.totals(summary)["Quantization"]
        stays = gpu or (kernels and mode == "affine")
        assert line.endswith("; multiplied as stored" if stays else "; unpacked at load, while memory allows")
