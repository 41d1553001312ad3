"""PEFT's LoRA settings: those we support against PEFT itself, the others refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_openelm import AdapterSwitch, convert, load
from mlx_openelm.adapters.attaching import adapted_layers, attach, detach, extract
from mlx_openelm.adapters.files import read_adapter, write_adapter
from mlx_openelm.adapters.merging import merge
from mlx_openelm.config import EMBEDDING, ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats import peft, peft_settings
from mlx_openelm.formats.adapter import Adapter, LowRank
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from peft_adapters import FOLDER, change_tensors, torch_base

FIXTURES = Path(__file__).parent / "fixtures"
LORA = FIXTURES / "peft-lora"
CASES = Path(__file__).parents[2] / "shared" / "cases" / "peft"
CONFIG = mlx_format.read(FOLDER).config
PREFIX, QKV = "base_model.model.", "transformer.layers.0.attn.qkv_proj"
TABLE, TABLE_COPY = f"{PREFIX}{EMBEDDING}.weight", f"{PREFIX}{EMBEDDING}.base_layer.weight"
LINEAR = ["qkv_proj", "proj_2"]
HANGING = "(.*)*X"
TYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in mx.load(str(FOLDER / "model.safetensors")).items()}


@pytest.fixture
def model() -> Iterator[OpenELM]:
    yield build_model(mlx_format.read(FOLDER), dtype="float32")


def edit(folder: Path, change: Callable[[dict[str, mx.array]], object] = dict, **settings: Any) -> Path:
    """A copy of an adapter with other settings and tensors."""
    change_tensors(LORA, folder, change)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def merged(folder: Path) -> dict[str, np.ndarray]:
    """The model's weights with an adapter merged by our code."""
    checkpoint = mlx_format.read(FOLDER)
    tensors = merge(checkpoint, read_adapter(folder, checkpoint.config)).checkpoint.weights.tensors
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def train_in_peft(folder: Path, **settings: Any) -> None:
    peft = pytest.importorskip("peft")
    import torch

    theirs = peft.get_peft_model(torch_base(), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    theirs.save_pretrained(folder)


def merged_by_peft(folder: Path) -> dict[str, np.ndarray]:
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(torch_base(), str(folder)).merge_and_unload()
    return {name: value.detach().numpy() for name, value in theirs.named_parameters()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*\.[0-2]\.attn\.(qkv|out)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["layers.0.attn.qkv_proj"]},
        {"target_modules": LINEAR, "exclude_modules": r".*layers\.[1-3]\..*", "bias": "all"},
        {"target_modules": LINEAR, "layers_to_transform": [0, 2], "fan_in_fan_out": True, "bias": "lora_only"},
        {"target_modules": LINEAR, "layers_to_transform": 3, "layers_pattern": ["h", "lay.*"]},
        {
            "target_modules": LINEAR,
            "rank_pattern": {r"layers\.[0-2]\.attn\.qkv_proj": 2, "proj_2": 6},
            "alpha_pattern": {r"^transformer.layers.(1|3).*qkv_proj": 32, "layers.1.attn.qkv_proj": 5},
            "use_rslora": True,
        },
        {"target_modules": ["token_embeddings", "qkv_proj"], "use_dora": True, "ensure_weight_tying": True},
        {"target_modules": ["token_embeddings"], "init_lora_weights": "mica", "lora_dropout": 1.0},
        {"target_modules": LINEAR, "init_lora_weights": "orthogonal", "modules_to_save": ["token_embeddings"]},
        {"target_modules": LINEAR, "init_lora_weights": False, "megatron_core": "x", "modules_to_save": ["classifier"]},
        {"target_modules": LINEAR, "velora_config": {"num_groups": 4}},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_merged_weights_equal_pefts(tmp_path: Path, weights: dict[str, np.ndarray], settings: dict[str, Any]) -> None:
    train_in_peft(tmp_path / "a", **settings)
    expected, ours = merged_by_peft(tmp_path / "a"), merged(tmp_path / "a")
    changed = [name for name, value in expected.items() if np.abs(value - weights[name]).max() > 1e-3]
    assert changed
    for name, value in expected.items():
        assert np.abs(ours[name] - value).max() < 1e-6, name


@pytest.mark.skipif(not CASES.exists(), reason="needs the cases")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["emb-saved2", "noemb-saved2", "bias-all"])
def test_files_of_other_programs(name: str) -> None:
    expected, ours = merged_by_peft(CASES / name), merged(CASES / name)
    assert len(expected) == 25  # all matrices
    for tensor, value in expected.items():
        assert np.abs(ours[tensor] - value).max() < 1e-6, tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding"])
def test_peft_merges_our_files_to_the_same_weights(tmp_path: Path, name: str) -> None:
    write_adapter(read_adapter(FIXTURES / name, CONFIG), tmp_path, CONFIG, "peft")
    expected, ours = merged_by_peft(FIXTURES / name), merged_by_peft(tmp_path)
    assert all(np.abs(ours[tensor] - value).max() < 1e-6 for tensor, value in expected.items())


def test_every_setting_of_peft_is_known() -> None:
    """A setting added by a new PEFT is refused by name until it is handled."""
    theirs = pytest.importorskip("peft")
    refused = {
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias"),
        *("monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
    }
    fields = {field.name for field in dataclasses.fields(theirs.LoraConfig)}
    assert fields - refused <= peft_settings.HARMLESS | peft_settings.READ
    assert not refused & (peft_settings.HARMLESS | peft_settings.READ)


def test_methods_other_than_lora_are_refused_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = edit(tmp_path / "a")
    for kind in peft.PeftType:
        if kind != "LORA":
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind.value, "r": 8}))
            with pytest.raises(RequestError, match=f"peft_type '{kind.value}' is not supported; only LORA is"):
                read_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["qkv_proj"]}, "for transformer.*, but target_modules in adapter_config.json excludes"),
        ({"target_modules": r".*\.attn\..*"}, "but target_modules in"),
        ({"target_modules": []}, "but target_modules in"),
        ({"exclude_modules": ["proj_1"]}, "ffn.proj_1, but exclude_modules in"),
        ({"exclude_modules": r".*layers\.4.*"}, "layers.4.*, but exclude_modules in"),
        ({"layers_to_transform": [0, 1]}, r"layers.[2-5].*, but layers_to_transform in"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "but layers_to_transform in"),
        ({"modules_to_save": ["ffn"]}, r"ffn.proj_\d, but modules_to_save in"),
        ({"target_modules": {"qkv_proj": 1}}, r"target_modules must be names of modules, got \{'qkv_proj': 1\}"),
        ({"target_modules": ["qkv_proj", 5]}, "target_modules must be names of modules"),
        ({"layers_to_transform": [0, "1"]}, "layers_to_transform must be layer numbers"),
        ({"rank_pattern": ["qkv_proj"]}, "rank_pattern must be an object of numbers by module"),
        (
            {"rank_pattern": {f"m{n}": 8 for n in range(1001)}},
            "rank_pattern has 1001 entries, more than the limit of 1000",
        ),
        (
            {"rank_pattern": {"qkv_proj": "8"}},
            "rank_pattern of 'qkv_proj' must be a finite float32 number, got '8'",
        ),
        ({"rank_pattern": {"qkv_proj": -8}}, "qkv_proj has rank 8, but adapter_config.json says -8"),
        (
            {"alpha_pattern": {"qkv_proj": float("nan")}},
            "alpha_pattern of 'qkv_proj' must be a finite float32 number, got nan",
        ),
        ({"r": 0}, "has rank 8, but adapter_config.json says 0"),
        ({"r": True}, "r must be a finite float32 number, got True"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite float32 number, got 1000"),
        ({"lora_alpha": 1e300}, "lora_alpha must be a finite float32 number"),
        ({"lora_dropout": 1.5}, "lora_dropout must be from 0 to 1, got 1.5"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"init_lora_weights": "newer"}, "unknown init_lora_weights 'newer'"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga' changes the base model too; let PEFT convert"),
        ({"x" * 5000: 1}, "xx = 1 is not supported"),
    ],
)
def test_unsuitable_settings_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = edit(tmp_path / "a", **settings)
    with pytest.raises(RequestError, match=message) as error:
        read_adapter(folder, CONFIG)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", [HANGING, f"({HANGING})", "(a|a)*b", "a{1,1000000000}", "x)|(y"])
def test_malicious_patterns_end_at_once(tmp_path: Path, setting: str, key: str) -> None:
    """They match nothing here, as in PEFT, or are refused in one line."""
    started = time.process_time()
    try:
        adapter = read_adapter(edit(tmp_path / "a", **{setting: {key: 3}}), CONFIG)
        assert len(adapter.modules) == 24
    except RequestError as error:
        assert re.search(f"{setting} has .*, which is not a regular expression", str(error))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern"])
def test_other_patterns_are_bounded_too(tmp_path: Path, setting: str) -> None:
    started = time.process_time()
    for number, text in enumerate([HANGING, "[", "(" * 3000, "a{5000000000}"]):
        value = text if setting in ("target_modules", "exclude_modules") else [text]
        more = {"layers_to_transform": [0]} if setting == "layers_pattern" else {}
        try:
            read_adapter(edit(tmp_path / str(number), **{setting: value}, **more), CONFIG)
        except RequestError as error:
            assert setting in str(error) or "layers_to_transform" in str(error)
    assert time.process_time() - started < 8


def test_a_file_that_lacks_modules_warns_as_peft_does(tmp_path: Path) -> None:
    def drop(tensors: dict[str, mx.array]) -> None:
        for part in "AB":
            del tensors[f"{PREFIX}{QKV}.lora_{part}.weight"]

    with pytest.warns(UserWarning, match=f"has no tensors for {QKV}, which target_modules names"):
        adapter = read_adapter(edit(tmp_path / "a", drop), CONFIG)
    assert QKV not in adapter.modules


def test_a_target_modules_expression_ignores_layers_to_transform_as_in_peft(tmp_path: Path) -> None:
    names = "|".join(json.loads((LORA / "adapter_config.json").read_text())["target_modules"])
    folder = edit(tmp_path / "a", target_modules=rf".*\.({names})", layers_to_transform=[0])
    assert read_adapter(folder, CONFIG).modules.keys() == read_adapter(LORA, CONFIG).modules.keys()


def test_a_file_without_tensors_does_not_warn_of_each_module(tmp_path: Path) -> None:
    folder = edit(tmp_path / "a", lambda tensors: tensors.clear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.read(folder / "adapter_model.safetensors", CONFIG).modules == {}


@pytest.mark.parametrize(("scale", "alpha"), [(1.05, 4.2), (2.5, 10)])
def test_the_written_alpha_gives_the_scale(tmp_path: Path, scale: float, alpha: float) -> None:
    change = LowRank(mx.zeros((192, 4)), mx.zeros((4, 160)), scale)
    peft.write(Adapter(modules={QKV: change}), tmp_path, CONFIG)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(alpha, rel=1e-9)


def test_the_cost_of_real_settings_is_allowed(tmp_path: Path) -> None:
    """On the largest model: EVA gives each module a rank, Unsloth's expressions are long."""
    config = ModelConfig.from_name("OpenELM-3B")
    paths = [path for path in config.matrix_shapes() if path != EMBEDDING]
    values = {
        "peft_type": "LORA",
        "target_modules": r"(?:.*?(?:language|text|transformer).*?(?:attn|mlp|ffn).*?(?:proj).*?)|(?:\bmodel\.x)",
        "modules_to_save": ["embed_tokens", "lm_head"],
        "rank_pattern": {f"^{path}": n + 1 for n, path in enumerate(paths)},
        "alpha_pattern": {rf"layers\.{n}\.(attn|ffn)\..*": n + 1 for n in range(36)},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    settings = peft_settings.Settings(tmp_path / "adapter_config.json")
    assert [settings.rank(path) for path in paths] == list(range(1, 145))
    assert all(settings.targets(path) for path in paths) and not settings.targets(EMBEDDING)
    scales = [settings.scale(path, 2) for path in paths]
    assert scales == [(n + 1) / 2 for n in range(36) for _ in range(4)]


# Names of tensors.


def test_names_of_a_whole_state_and_without_a_prefix(tmp_path: Path) -> None:
    def rename(tensors: dict[str, mx.array], change: Callable[[str], str]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    def with_default(name: str) -> str:
        module, _, part = name.removesuffix(".weight").rpartition(".")
        return f"{module}.{part}.default" + ("" if "embedding" in part else ".weight")

    for number, (source, change) in enumerate(
        [
            ("peft-lora", lambda name: name.removeprefix(PREFIX)),
            ("peft-lora", with_default),
            ("peft-dora", with_default),
            ("peft-dora", lambda name: name + ".weight" if "magnitude" in name else name),
            ("peft-lora-embedding", with_default),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(FIXTURES / source, folder)
        file = folder / "adapter_model.safetensors"
        tensors = dict(mx.load(str(file)))
        mx.eval(tensors)
        rename(tensors, change)
        file.unlink()
        mx.save_safetensors(str(file), tensors)
        expected, got = (read_adapter(place, CONFIG).modules for place in (FIXTURES / source, folder))
        assert expected.keys() == got.keys()
        assert all(mx.array_equal(expected[path].b, got[path].b).item() for path in expected)
        assert all((expected[path].magnitude is None) == (got[path].magnitude is None) for path in expected)


def test_two_adapters_in_a_file_are_refused(tmp_path: Path) -> None:
    name = f"{PREFIX}{QKV}.lora_A.weight"
    for number, (other, message) in enumerate(
        [
            (name.replace(".weight", ".default.weight"), f"contains {re.escape(name)} under two names"),
            (name.removeprefix(PREFIX), f"contains {re.escape(name)} under two names"),
            (
                name.replace(".weight", ".other.weight"),
                r"contains .*lora_A.other.weight, which a LoRA adapter has no place for",
            ),
        ]
    ):
        folder = edit(tmp_path / str(number), lambda tensors, other=other: tensors.update({other: tensors[name]}))
        with pytest.raises(RequestError, match=message):
            read_adapter(folder, CONFIG)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_read(tmp_path: Path, dtype: mx.Dtype) -> None:
    def cast(tensors: dict[str, mx.array]) -> None:
        tensors.update({name: value.astype(dtype) for name, value in tensors.items()})

    change = read_adapter(edit(tmp_path / "a", cast), CONFIG).modules[QKV]
    exact = read_adapter(LORA, CONFIG).modules[QKV]
    assert change.a.dtype == mx.float32
    assert mx.array_equal(change.a, exact.a.astype(dtype).astype(mx.float32)).item()


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for number, value in enumerate([float("nan"), float("inf")]):

        def spoil(tensors: dict[str, mx.array], value: float = value) -> None:
            tensors[f"{PREFIX}{QKV}.lora_B.weight"][0, 0] = value

        with pytest.raises(RequestError, match=f"has values for {QKV} that are not finite"):
            read_adapter(edit(tmp_path / str(number), spoil), CONFIG)


# Base weights in the file.


def with_table(folder: Path, value: np.ndarray | mx.array, name: str = TABLE, **settings: Any) -> Path:
    return edit(folder, lambda tensors: tensors.update({name: mx.array(value)}), **settings)


@pytest.fixture(scope="module")
def merged_lora() -> dict[str, np.ndarray]:
    return merged(LORA)


@pytest.mark.parametrize("name", [TABLE, TABLE_COPY, f"{PREFIX}lm_head.weight", f"{EMBEDDING}.original_module.weight"])
def test_the_bases_own_embedding_is_dropped(
    tmp_path: Path, model: OpenELM, weights: dict[str, np.ndarray], merged_lora: dict[str, np.ndarray], name: str
) -> None:
    """As in files of PEFT's `save_embedding_layers`, and with `modules_to_save` where nothing changed."""
    folder = with_table(tmp_path / "a", weights[f"{EMBEDDING}.weight"], name)
    ids = mx.array([[1, 5, 900]])
    attach(model, read_adapter(LORA, model.config))
    expected = model(ids)
    attach(model, read_adapter(folder, model.config))
    assert mx.array_equal(model(ids), expected).item()
    loaded, _ = load(FOLDER, {str(folder): 0.5, str(LORA): 0.5}, "float32")
    assert mx.allclose(loaded(ids), expected, atol=1e-4).item()
    ours = merged(folder)
    assert merged_lora.keys() == ours.keys()
    assert all(np.array_equal(merged_lora[key], ours[key]) for key in merged_lora)
    write_adapter(extract(model), folder, model.config, "peft")
    assert not read_adapter(folder, model.config).base_copies


@pytest.mark.parametrize(
    ("name", "settings", "setting"),
    [
        (TABLE, {}, r"\(save_embedding_layers\)"),
        (TABLE_COPY, {}, r"\(save_embedding_layers\)"),
        (TABLE, {"modules_to_save": ["token_embeddings"]}, r"\(modules_to_save\)"),
        (f"{PREFIX}lm_head.weight", {"modules_to_save": ["lm_head"]}, r"\(modules_to_save\)"),
        (f"{PREFIX}transformer.norm.weight", {"modules_to_save": ["transformer.norm"]}, r"\(modules_to_save\)"),
        (f"{PREFIX}{QKV}.base_layer.weight", {}, r"\(a weight of the base\)"),
    ],
)
def test_another_base_is_refused_by_the_settings_name(
    tmp_path: Path,
    model: OpenELM,
    weights: dict[str, np.ndarray],
    name: str,
    settings: dict[str, Any],
    setting: str,
) -> None:
    own = name.removeprefix(PREFIX).replace(".base_layer", "").replace("lm_head", EMBEDDING)
    changed = weights[own].copy()
    changed[-1] += 0.01
    folder = with_table(tmp_path / "a", changed, name, **settings)
    message = rf"contains {re.escape(name)} {setting}, which differs from the base model.s; merge the adapter"
    with pytest.raises(RequestError, match=message):
        attach(model, read_adapter(folder, model.config))
    assert not list(adapted_layers(model))
    with pytest.raises(RequestError, match=message):
        merged(folder)
    with pytest.raises(RequestError, match=message):
        load(FOLDER, {str(folder): 0.5, str(LORA): 0.5}, "float32")
    switch = AdapterSwitch(model)
    with pytest.raises(RequestError, match=message):
        switch.add("a", folder)
    assert switch.names == []


def test_a_resized_vocabulary_is_refused(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    table = np.pad(weights[f"{EMBEDDING}.weight"], ((0, 2), (0, 0)))
    with pytest.raises(RequestError, match=r"\(save_embedding_layers\).*shape is \[2050, 192\], the model's \[2048"):
        read_adapter(with_table(tmp_path / "a", table), CONFIG)


def test_a_copy_of_the_embedding_alone_is_not_an_adapter(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    folder = with_table(tmp_path / "a", weights[f"{EMBEDDING}.weight"])
    tensors = {TABLE: mx.load(str(folder / "adapter_model.safetensors"))[TABLE]}
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    with pytest.raises(RequestError, match="is not an adapter"):
        read_adapter(folder, CONFIG)


@pytest.mark.parametrize(
    ("base", "stored"),
    [
        *[
            pytest.param(base, stored, marks=pytest.mark.slow if (number, place) in ((1, 1), (2, 2)) else ())
            for number, base in enumerate(TYPES)
            for place, stored in enumerate((mx.float32, mx.float16, mx.bfloat16))
        ],
        *[("4 bits", mx.float32), ("8 bits", mx.float16), ("mxfp8", mx.float32), ("unpacked", mx.bfloat16)],
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mxfp4", mx.float32), ("8 bits", mx.float32), ("unpacked", mx.float32))
        ),
    ],
)
def test_copies_are_compared_in_the_coarser_dtype(
    tmp_path: Path, weights: dict[str, np.ndarray], base: str, stored: mx.Dtype
) -> None:
    """A copy counts as the base's embedding whatever the dtypes; with one changed row it does not."""
    table = mx.array(weights[f"{EMBEDDING}.weight"])
    other = mx.array(table)
    other[700] = other[700] + 0.3 * mx.random.normal((192,), key=mx.random.key(1))
    same = with_table(tmp_path / "same", table.astype(stored))
    changed = with_table(tmp_path / "changed", other.astype(stored))
    place, options = FOLDER, {"dtype": base}
    if base not in TYPES:
        place, options = tmp_path / "base", {"dtype": "float32", "expand": base == "unpacked"}
        more = (
            {"q_mode": base, "q_group_size": 32}
            if base.startswith("mxfp")
            else {"q_bits": 8 if base == "8 bits" else 4}
        )
        convert(FOLDER, place, quantize=True, **({"q_group_size": 64} | more))
    load(place, same, **options)
    with pytest.raises(RequestError, match=r"\(save_embedding_layers\)"):
        load(place, changed, **options)
    checkpoint = mlx_format.read(place)
    merge(checkpoint, read_adapter(same, checkpoint.config))
    with pytest.raises(RequestError, match=r"\(save_embedding_layers\)"):
        merge(checkpoint := mlx_format.read(place), read_adapter(changed, checkpoint.config))


def test_a_copy_is_compared_with_the_base_even_if_another_adapter_is_active(
    tmp_path: Path, weights: dict[str, np.ndarray], model: OpenELM
) -> None:
    """Also while full fine-tuning weights replace the embedding."""
    from mlx_openelm.formats.adapter import Adapter

    table = mx.array(weights[f"{EMBEDDING}.weight"])
    switch = AdapterSwitch(model)
    switch.add("full", Adapter(weights={f"{EMBEDDING}.weight": table + 1}))
    switch.add("embedding", FIXTURES / "peft-lora-embedding")
    for number, used in enumerate(("full", "embedding")):
        switch.use(used)
        switch.add(f"a{number}", with_table(tmp_path / f"same{number}", table))
        with pytest.raises(RequestError, match="save_embedding_layers"):
            switch.add("b", with_table(tmp_path / f"other{number}", table + 1))
    switch.use("a0")
    detach(model)


# Paths.


def test_folders_of_several_adapters_are_named(tmp_path: Path) -> None:
    for name in ("mine", "other"):
        edit(tmp_path / name)
    with pytest.raises(RequestError, match=r"has no adapter_config.json.*one of the folders in it: mine, other\."):
        read_adapter(tmp_path, CONFIG)


def test_pipes_and_impossible_names_are_refused(tmp_path: Path) -> None:
    import os

    folder = edit(tmp_path / "a")
    os.mkfifo(folder / "mine.safetensors")
    with pytest.raises(RequestError, match="is a pipe or a device, not a file"):
        read_adapter(folder / "mine.safetensors", CONFIG)
    (folder / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="has no adapter_model.safetensors"):
        read_adapter(folder, CONFIG)
    for name in ("x" * 5000, "~nobody-at-all", "a\0b"):
        with pytest.raises(RequestError, match="is not a file") as error:
            read_adapter(name, CONFIG)
        assert len(str(error.value)) < 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match="is not a file"):
            load(FOLDER, "x" * 5000 + "=0.5")
