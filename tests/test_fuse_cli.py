"""The `fuse` command: its output, uploads and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mlx_openelm import convert
from mlx_openelm.adapters.merging import Deviation
from mlx_openelm.cli.main import main
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.jobs.fuse import Fusion, fuse

import pytest
from fake_hub import FakeHub
from quantization_models import FIXTURES, SHAKESPEARE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and adapters: one with a large effect, one that unties the head."""
    shutil.copytree(SHAKESPEARE, tmp_path / "model")
    for name, adapter in {"adapters": "peft-lora", "embedding": "peft-lora-embedding"}.items():
        shutil.copytree(FIXTURES / adapter, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args: object) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["fuse", *map(str, args)])
    return stop.value.code


def test_the_written_files_are_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "model") == 0
    lines, warnings = capfd.readouterr()
    size = sum(path.stat().st_size for path in (folder / "fused_model").iterdir()) / 1e6
    assert lines.splitlines() == [
        f"Wrote fused_model: 32.00 bits per weight, {size:.1f} MB",
        "  24 tensors changed by 16.11% (root mean square)",
    ]
    assert "warning" not in warnings  # on a busy machine it reports progress


def test_json_has_the_values_of_the_python_function(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert("model", "packed", quantize=True, q_bits=8)
    assert run("--model", "packed", "--adapter-path", "embedding", "--save-path", "fused", "--json") == 0
    values: dict[str, Any] = json.loads(capfd.readouterr().out)
    done = fuse("packed", "embedding", "again")
    assert values["save_path"] == str(folder / "fused") and values["adapter_path"] == ["embedding"]
    assert (values["untied"], values["requantized"], values["exceptions"]) == (True, True, {})
    assert values["bits_per_weight"] == pytest.approx(done.bits_per_weight)
    assert values["error"] == pytest.approx(done.overall.relative_error) and 0.005 < values["error"] < 0.01
    assert (values["change"], values["kept"]) == (done.overall.relative_change, done.overall.kept)
    path = "transformer.layers.3.attn.qkv_proj"
    assert values["matrices"].keys() == done.matrices.keys()
    assert values["matrices"][path]["error"] == pytest.approx(done.matrices[path].relative_error)
    assert "kl_divergence" not in values and "upload" not in values


def test_the_cost_of_requantizing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "text.txt").write_text((SHAKESPEARE / "config.json").read_text())
    convert("model", "packed", quantize=True)
    assert run("--model", "packed", "--adapter-path", "embedding", "--report", "--report-data", "text.txt") == 0
    lines, warnings = capfd.readouterr()
    assert "packing them again costs an error of " in lines and "of the change" in lines
    assert "KL divergence from the base with the adapter: 0." in lines and "(of the base without it: " in lines
    assert "the output layer is now separate (lm_head)" in lines
    assert "warning" not in warnings  # on a busy machine it reports progress

    weak = ("--model", "packed", "--adapter-path", "adapters=0.1", "--overwrite")
    assert run(*weak) == 0
    assert "warning: Rounding undid most of the adapter's change. Use --dequantize" in capfd.readouterr().err
    assert run(*weak, "--dequantize") == 0
    assert "warning" not in capfd.readouterr().err
    assert not mlx_format.read(folder / "fused_model").quantization


def test_a_dtype_for_weights_that_stay_packed_warns(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert("model", "packed", quantize=True)
    words = ("--model", "packed", "--dtype", "float16", "--overwrite")
    assert run(*words) == 0
    printed = capfd.readouterr().err
    assert (
        "warning: The matrices stay packed in 4 bits" in printed and "--dequantize gives float16 throughout." in printed
    )
    assert run(*words, "--dequantize") == 0
    assert "packed in" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("divergences", "requantized", "advice"),
    [((0.3, 0.2), True, "with more bits or --dequantize."), ((0.3, 0.2), False, "with more bits."),
     ((0.2, 0.3), True, None)],
)  # fmt: skip
def test_a_result_further_away_than_the_base_warns(
    divergences: tuple[float, float],
    requantized: bool,
    advice: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    done = Fusion(tmp_path, 4.5, {}, Deviation(), {}, False, requantized, *divergences)
    monkeypatch.setattr("mlx_openelm.cli.fuse.fuse", lambda *_, **__: done)
    assert run("--report") == 0
    printed = capfd.readouterr().err
    further = f"The result is further from the base with the adapter than the base alone is; fuse {advice}\n"
    assert printed == (f"warning: {further}" if advice else "")


def test_adapters_are_mixed_and_the_result_quantized(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURES / "peft-rslora-attention", folder / "other")
    flags = ("--adapter-path", "adapters=0.75", "--adapter-path", "other=0.25", "-q", "--recipe", "mixed_3_6")
    assert run("--model", "model", "--save-path", "mixed", "--dtype", "bfloat16", *flags) == 0
    assert "storing them costs an error of" in capfd.readouterr().out
    fuse("model", {"adapters": 0.75, "other": 0.25}, "full", dtype="bfloat16", quantize=True, recipe="mixed_3_6")
    assert (folder / "mixed" / "model.safetensors").read_bytes() == (folder / "full" / "model.safetensors").read_bytes()


def test_every_flag_reaches_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*args: Any, **options: Any) -> None:
        calls.append((args, options))
        raise RequestError("that is enough")

    monkeypatch.setattr("mlx_openelm.cli.fuse.fuse", record)
    expected = {
        "dtype": "float16",
        "quantize": True,
        "q_bits": 3,
        "q_group_size": 32,
        "q_mode": "mxfp8",
        "recipe": "mixed_3_6",
        "dequantize": True,
        "report": True,
        "report_data": "text",
        "tokenizer": "words",
        "config_yaml": "a.yaml",
        "revision": "branch",
        "overwrite": True,
    }
    flags = [
        word
        for name, value in expected.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    assert run("--model", "base", "--adapter-path", "a", "--save-path", "out", *flags) == 2
    ((args, options),) = calls
    assert args == ("base", ["a"], Path("out"))
    assert options == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--adapter-path", "absent"), "There is no adapter 'absent'"),
        (("--model", "tiny", "--q-bits", 4), "--q-bits needs -q"),
        (("--model", "model", "--save-path", "adapters"), "exists; choose another --save-path"),
        (("--model", "model", "--private"), "--private needs --upload-repo"),
    ],
)
def test_bad_requests_are_refused_in_one_line(
    flags: tuple[object, ...], message: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert run(*flags) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(folder.iterdir()) == before


def test_a_dry_run_leaves_nothing_and_makes_no_request(
    folder: Path, hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert run("--model", "model", "--upload-repo", "me/fused", "--dry-run") == 0
    out = capfd.readouterr().out
    assert out.startswith("Would write fused_model: ") and "Would upload fused_model; nothing was sent." in out
    assert "# fused" in out and "Fused into the base: the LoRA adapter `adapters` (rank 8, on 24 matrices)." in out
    assert hub.requests == [] and sorted(folder.rglob("*")) == before


def test_the_result_is_uploaded(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert run("--model", "model", "--upload-repo", "me/fused", "--json") == 0
    assert json.loads(capfd.readouterr().out)["upload"]["repo"] == "me/fused"
    sent = hub.repos["me/fused"].folder
    assert (sent / "model.safetensors").read_bytes() == (folder / "fused_model" / "model.safetensors").read_bytes()
    assert "mlx-openelm generate --model me/fused" in (sent / "README.md").read_text()
