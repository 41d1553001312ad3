"""The mean of checkpoints, against NumPy's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_openelm import convert, load
from mlx_openelm.cli.main import main
from mlx_openelm.config import ModelConfig
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.jobs.average import average

import mlx.core as mx
import numpy as np
import pytest

FOLDER = Path(__file__).parent / "fixtures" / "shakespeare-hf"
CONFIG: dict[str, Any] = {
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 16,
    "vocab_size": 2048,
    "num_query_heads": [2, 4],
    "num_kv_heads": [1, 2],
    "ffn_multipliers": [1, 2],
    "ffn_dim_divisor": 32,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
}


def write(folder: Path, seed: int, dtype: str = "float32", **changes: Any) -> dict[str, np.ndarray]:
    """A model of random weights; returns them as float32, rounded as they are stored."""
    folder.mkdir()
    values = CONFIG | changes
    (folder / "config.json").write_text(json.dumps(values))
    rng = np.random.default_rng(seed)
    shapes = ModelConfig.from_dict(values).tensor_shapes()
    stored = {
        n: mx.array(rng.standard_normal(s).astype(np.float32)).astype(getattr(mx, dtype)) for n, s in shapes.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), stored)
    shutil.copy(FOLDER / "tokenizer.model", folder / "tokenizer.model")
    return {name: np.array(value.astype(mx.float32)) for name, value in stored.items()}


def written(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_mean(tmp_path: Path, count: int) -> None:
    models = [write(tmp_path / str(seed), seed) for seed in range(count)]
    assert average([tmp_path / str(seed) for seed in range(count)], tmp_path / "out") == tmp_path / "out"
    found = written(tmp_path / "out")
    assert found.keys() == models[0].keys()
    for name, value in found.items():
        assert value.dtype == mx.float32
        expected = np.mean([model[name].astype(np.float64) for model in models], axis=0)
        assert np.abs(np.array(value) - expected).max() < 1e-6
    assert load(tmp_path / "out")[1].vocab_size == 2048


def test_the_mean_of_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    models = [write(tmp_path / str(seed), seed, "bfloat16") for seed in range(3)]
    average([tmp_path / str(seed) for seed in range(3)], tmp_path / "out", dtype="float32")
    for name, value in written(tmp_path / "out").items():
        # Sums in bfloat16 would be off by 1%.
        assert np.abs(np.array(value) - np.mean([model[name] for model in models], axis=0)).max() < 1e-6


@pytest.mark.parametrize(
    ("kinds", "requested", "expected"),
    [
        (("bfloat16", "bfloat16"), None, "bfloat16"),
        (("float16", "bfloat16"), None, "float32"),
        (("float32", "bfloat16"), None, "float32"),
        (("float32", "float32"), "float16", "float16"),
    ],
)
def test_the_dtype_of_the_mean(tmp_path: Path, kinds: tuple[str, str], requested: str | None, expected: str) -> None:
    for number, kind in enumerate(kinds):
        write(tmp_path / str(number), number, kind)
    average([tmp_path / "0", tmp_path / "1"], tmp_path / "out", dtype=requested)
    assert {str(value.dtype) for value in written(tmp_path / "out").values()} == {f"mlx.core.{expected}"}


def test_one_model_given_twice_counts_twice(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    average([tmp_path / "a", tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    for name, value in written(tmp_path / "out").items():
        assert np.abs(np.array(value) - (2 * a[name].astype(np.float64) + b[name]) / 3).max() < 1e-6


def test_checkpoints_of_several_formats(tmp_path: Path) -> None:
    """CoreNet's, with a padded vocabulary, and a folder."""
    torch = pytest.importorskip("torch")
    import yaml

    a, b = write(tmp_path / "a", 0, num_gqa_groups=2), write(tmp_path / "b", 1)
    padded = {name.removeprefix("transformer."): torch.from_numpy(value) for name, value in b.items()}
    embedding = padded["token_embeddings.weight"]
    padded["token_embeddings.weight"] = torch.cat([embedding, torch.ones(64, 64)])
    torch.save(padded, tmp_path / "b.pt")
    section = {key: value for key, value in CONFIG.items()} | {"model_name": "b", "vocab_size": 2112}
    config = {"model": {"language_modeling": {"general_gpt": section}}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    average(
        [tmp_path / "a", tmp_path / "b.pt"],
        tmp_path / "out",
        config_yaml=tmp_path / "run.yaml",
        tokenizer=FOLDER / "tokenizer.model",
    )
    for name, value in written(tmp_path / "out").items():
        assert np.abs(np.array(value) - (a[name].astype(np.float64) + b[name]) / 2).max() < 1e-6


def test_models_that_cannot_be_averaged_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", 0)
    write(tmp_path / "wide", 1, model_dim=96)
    write(tmp_path / "deep", 1, num_transformer_layers=3, num_query_heads=2, num_kv_heads=1, ffn_multipliers=1)
    write(tmp_path / "relu", 1, activation_fn_name="relu")
    convert(tmp_path / "a", tmp_path / "packed", quantize=True)
    before = sorted(tmp_path.iterdir())
    for models, words in (
        ([], "at least two"),
        (["a"], "at least two"),
        (["a", "wide"], "such as transformer.token_embeddings.weight .2048 x 64 and 2048 x 96"),
        (["a", "deep"], "have different shapes"),
        (["a", "relu"], "activation_fn_name: swish and relu"),
        (["a", "packed"], "packed is quantized to 4 bits.*convert --dequantize"),
        (["a", "absent"], "absent does not exist"),
    ):
        with pytest.raises(RequestError, match=words):
            average([tmp_path / model for model in models], tmp_path / "out")
    with pytest.raises(RequestError, match="dtype must be one of"):
        average([tmp_path / "a", tmp_path / "a"], tmp_path / "out", dtype="int8")
    with pytest.raises(RequestError, match="is one of the models to average"):
        average([tmp_path / "a", tmp_path / "a"], tmp_path / "a", overwrite=True)
    with pytest.raises(RequestError, match="overwrite=True"):
        average([tmp_path / "a", tmp_path / "a"], tmp_path / "wide")
    assert sorted(tmp_path.iterdir()) == before


def test_averaging_stops_if_any_source_changes(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / str(number), number)

    def progress(written: int, total: int) -> None:
        (tmp_path / "2" / "model.safetensors").touch()

    with pytest.raises(OpenELMError, match="2/model.safetensors was changed"):
        average([tmp_path / str(number) for number in range(3)], tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    models = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(SystemExit) as stop:
        main(["average", *models, "--mlx-path", str(tmp_path / "out"), "--dtype", "float32", "--json"])
    assert stop.value.code == 0
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert json.loads(capfd.readouterr().out) == {"models": models, "mlx_path": str(tmp_path / "out"), "size": size}
    name = "transformer.layers.1.ffn.proj_2.weight"
    assert np.abs(np.array(written(tmp_path / "out")[name]) - (a[name] + b[name]) / 2).max() < 1e-6
    with pytest.raises(SystemExit) as stop:
        main(["average", models[0], "--mlx-path", str(tmp_path / "out"), models[1], "--overwrite"])
    assert stop.value.code == 0
    assert capfd.readouterr().out.startswith(f"Wrote {tmp_path / 'out'}: the mean of 2 checkpoints, ")
    with pytest.raises(SystemExit) as stop:
        main(["average"])
    assert stop.value.code == 2
    assert capfd.readouterr().err.startswith("error: MODEL is missing")


def card(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    return metadata_load(folder / "README.md")


def test_the_card_names_every_model_and_keeps_a_license_they_share(tmp_path: Path) -> None:
    for number, (base, terms) in enumerate([("them/one", "mit"), ("them/two", "mit"), ("them/two", "apple-amlr")]):
        write(tmp_path / f"model{number}", number)
        front = f"license: other\nlicense_name: {terms}\nlicense_link: LICENSE\nlanguage: en\n"
        front += f"base_model: {base}\nlibrary_name: mlx\n"
        (tmp_path / f"model{number}" / "README.md").write_text(f"---\n{front}---\n# A model\n")
        (tmp_path / f"model{number}" / "LICENSE").write_text(terms)
    average([tmp_path / "model0", tmp_path / "model1"], tmp_path / "alike")
    facts = card(tmp_path / "alike")
    assert (facts["base_model"], facts["base_model_relation"]) == (["them/one", "them/two"], "merge")
    assert [facts[key] for key in ("license_name", "license_link", "language")] == ["mit", "LICENSE", "en"]
    assert (tmp_path / "alike" / "LICENSE").read_text() == "mit"
    text = (tmp_path / "alike" / "README.md").read_text()
    assert "mlx-openelm average model0 model1 --mlx-path alike" in text
    assert str(tmp_path) not in text

    average([tmp_path / "model1", tmp_path / "model2"], tmp_path / "unlike")
    facts = card(tmp_path / "unlike")
    assert (facts["base_model"], facts["language"]) == ("them/two", "en")
    assert (
        not {"license", "license_name", "license_link"} & set(facts) and not (tmp_path / "unlike" / "LICENSE").exists()
    )


def test_the_card_of_unknown_models_names_no_base(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 0)
    average([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert "base_model" not in card(tmp_path / "out")
    assert "an OpenELM model (the mean of a, b)" in (tmp_path / "out" / "README.md").read_text()
