"""Mixed-bit recipes: spelled out by hand, and compared with mlx-lm's own rule."""

from __future__ import annotations

import importlib

from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.packing import bits_per_weight
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.quantization.recipes import RECIPES, Packing, planner

import mlx.nn as nn
import pytest
from quantization_models import tiny_config

# The first and last eighth of the layers, and every third in between.
MORE = {
    "270M": {0, 1, 4, 7, 10, 13, 14, 15},
    "1.1B": {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27},
}
BITS = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}


@pytest.mark.parametrize("size", MORE)
@pytest.mark.parametrize("recipe", BITS)
def test_each_matrix_gets_the_bits_of_the_rule(size, recipe):
    config = ModelConfig.from_name(size)
    low, high = BITS[recipe]
    expected = {"transformer.token_embeddings": high}
    for layer in range(config.num_transformer_layers):
        more = high if layer in MORE[size] else low
        for name, bits in {"attn.qkv_proj": more, "attn.out_proj": low, "ffn.proj_1": low, "ffn.proj_2": more}.items():
            expected[f"transformer.layers.{layer}.{name}"] = bits
    choices, exceptions = planner(recipe=recipe)(config)
    assert exceptions == {}
    assert choices == {path: Quantization(64, bits) for path, bits in expected.items()}
    assert low + 0.5 < bits_per_weight(config, choices, 2) < high + 0.5


@pytest.mark.parametrize("layers", [1, 2, 7, 8, 16, 20, 28, 36])
@pytest.mark.parametrize("recipe", RECIPES)
def test_layers_equal_those_that_mlx_lm_chooses(layers, recipe):
    # The package exports another object under the module's name.
    pytest.importorskip("mlx_lm")
    theirs = importlib.import_module("mlx_lm.convert")

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
                setattr(self, name, nn.Linear(1, 1))

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Module()
            self.model.layers = [Block() for _ in range(layers)]
            self.lm_head = nn.Linear(1, 1)

        @property
        def layers(self) -> list[nn.Module]:
            return self.model.layers

    llama = Llama()
    rule = theirs.mixed_quant_predicate_builder(recipe, llama, 64)
    mine, _ = planner(recipe=recipe)(tiny_config(num_transformer_layers=layers, num_query_heads=4, num_kv_heads=2,
                                                 ffn_multipliers=2.0, share_input_output_layers=False))  # fmt: skip
    same = {"attn.qkv_proj": "v_proj", "attn.out_proj": "o_proj", "ffn.proj_1": "gate_proj", "ffn.proj_2": "down_proj"}
    for layer in range(layers):
        for ours, name in same.items():
            expected = rule(f"model.layers.{layer}.{name}", None)
            assert mine[f"transformer.layers.{layer}.{ours}"].to_dict() == expected
    assert mine["lm_head"].to_dict() == rule("lm_head", None)


def test_an_untied_head_gets_the_bits_instead_of_the_embedding():
    choices, _ = planner(recipe="mixed_3_6")(tiny_config(share_input_output_layers=False))
    assert choices["lm_head"].bits == 6 and choices["transformer.token_embeddings"].bits == 3


def test_a_group_size_that_does_not_fit_is_reduced():
    choices, exceptions = planner(group_size=128, recipe="mixed_4_6")(tiny_config())
    inner = "transformer.layers.1.ffn.proj_2"  # 128 wide
    assert choices[inner] == Quantization(128, 6) and inner not in exceptions
    assert choices["transformer.layers.0.attn.out_proj"] == Quantization(32, 4)
    assert "128 does not divide 32" in exceptions["transformer.layers.0.attn.out_proj"]
    assert {c.group_size for c in planner(group_size=32, recipe="mixed_4_6")(tiny_config())[0].values()} == {32}


def test_without_a_recipe_all_matrices_get_the_same_bits():
    choices, _ = planner("affine", 5, 32)(tiny_config())
    assert set(choices) == set(tiny_config().matrix_shapes()) and set(choices.values()) == {Quantization(32, 5)}


@pytest.mark.parametrize(
    "request_,message",
    [
        ({"recipe": "mixed_5_6"}, "recipe must be one of mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6"),
        ({"recipe": "mixed_3_6", "bits": 4}, "leave q_bits and q_mode out"),
        ({"recipe": "mixed_3_6", "mode": "mxfp4"}, "leave q_bits and q_mode out"),
        ({"recipe": "mixed_3_6", "group_size": 48}, "q_group_size must be 32, 64 or 128"),
        ({"bits": 7}, "q_bits must be"),
        ({"mode": "nf4"}, "q_mode must be one of"),
    ],
)
def test_invalid_requests_are_refused(request_, message):
    with pytest.raises(RequestError, match=message):
        planner(**request_)


def test_a_packing_carries_the_flags_that_commands_share():
    packing = Packing(quantize=True, q_bits=3, dtype="float16")
    choices, exceptions = packing.plan(ModelConfig.from_name("270m"))
    assert set(choices.values()) == {Quantization(64, 3)} and exceptions == {}
    given = {name: value for name, value in packing.flags().items() if value}
    assert given == {"dtype": "float16", "quantize": True, "q_bits": 3, "q_mode": "affine"}
    recipe = Packing(quantize=True, recipe="mixed_3_6")
    assert {choice.bits for choice in recipe.plan(ModelConfig.from_name("270m"))[0].values()} == {3, 6}
    assert recipe.flags()["q_mode"] is None
    assert Packing().plan(ModelConfig.from_name("270m")) == ({}, {})
    assert not any(Packing().flags().values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"quantize": True, "dequantize": True}, "either quantize or dequantize"),
        ({"q_bits": 4}, "needs quantize"),
        ({"recipe": "mixed_3_6"}, "needs quantize"),
        ({"q_mode": "mxfp4", "dequantize": True}, "needs quantize"),
        ({"quantize": True, "q_bits": 7}, "q_bits must be 2, 3, 4, 5, 6 or 8"),
        ({"quantize": True, "recipe": "mixed_3_6", "q_bits": 4}, "leave q_bits and q_mode out"),
    ],
)
def test_contradictory_packings_are_refused(flags, expected):
    with pytest.raises(RequestError, match=expected):
        Packing(**flags)


def test_only_a_packed_model_is_unpacked():
    config = ModelConfig.from_name("270m")
    packed = Checkpoint(config, Weights({}), {"lm_head": Quantization(64, 4)})
    Packing(dequantize=True).check(packed)
    Packing().check(Checkpoint(config, Weights({})))
    with pytest.raises(RequestError, match="nothing to dequantize"):
        Packing(dequantize=True).check(Checkpoint(config, Weights({})))
