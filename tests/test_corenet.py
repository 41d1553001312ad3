"""CoreNet's checkpoints and its MLX port: values, lazy reading, configurations, and refusals."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.cli.main import COMMANDS, command, main
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import corenet
from mlx_openelm.formats.safetensors import TensorInfo
from mlx_openelm.sources import open_source

import mlx.core as mx
import numpy as np
import pytest
from torch_files import members, pack, write_state

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
TOKENIZER = FOLDER / "tokenizer.model"
SHARED = Path(__file__).parents[2] / "shared" / "reference"
EMBEDDING = "transformer.token_embeddings.weight"
PADDED = 2112

SECTION: dict[str, Any] = {
    "model_name": "custom",
    "vocab_size": PADDED,
    "max_context_length": 512,
    "padding_index": 2048,
    "num_transformer_layers": 6,
    "model_dim": 192,
    "head_dim": 32,
    "num_gqa_groups": 3,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 4.0],
    "ffn_dim_divisor": 64,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}


def fixture_weights() -> dict[str, np.ndarray]:
    """The trained model under CoreNet's names, its vocabulary padded with unused rows."""
    weights = {
        name.removeprefix("transformer."): np.array(value)
        for name, value in mx.load(str(FOLDER / "model.safetensors")).items()
    }
    rows = np.full((PADDED - 2048, 192), 7, np.float32)
    weights["token_embeddings.weight"] = np.concatenate([weights["token_embeddings.weight"], rows])
    return weights


def write_yaml(path: Path, **changes: Any) -> Path:
    import yaml

    section = {key: value for key, value in (SECTION | changes).items() if value is not None}
    path.write_text(yaml.safe_dump({"model": {"language_modeling": {"name": "general_gpt", "general_gpt": section}}}))
    return path


@pytest.fixture
def config_yaml(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "run.yaml")


def torch_save(path: Path, state: Any, **options: Any) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(state, path, **options)
    return path


def tensors(weights: dict[str, np.ndarray] | None = None) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(value) for name, value in (weights or fixture_weights()).items()}


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        open_source(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_logits(model: Any, reference: dict[str, Any]) -> None:
    for number, ids in enumerate(reference["ids"]):
        logits = np.array(model(mx.array([ids])))[0]
        assert np.abs(logits - reference[f"logits_{number}"]).max() < 1e-4


# Checkpoints.


def test_a_checkpoint_gives_the_reference_logits(tmp_path: Path, config_yaml: Path, reference: dict[str, Any]) -> None:
    path = torch_save(tmp_path / "checkpoint.pt", tensors())
    model, tokenizer = load(path, dtype="float32", tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert model.parameters()["transformer"]["token_embeddings"]["weight"].shape == (2048, 192)
    assert tokenizer.encode(reference["prompts"][0]) == reference["ids"][0]
    check_logits(model, reference)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_loads_a_model_takes_its_training_configuration(name: str) -> None:
    flags = command(name)[0].flags
    assert ("--config-yaml" in flags) == (name not in ("upload", "doctor", "leaderboard", "train-tokenizer"))
    assert ("--tokenizer" in flags) == (name not in ("upload", "doctor", "info", "leaderboard", "train-tokenizer"))


def test_the_training_configuration_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch_save(tmp_path / "c.pt", tensors())
    write_yaml(tmp_path / "run.yaml")
    (tmp_path / "play.txt").write_text("To be, or not to be, that is the question. " * 40)
    given = ["--model", "c.pt", "--config-yaml", "run.yaml", "--tokenizer", str(TOKENIZER)]
    for words in (
        ["generate", "hi", "--max-tokens", "2"],
        ["cache-prompt", "hi", "--prompt-cache-file", "held"],
        ["perplexity", "--data", "play.txt", "--sequence-length", "32"],
        ["bench", "-p", "8", "-g", "2", "-n", "1"],
    ):
        for last, code in ((given, 0), (given[:2] + given[4:], 2)):
            with pytest.raises(SystemExit) as stop:
                main([*words, *last, "--json"])
            assert stop.value.code == code, words


def test_the_configuration_equals_that_on_the_hub(tmp_path: Path, config_yaml: Path) -> None:
    path = torch_save(tmp_path / "checkpoint.pt", tensors())
    source = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert source.checkpoint.config == ModelConfig.from_file(FOLDER / "config.json")
    assert (source.repo, source.release, source.path) == (None, None, path)


def test_convert_from_a_checkpoint(tmp_path: Path, config_yaml: Path, reference: dict[str, Any]) -> None:
    path = torch_save(tmp_path / "checkpoint.pt", tensors())
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")  # beside the checkpoint
    convert(path, tmp_path / "out", dtype="float32", config_yaml=config_yaml)
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    original = mx.load(str(FOLDER / "model.safetensors"))
    assert written.keys() == original.keys()
    assert all(mx.array_equal(written[name], original[name]).item() for name in original)
    check_logits(load(tmp_path / "out", dtype="float32")[0], reference)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_types_are_kept(tmp_path: Path, config_yaml: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    state = {name: value.to(getattr(torch, kind)) for name, value in tensors().items()}
    source = open_source(torch_save(tmp_path / "c.pt", state), tokenizer=TOKENIZER, config_yaml=config_yaml)
    weights = source.checkpoint.weights
    assert all(str(weight.dtype) == f"mlx.core.{kind}" for weight in weights.values())
    for name in ("token_embeddings.weight", "layers.3.ffn.proj_2.weight", "norm.weight"):
        expected = state[name].float().numpy()[: 2048 if "embed" in name else None]
        assert np.array_equal(np.array(weights[f"transformer.{name}"].astype(mx.float32)), expected)


def test_training_checkpoints(tmp_path: Path, config_yaml: Path) -> None:
    """The weights are found among everything else in the file, NumPy's numbers included."""
    torch = pytest.importorskip("torch")
    weights = fixture_weights()
    state = {
        "optim_state_dict": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 0.1}]},
        "ema_model_state_dict": tensors({name: value * 0 for name, value in weights.items()}),
        "model_state_dict": collections.OrderedDict(tensors(weights)),
        "best_metric": np.float64(2.5),
        "iterations": 1000,
    }
    path = torch_save(tmp_path / "training_checkpoint_last.pt", state)
    source = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
    norm = source.checkpoint.weights["transformer.norm.weight"]
    assert np.array_equal(np.array(norm), weights["norm.weight"])


def test_an_untied_head(tmp_path: Path) -> None:
    config_yaml = write_yaml(tmp_path / "run.yaml", share_input_output_layers=False)
    weights = fixture_weights()
    weights["classifier.weight"] = np.random.default_rng(0).standard_normal((PADDED, 192)).astype(np.float32)
    path = torch_save(tmp_path / "c.pt", tensors(weights))
    source = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
    head = source.checkpoint.weights["lm_head.weight"]
    assert np.array_equal(np.array(head), weights["classifier.weight"][:2048])
    assert not source.checkpoint.config.share_input_output_layers


def test_a_copy_of_a_shared_output_layer_is_dropped(tmp_path: Path, config_yaml: Path) -> None:
    weights = fixture_weights()
    copied = weights | {"classifier.weight": weights["token_embeddings.weight"]}
    checkpoint, _ = corenet.read(write_state(tmp_path / "c.pt", copied), config_yaml)
    assert checkpoint.config.share_input_output_layers
    assert checkpoint.weights.keys() == {f"transformer.{name}" for name in weights}
    copied["classifier.weight"] = weights["token_embeddings.weight"] + 1
    message = error_of(write_state(tmp_path / "c.pt", copied), tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert f"classifier.weight, which differs from the embedding, though {config_yaml} says they are shared" in message


@pytest.mark.parametrize(
    ("under", "prefix"),
    [
        ([], "module."),
        ([], "transformer."),
        ([], "_fsdp_wrapped_module._orig_mod."),
        (["model_state_dict", "ema_model_state_dict"], "module."),
        (["model_state_dict", "model"], ""),
        (["state_dict"], "model._orig_mod."),
        (["model"], ""),
        (["module"], ""),
    ],
)
def test_what_wrappers_and_trainers_add_to_names_is_removed(
    tmp_path: Path, config_yaml: Path, under: list[str], prefix: str
) -> None:
    weights = fixture_weights()
    path = write_state(tmp_path / "c.pt", {f"{prefix}{name}": value for name, value in weights.items()}, under)
    checkpoint, _ = corenet.read(path, config_yaml)
    assert checkpoint.weights.keys() == {f"transformer.{name}" for name in weights}
    norm = checkpoint.weights["transformer.layers.3.attn_norm.weight"]
    assert np.array_equal(np.array(norm), weights["layers.3.attn_norm.weight"])


def test_wrappers_within_names_are_removed(tmp_path: Path, config_yaml: Path) -> None:
    """As PyTorch inserts them into the path of wrapped layers."""
    weights = fixture_weights()
    wrapped = {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): value for name, value in weights.items()}
    checkpoint, _ = corenet.read(write_state(tmp_path / "c.pt", wrapped), config_yaml)
    assert checkpoint.weights.keys() == {f"transformer.{name}" for name in weights}


def test_other_prefixes_and_ambiguous_dictionaries_are_refused(tmp_path: Path, config_yaml: Path) -> None:
    weights = fixture_weights()
    path, named = tmp_path / "c.pt", {"tokenizer": TOKENIZER, "config_yaml": config_yaml}
    write_state(path, {name if name == "norm.weight" else f"module.{name}": value for name, value in weights.items()})
    assert "missing: transformer.token_embeddings.weight" in error_of(path, **named)
    for under in (["model", "state_dict"], ["net"]):
        message = error_of(write_state(path, weights, under), **named)
        assert f"(not tensors: {', '.join(under)}); save the weights alone" in message


def test_tensors_that_are_not_contiguous(tmp_path: Path, config_yaml: Path) -> None:
    """Transposed tensors are read at once, views of a storage lazily in place."""
    torch = pytest.importorskip("torch")
    weights = fixture_weights()
    state = tensors(weights)
    name = "layers.1.ffn.proj_1.weight"
    state[name] = torch.from_numpy(np.ascontiguousarray(weights[name].T)).t()
    assert not state[name].is_contiguous()
    both = torch.from_numpy(np.concatenate([weights["norm.weight"], weights["layers.0.attn_norm.weight"]]))
    state["norm.weight"], state["layers.0.attn_norm.weight"] = both[:192], both[192:]
    source = open_source(torch_save(tmp_path / "c.pt", state), tokenizer=TOKENIZER, config_yaml=config_yaml)
    for kept in (name, "norm.weight", "layers.0.attn_norm.weight"):
        assert np.array_equal(np.array(source.checkpoint.weights[f"transformer.{kept}"]), weights[kept])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_files_of_old_pytorch_versions(tmp_path: Path, config_yaml: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    state = {name: value.to(getattr(torch, kind)) for name, value in tensors().items()}
    path = torch_save(tmp_path / "c.pth", state, _use_new_zipfile_serialization=False)
    weights = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml).checkpoint.weights
    for name in ("layers.5.attn.qkv_proj.weight", "norm.weight"):
        value = np.array(weights[f"transformer.{name}"].astype(mx.float32))
        assert np.array_equal(value, state[name].float().numpy())


@pytest.mark.parametrize("old", [True, False])
def test_weights_are_read_when_first_used(tmp_path: Path, config_yaml: Path, old: bool) -> None:
    """And not before; newer files have checksums, and a change in between is refused."""
    path = torch_save(tmp_path / "c.pt", tensors(), _use_new_zipfile_serialization=not old)
    weights = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml).checkpoint.weights
    marker = fixture_weights()["norm.weight"].tobytes()
    data = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(data.index(marker))
        file.write(np.full(192, 3, np.float32).tobytes())
    if old:
        assert np.array_equal(np.array(weights["transformer.norm.weight"]), np.full(192, 3))
    else:
        with pytest.raises(RequestError, match="was changed while it was being read: norm.weight does not match"):
            mx.eval(weights["transformer.norm.weight"])


def test_weights_are_read_tensor_by_tensor(tmp_path: Path, config_yaml: Path) -> None:
    """Converted in a separate process, so that nothing else counts in the peak; one tensor is transposed."""
    torch = pytest.importorskip("torch")
    weights = fixture_weights()
    state = tensors(weights)
    name = "layers.1.ffn.proj_1.weight"
    state[name] = torch.from_numpy(np.ascontiguousarray(weights[name].T)).t()
    path = torch_save(tmp_path / "c.pt", state)
    code = """
import sys
from mlx_openelm import convert
import mlx.core as mx
mx.set_default_device(mx.cpu)
path, config_yaml, tokenizer, out = sys.argv[1:]
convert(path, out, tokenizer=tokenizer, config_yaml=config_yaml)
print(mx.get_peak_memory())
"""
    command = [sys.executable, "-c", code, str(path), str(config_yaml), str(TOKENIZER), str(tmp_path / "out")]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 4 * PADDED * 192 <= peak <= 2.5 * 4 * PADDED * 192
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    expected = mx.array(weights[name]).astype(mx.bfloat16)
    assert mx.array_equal(written[f"transformer.{name}"], expected).item()


# Refusals.


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("inside", [True, False])
def test_code_is_refused_and_not_run(tmp_path: Path, config_yaml: Path, protocol: int, inside: bool) -> None:
    pytest.importorskip("torch")
    trace, path = tmp_path / "trace", tmp_path / "c.pt"
    if inside:
        torch_save(path, {"model_state_dict": tensors(), "extra": Hostile(trace)}, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(Hostile(trace), protocol=protocol))
    message = error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert str(path) in message
    assert not trace.exists()
    assert "is refused" in message
    assert "system" in message
    # The trap works: an unsafe load does run it.
    pickle.loads(pickle.dumps(Hostile(trace), protocol=protocol))
    assert trace.exists()


def test_damaged_files_are_refused(tmp_path: Path, config_yaml: Path) -> None:
    path = torch_save(tmp_path / "c.pt", tensors())
    data = path.read_bytes()
    for content in (b"", b"hello world" * 100, data[: len(data) // 2], data[:-30], b"PK\x03\x04" + bytes(500)):
        path.write_bytes(content)
        message = error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
        assert "damaged" in message and str(path) in message


def test_files_with_other_contents_are_refused(tmp_path: Path, config_yaml: Path) -> None:
    torch = pytest.importorskip("torch")
    for state in ([1, 2], {"a": 1}, {}, {1: torch.zeros(2)}, torch.zeros(3), {"epoch": 3, "w": torch.zeros(2)}):
        path = torch_save(tmp_path / "c.pt", state)
        assert "is not a CoreNet checkpoint" in error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)


def test_adapters_are_refused(tmp_path: Path, config_yaml: Path) -> None:
    torch = pytest.importorskip("torch")
    state = tensors()
    state["layers.0.attn.qkv_proj.base_layer.weight"] = state.pop("layers.0.attn.qkv_proj.weight")
    state["layers.0.attn.qkv_proj.lora_A.lora.weight"] = torch.zeros(8, 192)
    path = torch_save(tmp_path / "c.pt", state)
    assert "LoRA or DoRA adapter" in error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)


def test_one_error_lists_what_does_not_fit(tmp_path: Path, config_yaml: Path) -> None:
    torch = pytest.importorskip("torch")
    state = tensors()
    del state["layers.2.ffn.proj_2.weight"]
    state["layers.9.extra.weight"] = torch.zeros(3)
    state["norm.weight"] = torch.zeros(191)
    message = error_of(torch_save(tmp_path / "c.pt", state), tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert "missing: transformer.layers.2.ffn.proj_2.weight" in message
    assert "unexpected: transformer.layers.9.extra.weight" in message
    assert "transformer.norm.weight has shape [191] instead of [192]" in message
    assert str(config_yaml) in message


def test_other_types_are_refused(tmp_path: Path, config_yaml: Path) -> None:
    torch = pytest.importorskip("torch")
    for kind in (torch.float64, torch.int64):
        path = torch_save(tmp_path / "c.pt", tensors() | {"norm.weight": torch.zeros(192, dtype=kind)})
        message = error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
        assert f"norm.weight as {str(kind).removeprefix('torch.')}" in message


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_repacked_reference_gives_the_same_logits(
    tmp_path: Path, reference: dict[str, Any], method: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `load` and `convert`, without PyTorch."""
    if not SHARED.exists():
        pytest.skip("needs the reference checkpoint")
    monkeypatch.setitem(sys.modules, "torch", None)
    path = pack(tmp_path / "c.pt", members(SHARED / "shakespeare-corenet.pt"), method)
    named: dict[str, Any] = {"config_yaml": SHARED / "shakespeare-corenet.yaml", "tokenizer": TOKENIZER}
    check_logits(load(path, dtype="float32", **named)[0], reference)
    convert(path, tmp_path / "out", dtype="float32", **named)
    written, expected = (mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "out", FOLDER))
    assert all(mx.array_equal(written[name], expected[name]).item() for name in expected)


def test_damaged_weights_leave_no_output(tmp_path: Path, config_yaml: Path) -> None:
    path = torch_save(tmp_path / "c.pt", tensors())
    data = bytearray(path.read_bytes())
    data[data.index(fixture_weights()["norm.weight"].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(RequestError, match="is damaged.*norm.weight"):
        convert(path, tmp_path / "out", tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.pt", "run.yaml"]


def test_a_pipe_is_refused_as_a_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.pt")
    assert "is a pipe or a device, not a file" in error_of(tmp_path / "c.pt", tokenizer=TOKENIZER)
    with pytest.raises(RequestError, match="is a pipe or a device, not a file"):
        load(FOLDER, tmp_path / "c.pt")


# The vocabulary.


def test_a_tokenizer_larger_than_the_rows_is_refused(tmp_path: Path) -> None:
    config_yaml = write_yaml(tmp_path / "run.yaml", vocab_size=2000, padding_index=None)
    weights = fixture_weights()
    weights["token_embeddings.weight"] = weights["token_embeddings.weight"][:2000]
    path = torch_save(tmp_path / "c.pt", tensors(weights))
    assert "2048 tokens, but the model only 2000" in error_of(path, tokenizer=TOKENIZER, config_yaml=config_yaml)


def test_without_a_padding_index_the_tokenizer_decides(tmp_path: Path) -> None:
    config_yaml = write_yaml(tmp_path / "run.yaml", padding_index=None)
    path = torch_save(tmp_path / "c.pt", tensors())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml).checkpoint.config.vocab_size == 2048


def test_a_tokenizer_smaller_than_the_padding_index_warns(tmp_path: Path) -> None:
    config_yaml = write_yaml(tmp_path / "run.yaml", padding_index=2100)
    path = torch_save(tmp_path / "c.pt", tensors())
    with pytest.warns(UserWarning, match="2100 tokens .* tokenizer has 2048"):
        source = open_source(path, tokenizer=TOKENIZER, config_yaml=config_yaml)
    assert source.checkpoint.weights["transformer.token_embeddings.weight"].shape == (2048, 192)


# Configurations.


@pytest.mark.parametrize("name", ["OpenELM-270M", "OpenELM-450M", "OpenELM-1_1B", "OpenELM-3B"])
def test_configurations_with_published_names(name: str) -> None:
    section = {"model_name": name, "vocab_size": 32128, "max_context_length": 2048, "padding_index": 32000}
    config, pieces = corenet.config_from_section(section, "run.yaml")
    published = ModelConfig.from_name(name)
    assert pieces == published.vocab_size == 32000
    assert config.vocab_size == 32128
    assert (config.max_context_length, config.rope_max_length) == (2048, 4096)
    assert config.num_query_heads == published.num_query_heads
    assert config.ffn_dims == published.ffn_dims


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_dim": None}, "Unknown model_name 'custom' (expected OpenELM-270M"),
        ({"model_name": "OpenELM-7B", "head_dim": None}, "'OpenELM-7B'"),
        ({"vocab_size": None}, "no vocab_size"),
        ({"vocab_size": "many"}, "vocab_size is many"),
        ({"max_context_length": "x"}, "x"),
        ({"num_gqa_groups": 0}, "num_gqa_groups"),
    ],
)
def test_invalid_configurations_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_yaml(tmp_path / "run.yaml", **changes)
    with pytest.raises(RequestError) as caught:
        corenet.config_from_section(corenet.read_yaml(path), str(path))
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "\t- x: {",
        "model: 3",
        "",
        "[]",
        "model: {language_modeling: {}}",
        "!!python/object/apply:os.system [ls]",
    ],
)
def test_files_that_are_not_a_configuration_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(RequestError, match="run.yaml"):
        corenet.read_yaml(tmp_path / "run.yaml")
    with pytest.raises(RequestError, match="absent.yaml does not exist"):
        corenet.read_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize("rows", [32000, 32128])
@pytest.mark.parametrize(("size", "layers"), [("270M", 16), ("450M", 20), ("1_1B", 28), ("3B", 36)])
def test_published_sizes_need_no_yaml(rows: int, size: str, layers: int) -> None:
    shapes = ModelConfig.from_name(size).tensor_shapes() | {EMBEDDING: (rows, ModelConfig.from_name(size).model_dim)}
    infos = {name: TensorInfo(mx.float32, shape) for name, shape in shapes.items()}
    config, pieces = corenet.published_config(Path("c.pt"), infos)
    assert (config.vocab_size, pieces, config.num_transformer_layers) == (rows, 32000, layers)
    assert (config.max_context_length, config.rope_max_length) == (2048, 4096)


def test_other_sizes_need_a_yaml(tmp_path: Path) -> None:
    path = torch_save(tmp_path / "c.pt", tensors())
    assert "config_yaml" in error_of(path, tokenizer=TOKENIZER)


# The MLX port.


def write_port(folder: Path, quantized: bool = False) -> dict[str, np.ndarray]:
    folder.mkdir()
    weights = fixture_weights()
    stored = {name: mx.array(value) for name, value in weights.items()}
    section = dict(SECTION)
    if quantized:
        section["quantization"] = {"group_size": 32, "bits": 4}
        for name in [name for name in stored if name.endswith("_proj.weight") or ".proj_" in name]:
            path = name.removesuffix(".weight")
            packed, scales, biases = mx.quantize(stored.pop(name), group_size=32, bits=4)
            stored |= {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}
    mx.save_safetensors(str(folder / "weights.safetensors"), stored)
    (folder / "config.json").write_text(json.dumps(section))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    return weights


def test_a_port_folder_gives_the_reference_logits(tmp_path: Path, reference: dict[str, Any]) -> None:
    write_port(tmp_path / "port")
    model, _ = load(tmp_path / "port", dtype="float32")
    check_logits(model, reference)


def test_a_quantized_port_folder(tmp_path: Path) -> None:
    weights = write_port(tmp_path / "port", quantized=True)
    model, _ = load(tmp_path / "port", dtype="float32", expand=True)
    assert len(model.quantization) == 24
    assert "transformer.token_embeddings" not in model.quantization
    name = "layers.0.ffn.proj_1"
    parts = mx.quantize(mx.array(weights[f"{name}.weight"]), group_size=32, bits=4)
    expected = mx.dequantize(*parts, group_size=32, bits=4)
    found = model.transformer.layers[0].ffn.proj_1.weight
    assert mx.array_equal(found, expected).item()
    convert(tmp_path / "port", tmp_path / "out", dtype="float32", dequantize=True)
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert mx.array_equal(written[f"transformer.{name}.weight"], expected).item()
    assert written["transformer.token_embeddings.weight"].shape == (2048, 192)


def test_a_port_folder_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    write_port(tmp_path / "port")
    (tmp_path / "port" / "config.json").write_text(json.dumps(SECTION | {"num_transformer_layers": 7}))
    assert "layers.6" in error_of(tmp_path / "port")
    assert "config_yaml belongs" in error_of(tmp_path / "port", config_yaml=tmp_path / "x.yaml")


def test_a_large_checkpoint_is_never_wholly_in_memory(tmp_path: Path) -> None:
    """120 MB of float32, converted in a separate process, which grows by a fraction of that."""
    torch = pytest.importorskip("torch")
    changes = {"num_transformer_layers": 10, "model_dim": 768, "head_dim": 64, "ffn_dim_divisor": 256}
    config_yaml = write_yaml(tmp_path / "run.yaml", **changes)
    config, _ = corenet.config_from_section(corenet.read_yaml(config_yaml), "")
    shapes = config.tensor_shapes()
    torch_save(tmp_path / "c.pt", {n.removeprefix("transformer."): torch.ones(s) for n, s in shapes.items()})
    size = (tmp_path / "c.pt").stat().st_size
    assert size > 120_000_000
    code = f"""
import resource, sys
import torch
from mlx_openelm import convert
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
convert({str(tmp_path / "c.pt")!r}, {str(tmp_path / "out")!r}, dtype="float16",
        config_yaml={str(config_yaml)!r}, tokenizer={str(TOKENIZER)!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.5 * size
