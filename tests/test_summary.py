"""The summary of a model: numbers that the paper, the files and arithmetic agree on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from mlx_openelm import load
from mlx_openelm.cli.main import main
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.formats.mlx import Quantization
from mlx_openelm.hub import catalog, corenet
from mlx_openelm.hub.catalog import TINY_FOLDER
from mlx_openelm.jobs.convert import convert
from mlx_openelm.jobs.export import export
from mlx_openelm.jobs.summary import layer_table, memory_needed, summarize, summarize_config, summarize_folder
from mlx_openelm.quantization.recipes import plan
from mlx_openelm.sources import open_source
from mlx_openelm.text import shared_tokenizer

import mlx.core as mx
import pytest
from fake_hub import FakeHub
from test_corenet import fixture_weights, torch_save, write_yaml

SHAKESPEARE = Path(__file__).parent / "fixtures" / "shakespeare-hf"
# arXiv:2404.14619 and the weights published with it.
PARAMETERS = {"270M": 271_527_168, "450M": 457_179_136, "1.1B": 1_079_891_456, "3B": 3_036_647_424}


@pytest.mark.parametrize("size", PARAMETERS)
def test_layers_embedding_and_final_norm_add_up_to_the_model(size: str) -> None:
    config = ModelConfig.from_name(size)
    summary = summarize_config(config, name=size, source="published")
    layers = sum(layer.parameters for layer in summary.layers)
    assert layers + summary.embedding + config.model_dim == summary.parameters == PARAMETERS[size]
    assert sum(layer.share for layer in summary.layers) == pytest.approx(layers / PARAMETERS[size])
    assert summary.embedding == 32000 * config.model_dim
    assert summary.head == 0
    assert summary.norms == config.model_dim * (1 + 2 * len(summary.layers)) + 2 * config.head_dim * len(summary.layers)


def test_layer_wise_scaling_shows_in_the_table() -> None:
    layers = layer_table(ModelConfig.from_name("270M"))
    assert [layer.query_heads for layer in layers] == [12] * 5 + [16] * 7 + [20] * 4
    assert [layer.kv_heads for layer in layers] == [3] * 5 + [4] * 7 + [5] * 4
    assert (layers[0].inner_size, layers[-1].inner_size) == (768, 5120)
    # 1280 x (12 + 2 x 3) x 64 + 12 x 64 x 1280 + 3 x 768 x 1280, the norms 2 x 1280 + 2 x 64
    assert layers[0].parameters == 1_474_560 + 983_040 + 2_949_120 + 2_688
    assert [layer.layer for layer in layers] == list(range(16))


def test_untied_head_is_counted() -> None:
    values = ModelConfig.from_name("270M").to_dict() | {"share_input_output_layers": False}
    summary = summarize_config(ModelConfig.from_dict(values), name="x", source="config")
    assert summary.head == summary.embedding == 40_960_000
    assert summary.parameters == PARAMETERS["270M"] + 40_960_000


def test_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_openelm.backend.on_gpu", lambda: False)
    monkeypatch.setattr("mlx_openelm.native.kernels", None)
    memory = memory_needed(ModelConfig.from_name("270M"), {}, "bfloat16")
    # Keys and values, 63 key-value heads in all, 64 wide, 2048 positions, 4 bytes.
    assert memory.kv_cache == 2 * 63 * 64 * 2048 * 4 == 66_060_288
    assert (memory.dtype, memory.weights, memory.expanded) == ("float32", 4 * PARAMETERS["270M"], None)
    assert memory.total == memory.weights + memory.kv_cache


def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_openelm.backend.on_gpu", lambda: True)
    config = ModelConfig.from_name("270M")
    memory = memory_needed(config, {}, "float32")
    assert (memory.dtype, memory.weights, memory.kv_cache) == ("bfloat16", 2 * PARAMETERS["270M"], 33_030_144)
    choices, _ = plan(config, Quantization(64, 4))
    packed = memory_needed(config, choices, "bfloat16")
    assert packed.weights / PARAMETERS["270M"] == pytest.approx(4.5 / 8, rel=1e-3)
    assert packed.expanded is None


def test_quantized_weights_on_a_cpu_have_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_openelm.backend.on_gpu", lambda: False)
    monkeypatch.setattr("mlx_openelm.native.kernels", None)
    memory = summarize_folder(TINY_FOLDER).memory
    assert memory.expanded == 4 * 4_083_328
    assert memory.weights < memory.expanded / 3


def test_a_cpu_with_kernels_holds_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_openelm.backend.on_gpu", lambda: False)
    monkeypatch.setattr("mlx_openelm.native.kernels", object())
    config = ModelConfig.from_name("270M")
    memory = memory_needed(config, {}, "bfloat16")
    assert (memory.dtype, memory.weights, memory.expanded) == ("float32", 2 * PARAMETERS["270M"], None)
    packed = memory_needed(config, plan(config, Quantization(64, 4))[0], "bfloat16")
    assert packed.weights / PARAMETERS["270M"] == pytest.approx(4.5 / 8, rel=1e-3)
    assert packed.expanded is None
    assert memory_needed(config, plan(config, Quantization(32, 4, "mxfp4"))[0], "bfloat16").expanded is not None


def test_a_folder_is_read_from_its_headers() -> None:
    summary = summarize(str(SHAKESPEARE))
    assert (summary.source, summary.dtype, summary.quantization) == ("files", "float32", None)
    assert (summary.bits_per_weight, summary.tokenizer) == (32, "tokenizer.model")
    assert summary.storage_bytes == (SHAKESPEARE / "model.safetensors").stat().st_size


def test_tiny_is_quantized() -> None:
    summary = summarize("tiny")
    assert summary.quantization == {"bits": 8, "group_size": 64, "mode": "affine"}
    # 8 bits, and two bfloat16 numbers for every 64 weights; the norms have 16 bits.
    assert summary.bits_per_weight == pytest.approx(8.5, abs=0.02)
    assert summary.storage_bytes == pytest.approx(summary.bits_per_weight * 4_083_328 / 8, rel=0.01)
    assert summary.tokenizer == "tokenizer.json"


def test_a_published_model_needs_no_hub(hub: FakeHub) -> None:
    summary = summarize("3b-instruct")
    assert (summary.name, summary.source, summary.parameters) == ("OpenELM-3B-Instruct", "published", PARAMETERS["3B"])
    assert summary.storage_bytes == 4 * PARAMETERS["3B"]
    assert hub.requests == []


def test_a_cached_model_is_read(hub: FakeHub) -> None:
    from mlx_openelm.hub.resolve import resolve

    hub.add("apple/OpenELM-270M", SHAKESPEARE)
    resolve("270m")
    summary = summarize("270m")
    assert (summary.source, summary.parameters) == ("files", 2_485_056)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_only_the_configuration_of_a_hub_model_is_downloaded(hub: FakeHub, tmp_path: Path, group_size: int) -> None:
    folder = tmp_path / "model"
    convert(SHAKESPEARE, folder, quantize=True, q_group_size=group_size)
    hub.add("someone/model", folder)
    summary = summarize("someone/model")
    assert not any("safetensors" in path for _, path in hub.requests)
    read = summarize_folder(folder)
    assert (summary.source, read.source) == ("config", "files")
    assert summary.bits_per_weight == read.bits_per_weight
    assert summary.quantization == read.quantization
    assert summary.layers == read.layers


def test_an_unknown_quantization_in_a_configuration_is_accepted(hub: FakeHub, tmp_path: Path) -> None:
    values = json.loads((SHAKESPEARE / "config.json").read_text()) | {"quantization": {"bits": "many"}}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    hub.add("someone/model", folder)
    assert summarize("someone/model").quantization is None


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0"])
def test_the_summary_of_a_gguf_file_or_checkpoint_equals_what_load_reads(gguf_type: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    export("tiny", file, format="gguf", gguf_type=gguf_type)
    summary, source = summarize(str(file)), open_source(file)
    assert (summary.config, summary.tokenizer) == (source.checkpoint.config, "a.gguf")
    assert summary.rounded_to == source.checkpoint.rounded_to == (None if gguf_type == "f16" else "q8_0")
    with pytest.raises(RequestError, match="has no revision 'v1'"):
        summarize(str(file), revision="v1")
    with pytest.raises(RequestError, match="config_yaml belongs to CoreNet's .pt files"):
        summarize(str(file), config_yaml="run.yaml")


def test_a_corenet_checkpoint_is_read_with_its_padding_cut(hub: FakeHub, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = torch_save(tmp_path / "a.pt", {n: torch.from_numpy(w) for n, w in fixture_weights().items()})
    yaml_file = write_yaml(tmp_path / "run.yaml")
    shutil.copy(SHAKESPEARE / "tokenizer.model", tmp_path)
    summary = summarize(str(file), config_yaml=yaml_file)
    loaded, _ = load(file, config_yaml=yaml_file)
    assert (summary.config, summary.parameters) == (loaded.config, 2_485_056)
    assert (summary.bits_per_weight, summary.dtype, summary.tokenizer) == (32, "float32", "tokenizer.model")
    with pytest.raises(RequestError, match="give its training configuration with config_yaml"):
        summarize(str(file))


@pytest.mark.parametrize("pieces", [2048, 32000])
@pytest.mark.parametrize("kind", ["folder", "file", "file here"])
def test_info_says_how_to_get_a_tokenizer_as_load_does(
    kind: str, pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shared_tokenizer, "LLAMA2", replace(shared_tokenizer.LLAMA2, vocab_size=pieces))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # which would break the line
    words, model = [], tmp_path / "my model"
    if kind == "folder":
        shutil.copytree(SHAKESPEARE, model, ignore=shutil.ignore_patterns("tokenizer*"))
    else:
        torch = pytest.importorskip("torch")
        model.mkdir()
        monkeypatch.chdir(model if kind == "file here" else tmp_path)
        file = torch_save(model / "a.pt", {n: torch.from_numpy(w) for n, w in fixture_weights().items()})
        model = Path("a.pt") if kind == "file here" else file
        words = ["--config-yaml", str(write_yaml(tmp_path / "run.yaml"))]
    with pytest.raises(SystemExit, match="^0$"):
        main(["info", str(model), *words])
    line = capsys.readouterr().out.partition("Tokenizer")[2].strip()
    with pytest.raises(RequestError) as error:
        open_source(model, config_yaml=words[1] if words else None)
    where = f"in {model}" if kind == "folder" else f"beside {model}"
    assert line.startswith(f"none {where}; ") and "--" not in line.replace("--local-dir", "")
    advice = line.partition("; ")[2]
    if pieces == 2048:
        folder = "." if kind == "file here" else f"'{tmp_path / 'my model'}'"
        assert advice.endswith(f"run `hf download {catalog.TOKENIZER_REPO} tokenizer.model --local-dir {folder}`")
    else:
        assert advice == "copy the one it was trained with there"
    assert f"{where}; {advice}, or give a copy with" in str(error.value)


def test_corenet_names_are_summarized_without_a_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(corenet.CACHE_VARIABLE, str(tmp_path / "cache"))
    name = "corenet:270M/checkpoint_average"
    summary = summarize(name)
    assert (summary.name, summary.source, summary.parameters) == (name, "published", PARAMETERS["270M"])
    with pytest.raises(RequestError, match="lora is an adapter"):
        summarize("corenet:270M/lora")
    with pytest.raises(RequestError, match=r"mlx-4bit is not on this machine.* or see `mlx-openelm info 270m`\."):
        summarize("corenet:270M/mlx-4bit")
    # Once downloaded, the files are read: here the port of a smaller model.
    folder = tmp_path / "cache" / "corenet" / "mlx" / "270M-4bit"
    folder.mkdir(parents=True)
    weights = {n.removeprefix("transformer."): w for n, w in mx.load(str(SHAKESPEARE / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "weights.safetensors"), weights)
    values = json.loads((SHAKESPEARE / "config.json").read_text()) | {"model_name": "custom", "padding_index": 2048}
    (folder / "config.json").write_text(json.dumps(values))
    for place in ("corenet:270M/mlx-4bit", str(folder)):
        summary = summarize(place)
        assert (summary.source, summary.parameters, summary.tokenizer) == ("files", 2_485_056, None)
    assert hub.requests == []


def test_memory_is_computed_for_the_models_context() -> None:
    config = ModelConfig.from_name("270M")
    assert memory_needed(config, {}, "float32") == memory_needed(config, {}, "float32", 2048)
    assert summarize("tiny").memory.tokens == 512


def test_models_that_cannot_be_summarized_are_refused(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no model named 'nothing'"):
        summarize("nothing")
    with pytest.raises(RequestError, match="no hub repository named someone/nothing"):
        summarize("someone/nothing")
    (tmp_path / "config.json").write_text((SHAKESPEARE / "config.json").read_text())
    with pytest.raises(RequestError, match="has no"):
        summarize(str(tmp_path))
    hub.status = 500
    with pytest.raises(OpenELMError):
        summarize("someone/other")
