"""Model folders as programs, downloads and people leave them: what is read, and what is refused, by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import load
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.hub.resolve import resolve
from mlx_openelm.inputs import read_json
from mlx_openelm.publishing.files import model_files

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from mlx.utils import tree_flatten

CONFIG: dict[str, Any] = {
    "model_type": "openelm",
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 8,
    "vocab_size": 64,
    "num_query_heads": [2, 4],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [1, 2],
    "qkv_multipliers": [1, 1],
    "num_gqa_groups": 2,
    "ffn_dim_divisor": 32,
    "ffn_with_glu": True,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "rope_freq_constant": 10000,
    "rms_norm_eps": 1e-6,
}
UNTIED = CONFIG | {"share_input_output_layers": False}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD, TWIN = "transformer.token_embeddings.weight", "lm_head.weight", "transformer.classifier.weight"

Tensors = dict[str, mx.array]


def tensors_of(config: dict[str, Any]) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = ModelConfig.from_dict(config).tensor_shapes()
    return {name: mx.array(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


MODEL = tensors_of(CONFIG)
OTHER = {name: value + 1 for name, value in MODEL.items()}


def save(folder: Path, tensors: Tensors = MODEL, name: str = WHOLE) -> None:
    mx.save_safetensors(str(folder / name), tensors)


def save_shards(folder: Path, tensors: Tensors = MODEL, count: int = 3) -> dict[str, str]:
    """Every `count`-th tensor in the same file; returns the weight map."""
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = sorted(tensors)[number::count]
        save(folder, {tensor: tensors[tensor] for tensor in part}, name)
        weight_map |= dict.fromkeys(part, name)
    return weight_map


def save_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with only a `config.json`."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "m"


def is_model(found: Any) -> bool:
    return found.keys() == MODEL.keys() and all(mx.array_equal(found[name], MODEL[name]).item() for name in MODEL)


def refusal(folder: Path) -> str:
    with pytest.raises(RequestError) as caught:
        mlx_format.read(folder)
    return str(caught.value)


# Which files are read. If a folder has two sets, OTHER is the one that must not be read.


def stale_index(folder: Path) -> None:
    save(folder)
    save_index(folder, dict.fromkeys(MODEL, "model-00001-of-00002.safetensors"))


def whole_beside_indexed_shards(folder: Path) -> None:
    save(folder)
    save_index(folder, save_shards(folder, OTHER))


def whole_beside_shards(folder: Path) -> None:
    save(folder)
    save_shards(folder, OTHER)


def whole_beside_some_shards(folder: Path) -> None:
    whole_beside_shards(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def whole_beside_half_a_shard(folder: Path) -> None:
    whole_beside_shards(folder)
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"")


def whole_beside_a_variant(folder: Path) -> None:
    save(folder)
    save(folder, OTHER, "model.fp16.safetensors")


def whole_beside_a_copy(folder: Path) -> None:
    save(folder)
    save(folder, OTHER, "model (1).safetensors")


def variant_alone(folder: Path) -> None:
    save(folder, name="model.fp16.safetensors")


def indexed_shards(folder: Path) -> None:
    save_index(folder, save_shards(folder))


def shards_alone(folder: Path) -> None:
    save_shards(folder)


def index_of_some_shards(folder: Path) -> None:
    weight_map = save_shards(folder)
    save_index(folder, {name: file for name, file in weight_map.items() if "00003-of" not in file})


def index_of_one_tensor(folder: Path) -> None:
    weight_map = save_shards(folder)
    save_index(folder, {EMBEDDING: weight_map[EMBEDDING]})


def index_that_misplaces_tensors(folder: Path) -> None:
    save_index(folder, dict(zip(sorted(MODEL), sorted(save_shards(folder).values()), strict=True)))


def indexed_shards_beside_an_older_set(folder: Path) -> None:
    save_shards(folder, OTHER, count=2)
    save_index(folder, save_shards(folder))


def indexed_shards_beside_a_copy(folder: Path) -> None:
    indexed_shards(folder)
    save(folder, OTHER, "model-00001-of-00003 (1).safetensors")


def rest_in_an_unnumbered_file(folder: Path) -> None:
    first = sorted(MODEL)[:5]
    save(folder, {name: MODEL[name] for name in first})
    save(folder, {name: value for name, value in MODEL.items() if name not in first}, "model-rest.safetensors")


def rest_in_an_indexed_file(folder: Path) -> None:
    rest_in_an_unnumbered_file(folder)
    first = sorted(MODEL)[:5]
    save_index(folder, {name: WHOLE if name in first else "model-rest.safetensors" for name in MODEL})


def links_into_the_hubs_cache(folder: Path) -> None:
    indexed_shards(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted([*folder.glob("*.safetensors"), folder / INDEX])):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(blobs / f"{number:064x}")


def unfinished_download_beside_it(folder: Path) -> None:
    save(folder)
    for name in (f"{WHOLE}.incomplete", "model-00001-of-00002.safetensors.part", f"._{WHOLE}"):
        (folder / name).write_bytes(b"half")


def with_pickles(folder: Path) -> None:
    save(folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_config.json"):
        (folder / name).write_bytes(b"code")


READ: list[Callable[[Path], None]] = [
    stale_index,
    whole_beside_indexed_shards,
    whole_beside_shards,
    whole_beside_some_shards,
    whole_beside_half_a_shard,
    whole_beside_a_variant,
    whole_beside_a_copy,
    variant_alone,
    indexed_shards,
    shards_alone,
    index_of_some_shards,
    index_of_one_tensor,
    index_that_misplaces_tensors,
    indexed_shards_beside_an_older_set,
    indexed_shards_beside_a_copy,
    rest_in_an_unnumbered_file,
    rest_in_an_indexed_file,
    links_into_the_hubs_cache,
    unfinished_download_beside_it,
    with_pickles,
]


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_folders_with_a_model_are_read(folder: Path, kind: Callable[[Path], None]) -> None:
    kind(folder)
    assert is_model(mlx_format.read(folder).weights)


@pytest.mark.parametrize(
    "kind",
    [stale_index, variant_alone, indexed_shards, shards_alone, index_of_some_shards, rest_in_an_unnumbered_file],
    ids=lambda kind: kind.__name__,
)
def test_mlx_lm_reads_the_same(folder: Path, kind: Callable[[Path], None]) -> None:
    utils = pytest.importorskip("mlx_lm.utils")
    kind(folder)
    assert is_model(dict(tree_flatten(utils.load_model(folder)[0].parameters())))


def unlink(folder: Path, name: str) -> None:
    (folder / name).unlink()


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_half_a_download_is_refused_by_what_is_missing(folder: Path, number: int, has_index: bool) -> None:
    weight_map = save_shards(folder)
    if has_index:
        save_index(folder, weight_map)
    gone = folder / f"model-0000{number}-of-00003.safetensors"
    gone.rename(f"{gone}.part")
    message = refusal(folder)
    assert str(folder) in message and f"{gone.name}" in message and "download the folder again" in message
    assert all(name not in message for name in weight_map.values() if name != gone.name)


def test_a_shard_missing_from_folder_and_index_is_named(folder: Path) -> None:
    weight_map = save_shards(folder)
    save_index(folder, {name: file for name, file in weight_map.items() if "00003-of" not in file})
    unlink(folder, "model-00003-of-00003.safetensors")
    assert "missing: model-00003-of-00003.safetensors;" in refusal(folder)


def test_a_dead_link_in_place_of_a_shard_is_refused(folder: Path) -> None:
    indexed_shards(folder)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(folder / "gone")
    assert f"{INDEX} names {shard.name}, which is missing;" in refusal(folder)
    unlink(folder, INDEX)
    assert f"{shard.name} does not exist" in refusal(folder)


def test_many_missing_shards_are_counted(folder: Path) -> None:
    save(folder, name="model-00007-of-00030.safetensors")
    message = refusal(folder)
    assert (
        "missing: model-00001-of-00030.safetensors, " in message and "00009-of-00030.safetensors and 21 more" in message
    )
    unlink(folder, "model-00007-of-00030.safetensors")
    save(folder, name=f"model-1-of-{'9' * 200}.safetensors")
    assert len(refusal(folder)) < 3000


@pytest.mark.parametrize("name", ["model-00001-of-00000.safetensors", "model-00003-of-00001.safetensors"])
def test_shard_numbers_that_do_not_count_shards(folder: Path, name: str) -> None:
    save(folder, name=name)
    if name.endswith("00000.safetensors"):
        assert is_model(mlx_format.read(folder).weights)
    else:
        assert "missing: model-00001-of-00001.safetensors;" in refusal(folder)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_shards(folder, count=2)
    save_shards(folder, count=3)
    message = refusal(folder)
    assert "is both in model-00001-of-00002.safetensors and in model-00001-of-00003.safetensors" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\0b", "\ud800", "é" * 200]
)
def test_an_index_cannot_point_outside_of_the_folder(folder: Path, name: str) -> None:
    save(folder)
    save(folder.parent, name="secret.safetensors")
    save_index(folder, {EMBEDDING: WHOLE, "transformer.norm.weight": name})
    message = refusal(folder)
    assert INDEX in message and message.encode()


def test_only_an_index_of_the_loaded_weights_is_published(folder: Path) -> None:
    shutil.copy(Path(__file__).parent / "fixtures/shakespeare-hf/tokenizer.model", folder)
    stale_index(folder)
    assert {file.name for file in model_files(folder)} == {"config.json", "tokenizer.model", WHOLE}
    unlink(folder, WHOLE)
    weight_map = save_shards(folder)
    save_index(folder, weight_map)
    assert {file.name for file in model_files(folder)} == {
        "config.json",
        "tokenizer.model",
        INDEX,
        *weight_map.values(),
    }
    save_index(folder, {EMBEDDING: weight_map[EMBEDDING]})
    assert {file.name for file in model_files(folder)} == {"config.json", "tokenizer.model", *weight_map.values()}


# Folders without readable weights.


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{WHOLE}.incomplete", "an unfinished download: download the folder again"),
        ("model-00001-of-00002.safetensors.part", "an unfinished download"),
        ("model.safetensors.crdownload", "an unfinished download"),
        ("pytorch_model.bin", "a pickle, which could run code and is never read: save the weights as safetensors"),
        ("pytorch_model-00001-of-00002.bin", "a pickle"),
        ("checkpoint_average.pt", "a complete model: give that file instead of the folder"),
        ("OpenELM-270M-q8_0.gguf", "a complete model: give that file instead of the folder"),
        ("adapter_model.safetensors", "it is an adapter. Give it with adapter_path"),
        ("adapters.safetensors", "it is an adapter. Give it with adapter_path"),
        ("openelm.safetensors", "'openelm.safetensors' is not read under that name"),
        ("training_args.bin", "has no model*.safetensors file."),
    ],
)
def test_folders_without_weights_are_refused_with_a_hint(folder: Path, name: str, words: str) -> None:
    (folder / name).write_bytes(b"x")
    message = refusal(folder)
    assert message.startswith(f"{folder} has no model*.safetensors file") and words in message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapters.safetensors", "adapter_model.safetensors"])
def test_adapters_given_as_a_model_are_refused(folder: Path, name: str) -> None:
    unlink(folder, "config.json")
    (folder / name).write_text("{}")
    with pytest.raises(RequestError, match="it is an adapter. Give it with adapter_path") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_adapters_on_the_hub_given_as_a_model_are_refused(hub: FakeHub) -> None:
    adapter = hub.new_folder()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("{}")
    hub.add("me/my-adapter", adapter)
    with pytest.raises(RequestError, match="me/my-adapter is an adapter: give it with adapter_path"):
        resolve("me/my-adapter")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("name", [WHOLE, INDEX, "config.json"])
def test_git_lfs_pointers_are_named(folder: Path, name: str) -> None:
    save(folder)
    (folder / name).write_text(POINTER)
    assert refusal(folder).startswith(f"{folder / name} is a Git LFS pointer, not the file itself; run `git lfs pull`")


def test_read_json_wraps_its_message_only_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_json(tmp_path / "gone.json")
    assert str(caught.value) == f"{tmp_path / 'gone.json'} does not exist."


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", b"PK\3\4" + b"\0" * 100, b"\0" * 64])
def test_files_of_another_format_are_refused(folder: Path, content: bytes) -> None:
    (folder / WHOLE).write_bytes(content)
    message = refusal(folder)
    assert f"{folder / WHOLE} is damaged" in message and ("is empty" in message) == (content == b"")


def test_pipes_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / WHOLE)
    assert "is a pipe or a device" in refusal(folder)


# Other methods of quantization.


@pytest.mark.parametrize(
    "method",
    ["bitsandbytes", "gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "torchao", "hqq", "eetq", "quanto"],
)
def test_other_quantization_methods_are_refused_by_name(folder: Path, method: str) -> None:
    save(folder)
    settings = {"quant_method": method, "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings}))
    message = refusal(folder)
    assert str(folder) in message and f"quantized by {method}, which is not supported" in message
    assert "Take the original model and quantize it with `mlx-openelm quantize`" in message


@pytest.mark.parametrize("method", [["gptq"], {"a": 1}, 5, "x\ny" * 500])
def test_quantization_methods_that_are_not_names_are_refused(folder: Path, method: Any) -> None:
    save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": method}}))
    assert "quantized by " in refusal(folder) and len(refusal(folder)) < 1000 and "\n" not in refusal(folder)


def test_an_early_bitsandbytes_configuration_is_refused(folder: Path) -> None:
    save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"load_in_4bit": True}}))
    assert "quantized by bitsandbytes" in refusal(folder)


@pytest.mark.parametrize(
    ("parts", "method"),
    [
        ({".qweight": mx.int32, ".qzeros": mx.int32, ".scales": mx.float16, ".g_idx": mx.int32}, "GPTQ or AWQ"),
        ({".qweight": mx.int32, ".qzeros": mx.int32, ".scales": mx.float16}, "GPTQ or AWQ"),
        ({".weight": mx.uint8, ".weight.absmax": mx.uint8, ".weight.quant_map": mx.float32}, "bitsandbytes"),
        ({".weight": mx.int8, ".SCB": mx.float32}, "bitsandbytes"),
        ({".weight_packed": mx.int32, ".weight_scale": mx.bfloat16, ".weight_shape": mx.int64}, "compressed-tensors"),
        ({".W_q": mx.uint8, ".scale": mx.float16}, "HQQ"),
    ],
)
def test_other_quantization_methods_are_recognized_by_their_tensors(
    folder: Path, parts: dict[str, mx.Dtype], method: str
) -> None:
    path = "transformer.layers.0.ffn.proj_1"
    packed = {path + ending: mx.zeros((8, 8), dtype) for ending, dtype in parts.items()}
    save(folder, {name: value for name, value in MODEL.items() if name != f"{path}.weight"} | packed)
    assert f"quantized by {method}" in refusal(folder)


def test_mlx_and_its_second_entry_are_read(folder: Path) -> None:
    """mlx-lm converts GPTQ and AWQ, and writes its own entry beside the old one."""
    path = EMBEDDING.removesuffix(".weight")
    packed = dict(zip((".weight", ".scales", ".biases"), mx.quantize(MODEL[EMBEDDING]), strict=True))
    save(folder, MODEL | {path + ending: value for ending, value in packed.items()})
    own = {"group_size": 64, "bits": 4}
    for entries in (
        {"quantization": own},
        {"quantization_config": own},
        {"quantization": own, "quantization_config": own},
        {"quantization": own, "quantization_config": own | {"quant_method": "awq"}},
    ):
        (folder / "config.json").write_text(json.dumps(CONFIG | entries))
        assert mlx_format.read(folder).quantization[path].bits == 4


# Unused tensors.


def test_an_unused_twin_of_the_output_layer_is_dropped(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(UNTIED))
    own = tensors_of(UNTIED)
    save(folder, own | {TWIN: own[HEAD] + 1})
    checkpoint = mlx_format.read(folder)
    assert checkpoint.weights.tensors.keys() == own.keys()
    assert mx.array_equal(checkpoint.weights[HEAD], own[HEAD]).item()


@pytest.mark.parametrize("has_twin", [True, False])
@pytest.mark.parametrize("ties", [None, True])
def test_an_output_layer_that_transformers_4_tied_is_the_embedding(
    folder: Path, ties: bool | None, has_twin: bool
) -> None:
    """It ties them by default and then stores no lm_head, but Apple's unused twin, unless another program drops it."""
    (folder / "config.json").write_text(json.dumps(UNTIED | ({} if ties is None else {"tie_word_embeddings": ties})))
    save(folder, MODEL | ({TWIN: MODEL[EMBEDDING] + 1} if has_twin else {}))
    if ties is None and not has_twin:  # as if a file were incomplete
        assert "missing: lm_head.weight" in refusal(folder)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = mlx_format.read(folder)
    assert is_model(checkpoint.weights)
    assert checkpoint.config == ModelConfig.from_dict(CONFIG)
    assert ["its output layer is the embedding" in str(warning.message) for warning in caught] == [True] * has_twin


def test_an_output_layer_beside_a_setting_that_ties_it_is_kept(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(UNTIED | {"tie_word_embeddings": True}))
    own = tensors_of(UNTIED)
    save(folder, own)
    assert mx.array_equal(mlx_format.read(folder).weights[HEAD], own[HEAD]).item()


def test_a_twin_without_an_output_layer_is_ambiguous_if_nothing_is_tied(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(UNTIED | {"tie_word_embeddings": False}))
    own = tensors_of(UNTIED)
    save(folder, {TWIN if name == HEAD else name: value for name, value in own.items()})
    message = refusal(folder)
    assert TWIN in message and "no lm_head.weight" in message and "rename it" in message
    save(folder, {name: value for name, value in own.items() if name != HEAD})
    assert "missing: lm_head.weight" in refusal(folder)


def test_a_twin_of_a_shared_output_layer_is_refused(folder: Path) -> None:
    """Apple's code has none there."""
    save(folder, MODEL | {TWIN: MODEL[EMBEDDING]})
    assert f"unexpected: {TWIN}" in refusal(folder)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_a_copy_of_a_shared_output_layer_is_dropped(folder: Path, dtype: mx.Dtype) -> None:
    save(folder, MODEL | {HEAD: MODEL[EMBEDDING].astype(dtype)})
    assert is_model(mlx_format.read(folder).weights)


@pytest.mark.parametrize(
    "head",
    [
        MODEL[EMBEDDING].at[63, 63].add(0.5),
        MODEL[EMBEDDING].at[0, 0].add(1).astype(mx.float16),
        MODEL[EMBEDDING][:32],
        mx.quantize(MODEL[EMBEDDING])[0],
    ],
    ids=["one value", "in float16", "fewer rows", "packed"],
)
def test_a_different_output_layer_is_not_dropped_silently(folder: Path, head: mx.array) -> None:
    save(folder, MODEL | {HEAD: head})
    message = refusal(folder)
    assert "lm_head.weight, which differs from the embedding" in message
    assert "set share_input_output_layers to false" in message


def test_a_packed_copy_of_a_packed_embedding_is_dropped(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization": {"group_size": 64, "bits": 4}}))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(MODEL[EMBEDDING]), strict=True))
    embedding = {f"transformer.token_embeddings.{part}": value for part, value in parts.items()}
    save(folder, MODEL | embedding | {f"lm_head.{part}": value for part, value in parts.items()})
    assert not any(name.startswith("lm_head") for name in mlx_format.read(folder).weights)
    save(folder, MODEL | embedding | {f"lm_head.{part}": value for part, value in parts.items()} | {
        "lm_head.scales": parts["scales"] * 2})  # fmt: skip
    assert "lm_head.scales, which differs" in refusal(folder)


@pytest.mark.parametrize("name", ["attn.pos_embedding.inv_freq", "attn.rotary_emb.inv_freq"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_rope_frequencies_are_dropped(folder: Path, name: str, dtype: mx.Dtype) -> None:
    inv_freq = (1 / 10000 ** (mx.arange(0, 8, 2) / 8)).astype(dtype)
    save(folder, MODEL | {f"transformer.layers.{layer}.{name}": inv_freq for layer in range(2)})
    assert is_model(mlx_format.read(folder).weights)


@pytest.mark.parametrize(
    "inv_freq",
    [
        1 / 500000 ** (mx.arange(0, 8, 2) / 8),
        1 / 10000 ** (mx.arange(0, 16, 2) / 16),
        mx.zeros(4),
        mx.zeros(4, mx.int32),
    ],
    ids=["another base", "another size", "zeros", "integers"],
)
def test_frequencies_of_another_rope_base_are_refused(folder: Path, inv_freq: mx.array) -> None:
    save(folder, MODEL | {"transformer.layers.0.attn.rotary_emb.inv_freq": inv_freq})
    assert "unexpected: transformer.layers.0.attn.rotary_emb.inv_freq" in refusal(folder)


@pytest.mark.parametrize("prefix", ["model.", "base_model.model.", "module.", "_orig_mod."])
def test_other_prefixes_are_refused_by_name(folder: Path, prefix: str) -> None:
    save(folder, {prefix + name: value for name, value in MODEL.items()})
    message = refusal(folder)
    assert f"missing: {EMBEDDING}" in message and f"unexpected: {prefix}transformer." in message


def test_other_unexpected_tensors_are_refused_by_name(folder: Path) -> None:
    for name, value in {
        "transformer.causal_mask": mx.zeros((4, 4), mx.bool_),
        "transformer.layers.0.attn.qkv_proj.bias": mx.zeros(4),
        "transformer.layers.0.attn.rotary_emb.cos_cached": mx.zeros(4),
        "lm_head.bias": mx.zeros(64),
        "transformer.position_ids": mx.arange(4).astype(mx.int64),
    }.items():
        save(folder, MODEL | {name: value})
        assert f"unexpected: {name}" in refusal(folder)


@pytest.mark.parametrize("dtype", [mx.int8, mx.int64, mx.bool_, mx.uint8, mx.uint32])
def test_weights_that_are_not_floating_point_are_refused(folder: Path, dtype: mx.Dtype) -> None:
    save(folder, MODEL | {EMBEDDING: MODEL[EMBEDDING].astype(dtype)})
    assert f"wrong: {EMBEDDING} is stored as {str(dtype).removeprefix('mlx.core.').rstrip('_')}" in refusal(folder)


def test_dtypes_that_mlx_lacks_are_refused(folder: Path) -> None:
    for kind, size in {"F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}.items():
        header = json.dumps({EMBEDDING: {"dtype": kind, "shape": [2], "data_offsets": [0, 2 * size]}}).encode()
        (folder / WHOLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(2 * size))
        assert f"stores '{EMBEDDING}' as '{kind}', which is not supported; expected F32" in refusal(folder)


def test_a_config_of_another_model_is_refused(folder: Path) -> None:
    save(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": "llama"}))
    assert "This is a 'llama' model" in refusal(folder)
