"""The configuration: every form it may have in a file, the shapes that follow from it, and every refusal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mlx_openelm.config import SIZES, ModelConfig, make_divisible, spread
from mlx_openelm.errors import RequestError
from mlx_openelm.inputs import read_json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1_1B": 1_079_891_456, "3B": 3_036_647_424}
SMALL: dict[str, Any] = {
    "num_transformer_layers": 4,
    "model_dim": 64,
    "head_dim": 16,
    "vocab_size": 100,
    "num_gqa_groups": 2,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 4.0],
    "ffn_dim_divisor": 16,
}


def small(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(SMALL | changes)


# An independent computation by the published rules: NumPy's linspace and rounding, exact multiples.


def numpy_spread(first: float, last: float, count: int) -> list[float]:
    return [float(np.round(np.float64(v), 2)) for v in np.linspace(first, last, count)]


def nearest_multiple(value: float, divisor: int) -> int:
    multiple = divisor * max(1, math.floor((value + divisor / 2) / divisor))
    return multiple + divisor if multiple < 0.9 * value else multiple


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_parameter_counts(size: str) -> None:
    config = ModelConfig.from_name(f"OpenELM-{size}")
    assert config.num_parameters == PARAMETERS[size]
    layers, model_dim, head_dim = SIZES[size]
    assert (config.num_transformer_layers, config.model_dim, config.head_dim) == (layers, model_dim, head_dim)
    heads = [nearest_multiple(model_dim * m, 4 * head_dim) // head_dim for m in numpy_spread(0.5, 1.0, layers)]
    inner = [nearest_multiple(model_dim * m, 256) for m in numpy_spread(0.5, 4.0, layers)]
    assert config.num_query_heads == tuple(heads)
    assert config.num_kv_heads == tuple(h // 4 for h in heads)
    assert config.ffn_dims == tuple(inner)
    assert (config.vocab_size, config.max_context_length) == (32000, 2048)
    assert (config.rms_norm_eps, config.rope_freq_constant) == (1e-6, 10000)


def test_the_layers_of_270m_equal_the_published_config() -> None:
    config = ModelConfig.from_name("270m")
    assert config.num_query_heads == (12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20)
    assert config.num_kv_heads == (3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5)
    assert config.ffn_multipliers[:6] == (0.5, 0.73, 0.97, 1.2, 1.43, 1.67)
    assert config.ffn_multipliers[-1] == 4.0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("270m", "270M"),
        ("OpenELM-270M", "270M"),
        ("apple/OpenELM-270M", "270M"),
        ("apple/OpenELM-270M-Instruct", "270M"),
        ("450M-instruct", "450M"),
        ("openelm-1.1b", "1_1B"),
        ("OpenELM-1_1B", "1_1B"),
        ("APPLE/OPENELM-1_1B-INSTRUCT", "1_1B"),
        ("3b", "3B"),
        ("3B", "3B"),
    ],
)
def test_sizes_are_found_in_every_spelling(name: str, size: str) -> None:
    assert ModelConfig.from_name(name).num_parameters == PARAMETERS[size]


@pytest.mark.parametrize("name", ["", "7B", "OpenELM", "llama-270M", "270M-base", "apple/"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(RequestError, match="270M, 450M, 1_1B, 3B"):
        ModelConfig.from_name(name)


@pytest.mark.parametrize("value", [0.0, 0.2, 7, 96, 127.9, 128, 383.9, 384, 640.0, 1000, 1e6])
@pytest.mark.parametrize("divisor", [1, 8, 256])
def test_make_divisible(value: float, divisor: int) -> None:
    assert make_divisible(value, divisor) == nearest_multiple(value, divisor)


def test_make_divisible_takes_the_next_multiple_if_rounding_loses_over_a_tenth() -> None:
    assert make_divisible(380, 256) == 512  # 256 is nearer, but more than 10% below
    assert make_divisible(284, 256) == 256
    assert make_divisible(285, 256) == 512
    assert make_divisible(1, 256) == 256


@given(st.floats(0, 1e7), st.integers(1, 4096))
def test_make_divisible_is_a_multiple_near_the_value(value: float, divisor: int) -> None:
    result = make_divisible(value, divisor)
    assert result % divisor == 0
    assert result >= divisor
    assert result >= 0.9 * value
    assert result <= max(divisor, value + divisor)
    assert result == nearest_multiple(value, divisor)


@given(st.floats(0.01, 8), st.floats(0.01, 8), st.integers(1, 80))
def test_spread_is_linspace_rounded_as_numpy_rounds(first: float, last: float, count: int) -> None:
    assert list(spread((first, last), count)) == numpy_spread(first, last, count)


@settings(max_examples=60)
@given(
    layers=st.integers(1, 12),
    head_dim=st.sampled_from([2, 16, 64]),
    groups=st.integers(1, 8),
    dim=st.integers(1, 512),
    bounds=st.tuples(st.floats(0.05, 4), st.floats(0.05, 4)),
    ffn=st.tuples(st.floats(0.05, 8), st.floats(0.05, 8)),
    divisor=st.sampled_from([1, 64, 256]),
    glu=st.booleans(),
    shared=st.booleans(),
    norms=st.booleans(),
)
def test_any_scaling_gives_whole_groups_and_the_parameters_of_its_tensors(
    layers, head_dim, groups, dim, bounds, ffn, divisor, glu, shared, norms
) -> None:
    config = ModelConfig.from_dict(
        {
            "num_transformer_layers": layers,
            "model_dim": dim,
            "head_dim": head_dim,
            "vocab_size": 50,
            "num_gqa_groups": groups,
            "qkv_multipliers": list(bounds),
            "ffn_multipliers": list(ffn),
            "ffn_dim_divisor": divisor,
            "ffn_with_glu": glu,
            "share_input_output_layers": shared,
            "normalize_qk_projections": norms,
        }
    )
    total = dim + 50 * dim * (1 if shared else 2)
    for layer, (attention, inner) in enumerate(
        zip(numpy_spread(*bounds, layers), numpy_spread(*ffn, layers), strict=True)
    ):
        query = nearest_multiple(dim * attention, head_dim * groups) // head_dim
        assert config.num_query_heads[layer] == query
        assert config.num_kv_heads[layer] == query // groups
        width = nearest_multiple(inner * dim, divisor)
        assert config.ffn_dims[layer] == width
        total += dim * head_dim * (2 * query + 2 * (query // groups)) + (2 * head_dim if norms else 0)
        total += dim * width * (3 if glu else 2) + 2 * dim
    assert config.num_parameters == total
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# The forms a file may take.


def test_the_fixture_in_its_expanded_form() -> None:
    config = ModelConfig.from_file(SHAKESPEARE)
    assert config.num_parameters == 2_485_056
    assert config.num_query_heads == (3, 6, 6, 6, 6, 6)
    assert config.num_kv_heads == (1, 2, 2, 2, 2, 2)
    assert config.ffn_dims == (128, 256, 384, 512, 640, 768)
    assert config == ModelConfig.from_file(SHAKESPEARE / "config.json")


def test_pairs_and_expanded_lists_give_the_same_model() -> None:
    config = small()
    expanded = small(
        num_query_heads=list(config.num_query_heads),
        num_kv_heads=list(config.num_kv_heads),
        ffn_multipliers=[0.5, 1.67, 2.83, 4.0],
    )
    assert expanded == config


def test_one_number_for_all_layers() -> None:
    config = small(qkv_multipliers=1.0, ffn_multipliers=2)
    assert config.num_query_heads == (4, 4, 4, 4)
    assert config.num_kv_heads == (2, 2, 2, 2)
    assert config.ffn_multipliers == (2, 2, 2, 2)
    assert config.ffn_dims == (128, 128, 128, 128)


def test_multipliers_that_are_left_out_are_apples() -> None:
    sizes = {name: value for name, value in SMALL.items() if not name.endswith("multipliers")}
    config = ModelConfig.from_dict(sizes)
    assert config == small(qkv_multipliers=1.0, ffn_multipliers=[4.0] * 4) and config.ffn_dims == (256,) * 4


def test_scalar_num_query_heads() -> None:
    config = small(num_query_heads=6, num_kv_heads=3)
    assert config.num_query_heads == (6, 6, 6, 6)
    assert config.num_kv_heads == (3, 3, 3, 3)


@pytest.mark.parametrize("absent", [{}, {"num_kv_heads": None}, {"num_kv_heads": []}])
def test_missing_kv_heads_follow_from_the_groups(absent: dict) -> None:
    assert small(num_query_heads=[2, 2, 4, 8], **absent).num_kv_heads == (1, 1, 2, 4)


def test_one_multiplier_per_layer() -> None:
    config = small(qkv_multipliers=[0.5, 1.0, 1.5, 2.0], ffn_multipliers=[1, 2, 3, 4])
    assert config.num_query_heads == (2, 4, 6, 8)
    assert config.ffn_dims == (64, 128, 192, 256)


def test_null_means_the_default_and_unknown_keys_are_ignored() -> None:
    config = small(rope_freq_constant=None, use_cache=True, auto_map={"AutoConfig": "x.py"}, quantization={"bits": 4})
    assert config == small()
    assert config.rope_freq_constant == 10000


def test_several_eos_tokens() -> None:
    assert small(eos_token_id=[2, 7]).eos_token_ids == (2, 7)
    assert small(eos_token_id=5).eos_token_ids == (5,)
    assert small(eos_token_id=[2, 7]).to_dict()["eos_token_id"] == [2, 7]


@pytest.mark.parametrize("size", SIZES)
def test_to_dict_round_trips(size: str) -> None:
    config = ModelConfig.from_name(size)
    values = config.to_dict()
    assert values["model_type"] == "openelm"
    assert values["qkv_multipliers"] == [0.5, 1.0]
    for name in ("num_query_heads", "num_kv_heads", "ffn_multipliers"):
        assert len(values[name]) == config.num_transformer_layers
    assert ModelConfig.from_dict(json.loads(json.dumps(values))) == config


def test_to_dict_keeps_the_settings_of_the_original_file() -> None:
    original = json.loads((SHAKESPEARE / "config.json").read_text())
    written = ModelConfig.from_file(SHAKESPEARE).to_dict()
    # Not the model's shape: where its code is, and what wrote it.
    assert {k: v for k, v in original.items() if written.get(k) != v}.keys() == {
        "auto_map",
        "torch_dtype",
        "transformers_version",
    }


@pytest.mark.parametrize("changes", [{}, {"share_input_output_layers": True, "normalize_qk_projections": True}])
def test_mlx_lm_reads_to_dict_to_the_same_tensors(changes: dict) -> None:
    openelm = pytest.importorskip("mlx_lm.models.openelm")
    from mlx.utils import tree_flatten

    for config in (small(**changes), ModelConfig.from_file(SHAKESPEARE)):
        theirs = openelm.Model(openelm.ModelArgs.from_dict(json.loads(json.dumps(config.to_dict()))))
        shapes = {name: value.shape for name, value in tree_flatten(theirs.parameters())}
        assert shapes == config.tensor_shapes()


# Refusals, each naming its field.


@pytest.mark.parametrize("name", ["num_transformer_layers", "model_dim", "head_dim", "vocab_size"])
@pytest.mark.parametrize("how", ["missing", "null"])
def test_missing_sizes_are_refused(name: str, how: str) -> None:
    values = {k: v for k, v in SMALL.items() if k != name} | ({name: None} if how == "null" else {})
    with pytest.raises(RequestError, match=rf"has no {name}\b"):
        ModelConfig.from_dict(values)


SIZE_FIELDS = [
    "num_transformer_layers",
    "model_dim",
    "head_dim",
    "vocab_size",
    "num_gqa_groups",
    "ffn_dim_divisor",
    "rope_max_length",
    "max_context_length",
]
NOT_SIZES = [0, -1, True, False, 1.5, 2.0, "16", [16], {}, math.nan, math.inf, 1 << 60, 10**400]


@pytest.mark.covering
@pytest.mark.parametrize("name", SIZE_FIELDS)
@pytest.mark.parametrize("value", NOT_SIZES, ids=lambda v: str(v)[:12])
def test_invalid_sizes_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is"):
        small(**{name: value})


NOT_POSITIVE = [0, -1.0, True, "1", {}, math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_freq_constant", "qkv_multipliers", "ffn_multipliers"])
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=str)
def test_invalid_numbers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is"):
        small(**{name: value})


@pytest.mark.parametrize("name", ["qkv_multipliers", "ffn_multipliers"])
@pytest.mark.parametrize("value", [1e308, 10**400, [0.5, 1e300], 1e13], ids=lambda v: str(v)[:12])
def test_huge_multipliers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        small(**{name: value})


@pytest.mark.parametrize("name", ["rms_norm_eps", "rope_freq_constant"])
def test_numbers_beyond_a_float_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match=name):
        small(**{name: 10**400})


@pytest.mark.parametrize("name", ["qkv_multipliers", "ffn_multipliers"])
@pytest.mark.parametrize("value", [[], [1.0], [1.0] * 3, [1.0] * 5])
def test_a_wrong_number_of_multipliers_is_refused(name: str, value: list) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is a list of {len(value)}; .*4 numbers, one per layer"):
        small(**{name: value})


@pytest.mark.parametrize("name", ["qkv_multipliers", "ffn_multipliers"])
@pytest.mark.parametrize("entry", [*NOT_POSITIVE, [1.0], None], ids=str)
def test_one_bad_multiplier_is_refused(name: str, entry: Any) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is"):
        small(**{name: [1.0, entry, 1.0, 1.0]})


@pytest.mark.parametrize("name", ["num_query_heads", "num_kv_heads"])
@pytest.mark.parametrize("value", [[4], [4, 4], [4] * 3, [4] * 5])
def test_a_wrong_number_of_heads_is_refused(name: str, value: list) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is a list of {len(value)}; .*4 numbers, one per layer"):
        small(**{name: value})


@pytest.mark.parametrize("name", ["num_query_heads", "num_kv_heads"])
@pytest.mark.parametrize("entry", [v for v in NOT_SIZES if v is not False] + [None], ids=lambda v: str(v)[:12])
def test_one_bad_head_count_is_refused(name: str, entry: Any) -> None:
    with pytest.raises(RequestError, match=rf"'s {name} is"):
        small(**{name: [4, 4, entry, 4]})
    if entry is not None and not isinstance(entry, list):
        with pytest.raises(RequestError, match=rf"'s {name} is"):
            small(**{name: entry})


def test_query_heads_must_be_a_multiple_of_kv_heads() -> None:
    with pytest.raises(RequestError, match=r"num_query_heads is 5; it must be divisible by num_gqa_groups, 2"):
        small(num_query_heads=[4, 4, 5, 4])
    with pytest.raises(
        RequestError, match=r"num_query_heads is 4; it must be divisible by num_kv_heads, 3, in layer 2"
    ):
        small(num_query_heads=4, num_kv_heads=[2, 2, 3, 2])
    with pytest.raises(RequestError, match=r"num_kv_heads"):
        small(num_query_heads=2, num_kv_heads=4)


@pytest.mark.parametrize("value", [1, 3, 65])
def test_an_odd_head_dim_is_refused(value: int) -> None:
    with pytest.raises(RequestError, match=r"head_dim is .* even"):
        small(head_dim=value)


@pytest.mark.parametrize("name", ["ffn_with_glu", "normalize_qk_projections", "share_input_output_layers"])
@pytest.mark.parametrize("value", [0, 1, "true", [True]])
def test_switches_are_booleans(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} is .* true or false"):
        small(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_fn_name", "tanh"),
        ("activation_fn_name", ["swish"]),
        ("activation_fn_name", {}),
        ("normalization_layer_name", "layer_norm"),
        ("bos_token_id", -1),
        ("bos_token_id", True),
        ("bos_token_id", "1"),
        ("eos_token_id", -2),
        ("eos_token_id", [2, -1]),
        ("eos_token_id", [[2]]),
        ("eos_token_id", {}),
    ],
)
def test_other_refusals_name_their_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"'s {name} is"):
        small(**{name: value})


@pytest.mark.parametrize("model_type", ["llama", "", 5, ["openelm"], {"a": 1}])
def test_other_models_are_refused(model_type: Any) -> None:
    with pytest.raises(RequestError, match="openelm"):
        small(model_type=model_type)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ('{"model_dim": 1} trailing', "cannot be read as JSON"),
        ("[]", "must contain a JSON object, not a list"),
        ('"openelm"', "must contain a JSON object, not a string"),
        ("null", "must contain a JSON object, not null"),
        ("7", "must contain a JSON object, not a number"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "cannot be read as JSON"),
        ('{"model_dim": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"model_dim": 64}', "no num_transformer_layers"),
    ],
    ids=lambda v: v[:24],
)
def test_files_that_are_not_a_configuration_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for path in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(RequestError, match=words):
            ModelConfig.from_file(path)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="does not exist"):
        ModelConfig.from_file(tmp_path)
    with pytest.raises(RequestError, match="does not exist"):
        ModelConfig.from_file(tmp_path / "elsewhere.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(RequestError, match="cannot be read as JSON"):
        read_json(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RequestError, match=r"config\.json"):
        read_json(tmp_path)


@pytest.mark.parametrize("value", [None, [], "openelm", 3])
def test_from_dict_refuses_other_types(value: Any) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        ModelConfig.from_dict(value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(st.sampled_from([*ModelConfig.__dataclass_fields__, "model_type"]), json_values)
def test_any_value_of_any_field_is_accepted_or_refused_by_name(name: str, value: Any) -> None:
    try:
        config = small(**{name: value})
    except RequestError as error:
        assert name in str(error) or "num_" in str(error)
    else:
        assert config.num_parameters > 0
        assert len(config.num_query_heads) == len(config.ffn_dims) == config.num_transformer_layers


def test_only_the_3b_shape_does_not_fit_float16():
    assert [size for size in SIZES if not ModelConfig.from_name(size).fits_float16] == ["3B"]
