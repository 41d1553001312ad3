"""Reading and writing model folders: every layout, every kind of damage, atomic writing, tokenizers, memory."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm import backend, convert, load, loading, native
from mlx_openelm.config import SIZES, ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import atomic, safetensors
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.mlx import Checkpoint
from mlx_openelm.hub import catalog
from mlx_openelm.loading import build_model, draft_name
from mlx_openelm.text import shared_tokenizer
from mlx_openelm.text.chat_template import CORENET_TEMPLATE

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
REFERENCE = json.loads((FIXTURES / "shakespeare-reference.json").read_text())
WEIGHTS = "model.safetensors"
EMBEDDING = "transformer.token_embeddings.weight"

CONFIG: dict[str, Any] = {
    "model_type": "openelm",
    "num_transformer_layers": 2,
    "model_dim": 32,
    "head_dim": 8,
    "vocab_size": 2048,
    "num_query_heads": [2, 4],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [1, 2],
    "ffn_dim_divisor": 32,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}


def make_weights(config: ModelConfig, seed: int = 0) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {n: mx.array(rng.standard_normal(s).astype(np.float32)) for n, s in config.tensor_shapes().items()}


def write_folder(folder: Path, weights: dict[str, mx.array] | None = None, **changes: Any) -> dict[str, mx.array]:
    """A small model in Hugging Face's layout, with the fixture's tokenizer; returns its weights."""
    folder.mkdir(exist_ok=True)
    values = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(values))
    weights = make_weights(ModelConfig.from_dict(values)) if weights is None else weights
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(FOLDER / name, folder / name)
    return weights


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_folder(tmp_path / "small")
    return tmp_path / "small"


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and mx.array_equal(a[n].view(mx.uint8), b[n].view(mx.uint8)).item() for n in a
    )


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array([REFERENCE["ids"][3]])).astype(mx.float32))


def refused(folder: Path, *words: str) -> str:
    """`load` refuses the folder in one line, which names it and contains `words`; returns the line."""
    with pytest.raises(RequestError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    for word in words:
        assert word in message
    return message


# Layouts.


def test_the_fixture_gives_the_reference_logits(reference_logits: np.ndarray) -> None:
    model, tokenizer = load(FOLDER)
    assert np.abs(logits(model)[0] - reference_logits).max() < 1e-4
    assert [tokenizer.encode(text) for text in REFERENCE["prompts"]] == REFERENCE["ids"]
    assert tokenizer.eos_token_ids == {2}
    assert (model.quantization, model.expanded) == ({}, False)
    assert not model.training


@pytest.fixture
def reference_logits() -> np.ndarray:
    return np.load(FIXTURES / "shakespeare-reference.npz")["logits_3"]


def test_weights_in_one_file(small: Path) -> None:
    weights = make_weights(ModelConfig.from_dict(CONFIG))
    assert same(parameters(load(small)[0]), weights)
    assert same(parameters(load(str(small))[0]), weights)


def write_shards(folder: Path, weights: dict[str, mx.array]) -> None:
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(weights), {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        mx.save_safetensors(str(folder / file), {name: weights[name] for name in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_weights_in_shards(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m")
    write_shards(tmp_path / "m", weights)
    assert same(parameters(load(tmp_path / "m")[0]), weights)
    # The index lists the model's files; another file beside them is ignored.
    mx.save_safetensors(str(tmp_path / "m" / "model-extra.safetensors"), {"x": mx.zeros(3)})
    assert same(parameters(load(tmp_path / "m")[0]), weights)
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path / "m", "model-00002-of-00003.safetensors", "missing")


def test_shards_with_a_duplicate_tensor_are_refused(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m")
    mx.save_safetensors(str(tmp_path / "m" / "model-2.safetensors"), {EMBEDDING: weights[EMBEDDING]})
    with pytest.raises(RequestError, match=f"{EMBEDDING} is both in"):
        load(tmp_path / "m")


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m")
    expected = logits(load(tmp_path / "m")[0])
    mx.save_safetensors(
        str(tmp_path / "m" / WEIGHTS), weights | {"lm_head.weight": weights[EMBEDDING], "lm_head.scales": mx.zeros(3)}
    )
    model = load(tmp_path / "m")[0]
    assert same(parameters(model), weights)
    assert np.array_equal(logits(model), expected)


def test_an_untied_head(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m", share_input_output_layers=False)
    assert weights["lm_head.weight"].shape == (2048, 32)
    model = load(tmp_path / "m")[0]
    assert same(parameters(model), weights)
    hidden = np.array(model.hidden_states(mx.array([[1, 5]])))
    assert np.abs(np.array(model(mx.array([[1, 5]]))) - hidden @ np.array(weights["lm_head.weight"]).T).max() < 1e-4
    convert(tmp_path / "m", tmp_path / "out", dtype="float32")
    assert same(parameters(load(tmp_path / "out")[0]), weights)


def test_half_precision_is_computed_in_float32_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", None)
    weights = make_weights(ModelConfig.from_dict(CONFIG))
    for dtype in (mx.bfloat16, mx.float16):
        stored = {n: w.astype(dtype) for n, w in weights.items()}
        write_folder(tmp_path / "m", stored)
        assert same(parameters(load(tmp_path / "m")[0]), {n: w.astype(mx.float32) for n, w in stored.items()})
        assert same(parameters(load(tmp_path / "m", dtype=str(dtype).split(".")[-1])[0]), stored)
        assert same(parameters(load(tmp_path / "m", dtype=dtype)[0]), stored)
    with pytest.raises(RequestError, match="dtype must be one of float32, .*, bf16, got 'int8'"):
        load(tmp_path / "m", dtype="int8")


@pytest.mark.skipif(native.kernels is None, reason="the kernels are not used")
def test_kernels_use_matrices_as_stored(tmp_path: Path, quantized: Path) -> None:
    weights = make_weights(ModelConfig.from_dict(CONFIG))
    for dtype in (mx.bfloat16, mx.float16):
        stored = {n: w.astype(dtype) for n, w in weights.items()}
        write_folder(tmp_path / "m", stored)
        expected = {n: w.astype(mx.float32) if w.ndim == 1 else w for n, w in stored.items()}
        assert same(parameters(load(tmp_path / "m")[0]), expected)
        wide = {n: w.astype(mx.float32) for n, w in stored.items()}
        assert same(parameters(load(tmp_path / "m", dtype="float32")[0]), wide)
        assert np.abs(logits(load(tmp_path / "m")[0]) - logits(load(tmp_path / "m", dtype="float32")[0])).max() < 1e-4
    model, _ = load(quantized)
    assert model.quantization and not model.expanded
    packed = parameters(model)
    assert packed["transformer.layers.0.attn.qkv_proj.weight"].dtype == mx.uint32
    assert packed["transformer.layers.0.attn.qkv_proj.scales"].dtype == mx.bfloat16
    assert packed["transformer.norm.weight"].dtype == mx.float32


def test_modes_without_kernels_are_expanded(tmp_path: Path, small: Path) -> None:
    convert(small, tmp_path / "q", quantize=True, q_mode="mxfp4")
    assert load(tmp_path / "q")[0].expanded


def test_a_missing_adapter_is_named(small: Path) -> None:
    for path in ("somewhere", ["somewhere=0.5"], {"somewhere": 2}):
        with pytest.raises(RequestError, match="There is no adapter 'somewhere'"):
            load(small, adapter_path=path)


# Everything that does not fit, in one message.


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m")
    del weights["transformer.norm.weight"], weights["transformer.layers.1.attn.q_norm.weight"]
    weights["transformer.layers.2.attn_norm.weight"] = mx.zeros(32)
    weights["stray"] = mx.zeros(1)
    weights["transformer.layers.0.ffn.proj_1.weight"] = mx.zeros((64, 31))
    weights["transformer.layers.0.attn_norm.weight"] = mx.zeros((32, 1))
    mx.save_safetensors(str(tmp_path / "m" / WEIGHTS), weights)
    refused(
        tmp_path / "m",
        "missing: transformer.layers.1.attn.q_norm.weight, transformer.norm.weight",
        "unexpected: ",
        "transformer.layers.2.attn_norm.weight",
        "stray",
        "transformer.layers.0.ffn.proj_1.weight has shape [64, 31] instead of [64, 32]",
        "transformer.layers.0.attn_norm.weight has shape [32, 1] instead of [32]",
    )


def test_many_problems_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", {"a": mx.zeros(1)})
    message = refused(tmp_path / "m", "missing: ", " and 10 more", "unexpected: a")
    assert len(message) < 1000


def test_a_config_of_another_model_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"ffn_multipliers": [1, 1]}))
    refused(tmp_path / "m", "transformer.layers.1.ffn.proj_2.weight has shape [32, 64] instead of [32, 32]")


# Damaged files.


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: Any, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 1000])
def test_truncated_headers_are_refused(small: Path, size: int) -> None:
    data = (small / WEIGHTS).read_bytes()
    (small / WEIGHTS).write_bytes(data[:size])
    refused(small, WEIGHTS, "damaged", "header is cut off")


@pytest.mark.parametrize("lost", [1, 100, 100_000])
def test_truncated_data_is_refused(small: Path, lost: int) -> None:
    data = (small / WEIGHTS).read_bytes()
    (small / WEIGHTS).write_bytes(data[:-lost])
    refused(small, WEIGHTS, "damaged", "is cut off")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200_000_000, 1 << 40])
def test_headers_of_impossible_length_are_refused(small: Path, length: int) -> None:
    data = (small / WEIGHTS).read_bytes()
    (small / WEIGHTS).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(small, WEIGHTS, "header is cut off")


@pytest.mark.parametrize(
    "header",
    [b"", b"hello", b"[]", b"null", b"7", b"{" * 50_000, b"[" * 50_000, b'{"a":' * 50_000, b"\xff\xfe\x00\x00"],
    ids=lambda h: str(h[:12]),
)
def test_headers_that_are_not_a_json_object_are_refused(small: Path, header: bytes) -> None:
    write_raw(small / WEIGHTS, header, b"\0" * 100)
    refused(small, WEIGHTS, "damaged", "JSON")


def test_headers_in_another_encoding_are_refused(small: Path) -> None:
    """Python's JSON reader guesses encodings; other readers of the format do not."""
    header, data = header_of(small / WEIGHTS)
    write_raw(small / WEIGHTS, json.dumps(header).encode("utf-16"), data)
    refused(small, WEIGHTS, "damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": []},
        {"dtype": {}},
        {"dtype": None},
        {"dtype": 5},
        {"dtype": "F64"},
        {"dtype": "I8"},
        {"dtype": "f32"},
        {"shape": None},
        {"shape": "ab"},
        {"shape": [-1]},
        {"shape": [32.0]},
        {"shape": [True] * 32},
        {"shape": [[32]]},
        {"shape": [1 << 62, 1 << 62]},
        {"shape": [33]},
        {"shape": []},
        {"data_offsets": None},
        {"data_offsets": [0]},
        {"data_offsets": [0, 128, 256]},
        {"data_offsets": [-128, 0]},
        {"data_offsets": [128, 0]},
        {"data_offsets": [0, 127]},
        {"data_offsets": [0, 128.0]},
        {"data_offsets": ["0", "128"]},
        {"data_offsets": [1 << 40, (1 << 40) + 128]},
        {"data_offsets": {"a": 1, "b": 2}},
    ],
    ids=str,
)
def test_inconsistent_headers_are_refused(small: Path, change: dict) -> None:
    header, data = header_of(small / WEIGHTS)
    header["transformer.norm.weight"] |= change
    write_raw(small / WEIGHTS, header, data)
    refused(small, WEIGHTS, "transformer.norm.weight")


@pytest.mark.parametrize("entry", [None, [], "x", 5, {}, {"dtype": "F32"}], ids=str)
def test_header_entries_of_other_types_are_refused(small: Path, entry: Any) -> None:
    header, data = header_of(small / WEIGHTS)
    header["transformer.norm.weight"] = entry
    write_raw(small / WEIGHTS, header, data)
    refused(small, WEIGHTS, "transformer.norm.weight", "malformed")


def test_overlapping_tensors_are_refused(small: Path) -> None:
    """The format forbids it: with two tensors on the same bytes, one is lost."""
    header, data = header_of(small / WEIGHTS)
    first, second = (f"transformer.layers.{i}.attn_norm.weight" for i in range(2))
    header[first]["data_offsets"] = header[second]["data_offsets"]
    write_raw(small / WEIGHTS, header, data)
    refused(small, WEIGHTS, "damaged")


@pytest.mark.parametrize("metadata", [None, [], "x", {"format": 5}, {"a": {"b": "c"}}], ids=str)
def test_metadata_of_other_types_is_refused_or_ignored(small: Path, metadata: Any) -> None:
    expected = parameters(load(small)[0])
    header, data = header_of(small / WEIGHTS)
    write_raw(small / WEIGHTS, {"__metadata__": metadata} | header, data)
    try:
        model, _ = load(small)
    except RequestError as error:
        assert WEIGHTS in str(error)
    else:
        assert same(parameters(model), expected)


@pytest.mark.parametrize("kind", ["folder", "dead link", "unreadable"])
def test_unreadable_weights_are_refused(small: Path, kind: str) -> None:
    (small / WEIGHTS).unlink()
    if kind == "folder":
        (small / WEIGHTS).mkdir()
    elif kind == "dead link":
        (small / WEIGHTS).symlink_to(small / "gone")
    else:
        (small / WEIGHTS).write_bytes(b"")
        (small / WEIGHTS).chmod(0)
        if os.access(small / WEIGHTS, os.R_OK):
            pytest.skip("root can read every file")
    refused(small)


def test_the_hubs_links_are_followed(small: Path, tmp_path: Path) -> None:
    """Its cache has links to files without a suffix, outside of the folder."""
    expected = parameters(load(small)[0])
    (small / WEIGHTS).rename(tmp_path / "0123abcd")
    (small / WEIGHTS).symlink_to(tmp_path / "0123abcd")
    assert same(parameters(load(small)[0]), expected)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_harmless(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, num_transformer_layers=1, num_query_heads=2, num_kv_heads=1, vocab_size=40)
        raw = bytearray((folder / WEIGHTS).read_bytes())
        header = 8 + struct.unpack("<Q", raw[:8])[0]
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            raw = raw[: data.draw(st.integers(0, len(raw)))]
        (folder / WEIGHTS).write_bytes(raw)
        try:
            model = build_model(mlx_format.read(folder))
        except RequestError as error:
            assert name in str(error)
        else:
            assert model.config.num_parameters == sum(w.size for w in parameters(model).values())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_value_in_a_header_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whole JSON values instead of bytes get further into the reader."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F32", "BF16", "U8", "U32", ""]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("aé ", max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folder(folder, num_transformer_layers=1, num_query_heads=2, num_kv_heads=1, vocab_size=40)
        header, rest = header_of(folder / WEIGHTS)
        header.pop("__metadata__", None)
        tensor = data.draw(st.sampled_from(sorted(header)))
        header[tensor][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(values)
        write_raw(folder / WEIGHTS, header, rest)
        try:
            build_model(mlx_format.read(folder))
        except RequestError as error:
            assert tensor in str(error)


# Damaged indices and configurations.


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "{", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}', "", "[" * 99_999],
    ids=lambda t: t[:20],
)
def test_invalid_indices_are_refused(small: Path, text: str) -> None:
    (small / "model.safetensors.index.json").write_text(text)
    refused(small, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "name",
    [
        *[
            "../secret",
            "../small/model.safetensors",
            "/etc/passwd",
            "sub/model.safetensors",
            "",
            ".",
            "..",
            "./a",
            "a/",
            "~",
        ],
        *[5, None, True, [], ["model.safetensors"], {}, "model\0.safetensors"],
    ],
    ids=repr,
)
def test_shards_outside_of_the_folder_are_refused(small: Path, tmp_path: Path, name: Any) -> None:
    shutil.copy(small / WEIGHTS, tmp_path / "secret")
    (small / "sub").mkdir()
    shutil.copy(small / WEIGHTS, small / "sub" / WEIGHTS)
    weight_map = {EMBEDDING: WEIGHTS, "transformer.norm.weight": name}
    (small / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(small, "model.safetensors.index.json")


@pytest.mark.parametrize("text", ["[]", "null", "5", '"x"', "{", "", '{"model_type": "llama"}', "{}"])
def test_invalid_configurations_are_refused(small: Path, text: str) -> None:
    (small / "config.json").write_text(text)
    refused(small, "config.json")


def test_empty_folders_are_refused(tmp_path: Path) -> None:
    refused(tmp_path, "config.json", "has no")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "no model*.safetensors")
    with pytest.raises(RequestError, match="does not exist"):
        load(tmp_path / "nothing")


def test_no_code_of_a_folder_runs(small: Path, tmp_path: Path) -> None:
    """Neither Python files with expected names nor those its configuration refers to."""
    mark = tmp_path / "ran"
    code = f"open({str(mark)!r}, 'w').write('x')\n"
    for name in ("modeling_openelm", "configuration_openelm", "conftest", "sitecustomize", "tokenization", "json"):
        (small / f"{name}.py").write_text(code)
    auto_map = {"AutoConfig": "configuration_openelm.C", "AutoModelForCausalLM": "modeling_openelm.M"}
    values = CONFIG | {"auto_map": auto_map, "model_file": "modeling_openelm.py", "trust_remote_code": True}
    (small / "config.json").write_text(json.dumps(values))
    tokenizer = json.loads((small / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}, "tokenizer_class": "T"}
    (small / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    before = set(sys.path)
    load(small)
    convert(small, tmp_path / "out")
    assert not mark.exists()
    assert set(sys.path) == before
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir() if p.suffix == ".py") == []
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"auto_map", "model_file", "trust_remote_code"} & values.keys()


# Quantized folders.


@pytest.fixture(scope="module")
def small_quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    write_folder(folder / "small")
    convert(folder / "small", folder / "q", quantize=True, q_group_size=32)
    return folder / "q"


@pytest.fixture
def quantized(small_quantized: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(small_quantized, tmp_path / "q")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder: Path, **weights: mx.array | None) -> None:
    stored = {
        n: mx.array(np.array(w.astype(mx.float32))).astype(w.dtype) for n, w in mx.load(str(folder / WEIGHTS)).items()
    }
    stored |= weights
    mx.save_safetensors(str(folder / WEIGHTS), {n: w for n, w in stored.items() if w is not None})


def test_a_wrong_group_size_is_corrected_from_the_shapes(quantized: Path) -> None:
    """The shapes decide: a matrix without its own entry may differ from the common settings."""
    expected = logits(load(quantized)[0])
    change(quantized, quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    assert np.array_equal(logits(load(quantized)[0]), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 0, "bits": 4},
        {"group_size": 32},
        {"bits": 4},
        {"group_size": "x", "bits": 4},
        {"group_size": None, "bits": 4},
        {"group_size": 32, "bits": [4]},
        {"group_size": 32, "bits": 4, "mode": "nf4"},
        {"group_size": 32, "bits": 4, "mode": []},
        {"group_size": 32, "bits": 7},
        {"group_size": 1e400, "bits": 4},
        [],
        "4bit",
        {},
    ],
    ids=str,
)
def test_invalid_quantization_settings_are_refused(quantized: Path, settings: Any) -> None:
    change(quantized, quantization=settings, quantization_config=settings)
    refused(quantized, "quantiz")


def test_an_entry_that_does_not_fit_its_matrix_is_refused(quantized: Path) -> None:
    path = "transformer.layers.1.ffn.proj_2"
    common = {"group_size": 32, "bits": 4, "mode": "affine"}
    change(quantized, quantization=common | {path: {"group_size": 64, "bits": 8}})
    refused(quantized, f"{path}.weight has shape [32, 8] instead of [32, 16]", f"{path}.scales")


def test_missing_biases_are_refused(quantized: Path) -> None:
    change_weights(quantized, **{"transformer.layers.1.ffn.proj_2.biases": None})
    refused(quantized, "missing: transformer.layers.1.ffn.proj_2.biases")


def test_missing_scales_are_refused(quantized: Path) -> None:
    change_weights(quantized, **{"transformer.layers.1.ffn.proj_2.scales": None})
    refused(quantized, "transformer.layers.1.ffn.proj_2")


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("weight", mx.zeros((32, 8), mx.float32)),
        ("weight", mx.zeros((32, 8), mx.uint8)),
        ("scales", mx.zeros((32, 2), mx.uint32)),
        ("biases", mx.zeros((32, 2), mx.uint8)),
        ("scales", mx.zeros((32, 3))),
        ("biases", mx.zeros((32, 1))),
    ],
    ids=str,
)
def test_packed_parts_of_wrong_dtypes_are_refused(quantized: Path, part: str, weight: mx.array) -> None:
    name = f"transformer.layers.1.ffn.proj_2.{part}"
    change_weights(quantized, **{name: weight})
    refused(quantized, name)


def test_scales_of_the_wrong_dtype_are_refused(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "mx", quantize=True, q_mode="mxfp4")
    name = "transformer.layers.1.ffn.proj_2.scales"
    change_weights(tmp_path / "mx", **{name: mx.zeros((32, 2))})
    refused(tmp_path / "mx", name)


def test_plain_weights_stored_as_integers_are_refused(small: Path) -> None:
    change_weights(small, **{"transformer.norm.weight": mx.zeros(32, mx.uint32)})
    refused(small, "transformer.norm.weight is stored as")


@pytest.mark.covering
@pytest.mark.parametrize("mode", ["affine", "mxfp4", pytest.param("nvfp4", marks=pytest.mark.slow), "mxfp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expanded_and_packed_weights_give_the_same_logits(tmp_path: Path, mode: str, dtype: str) -> None:
    convert(FOLDER, tmp_path / "q", quantize=True, q_mode=mode, dtype=dtype)
    expanded, packed = (load(tmp_path / "q", expand=expand)[0] for expand in (True, False))
    assert (expanded.expanded, packed.expanded) == (True, False)
    assert expanded.quantization == packed.quantization
    assert len(packed.quantization) == 25
    assert set(parameters(expanded)) == set(expanded.config.tensor_shapes())
    assert f"{EMBEDDING.removesuffix('.weight')}.scales" in parameters(packed)
    assert np.abs(logits(expanded) - logits(packed)).max() < 1e-4


def test_expanding_depends_on_free_memory(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", None)
    needed = 4 * ModelConfig.from_dict(CONFIG).num_parameters
    for available, expanded in ((None, True), (2 * needed, True), (needed, False), (0, False)):
        monkeypatch.setattr(backend, "available_memory", lambda available=available: available)
        assert load(quantized)[0].expanded is expanded
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(backend, "available_memory", lambda: None)
    assert load(quantized)[0].expanded is False


# Writing.


def test_shards_keep_to_the_size_limit(tmp_path: Path) -> None:
    checkpoint = mlx_format.read(FOLDER)
    expected = {n: mx.array(w) for n, w in checkpoint.weights.items()}
    seen: list[tuple[int, int]] = []
    mlx_format.write(tmp_path, checkpoint, max_shard_bytes=700_000, progress=lambda *p: seen.append(p))
    assert checkpoint.weights == {}
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    total, index = 4 * 2_485_056, json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert 0.8 * total / 700_000 < count < 2 * total / 700_000  # one shard is larger because its tensor is
    assert index["metadata"]["total_size"] == total
    stored: dict[str, mx.array] = {}
    for file in files:
        header, data = header_of(tmp_path / file)
        assert header.pop("__metadata__") == {"format": "mlx"}
        assert (8 + len((tmp_path / file).read_bytes()) - 8 - len(data)) % 8 == 0
        # A tensor larger than the limit has its own shard.
        assert len(data) <= 700_000 or len(header) == 1
        assert {name for name, place in index["weight_map"].items() if place == file} == set(header)
        stored |= mx.load(str(tmp_path / file))
    assert same(stored, expected)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)
    assert seen[-1] == (total, total)
    assert same(mlx_format.read(tmp_path).weights, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_weights_are_read_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    done = convert(FOLDER, tmp_path / "out", dtype=dtype)
    expected = {n: w.astype(loading.WEIGHT_DTYPES[dtype]) for n, w in mlx_format.read(FOLDER).weights.items()}
    assert same(mlx_format.read(tmp_path / "out").weights, expected)
    assert done.bits_per_weight == {"float32": 32, "bfloat16": 16, "float16": 16}[dtype]
    assert (done.path, done.exceptions) == (tmp_path / "out", {})
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in values
    assert values["torch_dtype"] == dtype
    assert ModelConfig.from_dict(values) == ModelConfig.from_file(FOLDER)


def test_convert_defaults_to_bfloat16_and_four_bits(tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "plain")
    assert {w.dtype for w in mlx_format.read(tmp_path / "plain").weights.values()} == {mx.bfloat16}
    convert(FOLDER, tmp_path / "q", quantize=True)
    checkpoint = mlx_format.read(tmp_path / "q")
    kinds = {(q.bits, q.group_size, q.mode) for q in checkpoint.quantization.values()}
    assert kinds == {(4, 64, "affine"), (4, 32, "affine")}
    assert {w.dtype for w in checkpoint.weights.values()} == {mx.bfloat16, mx.uint32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantizing_equals_mlxs(tmp_path: Path, dtype: str) -> None:
    """Scales and biases are stored in 16 bits even for float32 weights."""
    done = convert(FOLDER, tmp_path / "q", quantize=True, q_bits=3, q_group_size=32, dtype=dtype)
    weights, source = mlx_format.read(tmp_path / "q").weights, mlx_format.read(FOLDER).weights
    name, kind = "transformer.layers.4.ffn.proj_2", loading.WEIGHT_DTYPES[dtype]
    packed, scales, biases = mx.quantize(source[f"{name}.weight"].astype(kind), 32, 3)
    stored = mx.float16 if dtype == "float16" else mx.bfloat16
    scales, biases = scales.astype(stored), biases.astype(stored)
    for part, expected in zip(("weight", "scales", "biases"), (packed, scales, biases), strict=True):
        assert weights[f"{name}.{part}"].dtype == expected.dtype
        assert mx.array_equal(weights[f"{name}.{part}"], expected)
    norms = sum(math.prod(tensor.shape) for tensor in weights.tensors.values() if len(tensor.shape) == 1)
    bits = (3 + 32 / 32) * (2_485_056 - norms) + 8 * kind.size * norms
    assert done.bits_per_weight == pytest.approx(bits / 2_485_056, rel=1e-12)
    convert(tmp_path / "q", tmp_path / "back", dequantize=True, dtype="float32")
    back = mlx_format.read(tmp_path / "back")
    assert back.quantization == {}
    expected = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=3)
    assert mx.array_equal(back.weights[f"{name}.weight"], expected)
    with pytest.raises(RequestError, match="already quantized to 3 bits"):
        convert(tmp_path / "q", tmp_path / "again", quantize=True)


def test_rows_no_group_size_divides_are_not_quantized(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", model_dim=40, ffn_dim_divisor=64)
    done = convert(tmp_path / "m", tmp_path / "q", quantize=True)
    kept = [path for path, why in done.exceptions.items() if "not quantized" in why]
    assert EMBEDDING.removesuffix(".weight") in kept
    assert set(mlx_format.read(tmp_path / "q").quantization) == {
        f"transformer.layers.{i}.{part}" for i in range(2) for part in ("ffn.proj_2",)
    } | {"transformer.layers.1.attn.out_proj"}
    assert (
        np.abs(logits(load(tmp_path / "q", expand=True)[0]) - logits(load(tmp_path / "q", expand=False)[0])).max()
        < 1e-3
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"q_bits": 4}, "needs quantize"),
        ({"q_mode": "mxfp4"}, "needs quantize"),
        ({"quantize": True, "dequantize": True}, "either"),
        ({"quantize": True, "q_bits": 7}, "q_bits must be 2, 3, 4, 5, 6 or 8"),
        ({"quantize": True, "q_group_size": 16}, "q_group_size must be 32, 64 or 128"),
        ({"quantize": True, "q_mode": "mxfp4", "q_bits": 8}, "q_bits must be 4"),
        ({"quantize": True, "q_mode": "nvfp4", "q_group_size": 32}, "q_group_size must be 16"),
        ({"quantize": True, "q_mode": "nf4"}, "q_mode must be one of affine, mxfp4, nvfp4, mxfp8"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"dequantize": True}, "not quantized"),
    ],
    ids=str,
)
def test_invalid_conversions_are_refused(small: Path, tmp_path: Path, options: dict, words: str) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RequestError, match=words):
        convert(small, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_float16_is_refused_for_the_3b_model() -> None:
    config = ModelConfig.from_name("3b")
    checkpoint = Checkpoint(config, {})
    with pytest.raises(RequestError, match="float16 cannot hold the 3B model's activations"):
        build_model(checkpoint, dtype="float16")
    with pytest.raises(RequestError, match="use bfloat16 or float32"):
        loading.dtype_for(mx.float16, config)
    assert loading.dtype_for("bfloat16", config) == mx.bfloat16
    assert loading.dtype_for("float16", ModelConfig.from_name("1.1b")) == mx.float16


def test_float16_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "m")
    monkeypatch.setitem(SIZES, "3B", (2, 32, 8))
    with pytest.raises(RequestError, match="float16"):
        convert(tmp_path / "m", tmp_path / "out", dtype="float16")
    with pytest.raises(RequestError, match="float16"):
        load(tmp_path / "m", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


# All or nothing.


def test_a_failure_in_the_middle_leaves_nothing(small: Path, tmp_path: Path) -> None:
    errors = {
        OpenELMError: OSError(28, "No space left on device"),
        KeyboardInterrupt: KeyboardInterrupt(),
        ZeroDivisionError: ZeroDivisionError(),
    }
    for expected, error in errors.items():

        def fail(written: int, total: int, error: BaseException = error) -> None:
            assert any(p.name.startswith(".out.partial") for p in tmp_path.iterdir())
            if written > total / 2:
                raise error

        with pytest.raises(expected):
            convert(small, tmp_path / "out", progress=fail)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


def test_a_failure_while_overwriting_keeps_the_old_folder(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def fail(*_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OpenELMError, match="No space left on device"):
        convert(small, tmp_path / "out", overwrite=True, progress=fail)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small"]


def test_an_existing_folder_is_kept_unless_requested(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out")
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RequestError, match="exists.*overwrite=True"):
        convert(small, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    convert(small, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine").exists()
    assert load(tmp_path / "out")[0].config.model_dim == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "small"]
    (tmp_path / "file").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RequestError, match="file"):
            convert(small, tmp_path / "file", overwrite=overwrite)
    assert (tmp_path / "file").read_text() == "x"


def test_parent_folders_are_created_and_a_file_among_them_is_an_error(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "a" / "b" / "out")
    assert load(tmp_path / "a" / "b" / "out")[0].config.model_dim == 32
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="file"):
        convert(small, tmp_path / "file" / "out")


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_dead_processes_are_removed_and_others_kept(tmp_path: Path) -> None:
    dead, alive = dead_process(), os.getppid()
    for name in (f".out.partial-{dead}", f".out.partial-{alive}", f".other.partial-{dead}", ".out.partial-x"):
        (tmp_path / name).mkdir()
    with atomic.new_folder(tmp_path / "out") as partial:
        assert partial.parent == tmp_path
        (partial / "a").write_text("1")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted([f".out.partial-{alive}", f".other.partial-{dead}", ".out.partial-x", "out"])


def test_the_previous_folder_of_a_killed_overwrite(tmp_path: Path) -> None:
    """It is removed, but restored if it is the only copy."""
    previous = tmp_path / f".out.partial-{dead_process()}-previous"
    for only_copy in (False, True):
        previous.mkdir()
        if not only_copy:
            (tmp_path / "out").mkdir()
        with atomic.new_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").write_text("1")
        assert {p.name for p in tmp_path.iterdir()} == {"out"}
        shutil.rmtree(tmp_path / "out")


# Memory.


def test_weights_are_read_lazily_and_never_held_twice(tmp_path: Path) -> None:
    """In a separate process, so that nothing else counts in the peak."""
    code = """
import sys, json
from pathlib import Path
import mlx_openelm
from mlx_openelm.formats.mlx import read
from mlx_openelm.jobs.convert import convert
from mlx_openelm.hub import catalog
from mlx_openelm.loading import build_model, draft_name
import mlx.core as mx
mx.set_default_device(mx.cpu)
folder, out = sys.argv[1:]
result = {}
checkpoint = read(Path(folder))
result["read"] = mx.get_peak_memory()
model = build_model(checkpoint)
result["load"] = mx.get_peak_memory()
model(mx.array([[1, 2, 3]]))
del model, checkpoint
mx.clear_cache()
for name, options in {"cast": {}, "q": {"quantize": True}, "same": {"dtype": "float32"}}.items():
    mx.reset_peak_memory()
    convert(folder, f"{out}/{name}", **options)
    result[name] = mx.get_peak_memory()
for name in ("cast", "q"):
    mx.clear_cache()
    mx.reset_peak_memory()
    model = build_model(read(Path(out, name)))
    result["load " + name] = mx.get_peak_memory()
    del model
print(json.dumps(result))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(FOLDER), str(tmp_path)], capture_output=True, text=True, check=True
    )
    peaks, size = json.loads(done.stdout.splitlines()[-1]), 4 * 2_485_056
    largest = 4 * 2048 * 192  # the embedding
    assert peaks["read"] < 0.01 * size
    assert size <= peaks["load"] <= 1.1 * size
    for name in ("cast", "q", "same"):
        assert peaks[name] <= 2.5 * largest, name
    # Casting and unpacking hold their source only while they run.
    assert peaks["load cast"] <= size + largest
    assert peaks["load q"] <= size + largest


def test_a_loaded_model_holds_its_weights_once() -> None:
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model, _ = load(FOLDER)
    gc.collect()
    assert 0 <= mx.get_active_memory() - before - 4 * 2_485_056 < 300_000
    del model
    gc.collect()
    assert mx.get_active_memory() - before < 300_000


# Tokenizers.


def write_large_tokenizer(folder: Path, pieces: int = 32000, bos: str = "<s>") -> None:
    """A `tokenizer.json` with this many pieces."""
    from mlx_openelm.text.tokenizer import Tokenizer

    Tokenizer.from_folder(FOLDER).save(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    assert isinstance(vocab, dict)
    while len(vocab) < pieces:
        vocab[f"piece{len(vocab)}"] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


@pytest.fixture
def without_tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "OpenELM-270M"
    write_folder(folder, vocab_size=32000)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_the_given_tokenizer_takes_precedence(small: Path, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_large_tokenizer(tmp_path / "t", 2040 + 8)
    spec = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    for tokenizer in (tmp_path / "t", tmp_path / "t" / "tokenizer.json", str(tmp_path / "t")):
        _, text = load(small, tokenizer=tokenizer)
        assert text.vocab_size == len(spec["model"]["vocab"])
    with pytest.raises(RequestError, match="No tokenizer"):
        load(small, tokenizer=tmp_path / "nowhere")


def test_the_folders_tokenizer_takes_precedence_over_the_hubs(small: Path, hub: FakeHub) -> None:
    renamed = small.rename(small.parent / "OpenELM-270M")
    _, text = load(renamed)
    assert text.vocab_size == 2048
    assert hub.requests == []


def test_the_hubs_tokenizer_for_published_models(
    without_tokenizer: Path, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    write_large_tokenizer(served)
    # In place of Llama 2's, which is not in the repository.
    ids = {REFERENCE["prompts"][3]: " ".join(map(str, REFERENCE["ids"][3][1:]))}
    monkeypatch.setattr(shared_tokenizer, "LLAMA2", replace(shared_tokenizer.LLAMA2, ids=ids))
    (served / "config.json").write_text("{}")
    hub.add("mlx-community/OpenELM-270M", served)
    _, text = load(without_tokenizer)
    assert (text.vocab_size, text.bos_token_id, text.eos_token_ids) == (32000, 1, {2})
    assert text.encode(REFERENCE["prompts"][3]) == REFERENCE["ids"][3]
    assert "config.json" not in hub.files_sent
    done = convert(without_tokenizer, tmp_path / "out")
    assert (done.path / "tokenizer.json").is_file()
    assert not (done.path / "chat_template.jinja").exists()
    hub.status = 503
    (tmp_path / "elsewhere").mkdir()
    _, again = load(done.path)
    assert again.encode("To be") == text.encode("To be")


@pytest.mark.parametrize("pieces", [31999, 32000])
def test_a_hub_tokenizer_that_is_not_llama_2s_is_refused(
    without_tokenizer: Path, hub: FakeHub, tmp_path: Path, pieces: int
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    write_large_tokenizer(served, pieces)
    hub.add("mlx-community/OpenELM-270M", served)
    with pytest.raises(RequestError, match="is neither in mlx-community/OpenELM-270M, .* with tokenizer"):
        load(without_tokenizer)


def test_without_a_tokenizer_the_error_says_what_to_do(small: Path, hub: FakeHub) -> None:
    (small / "tokenizer.model").unlink()
    with pytest.raises(RequestError, match="tokenizer"):
        load(small)
    assert hub.requests == []


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", vocab_size=2047)
    with pytest.raises(RequestError, match="2048 tokens, but the model only 2047"):
        load(tmp_path / "m")


def test_a_bad_tokenizer_leaves_no_output(small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.model").unlink()
    with pytest.raises(RequestError, match="tokenizer"):
        convert(small, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small"]


# Instruct models.


@pytest.mark.parametrize(
    ("name", "instruct"),
    [("OpenELM-270M-Instruct", True), ("OpenELM-1_1B-Instruct", True), ("OpenELM-270M", False), ("other", False)],
)
def test_instruct_models_get_a_chat_template(tmp_path: Path, name: str, instruct: bool) -> None:
    write_folder(tmp_path / name)
    convert(tmp_path / name, tmp_path / "out")
    template = tmp_path / "out" / "chat_template.jinja"
    assert template.exists() is instruct
    if instruct:
        assert template.read_text() == CORENET_TEMPLATE
        assert load(tmp_path / "out")[1].chat_template == CORENET_TEMPLATE


def test_the_folders_template_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "OpenELM-270M-Instruct"
    write_folder(folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}mine")
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ bos_token }}mine"


def test_written_folders_have_exactly_the_needed_files(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert safetensors.weight_files(tmp_path / "out") == [tmp_path / "out" / WEIGHTS]
    assert load(tmp_path / "out")[1].encode(REFERENCE["prompts"][3]) == REFERENCE["ids"][3]


def test_overwriting_never_removes_anything_but_a_model(tmp_path, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(FIXTURES / "shakespeare-hf", source)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="contains files that are not part of a model"):
        convert(source, precious, overwrite=True)
    with pytest.raises(RequestError, match="is the model to convert"):
        convert(source, source, overwrite=True)
    monkeypatch.chdir(precious)
    for path in ("", ".", "..", str(tmp_path)):
        with pytest.raises(RequestError, match="is the current folder or a parent of it"):
            convert(source, path, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert sorted(p.name for p in source.iterdir()) == sorted(p.name for p in (FIXTURES / "shakespeare-hf").iterdir())


def test_overwriting_through_a_link_replaces_its_target(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    convert(FIXTURES / "shakespeare-hf", target)
    link.symlink_to(target)
    convert(FIXTURES / "shakespeare-hf", link, quantize=True, overwrite=True)
    assert link.is_symlink()
    assert "quantization" in (target / "config.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("name", ["3b", "apple/OpenELM-3B-Instruct"])
def test_float16_is_refused_for_the_3b_before_any_download(tmp_path, hub, name):
    with pytest.raises(RequestError, match="overflow it"):
        convert(name, tmp_path / "out", dtype="float16")
    with pytest.raises(RequestError, match="overflow it"):
        load(name, dtype="float16")
    assert hub.requests == []


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32", mx.bfloat16])
def test_the_3b_in_a_wide_enough_dtype_is_requested_from_the_hub(tmp_path, hub, dtype):
    with pytest.raises(RequestError, match="OpenELM-3B"):
        load("3b", dtype=dtype)
    assert hub.requests
    if dtype is None or isinstance(dtype, str):
        with pytest.raises(RequestError, match="OpenELM-3B"):
            convert("3b", tmp_path / "out", dtype=dtype)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("tiny", "tiny-draft"),
        ("3b", "270m"),
        ("1.1B", "270m"),
        ("apple/OpenELM-3B-Instruct", "270m-instruct"),
        ("my/OpenELM-1_1B-Instruct", "270m-instruct"),
        ("450m", None),
        ("tiny-draft", None),
    ],
)
def test_the_draft_model_that_auto_means(model: str, expected: str | None) -> None:
    release = catalog.find(model) or catalog.find(Path(model).name)
    config = load("tiny")[0].config if release is None else ModelConfig.from_name(release.name)
    assert draft_name("450m", model, config) == "450m"
    if expected is not None:
        assert draft_name("auto", model, config) == expected
        return
    with pytest.raises(RequestError, match="auto knows no smaller model for '(450m|tiny-draft)', only for"):
        draft_name("auto", model, config)
