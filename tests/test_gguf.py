"""GGUF files: against the gguf package's own quantizers and reader, and against llama.cpp where it is installed."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import gguf as gguf_format
from mlx_openelm.formats import gguf_tokenizer
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.mlx import Checkpoint
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.loading import build_model
from mlx_openelm.text.sentencepiece import read_model
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import numpy_model
import pytest
from gguf_files import keep_weights_as_they_are

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
# The types, and how far their logits are from the reference's on average: KL in nats, a third more than measured.
KL = {"f32": 1e-9, "f16": 2.2e-6, "bf16": 9e-5, "q8_0": 9e-4, "q4_0": 0.13}
TEXTS = ["To be", " two", "  a  b ", "", " ", "\n", "a\n\n b\tc", "naïve café", "日本語 🙂", "</s>a<s>b", "<unk>", "▁a"]
FFN = (128, 256, 384, 512, 640, 768)  # 192 × 0.5, 1.2, … 4.0, rounded to multiples of 64


# Files that no test changes.
reader = functools.cache(gguf.GGUFReader)
vocabulary = functools.cache(read_model)
shakespeare = functools.cache(lambda: Tokenizer.from_folder(SHAKESPEARE))


@functools.cache
def dequantized(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader(path).tensors}


def write(path: Path, gguf_type: str = "f32", checkpoint: Checkpoint | None = None, **more: Any) -> dict[str, str]:
    checkpoint = checkpoint or mlx_format.read(SHAKESPEARE)
    tokenizer = more.pop("tokenizer", None) or shakespeare()
    return gguf_format.write(path, checkpoint, tokenizer, gguf_type, name="Shakespeare", **more)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained checkpoint in every type."""
    folder = tmp_path_factory.mktemp("gguf")
    for gguf_type in KL:
        assert write(folder / f"{gguf_type}.gguf", gguf_type) == {}
    return {gguf_type: folder / f"{gguf_type}.gguf" for gguf_type in KL}


def original() -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in mlx_format.read(SHAKESPEARE).weights.items()}


def expected_tensors(weights: dict[str, np.ndarray], layers: int = 6) -> dict[str, np.ndarray]:
    """Weights by llama.cpp's names, spelled out from the format's description."""
    tensors = {
        "token_embd.weight": weights["transformer.token_embeddings.weight"],
        "output_norm.weight": weights["transformer.norm.weight"],
    }
    for i in range(layers):
        layer = f"transformer.layers.{i}"
        gate, up = np.split(weights[f"{layer}.ffn.proj_1.weight"], 2)
        tensors |= {
            f"blk.{i}.attn_norm.weight": weights[f"{layer}.attn_norm.weight"],
            f"blk.{i}.attn_qkv.weight": weights[f"{layer}.attn.qkv_proj.weight"],
            f"blk.{i}.attn_q_norm.weight": weights[f"{layer}.attn.q_norm.weight"],
            f"blk.{i}.attn_k_norm.weight": weights[f"{layer}.attn.k_norm.weight"],
            f"blk.{i}.attn_output.weight": weights[f"{layer}.attn.out_proj.weight"],
            f"blk.{i}.ffn_norm.weight": weights[f"{layer}.ffn_norm.weight"],
            f"blk.{i}.ffn_gate.weight": gate,
            f"blk.{i}.ffn_up.weight": up,
            f"blk.{i}.ffn_down.weight": weights[f"{layer}.ffn.proj_2.weight"],
        }
    return tensors


# Writing.


def test_keys(files: dict[str, Path]) -> None:
    values = {name: field.contents() for name, field in reader(files["q8_0"]).fields.items()}
    expected = {
        "general.architecture": "openelm",
        "general.type": "model",
        "general.name": "Shakespeare",
        "general.size_label": "2.5M",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "openelm.block_count": 6,
        "openelm.context_length": 512,
        "openelm.embedding_length": 192,
        "openelm.vocab_size": 2048,
        "openelm.feed_forward_length": list(FFN),
        "openelm.attention.head_count": [3, 6, 6, 6, 6, 6],
        "openelm.attention.head_count_kv": [1, 2, 2, 2, 2, 2],
        "openelm.attention.key_length": 32,
        "openelm.attention.value_length": 32,
        "openelm.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        "openelm.rope.freq_base": 10000.0,
        "openelm.rope.dimension_count": 32,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {name: values.get(name) for name in expected} == expected
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(SHAKESPEARE / "tokenizer.model"))
    assert values["tokenizer.ggml.tokens"] == [pieces.id_to_piece(i) for i in range(2048)]
    assert values["tokenizer.ggml.scores"] == [pieces.get_score(i) for i in range(2048)]
    kinds = values["tokenizer.ggml.token_type"]
    assert kinds == [2, 3, 3] + [6] * 256 + [1] * (2048 - 259)  # unknown, control, byte, normal
    types = {path: reader(path).get_field("general.file_type").contents() for path in files.values()}
    assert list(types.values()) == [0, 1, 32, 7, 2]


@pytest.mark.parametrize("gguf_type", KL)
def test_tensors_are_quantized_as_by_the_gguf_package(files: dict[str, Path], gguf_type: str) -> None:
    expected = expected_tensors(original())
    tensors = {tensor.name: tensor for tensor in reader(files[gguf_type]).tensors}
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        kind = gguf.GGMLQuantizationType[gguf_type.upper() if weight.ndim == 2 else "F32"]
        assert tensors[name].tensor_type == kind
        assert tuple(reversed(tensors[name].shape.tolist())) == weight.shape
        assert np.array_equal(tensors[name].data.view(np.uint8), quants.quantize(weight, kind).view(np.uint8)), name


def test_large_matrices_quantized_in_chunks_give_the_same_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows per chunk; the last has fewer."""
    monkeypatch.setattr(gguf_format.gguf_blocks, "CHUNK", 640)
    checkpoint = small_checkpoint()
    weight = np.array(checkpoint.weights["transformer.token_embeddings.weight"])
    write(tmp_path / "a.gguf", "q4_0", checkpoint)
    found = next(x for x in gguf.GGUFReader(tmp_path / "a.gguf").tensors if x.name == "token_embd.weight")
    assert len(weight) % 10 and np.array_equal(found.data, quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0))


def small_checkpoint(vocab_size: int = 2048, **changes: Any) -> Checkpoint:
    """Random weights; feed-forward widths of 40, which is not a multiple of the block size, 32."""
    values = {
        "num_transformer_layers": 2,
        "model_dim": 64,
        "head_dim": 16,
        "vocab_size": vocab_size,
        "num_query_heads": [2, 4],
        "num_kv_heads": [1, 1],
        "ffn_multipliers": 0.625,
        "ffn_dim_divisor": 8,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }
    config = ModelConfig.from_dict(values | changes)
    rng = np.random.default_rng(0)
    weights = {
        name: mx.array(rng.standard_normal(shape, np.float32) / 8) for name, shape in config.tensor_shapes().items()
    }
    return Checkpoint(config, Weights.of_arrays(weights))


def test_rows_that_blocks_do_not_divide_fall_back_to_float16(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    exceptions = write(tmp_path / "a.gguf", "q4_0", checkpoint)
    assert set(exceptions) == {f"transformer.layers.{i}.ffn.proj_2.weight" for i in range(2)}
    assert "rows of 40" in exceptions["transformer.layers.0.ffn.proj_2.weight"]
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name for name, kind in kinds.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in range(2)}
    bits = 8 * sum(int(t.n_bytes) for t in reader.tensors) / checkpoint.config.num_parameters
    assert gguf_format.bits_per_weight(checkpoint.config, "q4_0") == bits
    assert checkpoint.weights == {}  # removed one by one


def test_rows_beyond_the_tokenizer_become_unused_tokens(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(vocab_size=2053)
    embedding = np.array(checkpoint.weights["transformer.token_embeddings.weight"])
    write(tmp_path / "a.gguf", "f32", checkpoint)
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[2048:] == [f"[PAD{i}]" for i in range(2048, 2053)]
    assert fields["tokenizer.ggml.token_type"].contents()[2047:] == [1, 5, 5, 5, 5, 5]
    read, tokenizer = gguf_format.read(tmp_path / "a.gguf")
    assert (read.config.vocab_size, tokenizer.vocab_size) == (2053, 2048)
    assert np.array_equal(np.array(read.weights["transformer.token_embeddings.weight"]), embedding)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"share_input_output_layers": False}, "its output layer is not the embedding"),
        ({"normalize_qk_projections": False}, "does not normalize queries and keys"),
        ({"ffn_with_glu": False}, "not gated"),
        ({"activation_fn_name": "gelu"}, "its activation is gelu"),
    ],
)
def test_models_that_llama_cpp_cannot_run_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=f"llama.cpp does not support this model.*{reason}"):
        write(tmp_path / "a.gguf", "f32", small_checkpoint(**changes))
    assert list(tmp_path.iterdir()) == []


# Reading.


@pytest.mark.parametrize("gguf_type", KL)
def test_reading_equals_the_packages_dequantize(files: dict[str, Path], gguf_type: str) -> None:
    checkpoint, _ = gguf_format.read(files[gguf_type])
    theirs = dequantized(files[gguf_type])
    types = {"f32": mx.float32, "f16": mx.float16, "bf16": mx.bfloat16}
    assert checkpoint.weights["transformer.layers.3.ffn.proj_1.weight"].dtype == types.get(gguf_type, mx.float32)
    ours = {name: np.array(weight.astype(mx.float32)) for name, weight in checkpoint.weights.items()}
    shapes = mlx_format.read(SHAKESPEARE).config.tensor_shapes()
    assert {name: weight.shape for name, weight in ours.items()} == shapes
    for name, weight in expected_tensors(ours).items():
        assert np.array_equal(weight, theirs[name].reshape(weight.shape)), name


def test_a_float32_round_trip_is_bit_for_bit(files: dict[str, Path]) -> None:
    checkpoint, tokenizer = gguf_format.read(files["f32"])
    before = mlx_format.read(SHAKESPEARE)
    assert checkpoint.weights.keys() == before.weights.keys()
    for name, weight in before.weights.items():
        assert bytes(memoryview(checkpoint.weights[name])) == bytes(memoryview(weight))
    ours, theirs = checkpoint.config.to_dict(), before.config.to_dict()
    del ours["ffn_dim_divisor"], theirs["ffn_dim_divisor"]  # 64 or 128, which give the same widths
    assert ours == theirs
    assert checkpoint.config.ffn_dims == FFN
    assert tokenizer.eos_token_ids == {2}


@pytest.mark.parametrize("size", ["270M", "450M", "1_1B", "3B"])
def test_the_published_configurations_come_back(size: str) -> None:
    from mlx_openelm.formats import gguf_metadata

    config = ModelConfig.from_name(size)
    writer = gguf.GGUFWriter(None, "openelm")
    gguf_metadata.write(writer, config, "ALL_F32", "x")
    values = {key: value.value for key, value in writer.kv_data[0].items()}
    read = gguf_metadata.read(values, Path("x"), vocab_size=32000, max_layers=99)
    assert read == ModelConfig.from_dict(config.to_dict())


@pytest.mark.parametrize("gguf_type", KL)
def test_logits_of_a_round_trip(files: dict[str, Path], reference: dict[str, Any], gguf_type: str) -> None:
    """Against the reference, and against an independent model with the package's dequantized weights."""
    checkpoint, _ = gguf_format.read(files[gguf_type])
    config = checkpoint.config
    tensors = dequantized(files[gguf_type])
    weights = {name: np.zeros(shape) for name, shape in config.tensor_shapes().items()}
    for name, view in expected_tensors(weights).items():
        view[:] = tensors[name].reshape(view.shape)  # np.split gives views, so this fills proj_1's halves
    model = build_model(checkpoint, dtype="float32")
    ids = np.array([reference["ids"][1]])
    ours = np.array(model(mx.array(ids)))[0]
    assert np.abs(ours - numpy_model.logits(config, weights, ids)[0]).max() < 1e-4
    assert mean_kl(reference["logits_1"], ours) < KL[gguf_type]


def mean_kl(expected: np.ndarray, logits: np.ndarray) -> float:
    def log_softmax(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64) - values.max(-1, keepdims=True)
        return values - np.log(np.exp(values).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# Files of other programs, and damaged ones.


def other_file(path: Path, change: Callable[[Any, dict[str, np.ndarray]], None] | None = None, arch: str = "openelm"):
    """A file as a simple writer would make it: a scalar for a constant list, and few keys."""
    checkpoint = small_checkpoint(num_query_heads=[4, 4], num_kv_heads=[2, 2])
    tensors = expected_tensors({name: np.array(w) for name, w in checkpoint.weights.items()}, layers=2)
    pieces = vocabulary(SHAKESPEARE / "tokenizer.model")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32(f"{arch}.block_count", 2)
    writer.add_uint32(f"{arch}.context_length", 100)
    writer.add_uint32(f"{arch}.embedding_length", 64)
    writer.add_uint32(f"{arch}.feed_forward_length", 40)
    writer.add_uint32(f"{arch}.attention.head_count", 4)
    writer.add_uint32(f"{arch}.attention.head_count_kv", 2)
    writer.add_uint32(f"{arch}.attention.key_length", 16)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", pieces.pieces)
    writer.add_array("tokenizer.ggml.scores", pieces.scores)
    writer.add_array("tokenizer.ggml.token_type", pieces.types)
    if change is not None:
        change(writer, tensors)
    for name, weight in tensors.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_files_of_other_programs(tmp_path: Path) -> None:
    tensors = other_file(tmp_path / "a.gguf")
    checkpoint, tokenizer = gguf_format.read(tmp_path / "a.gguf")
    config = checkpoint.config
    assert (config.num_query_heads, config.num_kv_heads, config.ffn_dims) == ((4, 4), (2, 2), (40, 40))
    assert (config.qkv_multipliers, config.ffn_multipliers) == (1, (0.625, 0.625))  # not rounded as two bounds would be
    assert (config.max_context_length, config.rope_max_length, config.rope_freq_constant) == (100, 200, 10000)
    gate_up = np.concatenate([tensors["blk.1.ffn_gate.weight"], tensors["blk.1.ffn_up.weight"]])
    assert np.array_equal(np.array(checkpoint.weights["transformer.layers.1.ffn.proj_1.weight"]), gate_up)
    assert tokenizer.encode("To be") == Tokenizer.from_folder(SHAKESPEARE).encode("To be")


def change_key(name: str, value: Any) -> Callable[[Any, Any], None]:
    """Replace a key's value, or remove the key."""

    def change(writer: Any, _: Any) -> None:
        if value is None:
            del writer.kv_data[0][name]
        else:
            writer.kv_data[0][name].value = value

    return change


@pytest.mark.parametrize("named", [True, False])
def test_the_converter_of_llama_cpp_may_call_the_unknown_token_a_control_token(tmp_path: Path, named: bool) -> None:
    """It does for tokenizers that transformers 4 saved; for some it writes no unknown_token_id."""

    def change(writer: Any, _: Any) -> None:
        kinds = writer.kv_data[0]["tokenizer.ggml.token_type"].value
        assert kinds[:4] == [2, 3, 3, 6]
        writer.kv_data[0]["tokenizer.ggml.token_type"].value = [3, *kinds[1:]]
        if named:
            writer.add_unk_token_id(0)

    other_file(tmp_path / "a.gguf", change)
    _, tokenizer = gguf_format.read(tmp_path / "a.gguf")
    source = Tokenizer.from_folder(SHAKESPEARE)
    assert [tokenizer.encode(text) for text in TEXTS] == [source.encode(text) for text in TEXTS]
    assert tokenizer.decode(range(2048)) == source.decode(range(2048))


CHANGES: dict[str, tuple[Callable[[Any, dict[str, np.ndarray]], None], str]] = {
    "a small head": (
        lambda _, t: t.update({"output.weight": np.zeros((4, 4), np.float32)}),
        r"output.weight has shape \[4, 4\] instead of \[2048, 64\]",
    ),
    "no norm": (lambda _, t: t.pop("output_norm.weight"), "output_norm.weight is missing"),
    "no embedding": (lambda _, t: t.pop("token_embd.weight"), "no two-dimensional token_embd.weight"),
    "a wrong shape": (
        lambda _, t: t.update({"output_norm.weight": np.ones(9, np.float32)}),
        r"output_norm.weight has shape \[9\] instead of \[64\]",
    ),
    "too few rows": (
        lambda _, t: t.update({"token_embd.weight": np.ones((2000, 64), np.float32)}),
        "has 2048 tokens, but an embedding of 2000 rows",
    ),
    "a wrong width": (change_key("openelm.feed_forward_length", 48), "do not match its keys"),
    "another type": (
        lambda _, t: t.update({"output_norm.weight": np.ones(64, np.int32)}),
        "stores output_norm.weight as I32, which the gguf package cannot unpack",
    ),
    "no heads": (change_key("openelm.attention.head_count", None), "no openelm.attention.head_count"),
    "zero heads": (change_key("openelm.attention.head_count_kv", 0), "not a valid value"),
    "too many layers": (change_key("openelm.block_count", 2**32 - 1), "block_count is 4294967295"),
    "indivisible heads": (change_key("openelm.attention.head_count_kv", 3), "divisible by num_kv_heads"),
    "another rotation": (lambda w, _: w.add_rope_dimension_count(8), "rope.dimension_count is 8"),
    "scaled positions": (lambda w, _: w.add_string("openelm.rope.scaling.type", "yarn"), "scales its positions"),
    "another tokenizer": (change_key("tokenizer.ggml.model", "gpt2"), "has a 'gpt2' tokenizer"),
    "no scores": (change_key("tokenizer.ggml.scores", None), "no tokenizer.ggml.scores"),
    "fewer scores": (change_key("tokenizer.ggml.scores", [0.0]), "must have the same length"),
    "a bad bos": (lambda w, _: w.add_bos_token_id(5000), "bos_token_id is 5000"),
    "pieces twice": (change_key("tokenizer.ggml.tokens", ["a"] * 2048), "are not a valid SentencePiece model"),
    "no unknown piece": (change_key("tokenizer.ggml.token_type", [1] * 2048), "no unknown token"),
    "a bad unknown id": (
        lambda w, t: (
            change_key("tokenizer.ggml.token_type", [3] * 3 + [1] * 2045)(w, t),
            w.add_unk_token_id(5000),
        ),
        "no unknown token",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_inconsistent_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    other_file(tmp_path / "a.gguf", change)
    with pytest.raises(RequestError, match=message) as error:
        gguf_format.read(tmp_path / "a.gguf")
    assert "a.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_other_architectures_and_other_files_are_refused(tmp_path: Path) -> None:
    other_file(tmp_path / "llama.gguf", arch="llama")
    with pytest.raises(RequestError, match="is a 'llama' model"):
        gguf_format.read(tmp_path / "llama.gguf")
    for data in (b"", b"GG", b"GGUF", b"no GGUF file, but longer than its header", b"\x00" * 100):
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(RequestError, match="is damaged or not a GGUF file"):
            gguf_format.read(tmp_path / "x.gguf")
    with pytest.raises(RequestError, match="does not exist"):
        gguf_format.read(tmp_path / "none.gguf")


def test_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "openelm", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RequestError, match="other byte order"):
        gguf_format.read(tmp_path / "a.gguf")


def test_a_file_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    other_file(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    start = gguf.GGUFReader(tmp_path / "a.gguf").data_offset
    cuts = np.linspace(1, start, 15).astype(int).tolist() + np.linspace(start, len(data) - 1, 8).astype(int).tolist()
    for cut in cuts:
        (tmp_path / "cut.gguf").write_bytes(data[:cut])
        with pytest.raises(RequestError, match="damaged"):
            gguf_format.read(tmp_path / "cut.gguf")


def test_damaged_counts_are_refused(tmp_path: Path) -> None:
    """The version, both counts, and the length of a list, which must not be trusted for long."""
    other_file(tmp_path / "a.gguf")
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    scores = data.index(b"tokenizer.ggml.scores") + len(b"tokenizer.ggml.scores") + 8
    for position in (5, 15, 23, scores + 7):
        before, data[position] = data[position], 255
        (tmp_path / "b.gguf").write_bytes(data)
        with pytest.raises(RequestError, match="damaged"):
            gguf_format.read(tmp_path / "b.gguf")
        data[position] = before
    # Insert a key after the magic, the version and both counts: a list of 2 ** 22 bytes.
    name, (keys,) = b"long", struct.unpack_from("<Q", data, 16)
    list_of_bytes = struct.pack(f"<Q{len(name)}sIIQ", len(name), name, 9, 0, 1 << 22)
    struct.pack_into("<Q", data, 16, keys + 1)
    (tmp_path / "b.gguf").write_bytes(data[:24] + list_of_bytes + data[24:])
    with pytest.raises(RequestError, match=f"more than {1 << 22} values"):
        gguf_format.read(tmp_path / "b.gguf")


# Tokenizers.


@pytest.fixture
def json_only(tmp_path: Path) -> Path:
    """A folder with only a tokenizer.json."""
    folder = tmp_path / "json"
    Tokenizer.from_folder(SHAKESPEARE).save(folder)
    (folder / "tokenizer.model").unlink()
    return folder


def test_the_tokenizer_round_trips_and_can_be_saved(files: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(files["q4_0"], tmp_path / "a.gguf")
    _, tokenizer = gguf_format.read(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").unlink()
    before = Tokenizer.from_folder(SHAKESPEARE)
    tokenizer.save(tmp_path / "saved")
    for ours in (tokenizer, Tokenizer.from_folder(tmp_path / "saved")):
        assert [ours.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
        assert ours.decode(range(2048)) == before.decode(range(2048))
    saved, model = read_model(tmp_path / "saved" / "tokenizer.model"), read_model(SHAKESPEARE / "tokenizer.model")
    assert (saved.pieces, saved.scores, saved.types) == (model.pieces, model.scores, model.types)
    file = Path(tokenizer.model_file or "")
    assert file.is_file()
    del ours, tokenizer
    gc.collect()
    assert not file.parent.exists()


def test_scores_from_a_tokenizer_json_equal_its_sentencepiece_models(json_only: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(json_only)
    ours, theirs = gguf_tokenizer.vocabulary(tokenizer), read_model(SHAKESPEARE / "tokenizer.model")
    assert (ours.pieces, ours.types) == (theirs.pieces, theirs.types)
    assert ours.scores == [-(i - 259) if i > 259 else 0 for i in range(2048)]  # as in Llama's vocabularies
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    _, read = gguf_format.read(tmp_path / "a.gguf")
    assert [read.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_merges_in_another_order_keep_their_ids(json_only: Path, tmp_path: Path) -> None:
    before = Tokenizer.from_folder(json_only)
    spec = json.loads((json_only / "tokenizer.json").read_text())
    groups: dict[str, list[str]] = {}
    for merge in spec["model"]["merges"]:
        groups.setdefault(merge.replace(" ", ""), []).append(merge)
    spec["model"]["merges"] = [merge for group in reversed(groups.values()) for merge in group]
    (json_only / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.from_folder(json_only)
    text = "But soft, what light through yonder window breaks?"
    assert tokenizer.encode(text) != before.encode(text)
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    _, read = gguf_format.read(tmp_path / "a.gguf")
    assert read.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("damage", ["one is missing", "one of a piece's is ranked last"])
def test_merges_that_scores_cannot_express_are_refused(json_only: Path, tmp_path: Path, damage: str) -> None:
    spec = json.loads((json_only / "tokenizer.json").read_text())
    merges = spec["model"]["merges"]
    joined = [merge.replace(" ", "") for merge in merges]
    twice = next(i for i in range(len(merges)) if joined[i] == joined[i + 1])
    merge = merges.pop(twice)
    if damage != "one is missing":
        merges.append(merge)
    (json_only / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(RequestError, match="not those of a SentencePiece model"):
        write(tmp_path / "a.gguf", tokenizer=Tokenizer.from_folder(json_only))


@pytest.mark.parametrize("difference", ["no space in front", "other merges"])
def test_a_contradicting_tokenizer_model_is_not_used(json_only: Path, tmp_path: Path, difference: str) -> None:
    """The ids are those of the tokenizer.json, which is read, also if both files have the same pieces."""
    spec = json.loads((json_only / "tokenizer.json").read_text())
    if difference == "other merges":
        groups: dict[str, list[str]] = {}
        for merge in spec["model"]["merges"]:
            groups.setdefault(merge.replace(" ", ""), []).append(merge)
        spec["model"]["merges"] = [merge for group in reversed(groups.values()) for merge in group]
    else:
        spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (json_only / "tokenizer.json").write_text(json.dumps(spec))
    alone = Tokenizer.from_folder(json_only)
    shutil.copy(SHAKESPEARE / "tokenizer.model", json_only)
    tokenizer = Tokenizer.from_folder(json_only)
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    _, read = gguf_format.read(tmp_path / "a.gguf")
    expected = [alone.encode(text) for text in TEXTS]
    assert [tokenizer.encode(text) for text in TEXTS] == [read.encode(text) for text in TEXTS] == expected
    assert expected != [Tokenizer.from_folder(SHAKESPEARE).encode(text) for text in TEXTS]


def test_no_prefix_space_and_a_chat_template_survive(json_only: Path, tmp_path: Path) -> None:
    spec = json.loads((json_only / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (json_only / "tokenizer.json").write_text(json.dumps(spec))
    (json_only / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (json_only / "additional_chat_templates").mkdir()
    (json_only / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    tokenizer = Tokenizer.from_folder(json_only)
    assert tokenizer.encode("be") != Tokenizer.from_folder(SHAKESPEARE).encode("be")
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    _, read = gguf_format.read(tmp_path / "a.gguf")
    assert [read.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert read.decode(tokenizer.encode(" be")) == " be"
    assert read.templates() == {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}


# llama.cpp.


@pytest.fixture
def llama(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Open a file in llama.cpp, with keys and values in float32 like ours."""
    llama_cpp = pytest.importorskip("llama_cpp")
    float32 = 0  # GGML_TYPE_F32
    opened = []
    keep_weights_as_they_are(llama_cpp, monkeypatch)

    def load(path: str) -> Any:
        options = {"n_ctx": 512, "n_gpu_layers": 0, "n_threads": 2, "type_k": float32, "type_v": float32}
        opened.append(llama_cpp.Llama(path, logits_all=True, verbose=False, **options))
        return opened[-1]

    yield load
    for model in opened:
        model.close()


@pytest.mark.parametrize("gguf_type", KL)
def test_llama_cpp_computes_the_reference_logits(
    llama: Callable[[str], Any], files: dict[str, Path], reference: dict[str, Any], gguf_type: str
) -> None:
    model = llama(str(files[gguf_type]))
    kl, worst = [], 0.0
    for i, ids in enumerate(reference["ids"]):
        model.reset()
        model.eval(ids)
        logits = np.array(model.scores[: len(ids)])
        kl.append(mean_kl(reference[f"logits_{i}"], logits))
        worst = max(worst, float(np.abs(logits - reference[f"logits_{i}"]).max()))
    assert max(kl) < KL[gguf_type]
    assert worst < {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.4, "q4_0": 4.0}[gguf_type]


def test_llama_cpp_continues_prompts_as_we_do(
    llama: Callable[[str], Any], files: dict[str, Path], reference: dict[str, Any]
) -> None:
    model = llama(str(files["f32"]))
    ours = build_model(gguf_format.read(files["f32"])[0], dtype="float32")
    for prompt, ids, greedy in zip(reference["prompts"], reference["ids"], reference["greedy"], strict=True):
        assert model.tokenize(prompt.encode()) == ids
        model.reset()
        model.eval(ids)
        theirs = []
        for _ in range(48):
            theirs.append(int(np.argmax(model.scores[model.n_tokens - 1])))
            model.eval(theirs[-1:])
        mine = mx.argmax(ours(mx.array([ids + greedy]))[0], axis=-1).tolist()
        assert theirs == greedy
        assert mine[len(ids) - 1 : -1] == greedy


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_llama_cpp_encodes_as_we_do(llama: Callable[[str], Any], json_only: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = Tokenizer.from_folder(SHAKESPEARE if kind == "tokenizer.model" else json_only)
    write(tmp_path / "a.gguf", tokenizer=tokenizer)
    model = llama(str(tmp_path / "a.gguf"))
    assert [model.tokenize(text.encode(), special=False) for text in TEXTS] == list(map(tokenizer.encode, TEXTS))
    assert (model.token_bos(), model.token_eos(), model.n_vocab()) == (1, 2, 2048)


@pytest.mark.parametrize("gguf_type", ["q8_0", "q4_0"])
def test_llama_cpp_runs_fallbacks_and_padded_vocabularies(
    llama: Callable[[str], Any], tmp_path: Path, gguf_type: str
) -> None:
    checkpoint = small_checkpoint(vocab_size=2080, max_context_length=64)
    write(tmp_path / "a.gguf", gguf_type, checkpoint)
    read = {n: np.array(w.astype(mx.float32)) for n, w in gguf_format.read(tmp_path / "a.gguf")[0].weights.items()}
    ids = [1, 400, 500, 2060]
    expected = numpy_model.logits(checkpoint.config, read, np.array([ids]))[0]
    model = llama(str(tmp_path / "a.gguf"))
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)])
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999  # it rounds activations to 8 bits
