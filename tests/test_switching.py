"""Several adapters on one base: switching equals reloading; mixing adds the weight updates."""

from __future__ import annotations

from pathlib import Path

from mlx_openelm.adapters.attaching import adapted_layers, attach
from mlx_openelm.adapters.files import read_adapter
from mlx_openelm.adapters.switching import AdapterSwitch, mix, parse_paths
from mlx_openelm.config import EMBEDDING
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.adapter import Adapter, LowRank
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
IDS = mx.array([[1, 33, 7, 500, 12, 4, 90, 2]])
NORM, PROJ_2 = "transformer.layers.3.ffn_norm.weight", "transformer.layers.2.ffn.proj_2.weight"


def load_model(packing: Quantization | None = None) -> OpenELM:
    checkpoint = mlx_format.read(FOLDER)
    if packing is not None:
        checkpoint.quantization = dict.fromkeys(checkpoint.config.matrix_shapes(), packing)
        checkpoint.weights = quantize_weights(checkpoint.weights, checkpoint.quantization)
    return build_model(checkpoint, dtype="float32", expand=False)


def logits(model: OpenELM) -> np.ndarray:
    return np.array(model(IDS)[0])


def whole_weights(model: OpenELM) -> Adapter:
    shapes = model.config.tensor_shapes()
    return Adapter(weights={name: mx.random.normal(shapes[name], key=mx.random.key(8)) / 9 for name in (NORM, PROJ_2)})


@pytest.fixture(params=[None, Quantization(32, 8)], ids=["float32", "8bit"])
def switch(request: pytest.FixtureRequest) -> AdapterSwitch:
    adapters = AdapterSwitch(load_model(request.param))
    for name in ("peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding"):
        adapters.add(name, FIXTURES / name)
    adapters.add("full", whole_weights(adapters.model))
    return adapters


def test_switching_equals_reloading(switch: AdapterSwitch) -> None:
    model, base = switch.model, logits(switch.model)
    expected = {}
    for name in switch.names:
        packed = model.quantization and Quantization(32, 8)
        fresh = load_model(packed or None)
        attach(fresh, whole_weights(fresh) if name == "full" else read_adapter(FIXTURES / name, fresh.config))
        expected[name] = logits(fresh)
    for name in [*switch.names, "full", "peft-dora", "full", None, "peft-lora", "peft-dora", None]:
        switch.use(name)
        assert np.array_equal(logits(model), base if name is None else expected[name]), name
        assert switch.in_use == ({} if name is None else {name: 1.0})
    assert not list(adapted_layers(model))


def test_dora_norms_are_computed_once(switch: AdapterSwitch) -> None:
    switch.use("peft-dora")
    layers = dict(adapted_layers(switch.model))
    switch.use("peft-lora")
    switch.use("peft-dora")
    assert all(layer is layers[path] for path, layer in adapted_layers(switch.model))


def test_a_mixture_adds_the_weight_updates(switch: AdapterSwitch) -> None:
    weights = {"peft-lora": 0.7, "peft-rslora-attention": -0.4, "peft-lora-embedding": 0.25}
    switch.use(weights)
    mixed = logits(switch.model)
    # By hand: the summed updates of each matrix, as one full-rank update.
    plain = load_model((switch.model.quantization and Quantization(32, 8)) or None)
    sums: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        for path, change in read_adapter(FIXTURES / name, plain.config).modules.items():
            delta = weight * change.scale * np.array(change.a, np.float64) @ np.array(change.b, np.float64)
            sums[path] = sums.get(path, 0) + delta
    modules = {
        path: LowRank(mx.array(delta.astype(np.float32)), mx.eye(delta.shape[1]), 1.0) for path, delta in sums.items()
    }
    attach(plain, Adapter(modules))
    assert np.abs(logits(plain) - mixed).max() < 2e-4


def test_mixtures_of_one_adapter_and_of_none(switch: AdapterSwitch) -> None:
    base = logits(switch.model)
    switch.use("peft-lora")
    alone = logits(switch.model)
    switch.use({"peft-lora": 0.5})
    half = logits(switch.model)
    assert np.abs(half - alone).max() > 0.1
    switch.use({"peft-lora": 0.0, "peft-rslora-attention": 0})
    assert np.allclose(logits(switch.model), base, atol=1e-5)
    switch.add("again", FIXTURES / "peft-lora")
    switch.use({"peft-lora": 0.75, "again": 0.25})
    assert np.allclose(logits(switch.model), alone, atol=1e-4)


def test_invalid_choices_are_refused_and_change_nothing(switch: AdapterSwitch) -> None:
    switch.use("peft-lora")
    before = logits(switch.model)
    for choice, message in [
        ("nobody", "No adapter is named 'nobody'; there are peft-lora, peft-rslora-attention"),
        ({"peft-lora": 0.5, "peft-dora": 0.5}, "The adapter peft-dora is DoRA, which can only be used alone"),
        ({"peft-dora": 0.5}, "peft-dora is DoRA, which can only be used alone, with weight 1"),
        ({"full": 1.0, "peft-lora": 1.0}, "full is full fine-tuning, which can only be used alone"),
        ({"peft-lora": float("nan"), "peft-rslora-attention": 1}, "weight of the adapter peft-lora must be a number"),
        ({}, "A mixture needs an adapter"),
    ]:
        with pytest.raises(RequestError, match=message):
            switch.use(choice)
        assert switch.in_use == {"peft-lora": 1.0}
        assert np.array_equal(logits(switch.model), before)
    with pytest.raises(RequestError, match="There is already an adapter named 'full'"):
        switch.add("full", FIXTURES / "peft-lora")
    with pytest.raises(RequestError, match="The adapter odd changes transformer.layers.9"):
        switch.add(
            "odd", Adapter({"transformer.layers.9.attn.qkv_proj": LowRank(mx.zeros((2, 1)), mx.zeros((1, 2)), 1)})
        )
    assert "odd" not in switch.names


def test_removing_the_active_adapter_leaves_the_base(switch: AdapterSwitch) -> None:
    base = logits(switch.model)
    for name in ("full", "peft-dora"):
        switch.use(name)
        switch.remove(name)
        assert np.array_equal(logits(switch.model), base)
        assert name not in switch.names
    with pytest.raises(RequestError, match="No adapter is named 'full'"):
        switch.remove("full")
    switch.add("peft-dora", FIXTURES / "peft-lora")  # another adapter under a name that was used
    switch.use("peft-lora")
    expected = logits(switch.model)
    switch.use("peft-dora")
    assert np.array_equal(logits(switch.model), expected)


def test_adapters_of_the_output_side_do_not_mix_with_others() -> None:
    a, b = mx.ones((4, 1)), mx.ones((1, 3))
    sides = [(str(side), Adapter({EMBEDDING: LowRank(a, b, 1.0, output_side=side)}), 0.5) for side in (True, False)]
    with pytest.raises(RequestError, match="on the output side too, and another does not"):
        mix(sides)
    assert mix([sides[0], sides[0]]).modules[EMBEDDING].output_side


def test_paths_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=2").mkdir()
    assert parse_paths("a") == [("a", 1.0)]
    assert parse_paths(Path("a=0.5")) == [("a=0.5", 1.0)]
    assert parse_paths(["a=0.7", "b=3e-1", "me/c"]) == [("a", 0.7), ("b", 0.3), ("me/c", 1.0)]
    assert parse_paths(["run=2", "run=2=-1", "lr=high"]) == [("run=2", 1.0), ("run=2", -1.0), ("lr=high", 1.0)]
    assert parse_paths({"a=1": 2}) == [("a=1", 2.0)]
    with pytest.raises(RequestError, match="adapter_path is missing"):
        parse_paths([])
    with pytest.raises(RequestError, match="The weight of the adapter a must be a number, got 'much'"):
        parse_paths({"a": "much"})  # type: ignore[dict-item]
