"""Loading and generating leak no memory and leave MLX's global random state alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlx_openelm import convert, load
from mlx_openelm.adapters.attaching import attach_new, detach
from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.generation.stream import generate
from mlx_openelm.model import OpenELM

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "shakespeare-hf"
ADAPTER = ROOT / "tests" / "fixtures" / "peft-lora"

# Runs `turn` a few times, then many times; prints by how many MB the process grew.
SCRIPT = """
import gc, os, sys
from pathlib import Path

def resident():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

{setup}
for n in range({turns}):
    if n == {warm}:
        before = resident()
    turn()
print(resident() - before)
"""


def growth(setup: str, warm: int, turns: int, *arguments: str | Path) -> float:
    command = [sys.executable, "-c", SCRIPT.format(setup=setup, warm=warm, turns=turns), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_60_loads_take_the_memory_of_15() -> None:
    setup = "from mlx_openelm import load\ndef turn(): load('tiny')"
    assert growth(setup, 15, 60) < 3  # before a fix, 200 loads took 22


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_packed_models_adapters_and_texts_leak_no_memory(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "packed", quantize=True, q_group_size=32)
    setup = """
from mlx_openelm import generate, load
from mlx_openelm.adapters.attaching import attach_new
from mlx_openelm.config import ModelConfig
from mlx_openelm.model import OpenELM

def turn():
    model, tokenizer = load(sys.argv[1], adapter_path=sys.argv[2], expand=False)
    attach_new(model, rank=4, dora=True)
    generate(model, tokenizer, "To be", max_tokens=4, temp=1.0, repetition_penalty=1.1)
    OpenELM(model.config)
"""
    assert growth(setup, 6, 18, tmp_path / "packed", ADAPTER) < 2


def test_loading_leaves_global_randomness_alone(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "packed", quantize=True, q_mode="mxfp4")
    mx.random.seed(7)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(7)
    for folder in (FOLDER, tmp_path / "packed"):
        model, tokenizer = load(folder, adapter_path=ADAPTER, expand=False)
        detach(model)
        attach_new(model, rank=2)
        generate(model, tokenizer, "To be", max_tokens=2)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


SMALL = {
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 16,
    "vocab_size": 512,
    "num_query_heads": 2,
    "ffn_multipliers": 1,
    "ffn_dim_divisor": 32,
}


@pytest.mark.parametrize("shared", [True, False])
def test_a_model_made_in_python_starts_from_random_weights(shared: bool) -> None:
    """Matrices uniform within 1 / sqrt(inputs), embeddings normal with that deviation, norms 1; the seed is MLX's."""
    config = ModelConfig.from_dict(SMALL | {"share_input_output_layers": shared})
    models = []
    for seed in (3, 3, 4):
        mx.random.seed(seed)
        models.append({name: np.array(value) for name, value in tree_flatten(OpenELM(config).parameters())})
    for name, value in models[0].items():
        assert np.array_equal(value, models[1][name]), name
        if value.ndim == 1:
            assert (value == 1).all()
            continue
        assert not np.array_equal(value, models[2][name]), name
        bound = value.shape[1] ** -0.5
        deviation = bound if "embeddings" in name else bound / 3**0.5
        assert abs(value.std() / deviation - 1) < 0.05, name
        assert abs(value.mean()) < 0.05 * bound, name
        assert "embeddings" in name or abs(value).max() <= bound
    bare = OpenELM(config, initialize=False)
    assert {name: value.shape for name, value in tree_flatten(bare.parameters())} == config.tensor_shapes()
    assert not any(mx.any(value).item() for _, value in tree_flatten(bare.parameters()) if value.ndim == 2)


@pytest.mark.parametrize(
    "packing", [{}, {"group_size": 32, "bits": 3}, {"mode": "mxfp4"}, {"mode": "nvfp4"}, {"mode": "mxfp8"}], ids=str
)
def test_packed_layers_equal_mlxs_quantized_layers(packing: dict) -> None:
    """Made from a plain layer, frozen, with the mode's group size and bits unless given."""
    model = OpenELM(ModelConfig.from_dict(SMALL | {"share_input_output_layers": False}))
    model.freeze()
    kinds = {"lm_head": nn.QuantizedLinear.from_linear, "token_embeddings": nn.QuantizedEmbedding.from_embedding}
    for plain, make in zip((model.lm_head, model.transformer.token_embeddings), kinds.values(), strict=True):
        ours, theirs = plain.to_quantized(**packing), make(plain, **packing)
        assert isinstance(ours, type(theirs))
        for part in ("weight", "scales", "biases"):
            assert (ours.get(part) is None) == (theirs.get(part) is None), part
            assert ours.get(part) is None or mx.array_equal(ours[part], theirs[part]), part
        names = ("group_size", "bits", "mode")
        assert [getattr(ours, name) for name in names] == [getattr(theirs, name) for name in names]
        assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]
        assert ours.trainable_parameters() == {}
        choice = Quantization(ours.group_size, ours.bits, ours.mode)
        assert choice.to_dict() == {name: getattr(ours, name) for name in names}
