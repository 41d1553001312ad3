"""Hugging Face folders: byte-identical to the original, with logits of an independent implementation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_openelm import convert
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import huggingface, shards
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.jobs.export import export
from mlx_openelm.loading import build_model
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import numpy_model
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
SHAKESPEARE = FIXTURES / "shakespeare-hf"
TEXTS = ["To be", " two", "  a  b ", "", " ", "\n", "a\n\n b\tc", "naïve café", "日本語 🙂", "</s>a<s>", "\x00", "▁a"]


def stored(file: Path) -> tuple[dict[str, tuple[str, list[int], bytes]], dict[str, str]]:
    """Every tensor of a safetensors file (type, shape, bytes) and its metadata, read without our code."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {})
    spans = {name: [start + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*spans[name])]) for name, entry in header.items()
    }, metadata


def weights(folder: Path) -> dict[str, np.ndarray]:
    tensors, _ = stored(folder / "model.safetensors")
    assert {dtype for dtype, _, _ in tensors.values()} == {"F32"}
    return {name: np.frombuffer(data, np.float32).reshape(shape) for name, (_, shape, data) in tensors.items()}


def read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def mlx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint as an MLX folder in float32."""
    return convert(SHAKESPEARE, tmp_path_factory.mktemp("mlx") / "mlx", dtype="float32").path


@pytest.fixture(scope="module")
def exported(mlx_folder: Path) -> Path:
    return export(mlx_folder, mlx_folder.parent / "hf", format="huggingface").path


def test_an_export_of_a_float32_conversion_equals_the_original_folder(exported: Path) -> None:
    tensors, metadata = stored(exported / "model.safetensors")
    assert tensors == stored(SHAKESPEARE / "model.safetensors")[0]
    assert metadata == {"format": "pt"}
    original, config = read_json(SHAKESPEARE / "config.json"), read_json(exported / "config.json")
    assert config.keys() == original.keys()
    assert {k: v for k, v in config.items() if k != "auto_map"} == {
        k: v for k, v in original.items() if k != "auto_map"
    }
    repo = "apple/OpenELM-270M--"
    assert config["auto_map"] == {name: repo + code for name, code in original["auto_map"].items()}
    assert read_json(exported / "generation_config.json") == read_json(SHAKESPEARE / "generation_config.json")
    assert {file.name for file in exported.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    }


def test_the_round_trip_is_bit_for_bit(mlx_folder: Path, exported: Path, tmp_path: Path) -> None:
    back = convert(exported, tmp_path / "back", dtype="float32").path
    assert stored(back / "model.safetensors") == stored(mlx_folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (back / name).read_bytes() == (mlx_folder / name).read_bytes()


def test_bfloat16_stays_and_dtype_casts(tmp_path: Path) -> None:
    half = convert(SHAKESPEARE, tmp_path / "half").path
    result = export(half, tmp_path / "hf", format="huggingface")
    assert (result.type, result.bits_per_weight) == ("bfloat16", 16)
    tensors, _ = stored(tmp_path / "hf" / "model.safetensors")
    assert tensors == stored(half / "model.safetensors")[0]
    assert read_json(tmp_path / "hf" / "config.json")["torch_dtype"] == "bfloat16"

    result = export(SHAKESPEARE, tmp_path / "cast", format="huggingface", dtype="float16")
    assert result.type == read_json(tmp_path / "cast" / "config.json")["torch_dtype"] == "float16"
    original = weights(SHAKESPEARE)
    for name, (dtype, shape, data) in stored(tmp_path / "cast" / "model.safetensors")[0].items():
        assert (dtype, tuple(shape)) == ("F16", original[name].shape)
        assert data == original[name].astype(np.float16).tobytes()


def test_shards_have_an_index(tmp_path: Path) -> None:
    checkpoint = mlx_format.read(SHAKESPEARE)
    huggingface.write(tmp_path, checkpoint, max_shard_bytes=3_000_000)
    index = read_json(tmp_path / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == 4 * 2_485_056
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    merged = {}
    for file in files:
        tensors, metadata = stored(file)
        assert metadata == {"format": "pt"}
        assert all(index["weight_map"][name] == file.name for name in tensors)
        merged |= tensors
    assert merged == stored(SHAKESPEARE / "model.safetensors")[0]


def test_a_shard_may_have_exactly_the_limit(tmp_path: Path) -> None:
    arrays = {name: mx.ones(4) for name in "abc"}  # 16 bytes each
    shards.write(tmp_path, Weights.of_arrays(arrays), max_shard_bytes=32)
    assert list(read_json(tmp_path / "model.safetensors.index.json")["weight_map"].values()) == [
        *["model-00001-of-00002.safetensors"] * 2,
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("extra", range(8))
def test_the_data_of_a_shard_is_aligned_to_8_bytes(tmp_path: Path, extra: int) -> None:
    shards.write(tmp_path, Weights.of_arrays({"w" * (1 + extra): mx.ones(3)}))
    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_quantized_model_is_dequantized_to_the_same_logits(
    tmp_path: Path, reference: dict[str, Any], bits: int, mode: str
) -> None:
    packed = convert(SHAKESPEARE, tmp_path / "packed", quantize=True, q_bits=bits, q_mode=mode, q_group_size=32).path
    result = export(packed, tmp_path / "hf", format="huggingface")
    assert (result.type, result.bits_per_weight) == ("float32", 32)
    config = ModelConfig.from_file(tmp_path / "hf")
    assert "quantization" not in read_json(tmp_path / "hf" / "config.json")
    ids = np.array([reference["ids"][3]])
    expected = numpy_model.logits(config, weights(tmp_path / "hf"), ids)[0]
    model = build_model(mlx_format.read(packed), dtype="float32", expand=False)
    assert np.abs(np.array(model(mx.array(ids)))[0] - expected).max() < 1e-4
    assert np.abs(expected - reference["logits_3"]).max() > 0.05  # quantization is visible, so this is the packed model


def test_the_exported_folder_gives_the_reference_logits(exported: Path, reference: dict[str, Any]) -> None:
    config, tensors = ModelConfig.from_file(exported), weights(exported)
    for i, ids in enumerate(reference["ids"]):
        logits = numpy_model.logits(config, tensors, np.array([ids]))[0]
        assert np.abs(logits - reference[f"logits_{i}"]).max() < 1e-4


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    checkpoint = mlx_format.read(SHAKESPEARE)
    config = ModelConfig.from_dict(checkpoint.config.to_dict() | {"share_input_output_layers": False})
    head = mx.arange(2048 * 192, dtype=mx.float32).reshape(2048, 192)
    untied = Weights.of_arrays(dict(checkpoint.weights) | {"lm_head.weight": head})
    huggingface.write(tmp_path, Checkpoint(config, untied))
    assert np.array_equal(weights(tmp_path)["lm_head.weight"].ravel(), np.arange(2048 * 192))
    written = read_json(tmp_path / "config.json")
    assert written["share_input_output_layers"] is False
    assert written["tie_word_embeddings"] is False  # transformers 4 would put the embedding in its place


def test_a_release_names_its_repository_and_an_instruct_model_gets_its_template(tmp_path: Path) -> None:
    shutil.copytree(SHAKESPEARE, tmp_path / "OpenELM-1_1B-Instruct")
    export(tmp_path / "OpenELM-1_1B-Instruct", tmp_path / "hf", format="huggingface")
    names = read_json(tmp_path / "hf" / "config.json")["auto_map"].values()
    assert {name.split("--")[0] for name in names} == {"apple/OpenELM-1_1B-Instruct"}
    assert "<|assistant|>" in (tmp_path / "hf" / "chat_template.jinja").read_text()


def test_models_that_apples_code_computes_differently_are_refused(tmp_path: Path) -> None:
    checkpoint = mlx_format.read(SHAKESPEARE)
    config = ModelConfig.from_dict(checkpoint.config.to_dict() | {"rms_norm_eps": 1e-5})
    with pytest.raises(RequestError, match="rms_norm_eps is 1e-05"):
        huggingface.write(tmp_path, Checkpoint(config, checkpoint.weights))
    packed = Checkpoint(checkpoint.config, checkpoint.weights, {"transformer.token_embeddings": Quantization(64, 4)})
    with pytest.raises(RequestError, match="cannot have packed weights"):
        huggingface.write(tmp_path, packed)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RequestError, match="float16 cannot hold the 3B model's activations"):
        export("apple/OpenELM-3B", tmp_path / "hf", format="huggingface", dtype="float16")
    assert not (tmp_path / "hf").exists()


def apples_sizes(values: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Query heads and inner sizes as in `__post_init__` of Apple's configuration and its feed-forward."""

    def divisible(value: float, divisor: int) -> int:
        size = max(divisor, int(value + divisor / 2) // divisor * divisor)
        return size + divisor if size < 0.9 * value else size

    layers, dim, head_dim = values["num_transformer_layers"], values["model_dim"], values["head_dim"]

    def expand(multipliers: Any, lengths: tuple[int, ...]) -> list[float]:
        if not isinstance(multipliers, list):
            return [multipliers] * layers
        assert len(multipliers) in lengths
        return [round(m, 2) for m in np.linspace(*multipliers, layers)] if len(multipliers) == 2 else multipliers

    divisor = head_dim * values["num_gqa_groups"]
    heads = [divisible(dim * m, divisor) // head_dim for m in expand(values["qkv_multipliers"], (2,))]
    widths = [divisible(m * dim, values["ffn_dim_divisor"]) for m in expand(values["ffn_multipliers"], (2, layers))]
    return heads, widths


SIZES = {
    "num_transformer_layers": 4,
    "model_dim": 64,
    "head_dim": 16,
    "vocab_size": 32,
    "ffn_dim_divisor": 8,
    "ffn_multipliers": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_multipliers": [0.5, 1.0], "num_gqa_groups": 2},
        {"qkv_multipliers": 0.8},
        {"qkv_multipliers": [0.5, 0.5, 1.0, 1.0], "num_gqa_groups": 2},
        {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "qkv_multipliers": [1.0] * 4},
        {"num_query_heads": [4] * 4, "num_kv_heads": [1, 2, 4, 1], "qkv_multipliers": 0.5},
        {"num_query_heads": [2, 2, 4, 6], "num_kv_heads": [1, 1, 2, 3]},
        {"num_query_heads": [3, 4, 5, 6], "num_kv_heads": [3, 2, 1, 2]},
        {"num_transformer_layers": 2, "ffn_multipliers": 0.625, "ffn_dim_divisor": 1, "model_dim": 640},
        {"num_transformer_layers": 2, "qkv_multipliers": [0.333, 1]},
        {"num_transformer_layers": 1, "qkv_multipliers": [0.5]},
    ],
    ids=str,
)
def test_apples_code_computes_the_same_sizes(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(SIZES | {"share_input_output_layers": True} | changes)
    arrays = {name: mx.zeros(shape) for name, shape in config.tensor_shapes().items()}
    huggingface.write(tmp_path, Checkpoint(config, Weights.of_arrays(arrays)))
    values = read_json(tmp_path / "config.json")
    assert apples_sizes(values) == (list(config.num_query_heads), list(config.ffn_dims))
    assert ModelConfig.from_dict(values).tensor_shapes() == config.tensor_shapes()
    assert mlx_format.read(tmp_path).config.num_kv_heads == config.num_kv_heads
    assert "tie_word_embeddings" not in values


def test_heads_that_apples_code_cannot_compute_are_refused(tmp_path: Path) -> None:
    config = ModelConfig.from_dict(SIZES | {"num_query_heads": [2, 4, 4, 2], "num_kv_heads": [1, 2, 2, 1]})
    arrays = {name: mx.zeros(shape) for name, shape in config.tensor_shapes().items()}
    with pytest.raises(RequestError, match=r"query heads are \[2, 4, 4, 2\], which Apple's code cannot compute"):
        huggingface.write(tmp_path, Checkpoint(config, Weights.of_arrays(arrays)))
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_the_tokenizer_to_the_same_ids(exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    ours = Tokenizer.from_folder(SHAKESPEARE)
    assert [theirs(text, split_special_tokens=True)["input_ids"] for text in TEXTS] == list(map(ours.encode, TEXTS))
    plain = [text for text in TEXTS if "<" not in text]
    assert [theirs(text)["input_ids"] for text in plain] == list(map(ours.encode, plain))
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
