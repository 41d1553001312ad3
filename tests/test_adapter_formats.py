"""Adapter files: reference logits, mlx-lm and PEFT reading what we write and writing what we read, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.adapters.attaching import adapted_layers, attach, attach_new, detach, extract
from mlx_openelm.adapters.files import read_adapter, write_adapter
from mlx_openelm.config import EMBEDDING
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats import raw
from mlx_openelm.formats.adapter import TARGET_MODULES, Adapter, LowRank
from mlx_openelm.formats.safetensors import Tensor
from mlx_openelm.loading import build_model
from mlx_openelm.model import OpenELM

import mlx.core as mx
import numpy as np
import pytest
from fake_hub import FakeHub
from mlx.utils import tree_flatten
from peft_adapters import change_tensors, torch_base

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
IDS = mx.array([json.loads((FIXTURES / "shakespeare-reference.json").read_text())["ids"][0]])
SHARED = Path(__file__).parents[2] / "shared" / "reference" / "shakespeare-corenet-lora.pt"
PEFT_FOLDERS = ["peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding"]
QKV, PROJ_1 = "transformer.layers.0.attn.qkv_proj", "transformer.layers.4.ffn.proj_1"
ROWS, DIM = 2048, 192


@pytest.fixture(scope="module")
def base() -> OpenELM:
    return build_model(mlx_format.read(FOLDER), dtype="float32")


@pytest.fixture
def model(base: OpenELM) -> Any:
    yield base
    detach(base)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "adapters-reference.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def mlx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "mlx"
    convert(FOLDER, folder, dtype="float32")
    return folder


def logits(model: Any) -> np.ndarray:
    return np.array(model(IDS)[0])


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def normal(*shape: int, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def train(model: OpenELM) -> None:
    """Give an adapter nonzero values everywhere, as training would."""
    for number, (_, layer) in enumerate(adapted_layers(model)):
        layer.lora_b = normal(*layer.lora_b.shape, seed=number) / 20
        if "m" in layer:
            layer.m = layer.m * (1 + normal(*layer.m.shape, seed=number + 50) / 20)


def low_rank(model: OpenELM, path: str, rank: int = 3, scale: float = 1.0, **more: Any) -> LowRank:
    outputs, inputs = model.config.matrix_shapes()[path]
    if path == EMBEDDING:
        outputs, inputs = inputs, outputs
    seed = sum(map(ord, path))
    return LowRank(normal(inputs, rank, seed=seed) / 14, normal(rank, outputs, seed=seed + 1) / 4, scale, **more)


def uneven(model: OpenELM) -> Adapter:
    """Ranks, scales and modules that differ by layer."""
    ranks = {QKV: (2, 4.0), PROJ_1: (5, 0.5), "transformer.layers.4.attn.qkv_proj": (3, 1.5)}
    return Adapter({path: low_rank(model, path, rank, scale) for path, (rank, scale) in ranks.items()})


def write(adapter: Adapter, folder: Path, model: OpenELM, **options: Any) -> Path:
    folder.mkdir()
    write_adapter(adapter, folder, model.config, **options)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def edit(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy with other settings."""
    shutil.copytree(source, folder)
    (folder / "adapter_config.json").write_text(json.dumps(settings(source) | changes))
    return folder


# The reference implementation's logits.


@pytest.mark.parametrize("name", PEFT_FOLDERS)
def test_adapters_of_peft_give_the_reference_logits(
    model: OpenELM, expected: dict[str, np.ndarray], name: str, tmp_path: Path
) -> None:
    plain = logits(model)
    adapter = read_adapter(FIXTURES / name, model.config)
    assert adapter.base_model == "shakespeare-hf"
    attach(model, adapter)
    assert difference(logits(model), expected[name]) < 5e-5
    assert difference(plain, expected[name]) > 1
    for format in ("mlx", "peft"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = write(extract(model), tmp_path / format, model, format=format)
        attach(model, read_adapter(folder, model.config))
        assert difference(logits(model), expected[name]) < 5e-5


@pytest.mark.skipif(not SHARED.exists(), reason="needs the reference checkpoint")
def test_corenets_lora_gives_the_reference_logits(model: OpenELM, expected: dict[str, np.ndarray]) -> None:
    attach(model, read_adapter(SHARED, model.config))
    assert difference(logits(model), expected["corenet-lora"]) < 5e-5


@pytest.mark.covering
@pytest.mark.parametrize("name", ["peft-lora", "peft-dora"])
@pytest.mark.parametrize("expand", [True, False])
def test_load_on_packed_matrices(name: str, expand: bool, tmp_path: Path) -> None:
    convert(FOLDER, tmp_path / "q", quantize=True, q_bits=8, q_group_size=32)
    full, _ = load(tmp_path / "q", dtype="float32", expand=True)
    attach(full, read_adapter(FIXTURES / name, full.config))
    packed, _ = load(tmp_path / "q", FIXTURES / name, "float32", expand=expand)
    assert difference(logits(packed), logits(full)) < 2e-3
    assert not packed.training
    assert all(not layer.training for _, layer in adapted_layers(packed))


def test_load_mixes_weighted_adapters(expected: dict[str, np.ndarray]) -> None:
    names = [str(FIXTURES / name) for name in ("peft-lora", "peft-rslora-attention")]
    assert difference(logits(load(FOLDER, FIXTURES / "peft-dora", "float32")[0]), expected["peft-dora"]) < 5e-5
    by_mapping = logits(load(FOLDER, {names[0]: 0.7, names[1]: 0.3}, "float32")[0])
    by_text = logits(load(FOLDER, [f"{names[0]}=0.7", f"{names[1]}=0.3"], "float32")[0])
    assert np.array_equal(by_mapping, by_text)
    assert difference(by_mapping, expected["peft-lora"]) > 0.1


# mlx-lm.


def in_mlx_lm(mlx_folder: Path, adapter: Path) -> Any:
    mlx_lm = pytest.importorskip("mlx_lm")
    return mlx_lm.load(str(mlx_folder), adapter_path=str(adapter))[0]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("num_layers", [-1, 2])
def test_mlx_lm_reads_adapters_trained_here(
    model: OpenELM, mlx_folder: Path, tmp_path: Path, dora: bool, num_layers: int
) -> None:
    attach_new(model, target_modules=["qkv_proj", "proj_2"], num_layers=num_layers, rank=4, scale=3.0, dora=dora)
    train(model)
    folder = write(extract(model), tmp_path / "a", model, base_model="me/base")
    values = settings(folder)
    assert values["num_layers"] == (6 if num_layers == -1 else 2)
    assert values["lora_parameters"] == {
        "rank": 4,
        "scale": 3.0,
        "dropout": 0.0,
        "keys": ["attn.qkv_proj", "ffn.proj_2"],
    }
    assert (values["fine_tune_type"], values["model"]) == ("dora" if dora else "lora", "me/base")
    assert difference(logits(in_mlx_lm(mlx_folder, folder)), logits(model)) < 1e-4
    attach(model, read_adapter(folder, model.config))
    assert read_adapter(folder, model.config).base_model == "me/base"


def test_mlx_lm_reads_ranks_and_scales_that_differ(model: OpenELM, mlx_folder: Path, tmp_path: Path) -> None:
    adapter = uneven(model)
    attach(model, adapter)
    folder = write(adapter, tmp_path / "a", model)
    assert settings(folder)["lora_parameters"]["rank"] == 5
    theirs = in_mlx_lm(mlx_folder, folder)
    changed = {name.rpartition(".")[0] for name, _ in tree_flatten(theirs.parameters()) if name.endswith("lora_a")}
    assert changed == set(adapter.modules)  # and no other layers were wrapped
    assert difference(logits(theirs), logits(model)) < 1e-4
    before = logits(model)
    attach(model, read_adapter(folder, model.config))
    assert difference(logits(model), before) < 5e-5


def test_mlx_lm_reads_whole_weights(model: OpenELM, mlx_folder: Path, tmp_path: Path) -> None:
    shapes = model.config.tensor_shapes()
    names = ["transformer.norm.weight", "transformer.layers.5.ffn.proj_2.weight"]
    adapter = Adapter(weights={name: normal(*shapes[name], seed=4) / 10 for name in names})
    fresh = build_model(mlx_format.read(FOLDER), dtype="float32")
    attach(fresh, adapter)
    folder = write(extract(fresh), tmp_path / "a", model)
    assert settings(folder)["fine_tune_type"] == "full"
    assert difference(logits(in_mlx_lm(mlx_folder, folder)), logits(fresh)) < 1e-5
    assert difference(logits(load(FOLDER, folder, "float32")[0]), logits(fresh)) == 0
    with pytest.raises(RequestError, match="not the weights of full fine-tuning"):
        write(adapter, tmp_path / "b", model, format="peft")


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_trained_by_mlx_lm_are_read(model: OpenELM, mlx_folder: Path, tmp_path: Path, dora: bool) -> None:
    """With `keys` for the embedding, which acts on the output side there."""
    mlx_lm = pytest.importorskip("mlx_lm")
    from mlx_lm.tuner.utils import linear_to_lora_layers

    theirs = mlx_lm.load(str(mlx_folder))[0]
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.05, "keys": ["attn.out_proj", EMBEDDING]}
    theirs.freeze()
    linear_to_lora_layers(theirs, 3, parameters, use_dora=dora)
    theirs.eval()
    weights = dict(tree_flatten(theirs.trainable_parameters()))
    for number, name in enumerate(sorted(weights)):
        if name.endswith(".lora_b"):
            weights[name] = normal(*weights[name].shape, seed=number) / 5
        if name.endswith(".m"):
            weights[name] = weights[name] * (1 + normal(*weights[name].shape, seed=number) / 10)
    theirs.load_weights(list(weights.items()), strict=False)
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    values = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 3, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(values))

    adapter = read_adapter(folder, model.config)
    assert (set(adapter.modules), adapter.dropout) == (
        {EMBEDDING, *(f"transformer.layers.{n}.attn.out_proj" for n in (3, 4, 5))},
        0.05,
    )
    assert adapter.modules[EMBEDDING].output_side
    attach(model, adapter)
    assert difference(logits(model), logits(theirs)) < 1e-4
    again = write(extract(model), tmp_path / "ours", model)
    assert difference(logits(in_mlx_lm(mlx_folder, again)), logits(theirs)) < 1e-4
    with pytest.raises(RequestError, match=r"changes transformer.token_embeddings .* on the output side too"):
        write(adapter, tmp_path / "peft", model, format="peft")


def test_writing_an_embedding_for_mlx_lm_warns(model: OpenELM, mlx_folder: Path, tmp_path: Path) -> None:
    attach_new(model, target_modules=["token_embeddings"], rank=4, scale=4.0)
    train(model)
    with pytest.warns(UserWarning, match="mlx-lm will apply it to the output too.*adapter_format peft"):
        folder = write(extract(model), tmp_path / "a", model)
    assert settings(folder)["embedding_output_side"] is False
    assert difference(logits(in_mlx_lm(mlx_folder, folder)), logits(model)) > 0.1  # what the warning is about
    before = logits(model)
    attach(model, read_adapter(folder, model.config))
    assert difference(logits(model), before) == 0


def test_dora_on_the_embedding_round_trips(model: OpenELM, tmp_path: Path) -> None:
    attach_new(model, target_modules=["token_embeddings", "out_proj"], rank=4, scale=4.0, dora=True)
    train(model)
    before = logits(model)
    with pytest.warns(UserWarning, match="mlx-lm cannot load DoRA on the embedding"):
        ours = write(extract(model), tmp_path / "a", model)
    for folder in (ours, write(extract(model), tmp_path / "b", model, format="peft")):
        attach(model, read_adapter(folder, model.config))
        assert difference(logits(model), before) < 5e-5


def test_an_output_side_is_not_written_for_peft(model: OpenELM, tmp_path: Path) -> None:
    """PEFT cannot express it if the embedding is tied or has magnitudes per row."""
    lora = Adapter({EMBEDDING: low_rank(model, EMBEDDING, output_side=True)})
    dora = Adapter({EMBEDDING: low_rank(model, EMBEDDING, output_side=True, magnitude=mx.ones(ROWS))})
    untied = replace(model.config, share_input_output_layers=False)
    for adapter, config in ((lora, model.config), (dora, model.config), (dora, untied)):
        with pytest.raises(RequestError, match="on the output side too; PEFT cannot express that"):
            write_adapter(adapter, tmp_path, config, "peft")
    with pytest.raises(RequestError, match="not the weights of full fine-tuning; write mlx-lm's format"):
        write_adapter(Adapter(weights={"transformer.norm.weight": mx.ones(DIM)}), tmp_path, model.config, "peft")
    assert not list(tmp_path.iterdir())
    write_adapter(lora, tmp_path, untied, "peft")
    assert not read_adapter(tmp_path, untied).modules[EMBEDDING].output_side


def test_a_mixture_of_methods_is_not_written(model: OpenELM, tmp_path: Path) -> None:
    modules = {QKV: low_rank(model, QKV), PROJ_1: low_rank(model, PROJ_1, magnitude=mx.ones(1280 // 1))}
    for format in ("mlx", "peft"):
        with pytest.raises(RequestError, match="DoRA on some modules and LoRA on others"):
            write(Adapter(modules), tmp_path / format, model, format=format)
    with pytest.raises(RequestError, match="adapter_format must be one of mlx, peft, got 'gguf'"):
        write_adapter(Adapter(modules), tmp_path, model.config, "gguf")


# PEFT.


def modules_agree(theirs: Any, ours: OpenELM, paths: list[str]) -> bool:
    """The same modules are adapted, and give the same outputs."""
    import torch

    adapted = {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == set(paths)
    layers = dict(adapted_layers(ours))
    for path in paths:
        module = theirs.get_submodule(f"base_model.model.{path}")
        if path == EMBEDDING:
            x = np.array([1, 5, 2047])
        else:
            x = np.array(normal(5, layers[path].lora_a.shape[0], seed=3))
        with torch.no_grad():
            wanted = module(torch.from_numpy(x)).numpy()
        assert difference(np.array(layers[path](mx.array(x))), wanted) < 1e-4, path
    return True


@pytest.mark.parametrize("kind", ["lora", "dora", "uneven"])
def test_peft_reads_what_we_write(model: OpenELM, tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    if kind == "uneven":
        attach(model, uneven(model))
    else:
        targets = list(TARGET_MODULES)
        attach_new(model, target_modules=targets, num_layers=4, rank=4, scale=1.25, dora=kind == "dora")
        train(model)
    adapter = extract(model)
    folder = write(adapter, tmp_path / "a", model, format="peft", base_model="me/base")
    values = settings(folder)
    assert values["base_model_name_or_path"] == "me/base"
    if kind == "uneven":
        assert values["rank_pattern"] | {"r": values["r"]} != {"r": values["r"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and unexpected keys
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        theirs = peft.PeftModel.from_pretrained(torch_base(), str(folder))
    assert modules_agree(theirs, model, list(adapter.modules))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_written_by_peft_are_read(model: OpenELM, tmp_path: Path, rslora: bool, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    import torch

    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["token_embeddings", "qkv_proj", "proj_2"],
        rank_pattern={"layers.1.attn.qkv_proj": 2, r".*\.2\.ffn.proj_2": 6},
        alpha_pattern={
            "layers.3.attn.qkv_proj": 9,
            "oj_2": 50,
            "proj_2": 5,
        },  # only part of a name, which matches no module
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=0.1,
    )
    theirs = peft.get_peft_model(torch_base(), config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data = parameter.data * (1 + noise) if "magnitude" in name else noise
    theirs.save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a", model.config)
    assert adapter.dropout == 0.1
    assert adapter.modules["transformer.layers.1.attn.qkv_proj"].rank == 2
    assert adapter.modules["transformer.layers.2.ffn.proj_2"].rank == 6
    attach(model, adapter)
    assert modules_agree(theirs, model, list(adapter.modules))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA'"),
        ({"bias": "some"}, "unknown bias 'some'; expected none, all or lora_only"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication ="),
        ({"trainable_token_indices": [1]}, "trainable_token_indices ="),
        ({"target_parameters": ["a.weight"]}, "target_parameters ="),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens ="),
        ({"something_new": {"a": 1}}, "something_new ="),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model too; let PEFT convert"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changes the base model too; merge it into that"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite float32 number, got nan"),
        ({"r": 16}, "_proj has rank 8, but adapter_config.json says 16"),
        ({"lora_alpha": "8"}, "lora_alpha must be a finite float32 number, got '8'"),
        ({"rank_pattern": {"(": 8}}, r"rank_pattern has '\(', which is not a regular expression"),
        ({"use_dora": True}, "incomplete: .*lora_magnitude_vector is missing"),
    ],
)
def test_unsupported_peft_settings_are_refused(
    model: OpenELM, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edit(FIXTURES / "peft-lora", tmp_path / "a", **changes)
    with pytest.raises(RequestError, match=message) as caught:
        read_adapter(folder, model.config)
    assert "adapter_config.json" in str(caught.value) or "adapter_model.safetensors" in str(caught.value)


def test_harmless_peft_settings_are_accepted(model: OpenELM, tmp_path: Path) -> None:
    more = {"loftq_config": {"bits": 4}, "task_type": "CAUSAL_LM", "peft_version": "0.18", "qalora_group_size": 16}
    folder = edit(FIXTURES / "peft-lora", tmp_path / "a", init_lora_weights="Gaussian", lora_dropout=None, **more)
    assert len(read_adapter(folder, model.config).modules) == 24


def test_an_adapter_of_apples_unused_classifier_is_left_out(model: OpenELM, tmp_path: Path) -> None:
    """PEFT's `all-linear` adapts it in a model whose output layer is not shared; only there does it exist."""
    unused = f"{PREFIX}transformer.classifier"
    more = {f"{unused}.lora_A.weight": mx.zeros((8, DIM)), f"{unused}.lora_B.weight": mx.ones((ROWS, 8))}
    folder = change_tensors(FIXTURES / "peft-lora", tmp_path / "a", lambda tensors: tensors.update(more))
    targets = [*settings(folder)["target_modules"], "transformer.classifier"]
    (folder / "adapter_config.json").write_text(json.dumps(settings(folder) | {"target_modules": targets}))
    untied = replace(model.config, share_input_output_layers=False)
    plain, found = (read_adapter(path, untied) for path in (FIXTURES / "peft-lora", folder))
    assert found.modules.keys() == plain.modules.keys()
    with pytest.raises(RequestError, match=r"changes transformer\.classifier, which the model does not have"):
        read_adapter(folder, model.config)


# Files that do not fit.


PREFIX = "base_model.model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{PREFIX}{QKV}.lora_A.weight"), f"incomplete: .*{QKV}.lora_A.weight is missing"),
        (lambda t: t.pop(f"{PREFIX}{QKV}.lora_B.weight"), f"incomplete: .*{QKV}.lora_B.weight is missing"),
        (
            lambda t: t.update({f"{PREFIX}{QKV}.lora_A.weight": mx.zeros((8, 191))}),
            rf"{QKV}.lora_A.weight has shape \[8, 191\] instead of \[rank, 192\]",
        ),
        (
            lambda t: t.update({f"{PREFIX}{QKV}.lora_B.weight": mx.zeros((160, 7))}),
            rf"{QKV}.lora_B.weight has shape \[160, 7\] instead of \[160, 8\]",
        ),
        (lambda t: t.update({f"{PREFIX}{QKV}.lora_A.weight": mx.zeros((0, 192))}), r"has shape \[0, 192\]"),
        (lambda t: t.update({f"{PREFIX}{QKV}.lora_A.weight": mx.zeros(192)}), r"has shape \[192\]"),
        (lambda t: t.update({f"{PREFIX}lm_head.weight": mx.zeros((4, 4))}), f"contains {PREFIX}lm_head.weight"),
        (lambda t: t.update({f"{PREFIX}{QKV}.lora_magnitude_vector": mx.zeros(160)}), "lora_magnitude_vector, which"),
        (lambda t: t.update({"x.lora_A.weight": mx.zeros((4, 4))}), "changes x, which the model does not have"),
        (
            lambda t: t.update({f"{PREFIX}transformer.layers.6.attn.qkv_proj.lora_A.weight": mx.zeros((4, 4))}),
            "changes transformer.layers.6.attn.qkv_proj, which the model does not have",
        ),
        (
            lambda t: t.update({f"{PREFIX}transformer.norm.lora_A.weight": mx.zeros((4, 4))}),
            "changes transformer.norm, .* or which is not a matrix",
        ),
        (
            lambda t: t.update({f"{PREFIX}{QKV}.lora_A.weight": mx.zeros((8, 192), mx.uint32)}),
            f"stores .*{QKV}.lora_A.weight as uint32",
        ),
        (dict.clear, "is not an adapter: nothing in it changes the model"),
    ],
)
def test_odd_tensors_are_named_with_their_file(
    model: OpenELM, tmp_path: Path, change: Callable[[dict[str, mx.array]], None], message: str
) -> None:
    folder = change_tensors(FIXTURES / "peft-lora", tmp_path / "a", change)
    with pytest.raises(RequestError, match=message) as caught:
        read_adapter(folder, model.config)
    assert str(folder / "adapter_model.safetensors") in str(caught.value)


def test_odd_files_of_mlx_lm_are_refused(model: OpenELM, tmp_path: Path) -> None:
    folder = write(uneven(model), tmp_path / "a", model)
    for number, (changes, message) in enumerate(
        [
            ({"fine_tune_type": "prefix"}, "unknown fine_tune_type 'prefix'; expected lora, dora or full"),
            ({"lora_parameters": {"rank": 8, "alpha": 16}}, "must have a scale that is a finite float32 number"),
            ({"lora_parameters": None}, "lora_parameters must have a scale"),
            ({"lora_parameters": {"scale": 10**400}}, "must have a scale that is a finite float32 number"),
            ({"lora_parameters": {"scale": 2.0, "dropout": -1}}, "dropout must be from 0 to 1, got -1"),
            (
                {"lora_parameters": {"rank": 8, "scale": float("inf")}},
                "must have a scale that is a finite float32 number",
            ),
            ({"fine_tune_type": "dora"}, "incomplete: .*transformer.layers.*.m is missing"),
            ({"fine_tune_type": "full"}, "contains transformer.* and 5 more, which the model has no place for"),
        ]
    ):
        with pytest.raises(RequestError, match=message):
            read_adapter(edit(folder, tmp_path / str(number), **changes), model.config)
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[:-100])
    with pytest.raises(RequestError, match=r"adapters.safetensors is damaged: .* is cut off"):
        read_adapter(folder, model.config)


@pytest.mark.parametrize("alpha", [8, 16.0, "16"])
def test_an_adapter_of_mlx_lm_with_alpha_and_scale_warns(
    model: OpenELM, mlx_folder: Path, tmp_path: Path, alpha: object
) -> None:
    """As in current mlx-lm, only scale is used."""
    attach_new(model, target_modules=["qkv_proj"], rank=8, scale=5.0)
    train(model)
    wanted = logits(model)
    folder = write(extract(model), tmp_path / "a", model)
    values = settings(folder)
    values["lora_parameters"]["alpha"] = alpha
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"has both alpha and scale; only scale 5 is used"):
        adapter = read_adapter(folder, model.config)
    attach(model, adapter)
    assert difference(logits(model), wanted) < 1e-5
    assert difference(logits(in_mlx_lm(mlx_folder, folder)), wanted) < 1e-4


def test_mlx_lm_settings_that_follow_from_the_tensors_may_be_missing(model: OpenELM, tmp_path: Path) -> None:
    """Rank and modules come from the tensors; old versions wrote `lora_layers`, and `use_dora` for the method."""
    attach_new(model, target_modules=["qkv_proj"], num_layers=3, rank=4, scale=3.0, dora=True)
    train(model)
    wanted = logits(model)
    folder = write(extract(model), tmp_path / "a", model)
    for number, values in enumerate(
        [
            {"fine_tune_type": "dora", "num_layers": -1, "lora_parameters": {"scale": 3.0}},
            {"fine_tune_type": "dora", "num_layers": 100, "lora_parameters": {"scale": 3.0, "rank": 9, "keys": ["x"]}},
            {"use_dora": True, "lora_layers": 3, "lora_parameters": {"scale": 3, "rank": 4, "dropout": 0.0}},
        ]
    ):
        place = edit(folder, tmp_path / str(number))
        (place / "adapter_config.json").write_text(json.dumps(values))
        attach(model, read_adapter(place, model.config))
        assert difference(logits(model), wanted) < 1e-5


def test_a_path_without_an_adapter_is_refused(model: OpenELM, tmp_path: Path) -> None:
    for place, message in {
        tmp_path: "has no adapter_config.json, so it is not an adapter",
        tmp_path / "nowhere": "There is no adapter '.*nowhere'",
        "nowhere": "There is no adapter 'nowhere': adapters are folders",
        "a/b/c": "There is no adapter",
        "": "There is no adapter ''",
        "owner/run.safetensors": "There is no adapter",
        FOLDER: "has no adapter_config.json",
        FIXTURES / "peft-lora" / "adapter_config.json": "adapter_config.json is not an adapter: give its folder",
    }.items():
        with pytest.raises(RequestError, match=message):
            read_adapter(place, model.config)
    folder = edit(FIXTURES / "peft-lora", tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(RequestError, match=r"has no adapter_model.safetensors; a pickled .* is never read: load"):
        read_adapter(folder, model.config)
    with pytest.raises(RequestError, match="states its own alpha"):
        read_adapter(FIXTURES / "peft-lora", model.config, alpha=3)
    with pytest.raises(RequestError, match="it has no revision 'x'"):
        read_adapter(FIXTURES / "peft-lora", model.config, revision="x")


def test_a_weights_file_may_be_given_instead_of_its_folder(model: OpenELM, tmp_path: Path) -> None:
    adapter = uneven(model)
    folder = write(adapter, tmp_path / "a", model)
    step = folder / "0000100_adapters.safetensors"
    (folder / "adapters.safetensors").rename(step)
    assert set(read_adapter(step, model.config).modules) == set(adapter.modules)
    with pytest.raises(RequestError, match=r"has no adapters.safetensors\."):
        read_adapter(folder, model.config)


def test_an_adapter_can_overwrite_the_files_it_was_read_from(model: OpenELM, tmp_path: Path) -> None:
    name = "transformer.layers.5.ffn.proj_2.weight"
    whole = Adapter(weights={name: normal(*model.config.tensor_shapes()[name], seed=4)})
    for number, adapter in enumerate((uneven(model), whole)):
        folder = write(adapter, tmp_path / str(number), model)
        file = str(folder / "adapters.safetensors")
        before = {name: np.array(value) for name, value in mx.load(file).items()}
        write_adapter(read_adapter(folder, model.config), folder, model.config)
        after = {name: np.array(value) for name, value in mx.load(file).items()}
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    folder = write(uneven(model), tmp_path / "low rank", model)
    adapter, file = read_adapter(folder, model.config), folder / "adapters.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert mx.array_equal(adapter.modules[QKV].a[:, :2], uneven(model).modules[QKV].a).item()


def test_hub_repositories(model: OpenELM, hub: FakeHub, expected: dict[str, np.ndarray]) -> None:
    hub.add("me/adapter", FIXTURES / "peft-lora")
    hub.add("me/model", FOLDER)
    attach(model, read_adapter("me/adapter", model.config))
    assert difference(logits(model), expected["peft-lora"]) < 5e-5
    with pytest.raises(RequestError):
        read_adapter("me/model", model.config)
    assert not any("model.safetensors" in path and "adapter" not in path for _, path in hub.requests)
    with pytest.raises(RequestError):
        read_adapter("me/nothing", model.config)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("format", ["mlx", "peft"])
def test_a_full_disk_is_an_error(model: OpenELM, tmp_path: Path, format: str) -> None:
    for name in ("adapters.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_adapter(uneven(model), tmp_path, model.config, format)


# CoreNet.


def corenet_state(model: OpenELM, adapter: Adapter, padding: int = 64) -> dict[str, Any]:
    """A checkpoint as CoreNet writes it: base and adapter under PEFT's inner names, the vocabulary padded."""
    torch = pytest.importorskip("torch")
    state = {name: np.array(value) for name, value in tree_flatten(model.parameters())}
    for path, change in adapter.modules.items():
        state[f"{path}.base_layer.weight"] = state.pop(f"{path}.weight")
        a, b = np.array(change.a.T), np.array(change.b.T)
        if path == EMBEDDING:
            state |= {f"{path}.lora_embedding_A.lora": a, f"{path}.lora_embedding_B.lora": b}
        else:
            state |= {f"{path}.lora_A.lora.weight": a, f"{path}.lora_B.lora.weight": b}
        if change.magnitude is not None:
            state[f"{path}.lora_magnitude_vector.lora"] = np.array(change.magnitude)
    for name, value in state.items():
        if name.startswith(EMBEDDING) and ROWS in value.shape:
            axis = value.shape.index(ROWS)
            widths = [(0, padding if n == axis else 0) for n in range(value.ndim)]
            state[name] = np.pad(value, widths, constant_values=7)
    ordered = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}
    return {name.removeprefix("transformer."): value for name, value in ordered.items()}


@pytest.mark.parametrize("dora", [False, True])
def test_corenets_adapters_are_read(model: OpenELM, tmp_path: Path, dora: bool) -> None:
    torch = pytest.importorskip("torch")
    magnitudes = dict.fromkeys((QKV, EMBEDDING))
    if dora:
        magnitudes = {QKV: 1 + normal(160, seed=1) / 9, EMBEDDING: 4 + normal(DIM, seed=2)}
    adapter = Adapter({path: low_rank(model, path, magnitude=m) for path, m in magnitudes.items()})
    padded = np.pad(np.array(model.transformer.token_embeddings.weight), ((0, 64), (0, 0)), constant_values=7)
    state = corenet_state(model, adapter)
    if dora:  # as since PEFT 0.12
        state["layers.0.attn.qkv_proj.lora_magnitude_vector.lora.weight"] = state.pop(
            "layers.0.attn.qkv_proj.lora_magnitude_vector.lora"
        )
    torch.save(state, tmp_path / "lora.pt")
    for alpha, scale in ((None, 1.0), (6.0, 2.0)):
        read = read_adapter(tmp_path / "lora.pt", model.config, alpha=alpha)
        assert set(read.modules) == {QKV, EMBEDDING}
        for path, change in read.modules.items():
            assert change.scale == scale
            assert np.array_equal(np.array(change.a), np.array(adapter.modules[path].a))
            assert np.array_equal(np.array(change.b), np.array(adapter.modules[path].b))
        attach(model, read)
        # The logits of the padded model for the tokens that exist.
        change = adapter.modules[EMBEDDING]
        table = padded + scale * np.pad(np.array(change.a), ((0, 64), (0, 0)), constant_values=7) @ np.array(change.b)
        if dora:
            table *= np.array(change.magnitude) / np.linalg.norm(table, axis=0)
        ids = [1, 500, ROWS - 1]
        assert difference(np.array(model.transformer.token_embeddings(mx.array(ids))), table[ids]) < 1e-4
        detach(model)


def test_corenets_base_is_not_read(model: OpenELM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    adapter = Adapter({path: low_rank(model, path) for path in (QKV, EMBEDDING)})
    torch.save({"model_state_dict": corenet_state(model, adapter), "epoch": 3}, tmp_path / "lora.pt")
    read_bytes = []
    plain = raw.tensors

    def counted(path: Path, spans: Mapping[str, raw.Span]) -> dict[str, Tensor]:
        def read(tensor: Tensor) -> mx.array:
            read_bytes.append(tensor.nbytes)
            return tensor.read()

        found = plain(path, spans)
        return {name: replace(tensor, read=partial(read, tensor)) for name, tensor in found.items()}

    monkeypatch.setattr(raw, "tensors", counted)
    read_adapter(tmp_path / "lora.pt", model.config)
    assert sum(read_bytes) == 4 * 3 * (192 + 160 + ROWS + 64 + DIM)


def test_odd_checkpoints_of_corenet_are_refused(model: OpenELM, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter = Adapter({path: low_rank(model, path) for path in (QKV, EMBEDDING)})
    state = corenet_state(model, adapter)
    a = "layers.0.attn.qkv_proj.lora_A.lora.weight"
    odd = [
        ({name: value for name, value in state.items() if ".lora_" not in name}, "does not have a LoRA"),
        ({name: value for name, value in state.items() if name != a}, f"incomplete: .*transformer.{a} is missing"),
        (state | {a: torch.zeros(3, 4)}, rf"transformer.{a} has shape \[3, 4\] instead of \[rank, 192\]"),
        (state | {a: torch.zeros(3, 192, dtype=torch.int32)}, "as int32"),
        (state | {"layers.0.attn.qkv_proj.lora_C.lora": torch.zeros(3)}, "lora_C.lora, which a CoreNet adapter"),
        (
            state | {"token_embeddings.lora_embedding_A.lora": torch.zeros(3, 2000)},
            "adapter for a vocabulary of 2000 tokens, but the model has 2048",
        ),
    ]
    for number, (values, message) in enumerate(odd):
        torch.save(values, tmp_path / f"{number}.pt")
        with pytest.raises(RequestError, match=message):
            read_adapter(tmp_path / f"{number}.pt", model.config)


# The commands.


def test_generate_and_perplexity_take_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_openelm.cli.main import main

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main([*args, "--model", str(FOLDER), "--dtype", "float32"])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return out

    odd = tmp_path / "a=0.5"  # a path may look like a weight
    shutil.copytree(FIXTURES / "peft-lora", odd)
    generate = ["generate", "--prompt", "To be or", "--max-tokens", "12", "--temp", "0"]
    plain, adapted = run(*generate), run(*generate, "--adapter-path", str(odd))
    assert plain != adapted
    assert run(*generate, "--adapter-path", f"{odd}=1.0") == adapted
    assert run(*generate, "--adapter-path", f"{odd}=0") == plain
    assert run(*generate, "--adapter-path", f"{odd}=0.5", "--adapter-path", f"{FIXTURES / 'peft-lora'}=0.5") == adapted

    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.\n" * 9)
    measure = ["perplexity", "--data", str(text), "--sequence-length", "64", "--json"]
    values = [json.loads(run(*measure, *more))["nll"] for more in ([], ["--adapter-path", str(odd)])]
    assert abs(values[0] - values[1]) > 0.01


def test_adapter_modules_are_not_imported_without_an_adapter() -> None:
    code = (
        "import sys\nfrom mlx_openelm.cli.main import main\n"
        "try: main(['generate', '--model', 'tiny', '--prompt', 'x', '--max-tokens', '2'])\n"
        "except SystemExit: print([name for name in sys.modules if 'adapter' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
