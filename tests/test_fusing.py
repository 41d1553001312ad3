"""Fusing adapters into models: reference logits, NumPy's sums, mlx-lm's adapters, packings, memory, refusals."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.adapters.attaching import attach
from mlx_openelm.adapters.files import read_adapter
from mlx_openelm.adapters.merging import merge
from mlx_openelm.adapters.switching import read_mixture
from mlx_openelm.config import EMBEDDING
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.evaluation.perplexity import kl_divergence
from mlx_openelm.evaluation.windows import load_documents, make_windows
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats.adapter import Adapter, LowRank
from mlx_openelm.formats.mlx import Checkpoint
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.jobs.fuse import Fusion, fuse
from mlx_openelm.loading import build_model
from mlx_openelm.ops.packed import PARTS
from mlx_openelm.quantization.recipes import planner

import mlx.core as mx
import numpy as np
import pytest
from quantization_models import FIXTURES, SHAKESPEARE, write_tiny

CORENET_LORA = Path(__file__).parents[2] / "shared" / "reference" / "shakespeare-corenet-lora.pt"
ADAPTERS = ("peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding")
MODES: dict[str, dict[str, Any]] = {
    "4 bits": {"q_bits": 4},
    "3 bits in groups of 32": {"q_bits": 3, "q_group_size": 32},
    "8 bits": {"q_bits": 8},
    "mxfp4": {"q_mode": "mxfp4"},
    "nvfp4": {"q_mode": "nvfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
    "mixed": {"recipe": "mixed_3_6"},
}
IDS = json.loads((FIXTURES / "shakespeare-reference.json").read_text())["ids"]


@pytest.fixture(scope="session")
def expected() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "adapters-reference.npz") as arrays:
        return dict(arrays)


def logits(model: Any, ids: list[int] = IDS[0]) -> np.ndarray:
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))


def tensors(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # type: ignore[return-value]


def same(left: mx.array, right: mx.array) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bool(mx.array_equal(left, right).item())


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


# The result's logits.


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_the_reference_here_and_in_mlx_lm(name: str, expected: Any, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    done = fuse(SHAKESPEARE, FIXTURES / name, tmp_path / "fused")
    ours, _ = load(tmp_path / "fused")
    theirs, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert np.abs(logits(ours) - expected[name]).max() < 1e-4
    assert np.abs(logits(theirs) - expected[name]).max() < 1e-4

    adapter = read_adapter(FIXTURES / name, ours.config)
    assert done.matrices.keys() == adapter.modules.keys()
    attached, _ = load(SHAKESPEARE)
    attach(attached, adapter)
    assert np.abs(logits(ours) - logits(attached)).max() < 2e-5
    assert (done.overall.relative_error, done.overall.kept, done.kl_divergence) == (0, pytest.approx(1), None)
    before, after = tensors(SHAKESPEARE), tensors(tmp_path / "fused")
    for tensor, value in before.items():
        assert same(value, after[tensor]) is (tensor.removesuffix(".weight") not in adapter.modules), tensor


@pytest.mark.skipif(not CORENET_LORA.is_file(), reason="needs CoreNet's adapter, which is not in the repository")
def test_corenets_adapter_gives_the_reference_logits(expected: Any, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    assert fuse(SHAKESPEARE, CORENET_LORA, tmp_path / "fused").untied
    for model, _ in (load(tmp_path / "fused"), mlx_lm.load(str(tmp_path / "fused"))):
        assert np.abs(logits(model) - expected["corenet-lora"]).max() < 1e-4


def test_an_embedding_adapted_on_the_input_side_alone_unties_the_head(tmp_path: Path) -> None:
    done = fuse(SHAKESPEARE, FIXTURES / "peft-lora-embedding", tmp_path / "fused")
    before, after = tensors(SHAKESPEARE), tensors(tmp_path / "fused")
    assert done.untied and after.keys() == before.keys() | {"lm_head.weight"}
    assert same(after["lm_head.weight"], before[f"{EMBEDDING}.weight"])
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["share_input_output_layers"] is False
    # The result is a base like any other, here one with an untied head already.
    again = fuse(tmp_path / "fused", FIXTURES / "peft-lora-embedding", tmp_path / "again")
    assert not again.untied and same(tensors(tmp_path / "again")["lm_head.weight"], after["lm_head.weight"])


def random_change(shape: tuple[int, int], rank: int, rng: Any, **changes: Any) -> LowRank:
    a, b = (mx.array(rng.normal(0, 0.2, size).astype(np.float32)) for size in ((shape[0], rank), (rank, shape[1])))
    return LowRank(a, b, **{"scale": 1.5} | changes)


def random_adapter(config: Any, seed: int = 0, *, dora: bool = False, output_side: bool = False) -> Adapter:
    """Ranks and scales that differ, on every matrix."""
    rng = np.random.default_rng(seed)
    modules = {}
    for number, (path, shape) in enumerate(config.matrix_shapes().items()):
        is_embedding = path == EMBEDDING
        sizes = shape if is_embedding else shape[::-1]
        length = sizes[0] if is_embedding and output_side else sizes[1]
        magnitude = mx.array(rng.uniform(0.5, 2, length).astype(np.float32)) if dora else None
        values = {"scale": 1 / (1 + number), "magnitude": magnitude, "output_side": is_embedding and output_side}
        modules[path] = random_change(sizes, 1 + number % 3, rng, **values)
    return Adapter(modules)


def in_numpy(weight: np.ndarray, change: LowRank, is_embedding: bool) -> np.ndarray:
    """A merged weight by definition, in float64."""
    product = change.scale * as_numpy(change.a) @ as_numpy(change.b)
    total = weight + (product if is_embedding else product.T)
    if change.magnitude is None:
        return total
    magnitude, by_column = as_numpy(change.magnitude), is_embedding and not change.output_side
    if by_column:
        return total * magnitude / np.sqrt((total**2).sum(axis=0))
    return total * (magnitude / np.sqrt((total**2).sum(axis=1)))[:, None]


@pytest.mark.covering
@pytest.mark.parametrize("output_side", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merged_weights_equal_numpys_in_one_chunk_or_several(dora: bool, output_side: bool, tmp_path: Path) -> None:
    """Chunks have a million values: the embedding has more, the other matrices fewer."""
    folder = write_tiny(tmp_path / "model", vocab_size=17000)
    base = mlx_format.read(folder)
    adapter = random_adapter(base.config, dora=dora, output_side=output_side)
    merged = merge(base, adapter)
    before, result = tensors(folder), merged.checkpoint.weights
    assert merged.untied is not output_side
    for path, change in adapter.modules.items():
        wanted = in_numpy(as_numpy(before[f"{path}.weight"]), change, path == EMBEDDING)
        assert np.abs(as_numpy(result.take(f"{path}.weight")) - wanted).max() < 1e-5, path
    assert sorted(result) == sorted(
        {name for name, value in before.items() if value.ndim == 1} | ({"lm_head.weight"} if not output_side else set())
    )


@pytest.mark.parametrize("dora", [False, True])
def test_the_result_computes_the_same_as_the_attached_adapter(dora: bool, tmp_path: Path) -> None:
    for output_side in (False, True):
        folder = write_tiny(tmp_path / f"model{output_side}")
        attached = build_model(mlx_format.read(folder), dtype="float32")
        adapter = random_adapter(attached.config, dora=dora, output_side=output_side)
        attach(attached, adapter)
        merged = merge(mlx_format.read(folder), adapter)
        fused = build_model(merged.checkpoint, dtype="float32")
        ids = [1, 5, 7, 1999, 3, 3]
        scale = np.abs(logits(attached, ids)).max()
        assert np.abs(logits(fused, ids) - logits(attached, ids)).max() < 2e-6 * max(scale, 10)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_lm_adapters_give_the_same_logits_fused(kind: str, tmp_path: Path) -> None:
    """Its embedding adapters change the output side too, so nothing is untied."""
    mlx_lm = pytest.importorskip("mlx_lm")
    folder, adapter = write_tiny(tmp_path / "model"), tmp_path / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(3)
    config = mlx_format.read_config(folder)[0]
    keys = ["attn.qkv_proj", "ffn.proj_1", "ffn.proj_2"]
    paths = [EMBEDDING, *(f"transformer.layers.{layer}.{key}" for layer in range(2) for key in keys)]
    saved = {}
    for path in paths:
        shape = config.matrix_shapes()[path]
        change = random_change(shape if path == EMBEDDING else shape[::-1], 4, rng)
        saved |= {f"{path}.lora_a": change.a, f"{path}.lora_b": change.b}
        if kind == "dora":
            saved[f"{path}.m"] = mx.array(rng.uniform(0.5, 2, shape[0]).astype(np.float32))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), saved)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": [EMBEDDING, *keys]}
    settings = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with_adapter, _ = mlx_lm.load(str(folder), adapter_path=str(adapter))
    done = fuse(folder, adapter, tmp_path / "fused")
    theirs, _ = mlx_lm.load(str(tmp_path / "fused"))
    wanted = logits(with_adapter, [1, 5, 7, 1999])
    assert not done.untied
    assert np.abs(logits(theirs, [1, 5, 7, 1999]) - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())


def test_full_fine_tuning_replaces_tensors_bit_for_bit(tmp_path: Path) -> None:
    base = mlx_format.read(SHAKESPEARE)
    names = ["transformer.norm.weight", "transformer.layers.2.ffn.proj_1.weight", f"{EMBEDDING}.weight"]
    new = {name: mx.random.normal(base.config.tensor_shapes()[name], key=mx.random.key(1)) for name in names}
    merged = merge(base, Adapter(weights=dict(new)))
    assert not merged.untied
    before = tensors(SHAKESPEARE)
    for name in list(merged.checkpoint.weights):
        assert same(merged.checkpoint.weights.take(name), new.get(name, before[name]))


def test_several_adapters_are_weighted(tmp_path: Path) -> None:
    weights = {FIXTURES / "peft-lora": 0.7, FIXTURES / "peft-rslora-attention": -0.3}
    fuse(SHAKESPEARE, weights, tmp_path / "mapping")
    typed = [f"{path}={weight}" for path, weight in weights.items()]
    fuse(SHAKESPEARE, typed, tmp_path / "typed")
    before, mixed = tensors(SHAKESPEARE), tensors(tmp_path / "mapping")
    assert all(same(value, mixed[name]) for name, value in tensors(tmp_path / "typed").items())
    config = mlx_format.read_config(SHAKESPEARE)[0]
    read = [(read_adapter(path, config), weight) for path, weight in weights.items()]
    for name, value in before.items():
        base = as_numpy(value)
        path, wanted = name.removesuffix(".weight"), base.copy()
        for adapter, weight in read:
            if path in adapter.modules:
                wanted += weight * (in_numpy(base, adapter.modules[path], path == EMBEDDING) - base)
        assert np.abs(as_numpy(mixed[name]) - wanted).max() < 1e-5
    attached, _ = load(SHAKESPEARE, adapter_path=weights)
    assert np.abs(logits(load(tmp_path / "mapping")[0]) - logits(attached)).max() < 2e-5
    # A path may contain the = sign.
    odd = shutil.copytree(FIXTURES / "peft-lora", tmp_path / "alpha=16")
    fuse(SHAKESPEARE, str(odd), tmp_path / "odd")
    fuse(SHAKESPEARE, f"{odd}=1", tmp_path / "odd-once")
    assert all(same(value, tensors(tmp_path / "odd-once")[name]) for name, value in tensors(tmp_path / "odd").items())


# How the result is stored.


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The trained checkpoint in one of `MODES`."""
    folder = tmp_path_factory.mktemp("packed")

    @functools.cache
    def of(mode: str) -> Path:
        convert(SHAKESPEARE, folder / mode, quantize=True, dtype="float32", **MODES[mode])
        return folder / mode

    return of


def unpack(folder: Path, path: str) -> mx.array:
    checkpoint = mlx_format.read(folder)
    names = {part: f"{path}.{part}" for part in PARTS}
    parts = {part: checkpoint.weights[name] for part, name in names.items() if name in checkpoint.weights}
    return checkpoint.quantization[path].unpack(parts, mx.float32)


@pytest.mark.parametrize(
    "mode", [pytest.param(m, marks=() if m in ("4 bits", "mxfp4") else pytest.mark.slow) for m in MODES]
)
def test_a_quantized_base_is_requantized_the_same_way(mode: str, packed: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    base, adapter_path = packed(mode), FIXTURES / "peft-lora-embedding"
    done = fuse(base, adapter_path, tmp_path / "fused")
    before, after = mlx_format.read(base), mlx_format.read(tmp_path / "fused")
    assert done.requantized and done.untied
    assert after.quantization == before.quantization | {"lm_head": before.quantization[EMBEDDING]}
    adapter = read_adapter(adapter_path, before.config)
    squares = np.zeros(4)
    for path, choice in before.quantization.items():
        parts = [part for part in PARTS if f"{path}.{part}" in before.weights]
        if path == EMBEDDING:
            assert all(same(before.weights[f"{path}.{part}"], after.weights[f"lm_head.{part}"]) for part in parts)
        if path not in adapter.modules:
            assert all(same(before.weights[f"{path}.{part}"], after.weights[f"{path}.{part}"]) for part in parts)
            continue
        old = as_numpy(unpack(base, path))
        wanted = in_numpy(old, adapter.modules[path], path == EMBEDDING)
        found = as_numpy(unpack(tmp_path / "fused", path))
        fresh = choice.unpack(choice.pack(mx.array(wanted.astype(np.float32))), mx.float32)
        if choice.mode == "affine":
            # On a group's old grid or a new one, whichever is nearer.
            grouped = (wanted.shape[0], -1, choice.group_size)
            errors = [(((values - wanted) ** 2).reshape(grouped)).sum(axis=-1) for values in (found, as_numpy(fresh))]
            assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-9).all()
        else:
            assert np.mean(as_numpy(fresh) == found) > 0.999
        change, error = wanted - old, found - wanted
        squares += [(change**2).sum(), (error**2).sum(), (wanted**2).sum(), ((found - old) * change).sum()]
        deviation = done.matrices[path]
        assert deviation.relative_change == pytest.approx(np.sqrt((change**2).sum() / (old**2).sum()), rel=1e-3)
        assert deviation.relative_error == pytest.approx(np.sqrt((error**2).sum() / (wanted**2).sum()), rel=1e-3)
        assert deviation.kept == pytest.approx(((found - old) * change).sum() / (change**2).sum(), rel=1e-3)
    assert done.overall.relative_error == pytest.approx(np.sqrt(squares[1] / squares[2]), rel=1e-3)
    assert done.overall.kept == pytest.approx(squares[3] / squares[0], rel=1e-3)

    from test_mlx_lm import assert_equal_logits

    assert_equal_logits(tmp_path / "fused")


@pytest.mark.parametrize("mode", ["4 bits", "mxfp4", "mixed"])
def test_dequantized_results_compute_the_same_as_the_adapter_on_the_packed_base(
    mode: str, packed: Callable[[str], Path], tmp_path: Path
) -> None:
    done = fuse(packed(mode), FIXTURES / "peft-lora-embedding", tmp_path / "full", dequantize=True)
    assert not mlx_format.read(tmp_path / "full").quantization and not done.requantized
    assert done.bits_per_weight == 32 and done.overall.relative_error == 0
    attached, _ = load(packed(mode), exact_activations=True)
    attach(attached, read_adapter(FIXTURES / "peft-lora-embedding", attached.config))
    assert np.abs(logits(load(tmp_path / "full")[0]) - logits(attached)).max() < 1e-4
    assert "no more precise than that" in (tmp_path / "full" / "README.md").read_text()


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_matrix_that_does_not_change_has_the_same_values(mode: str, tmp_path: Path) -> None:
    """With a zero adapter affine parts are bit-identical, in other modes apart from the sign of zeros."""
    convert(write_tiny(tmp_path / "model"), tmp_path / "packed", quantize=True, dtype="float32", **MODES[mode])
    path, base = "transformer.layers.1.ffn.proj_1", mlx_format.read(tmp_path / "packed")
    outputs, inputs = base.config.matrix_shapes()[path]
    old = {part: base.weights[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in base.weights}
    choice = base.quantization[path]
    merged = merge(base, Adapter({path: LowRank(mx.zeros((inputs, 1)), mx.zeros((1, outputs)), 1.0)}))
    new = {part: merged.checkpoint.weights.take(f"{path}.{part}") for part in old}
    if choice.mode == "affine":
        assert all(same(old[part], new[part]) for part in old)
    if choice.mode != "nvfp4":  # whose scales are rounded twice
        assert mx.array_equal(choice.unpack(new, mx.float32), choice.unpack(old, mx.float32)).item()
        assert (merged.deviations[path].relative_error, merged.deviations[path].kept) == (0, 1)


def test_requantizing_a_small_change_costs_at_most_the_change(packed: Callable[[str], Path], tmp_path: Path) -> None:
    done = fuse(packed("4 bits"), {FIXTURES / "peft-lora": 0.1}, tmp_path / "fused")
    assert 0 < done.overall.relative_error <= done.overall.relative_change * 1.001


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The trained checkpoint with an adapter added, not quantized, in one dtype."""
    folder = tmp_path_factory.mktemp("fused")

    @functools.cache
    def of(dtype: str) -> Path:
        fuse(SHAKESPEARE, FIXTURES / "peft-lora-embedding", folder / dtype, dtype=dtype)
        return folder / dtype

    return of


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("float32", {}),
        ("float16", {}),
        ("float32", {"q_bits": 8, "q_group_size": 32}),
        ("float32", {"q_mode": "mxfp8"}),
        pytest.param("float32", {"q_mode": "nvfp4"}, marks=pytest.mark.slow),
        ("float32", {"recipe": "mixed_3_6"}),
    ],
)
def test_quantizing_while_fusing_equals_fusing_and_then_quantizing(
    dtype: str, flags: dict[str, Any], fused: Callable[[str], Path], tmp_path: Path
) -> None:
    name = FIXTURES / "peft-lora-embedding"
    at_once = fuse(SHAKESPEARE, name, tmp_path / "at once", dtype=dtype, quantize=True, **flags)
    later = convert(fused(dtype), tmp_path / "later", dtype=dtype, quantize=True, **flags)
    assert (at_once.bits_per_weight, at_once.exceptions) == (later.bits_per_weight, later.exceptions)
    ours, theirs = mlx_format.read(tmp_path / "at once"), mlx_format.read(tmp_path / "later")
    assert (ours.quantization, ours.config) == (theirs.quantization, theirs.config)
    assert set(ours.weights) == set(theirs.weights)
    assert all(same(ours.weights[name], theirs.weights[name]) for name in ours.weights)
    assert at_once.overall.relative_error > 0 and not at_once.requantized


@pytest.mark.parametrize(
    "stored", ["bfloat16", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("float16", "float32"))]
)
def test_dtypes_are_those_of_the_base_by_default(stored: str, tmp_path: Path) -> None:
    convert(SHAKESPEARE, tmp_path / "base", dtype=stored)
    fuse(tmp_path / "base", FIXTURES / "peft-lora", tmp_path / "fused")
    fuse(tmp_path / "base", FIXTURES / "peft-lora", tmp_path / "exact", dtype="float32")
    exact, kind = tensors(tmp_path / "exact"), getattr(mx, stored)
    for name, value in tensors(tmp_path / "fused").items():
        assert exact[name].dtype == mx.float32
        assert same(value, exact[name].astype(kind)), name


@pytest.mark.parametrize("scales", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16", "float32"])
def test_scales_keep_their_dtype(scales: str, tmp_path: Path) -> None:
    """mlx-lm writes 32-bit scales for a float32 model."""
    convert(SHAKESPEARE, tmp_path / "base", dtype=scales, quantize=True)
    if scales == "float32":
        stored = tensors(tmp_path / "base").items()
        wide = {name: value.astype(mx.float32) if value.dtype == mx.bfloat16 else value for name, value in stored}
        mx.save_safetensors(str(tmp_path / "base" / "model.safetensors"), wide)
    fuse(tmp_path / "base", FIXTURES / "peft-lora", tmp_path / "fused")
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "fused")
    assert {name: value.dtype for name, value in after.items()} == {name: v.dtype for name, v in before.items()}
    assert mlx_format.read(tmp_path / "fused").dtype == getattr(mx, scales)


# The report.


def test_the_report_has_the_divergence_from_the_adapter_on_the_base(
    packed: Callable[[str], Path], tmp_path: Path
) -> None:
    text = tmp_path / "play.txt"
    text.write_text("\n".join(load_documents(FIXTURES / "valid.jsonl"))[:1300])
    adapters = {str(FIXTURES / "peft-lora"): 0.9, str(FIXTURES / "peft-rslora-attention"): 0.5}
    done = fuse(packed("3 bits in groups of 32"), adapters, tmp_path / "fused", report=True, report_data=str(text))
    attached, tokenizer = load(packed("3 bits in groups of 32"))
    windows = make_windows(tokenizer, load_documents(text), 512)
    assert 0 < len(windows) < 9  # so that all of them are read
    base, _ = load(packed("3 bits in groups of 32"))
    attach(attached, read_mixture(adapters, attached.config))
    fused, _ = load(tmp_path / "fused")
    assert done.kl_divergence == pytest.approx(kl_divergence(attached, fused, windows), rel=1e-3)
    assert done.base_kl_divergence == pytest.approx(kl_divergence(attached, base, windows), rel=1e-3)
    assert 0 < done.kl_divergence < done.base_kl_divergence


def test_requantizing_undoes_changes_smaller_than_its_steps(packed: Callable[[str], Path], tmp_path: Path) -> None:
    """A weak adapter is mostly lost in few bits, unless the result is dequantized or the base was not quantized."""
    weak = {FIXTURES / "peft-lora": 0.1}
    lost = fuse(packed("4 bits"), weak, tmp_path / "lost")
    full = fuse(packed("4 bits"), weak, tmp_path / "full", dequantize=True)
    original = fuse(SHAKESPEARE, weak, tmp_path / "original", quantize=True)
    assert lost.overall.kept < 0.3
    assert full.overall.kept == pytest.approx(1, abs=1e-4)
    assert original.overall.kept == pytest.approx(1, abs=0.05)


def test_the_card_names_adapter_and_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import metadata_load

    base = shutil.copytree(SHAKESPEARE, tmp_path / "base")
    front = "license: other\nlicense_name: plays\nlicense_link: LICENSE\nbase_model: them/plays\nlibrary_name: mlx\n"
    (base / "README.md").write_text(f"---\n{front}---\n# Plays\n")
    (base / "LICENSE").write_text("Do as you like it.")
    paths = [str(FIXTURES / "peft-rslora-attention"), f"{FIXTURES / 'peft-lora'}=0.5"]
    fuse(base, paths, tmp_path / "fused", quantize=True)
    card = metadata_load(tmp_path / "fused" / "README.md")
    assert card is not None
    assert (card["base_model"], card["base_model_relation"]) == ("them/plays", "finetune")
    assert (card["license_name"], (tmp_path / "fused" / "LICENSE").read_text()) == ("plays", "Do as you like it.")
    text = (tmp_path / "fused" / "README.md").read_text()
    assert "fuse --model base --adapter-path peft-rslora-attention --adapter-path peft-lora=0.5 --save-path fused" in (
        " ".join(text.split())
    )
    assert (
        "Fused into the base: the LoRA adapter `peft-rslora-attention` (rank 4, on 6 matrices); "
        "the LoRA adapter `peft-lora`, 0.5 times (rank 8, on 24 matrices)." in text
    )
    assert str(tmp_path) not in text and str(FIXTURES) not in text
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "peft-lora", tmp_path / "clients" / "acme")
    fuse(base, "clients/acme=0.5", tmp_path / "weighed")
    assert "clients" not in (tmp_path / "weighed" / "README.md").read_text()
    # A conversion of the result still derives from that base.
    convert(tmp_path / "fused", tmp_path / "again", dequantize=True)
    card = metadata_load(tmp_path / "again" / "README.md")
    assert card is not None and (card["base_model"], card["base_model_relation"]) == ("them/plays", "finetune")


def test_a_merge_stays_a_merge_when_adapters_are_fused_into_it(tmp_path: Path) -> None:
    from huggingface_hub import metadata_load

    base = shutil.copytree(SHAKESPEARE, tmp_path / "base")
    (base / "README.md").write_text("---\nbase_model: [them/plays, me/poems]\nbase_model_relation: merge\n---\n")
    fuse(base, FIXTURES / "peft-lora", tmp_path / "fused")
    card = metadata_load(tmp_path / "fused" / "README.md")
    assert card is not None
    assert (card["base_model"], card["base_model_relation"]) == (["them/plays", "me/poems"], "merge")


def test_the_card_does_not_give_the_result_the_packaged_models_name(tmp_path: Path) -> None:
    config = load("tiny")[0].config
    merged_in = tmp_path / "adapter"
    merged_in.mkdir()
    path = "transformer.layers.0.attn.qkv_proj"
    outputs, inputs = config.matrix_shapes()[path]
    saved = {f"{path}.lora_a": mx.zeros((inputs, 2)), f"{path}.lora_b": mx.zeros((2, outputs))}
    mx.save_safetensors(str(merged_in / "adapters.safetensors"), saved)
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": [path]}
    settings = {"fine_tune_type": "lora", "num_layers": 6, "lora_parameters": parameters}
    (merged_in / "adapter_config.json").write_text(json.dumps(settings))
    fuse("tiny", merged_in, tmp_path / "fused")
    text = (tmp_path / "fused" / "README.md").read_text()
    assert "an OpenELM model (tiny, fine-tuned)" in text and "license: mit" in text
    assert "small model inside mlx-openelm" not in text


# Memory.


@pytest.mark.slow
def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """In a separate process, so that nothing else counts in the peak."""
    code = """
import sys, json
from pathlib import Path
import mlx_openelm
from mlx_openelm.adapters import merged_tensors
from mlx_openelm.config import EMBEDDING, ModelConfig
from mlx_openelm.formats.adapter import Adapter, LowRank
from mlx_openelm.jobs import fuse
from mlx_openelm.jobs.convert import convert
import mlx.core as mx
mx.set_default_device(mx.cpu)
merged_tensors.PIECE = 1 << 18
model, out, tokenizer = map(Path, sys.argv[1:])
model.mkdir()
config = ModelConfig(num_transformer_layers=4, model_dim=512, head_dim=64, vocab_size=12000, num_query_heads=8,
                     num_kv_heads=2, ffn_multipliers=(4.0,) * 2, share_input_output_layers=True)
shapes = config.tensor_shapes()
mx.save_safetensors(str(model / "model.safetensors"), {n: mx.random.normal(s) for n, s in shapes.items()})
(model / "config.json").write_text(json.dumps(config.to_dict()))
convert(model, out / "q4", quantize=True, tokenizer=tokenizer)
def adapter(dora):
    rank, made = 4, {}
    for path, (rows, columns) in config.matrix_shapes().items():
        a, b = (rows, columns) if path == EMBEDDING else (columns, rows)
        m = mx.ones(b) if dora else None
        made[path] = LowRank(mx.random.normal((a, rank)), mx.random.normal((rank, b)), 0.1, m)
    return Adapter(made)
result = {"model": 4 * config.num_parameters, "largest": 4 * 12000 * 512}
for name, (base, dora, options) in {
    "lora": (model, False, {}), "dora": (model, True, {"dtype": "bfloat16"}),
    "packed": (out / "q4", True, {}), "q": (model, False, {"quantize": True}),
}.items():
    made = adapter(dora)
    mx.eval([[c.a, c.b] for c in made.modules.values()])
    fuse.read_adapter = lambda *_: made
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fuse.fuse(base, "adapter", out / name, tokenizer=tokenizer, **options)
    result[name] = mx.get_peak_memory() - before
print(json.dumps(result))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out"), str(SHAKESPEARE)]
    (tmp_path / "out").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout.splitlines()[-1])
    largest = peaks.pop("largest")
    assert peaks.pop("model") > 2.8 * largest
    for name, peak in peaks.items():
        # The base's matrix, the new one, and temporary arrays for a chunk (1 MB each).
        assert peak <= 2.1 * largest + 10e6, (name, peak / largest)


# Refusals.


def test_a_quantized_base_can_be_stored_in_another_packing(packed: Callable[[str], Path], tmp_path: Path) -> None:
    base = packed("4 bits")
    fuse(base, FIXTURES / "peft-rslora-attention", tmp_path / "full", dequantize=True, dtype="float32")
    with pytest.warns(UserWarning, match="already quantized to 4 bits, so with quantize it is rounded twice"):
        fuse(base, FIXTURES / "peft-rslora-attention", tmp_path / "fused", quantize=True, q_bits=8)
    model, _ = load(tmp_path / "fused")
    # Matrices that the adapter does not change are requantized too.
    assert {choice.bits for choice in model.quantization.values()} == {8}
    assert len(model.quantization) == len(planner(bits=8)(model.config)[0])
    difference = np.abs(logits(model) - logits(load(tmp_path / "full")[0]))
    assert difference.max() < 0.5 and difference.mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": True, "dequantize": True}, "Choose either quantize or dequantize"),
        ({"q_bits": 4}, "needs quantize"),
        ({"recipe": "mixed_3_6"}, "needs quantize"),
        ({"quantize": True, "q_bits": 7}, "q_bits must be"),
        ({"dequantize": True}, "The model is not quantized, so there is nothing to dequantize"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"report_data": "a.txt"}, "report_data needs report"),
        ({"report": True, "report_data": "absent.txt"}, "report_data must name a file"),
        ({"adapter_path": []}, "adapter_path is empty"),
        ({"adapter_path": "peft-lora=nan"}, "The weight of the adapter peft-lora must be a number"),
        (
            {"adapter_path": ["peft-lora", "peft-dora=0.5"]},
            "The adapter peft-dora is DoRA, which can only be used alone",
        ),
        ({"adapter_path": "absent"}, "absent"),
        ({"save_path": "exists"}, "exists; choose another save_path, or replace it with overwrite=True"),
        ({"model": "model", "save_path": "model", "overwrite": True}, "is the model to fuse, or contains it"),
        ({"adapter_path": "exists", "save_path": "exists", "overwrite": True}, "is the adapter exists to fuse"),
        ({"model": "other"}, "which the model does not have|made for another model"),
    ],
)
def test_invalid_requests_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SHAKESPEARE, "model")
    for name in ("peft-lora", "peft-dora"):
        shutil.copytree(FIXTURES / name, name)
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "config.json").write_text("{}")
    if changes.get("model") == "other":
        write_tiny(tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    request: dict[str, Any] = {"model": "model", "adapter_path": "peft-lora", "save_path": "fused"}
    with pytest.raises(RequestError, match=message):
        fuse(**request | changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_base_that_changes_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    base = shutil.copytree(SHAKESPEARE, tmp_path / "base")

    def progress(stage: str, done: int, total: int) -> None:
        (base / "model.safetensors").touch()

    with pytest.raises(OpenELMError, match="was changed while it was being read"):
        fuse(base, FIXTURES / "peft-lora", tmp_path / "fused", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_existing_model_is_replaced_if_requested(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    for name in ("peft-lora", "peft-dora"):
        done = fuse(
            SHAKESPEARE, FIXTURES / name, tmp_path / "fused", overwrite=True, progress=lambda *a: stages.append(a)
        )
    assert isinstance(done, Fusion) and len(done.matrices) == 18
    assert stages[-1][0] == "Writing" and stages[-1][1] == stages[-1][2] > 9_000_000


def test_a_base_in_mixed_bits_keeps_the_bits_of_each_matrix(tmp_path: Path) -> None:
    """One matrix in eight bits, one full, the others in three."""
    source = mlx_format.read(SHAKESPEARE)
    choices = planner(bits=3)(source.config)[0]
    paths = list(choices)
    choices[paths[2]] = planner(bits=8)(source.config)[0][paths[2]]
    del choices[paths[3]]
    convert(SHAKESPEARE, tmp_path / "base", dtype="float32")
    mlx_format.write(tmp_path / "base", Checkpoint(source.config, quantize_weights(source.weights, choices), choices))
    fuse(tmp_path / "base", FIXTURES / "peft-lora", tmp_path / "fused")
    assert mlx_format.read(tmp_path / "fused").quantization == choices
