"""GGUF files of every type: what llama.cpp writes, against its logits and the gguf package's `dequantize`."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm.cli.main import main
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import gguf as gguf_format
from mlx_openelm.formats import gguf_blocks
from mlx_openelm.jobs.convert import convert
from mlx_openelm.jobs.summary import summarize
from mlx_openelm.loading import build_model

import gguf_files
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import LAYERS, SHAPES, RawFile, RawTensor, keep_weights_as_they_are, random_blocks

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

FIXTURE = Path(__file__).parent / "fixtures" / "gguf" / "llama-q3_k_m.gguf"
CASES = Path(__file__).parents[2] / "shared" / "cases" / "gguf"
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]
# In the order of ggml's header; newer types need a newer package.
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS"]
TYPES += ["IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"]
TYPES = [name for name in TYPES if name in gguf.GGMLQuantizationType.__members__]


first = functools.cache(gguf_files.small_file)


def small_file() -> RawFile:
    """A file that a test may change; its weights are made once."""
    return replace(first(), keys=[*first().keys], tensors=[*first().tensors])


def number(kind: str) -> int:
    return int(gguf.GGMLQuantizationType[kind])


def stored(kind: str, shape: tuple[int, ...], seed: int = 0) -> RawTensor:
    """A tensor of random blocks."""
    return RawTensor(number(kind), shape, random_blocks(shape, *gguf.GGML_QUANT_SIZES[number(kind)], seed))


def full(tensor: RawTensor) -> np.ndarray:
    """A tensor dequantized by the package."""
    data = np.frombuffer(tensor.data, np.uint8).reshape(*tensor.shape[:-1], -1)
    with np.errstate(all="ignore"):
        return quants.dequantize(data, gguf.GGMLQuantizationType(tensor.kind))


def weights_in(path: Path) -> dict[str, np.ndarray]:
    """The weights as we read them, by llama.cpp's names."""
    weights = gguf_format.read(path)[0].weights
    read = {name: np.array(weights[name].astype(mx.float32)) for name in weights}
    tensors = {
        "token_embd.weight": read["transformer.token_embeddings.weight"],
        "output_norm.weight": read["transformer.norm.weight"],
    }
    if "lm_head.weight" in read:
        tensors["output.weight"] = read["lm_head.weight"]
    parts = {"attn_qkv": "attn.qkv_proj", "attn_output": "attn.out_proj", "attn_q_norm": "attn.q_norm"}
    parts |= {"attn_k_norm": "attn.k_norm", "ffn_down": "ffn.proj_2", "attn_norm": "attn_norm", "ffn_norm": "ffn_norm"}
    for layer in range(LAYERS):
        for ours, theirs in parts.items():
            tensors[f"blk.{layer}.{ours}.weight"] = read[f"transformer.layers.{layer}.{theirs}.weight"]
        gate, up = np.split(read[f"transformer.layers.{layer}.ffn.proj_1.weight"], 2)
        tensors |= {f"blk.{layer}.ffn_gate.weight": gate, f"blk.{layer}.ffn_up.weight": up}
    return tensors


def logits_of(path: Path, ids: list[int]) -> np.ndarray:
    return np.array(build_model(gguf_format.read(path)[0], dtype="float32")(mx.array([ids])))[0]


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_dequantizes_as_by_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(gguf_blocks, "CHUNK", 100 * 256)  # several chunks, the last one smaller
    file = small_file()
    names = ("token_embd.weight", *(f"blk.1.ffn_{part}.weight" for part in ("gate", "up", "down")))
    for seed, name in enumerate(names):
        tensor = stored(kind, SHAPES[name], seed)
        file.tensor(name, kind=tensor.kind, data=tensor.data)
    path = file.write(tmp_path / "a.gguf")
    checkpoint, _ = gguf_format.read(path)
    assert checkpoint.rounded_to == kind.lower()
    assert {tensor.dtype for tensor in checkpoint.weights.tensors.values()} == {mx.float32}
    ours, theirs = weights_in(path), {name: full(tensor) for name, tensor in file.tensors}
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert np.array_equal(ours[name], weight, equal_nan=True), name


def test_types_mix_within_a_file_and_within_a_matrix(tmp_path: Path) -> None:
    """Gate and up are one matrix here, but may have different types; a norm may be quantized, too."""
    file = small_file()
    kinds = ["F16", "BF16", "F32", *TYPES]
    for i, name in enumerate(MATRICES):
        weight = full(dict(file.tensors)[name])
        kind = kinds[i % len(kinds)]
        if kind == "F16":
            file.tensor(name, kind=number(kind), data=weight.astype(np.float16).tobytes())
        elif kind == "BF16":
            file.tensor(name, kind=number(kind), data=quants.quantize(weight, gguf.GGMLQuantizationType.BF16).tobytes())
        elif kind != "F32":
            tensor = stored(kind, SHAPES[name], i)
            file.tensor(name, kind=tensor.kind, data=tensor.data)
    norm = quants.quantize(np.ones((1, 256), np.float32), gguf.GGMLQuantizationType.Q8_0)
    file.tensor("output_norm.weight", kind=number("Q8_0"), data=norm.tobytes())
    ours = weights_in(file.write(tmp_path / "a.gguf"))
    for name, tensor in file.tensors:
        assert np.array_equal(ours[name], full(tensor).reshape(ours[name].shape), equal_nan=True), name
    assert len({tensor.kind for _, tensor in file.tensors}) > 8


@pytest.mark.parametrize("kind", ["I8", "I32", "I64", "F64", "Q8_K"])
def test_types_the_package_cannot_dequantize_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    file = small_file()
    tensor = stored(kind, SHAPES["blk.1.ffn_up.weight"])
    file.tensor("blk.1.ffn_up.weight", kind=tensor.kind, data=tensor.data)
    with pytest.raises(
        RequestError, match=f"stores blk.1.ffn_up.weight as {kind}, which the gguf package cannot unpack"
    ):
        gguf_format.read(file.write(tmp_path / "a.gguf"))


def test_types_newer_than_the_package_are_refused(tmp_path: Path) -> None:
    file = small_file()
    file.tensor("output_norm.weight", kind=99)
    with pytest.raises(RequestError, match="stores output_norm.weight as ggml's type 99, .*update it"):
        gguf_format.read(file.write(tmp_path / "a.gguf"))


# A separate output layer, which converters write although llama.cpp's openelm does not read it.


def test_a_separate_output_layer_is_read(tmp_path: Path) -> None:
    file = small_file()
    shape = SHAPES["token_embd.weight"]
    head = stored("Q5_K", shape, 3)
    file.tensors.append(("output.weight", head))
    path = file.write(tmp_path / "a.gguf")
    checkpoint, _ = gguf_format.read(path)
    assert not checkpoint.config.share_input_output_layers
    assert np.array_equal(weights_in(path)["output.weight"], full(head), equal_nan=True)


def test_the_embedding_in_more_bits_is_a_separate_output_layer(tmp_path: Path) -> None:
    """llama.cpp's quantizer gives an output layer more bits than the embedding: their products differ."""
    file = small_file()
    weight = full(dict(file.tensors)["token_embd.weight"])
    kind = gguf.GGMLQuantizationType.Q8_0
    file.tensors.append(("output.weight", RawTensor(int(kind), weight.shape, quants.quantize(weight, kind).tobytes())))
    checkpoint, _ = gguf_format.read(file.write(tmp_path / "a.gguf"))
    assert not checkpoint.config.share_input_output_layers
    hidden = np.asarray(mx.random.normal((1, 256), key=mx.random.key(0)))
    model = build_model(checkpoint, dtype="float32")
    expected = hidden @ quants.dequantize(quants.quantize(weight, kind), kind).T
    assert np.allclose(np.array(model.logits(mx.array(hidden))), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "Q6_K"])
def test_an_output_layer_that_repeats_the_embedding_is_dropped(tmp_path: Path, kind: str) -> None:
    file = small_file()
    if kind != "F32":
        tensor = stored(kind, SHAPES["token_embd.weight"])
        file.tensor("token_embd.weight", kind=tensor.kind, data=tensor.data)
    file.tensors.append(("output.weight", dict(file.tensors)["token_embd.weight"]))
    checkpoint, _ = gguf_format.read(file.write(tmp_path / "a.gguf"))
    assert checkpoint.config.share_input_output_layers
    assert "lm_head.weight" not in checkpoint.weights


# llama.cpp's own files. It rounds activations to 8 bits, so logits agree to about a tenth of their deviation.


def test_a_file_of_llama_cpps_quantizer() -> None:
    """Q3_K_M: Q3_K, Q4_K and Q5_K matrices, and the embedding in Q6_K."""
    with np.load(FIXTURE.with_suffix(".npz")) as answers:
        ids, expected = answers["ids"].tolist(), answers["logits"]
    checkpoint, tokenizer = gguf_format.read(FIXTURE)
    assert checkpoint.rounded_to == "q3_k, q4_k, q5_k and q6_k"
    assert tokenizer.encode("a") == [1, 262]
    difference = np.abs(logits_of(FIXTURE, ids) - expected)
    assert difference.max() < 0.15 and difference.mean() < 0.03
    assert expected.std() > 0.9


@pytest.mark.skipif(not CASES.exists(), reason="needs the case files")
@pytest.mark.parametrize(
    ("kind", "rounded_to"),
    [("f32", None), ("q4_0", "q4_0 and q6_k"), ("q4_1", "q4_1 and q6_k"), ("q6_k", "q6_k and q8_0")],
)
def test_cases_of_llama_cpps_quantizer(kind: str, rounded_to: str | None) -> None:
    path = CASES / f"wide256-{kind}.gguf"
    with np.load(CASES / "expected.npz") as answers:
        ids, expected = answers["ids"].tolist(), answers[path.stem]
    assert gguf_format.read(path)[0].rounded_to == rounded_to
    difference = np.abs(logits_of(path, ids) - expected)
    assert difference.mean() < (1e-5 if kind == "f32" else 0.04)


def test_convert_reports_the_original_quantization(tmp_path: Path) -> None:
    convert(str(FIXTURE), tmp_path / "a", dtype="float32")
    assert "quantized to q3_k, q4_k, q5_k and q6_k" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(RequestError, match="already quantized to q3_k, q4_k, q5_k and q6_k"):
        convert(str(FIXTURE), tmp_path / "b", quantize=True)


def test_info_reports_how_a_file_is_stored(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", str(FIXTURE)])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(FIXTURE).tensors)
    bits = 8 * size / summarize(str(FIXTURE)).parameters
    stored = next(line for line in lines if line.startswith("Stored"))
    assert stored.endswith(f"{size / 1e3:.1f} kB, {bits:.2f} bits per weight")
    assert "q3_k, q4_k, q5_k and q6_k, unpacked to float32 when read" in "\n".join(lines)


def test_info_of_a_file_in_half_precision(tmp_path: Path) -> None:
    file = small_file()
    for name in MATRICES:
        file.tensor(name, kind=1, data=full(dict(file.tensors)[name]).astype(np.float16).tobytes())
    summary = summarize(str(file.write(tmp_path / "a.gguf")))
    assert (summary.dtype, summary.rounded_to, summary.tokenizer) == ("float16", None, "a.gguf")
    assert 16 < summary.bits_per_weight < 16.1


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("llama_cpp")
    keep_weights_as_they_are(module, monkeypatch)
    return module


@pytest.mark.parametrize(
    "file_type", ["Q2_K", "Q3_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q5_1", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]
)
def test_files_that_llama_cpp_quantizes(llama_cpp: Any, tmp_path: Path, file_type: str) -> None:
    source, path = small_file().write(tmp_path / "f32.gguf"), tmp_path / "a.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}"), 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0
    ids = [1, 259, 260, 261, 262, 70, 101, 200]
    ours = logits_of(path, ids)
    model = llama_cpp.Llama(str(path), n_ctx=64, n_gpu_layers=0, n_threads=1, logits_all=True, verbose=False)
    model.eval(ids)
    theirs = np.array(model.scores[: len(ids)])
    model.close()
    assert np.abs(ours - theirs).max() < 0.2 and np.abs(ours - theirs).mean() < 0.04
    assert math.isclose(ours.std(), theirs.std(), rel_tol=0.05)
