"""`mlx-openelm export` and `jobs.export`: what is written, where, and what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_openelm import convert
from mlx_openelm.config import SIZES, ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats import gguf as gguf_format
from mlx_openelm.formats import huggingface
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.jobs.average import average
from mlx_openelm.jobs.export import FORMATS, export
from mlx_openelm.jobs.quantize import quantize
from mlx_openelm.quantization.options import QuantizeOptions
from mlx_openelm.sources import Source
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import numpy as np
import pytest
from in_process import run_here
from processes import environment

gguf = pytest.importorskip("gguf")

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
PARAMETERS = 2_485_056


def run(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`."""
    return run_here("export", *args, folder=folder)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the trained checkpoint that a test may damage."""
    return Path(shutil.copytree(SHAKESPEARE, tmp_path / "model"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_folder_stored_in_several_types_is_exported_in_float32(tmp_path: Path) -> None:
    mixed = shutil.copytree(SHAKESPEARE, tmp_path / "mixed")
    weights = mx.load(str(mixed / "model.safetensors"))
    assert isinstance(weights, dict)
    mixed_weights = {name: w.astype(mx.bfloat16) if w.ndim == 2 else w for name, w in weights.items()}
    mx.save_safetensors(str(mixed / "model.safetensors"), mixed_weights, {"format": "pt"})
    result = export(mixed, tmp_path / "hf", format="huggingface")
    written = mx.load(str(tmp_path / "hf" / "model.safetensors"))
    assert isinstance(written, dict)
    assert result.type == "float32" and {w.dtype for w in written.values()} == {mx.float32}


def test_the_command_writes_a_gguf_file(tmp_path: Path) -> None:
    """In a separate process."""
    command = [sys.executable, "-m", "mlx_openelm", "export", "--model", str(SHAKESPEARE), "--format", "gguf"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    path = tmp_path / "shakespeare-hf-f16.gguf"
    reader = gguf.GGUFReader(path)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in reader.tensors) / PARAMETERS
    size = f"{path.stat().st_size / 1e6:.1f} MB"
    assert done.stdout == f"Wrote shakespeare-hf-f16.gguf: f16, {bits:.2f} bits per weight, {size}\n"
    assert reader.get_field("general.name").contents() == "shakespeare-hf"
    assert names(tmp_path) == {"shakespeare-hf-f16.gguf"}


def test_the_command_writes_a_hugging_face_folder(tmp_path: Path) -> None:
    done = run(*("--model", SHAKESPEARE, "--format", "huggingface", "--dtype", "bfloat16", "--json"), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "shakespeare-hf-hf"
    assert json.loads(done.stdout) == {
        "model": str(SHAKESPEARE),
        "format": "huggingface",
        "path": "shakespeare-hf-hf",
        "type": "bfloat16",
        "size": sum(file.stat().st_size for file in folder.iterdir()),
        "bits_per_weight": 16,
        "exceptions": {},
    }
    assert mlx_format.read(folder).dtype == mx.bfloat16


def test_an_error_of_the_command_is_one_line(tmp_path: Path) -> None:
    done = run("--format", "huggingface", "--gguf-type", "f32", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --gguf-type needs --format gguf; for huggingface there is --dtype.\n"
    done = run(folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--format" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"format": "onnx"}, "format must be one of huggingface, gguf"),
        ({"format": "gguf", "gguf_type": "q5_k"}, "gguf_type must be one of f32, f16, bf16, q8_0, q4_0"),
        ({"format": "gguf", "dtype": "float32"}, "dtype needs format huggingface"),
        ({"format": "huggingface", "dtype": "int8"}, "dtype must be one of float32"),
        ({"format": "gguf", "revision": "main", "model": "a.gguf"}, "leave the revision out"),
        ({"format": "gguf", "config_yaml": "a.yaml"}, "config_yaml belongs to CoreNet's .pt files"),
    ],
)
def test_invalid_requests_are_refused(tmp_path: Path, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        export(**({"model": SHAKESPEARE, "output": tmp_path / "out"} | request_))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("gguf_type", ["f32", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_a_quantized_model_is_dequantized_then_stored_as_asked(tmp_path: Path, gguf_type: str) -> None:
    packed = convert(SHAKESPEARE, tmp_path / "packed", quantize=True, q_bits=4, dtype="float32").path
    result = export(packed, tmp_path / "a.gguf", format="gguf", gguf_type=gguf_type)
    name = "transformer.layers.2.attn.out_proj"
    weights = mlx_format.read(packed).weights
    codes = np.array(weights[f"{name}.weight"])
    scales, biases = (np.array(weights[f"{name}.{part}"].astype(mx.float32)) for part in ("scales", "biases"))
    values = (codes[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(192, -1).astype(np.float32)
    full = values * scales.repeat(64, axis=1) + biases.repeat(64, axis=1)
    tensor = next(t for t in gguf.GGUFReader(result.path).tensors if t.name == "blk.2.attn_output.weight")
    stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(full.shape)
    step = np.abs(full).reshape(192, -1, 32).max(-1).repeat(32, axis=1) / 127
    assert (np.abs(stored - full) <= (1e-6 if gguf_type == "f32" else 0.6 * step)).all()  # scales are float16


def test_gguf_to_hugging_face_has_one_dtype(tmp_path: Path) -> None:
    """A float16 file has float32 norms; float32 holds both."""
    export(SHAKESPEARE, tmp_path / "a.gguf", format="gguf", gguf_type="f16")
    result = export(tmp_path / "a.gguf", format="huggingface", output=tmp_path / "hf")
    assert result.type == "float32"
    before, after = mlx_format.read(SHAKESPEARE).weights, mlx_format.read(tmp_path / "hf").weights
    for name, weight in before.items():
        expected = np.array(weight)
        if expected.ndim == 2:
            expected = expected.astype(np.float16).astype(np.float32)
        assert np.array_equal(np.array(after[name]), expected)


def test_the_3b_model_defaults_to_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SHAKESPEARE, tmp_path / "OpenELM-3B-Instruct")
    monkeypatch.chdir(tmp_path)
    shape = ModelConfig.from_file(SHAKESPEARE)
    monkeypatch.setitem(SIZES, "3B", (shape.num_transformer_layers, shape.model_dim, shape.head_dim))
    result = export("OpenELM-3B-Instruct", format="gguf")
    assert (str(result.path), result.type) == ("OpenELM-3B-Instruct-bf16.gguf", "bf16")
    template = gguf.GGUFReader(result.path).get_field("tokenizer.chat_template").contents()
    assert "<|assistant|>" in template  # CoreNet's, since instruct models have none
    _, tokenizer = gguf_format.read(result.path)
    assert tokenizer.chat_template == template
    assert export("OpenELM-3B-Instruct", format="gguf", gguf_type="f16").type == "f16"


# Where outputs go.


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("1.1b-instruct", "OpenELM-1_1B-Instruct"),
        ("apple/OpenELM-270M", "OpenELM-270M"),
        ("mlx-community/OpenELM-270M-4bit", "OpenELM-270M-4bit"),
        ("corenet:270M/checkpoint_average", "OpenELM-270M-checkpoint_average"),
        ("tiny", "tiny"),
        (str(SHAKESPEARE) + "/", "shakespeare-hf"),
        (str(SHAKESPEARE / "model.safetensors"), "model"),
    ],
)
def test_outputs_are_named_after_what_was_typed(
    typed: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, tokenizer = mlx_format.read(SHAKESPEARE), Tokenizer.from_folder(SHAKESPEARE)
    source = Source(typed, SHAKESPEARE, checkpoint, tokenizer, None, checkpoint.config)
    monkeypatch.setattr("mlx_openelm.jobs.export.open_source", lambda *_, **__: source)
    monkeypatch.chdir(tmp_path)
    assert export(typed, format="gguf").path == Path(f"{name}-f16.gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path, format: str) -> None:
    output = tmp_path / "out"
    export(SHAKESPEARE, output, format=format)
    before = mx.load(str(SHAKESPEARE / "model.safetensors"))["transformer.norm.weight"]
    with pytest.raises(RequestError, match="out exists; choose another output, or replace it with overwrite=True"):
        export("no-such-model", output, format=format)
    more = {"gguf_type": "f32"} if format == "gguf" else {"dtype": "float16"}
    export(SHAKESPEARE, output, format=format, overwrite=True, **more)
    read = gguf_format.read(output)[0] if format == "gguf" else mlx_format.read(output)
    norm = read.weights["transformer.norm.weight"]
    assert norm.dtype == (mx.float32 if format == "gguf" else mx.float16)
    assert mx.allclose(norm.astype(mx.float32), before, rtol=1e-3)
    assert names(tmp_path) == {"out"}


def test_files_and_folders_that_are_not_models_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("mine")
    for output, format, message in (
        ("notes", "gguf", "is not a GGUF file, so it will not be overwritten"),
        ("folder", "gguf", "is a folder; give a file"),
        ("notes", "huggingface", "is a file, not a folder"),
        ("folder", "huggingface", "contains files that are not part of a model"),
    ):
        with pytest.raises(RequestError, match=message):
            export(SHAKESPEARE, tmp_path / output, format=format, overwrite=True)
    assert (tmp_path / "notes").read_text() == (tmp_path / "folder" / "a.txt").read_text() == "mine"


def test_the_source_is_never_the_output(tmp_path: Path, model: Path) -> None:
    export(model, tmp_path / "a.gguf", format="gguf", gguf_type="f32")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "a.gguf")
    before = {path: path.read_bytes() for path in [*model.iterdir(), tmp_path / "a.gguf"]}
    for source, output, format in (
        (model, model, "huggingface"),
        (tmp_path / "a.gguf", tmp_path / "a.gguf", "gguf"),
        (tmp_path / "a.gguf", tmp_path / "link.gguf", "gguf"),
    ):
        with pytest.raises(RequestError, match="is the model to export, or contains it"):
            export(source, output, format=format, overwrite=True)
    assert before == {path: path.read_bytes() for path in before}


# Failures.


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_only_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    export(SHAKESPEARE, tmp_path / "out", format=format)

    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = content()
    write = gguf_format.write if format == "gguf" else huggingface.write

    def fill_disk(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_format if format == "gguf" else huggingface, "write", fill_disk)
    with pytest.raises(OpenELMError, match="Writing .*out failed: No space left on device; nothing was left there"):
        export(SHAKESPEARE, tmp_path / "out", format=format, overwrite=True)
    assert content() == before
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_source_that_changes_meanwhile_leaves_nothing(tmp_path: Path, model: Path, format: str) -> None:
    def change(done: int, total: int) -> None:
        os.utime(model / "model.safetensors", ns=(done, done))

    with pytest.raises(OpenELMError, match="was changed while it was being read"):
        export(model, tmp_path / "out", format=format, progress=change)
    assert names(tmp_path) == {"model"}


def test_a_file_cut_after_it_was_opened_leaves_nothing(tmp_path: Path, model: Path) -> None:
    def cut(done: int, total: int) -> None:
        os.truncate(model / "model.safetensors", 500_000)

    with pytest.raises(OpenELMError):
        export(model, tmp_path / "out.gguf", format="gguf", progress=cut)
    assert names(tmp_path) == {"model"}


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f".a.gguf.partial-{ended.pid}"
    left.mkdir()
    (left / "a.gguf").write_bytes(b"GGUF")
    export(SHAKESPEARE, tmp_path / "a.gguf", format="gguf")
    assert names(tmp_path) == {"a.gguf"}


def test_progress_counts_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = export(
        SHAKESPEARE, tmp_path / "a.gguf", format="gguf", gguf_type="q8_0", progress=lambda *a: calls.append(a)
    )
    assert calls[-1][0] == calls[-1][1] == round(result.bits_per_weight * PARAMETERS / 8)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == 2 + 9 * 6


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RequestError, match=r"pip install '\.\[gguf\]'"):
        export(SHAKESPEARE, tmp_path / "a.gguf", format="gguf")
    with pytest.raises(RequestError, match=r"pip install '\.\[gguf\]'"):
        gguf_format.read(tmp_path / "a.gguf")
    assert names(tmp_path) == set()


# Memory.


def test_files_are_written_and_read_tensor_by_tensor(tmp_path: Path) -> None:
    """In a separate process, so that nothing else counts in the peak."""
    code = """
import json, sys
from mlx_openelm import convert
from mlx_openelm.jobs.average import average
from mlx_openelm.jobs.export import export
from mlx_openelm.formats import mlx as mlx_format
import mlx.core as mx
mx.set_default_device(mx.cpu)
mlx_format._PIECE = 1 << 14  # small beside these matrices, as it is beside the published models'
model, out = sys.argv[1:]
peaks = {}
def measure(name, work):
    mx.clear_cache()
    mx.reset_peak_memory()
    work()
    peaks[name] = mx.get_peak_memory()
measure("to huggingface", lambda: export(model, f"{out}/hf", format="huggingface", dtype="float16"))
for kind in ("f32", "q8_0"):
    measure(f"to {kind}", lambda: export(model, f"{out}/{kind}.gguf", format="gguf", gguf_type=kind))
    measure(f"from {kind}", lambda: convert(f"{out}/{kind}.gguf", f"{out}/{kind}"))
measure("packed from f32", lambda: convert(f"{out}/f32.gguf", f"{out}/packed", quantize=True))
measure("mxfp8", lambda: convert(model, f"{out}/mxfp8", quantize=True, q_mode="mxfp8"))
measure("dequantized", lambda: export(f"{out}/mxfp8", f"{out}/mxfp8-hf", format="huggingface"))
measure("average", lambda: average([model, f"{out}/hf", f"{out}/f32"], f"{out}/mean"))
print(json.dumps(peaks))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(SHAKESPEARE), str(tmp_path)], capture_output=True, text=True, check=True
    )
    peaks, largest = json.loads(done.stdout), 4 * 2048 * 192  # the embedding
    assert len(peaks) == 9
    assert max(peaks.values()) <= 3 * largest < 4 * PARAMETERS / 1.8, peaks


@pytest.mark.parametrize("format", ["huggingface", "gguf"])
def test_messages_name_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    (tmp_path / "precious" / "photos").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "precious")
    outputs: list[tuple[object, bool]] = [(".", True), (tmp_path / "precious", False), (tmp_path / "precious", True)]
    outputs += [(tmp_path / "file", True), (tmp_path / "file", False)] if format == "gguf" else []
    for output, overwrite in outputs:
        with pytest.raises(RequestError, match="output"):
            export(SHAKESPEARE, output, format=format, overwrite=overwrite)  # type: ignore[arg-type]
    assert names(tmp_path) == {"precious", "file"}


def test_rounded_weights_are_not_rounded_again(tmp_path: Path) -> None:
    """A low-bit GGUF file is unpacked, and its card says so; quantizing or averaging it is refused."""
    file = tmp_path / "a.gguf"
    export(SHAKESPEARE, file, format="gguf", gguf_type="q4_0")
    convert(file, tmp_path / "unpacked", dtype="float32")
    assert "were quantized to q4_0 and then unpacked" in (tmp_path / "unpacked" / "README.md").read_text()
    with pytest.raises(
        RequestError, match=r'already quantized to q4_0.*a.gguf", "a-unpacked"\)`, then `convert\("a-unpacked"'
    ):
        convert(file, tmp_path / "out", quantize=True)
    with pytest.raises(RequestError, match="already quantized to q4_0: quantize the original"):
        quantize(file, tmp_path / "out", QuantizeOptions(q_bits=4))
    with pytest.raises(RequestError, match="is quantized to q4_0"):
        average([file, SHAKESPEARE], tmp_path / "out")
    convert(tmp_path / "unpacked", tmp_path / "packed", quantize=True, q_bits=6)
    convert(tmp_path / "packed", tmp_path / "again", dequantize=True)
    assert "were quantized to 6 bits and then unpacked" in (tmp_path / "again" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "again", "packed", "unpacked"]
