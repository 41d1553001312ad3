"""The `quantize` command, and recipes in `convert`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mlx_openelm.evaluation.windows import load_documents
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.formats import rounding
from mlx_openelm.quantization import awq, report, sensitivity
from mlx_openelm.quantization.recipes import planner

import pytest
from in_process import run_here
from quantization_models import FIXTURES, measure_few_choices, search_little, write_tiny

LEARNING = ("--calibration", "play.txt", "--num-samples", 2, "--sequence-length", 32)
ONE_LAYER = {"num_transformer_layers": 1, "num_query_heads": 2, "num_kv_heads": 1, "ffn_multipliers": 1.5}


def run(*args: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in `folder`, which has a model and a text."""
    return run_here(*args, folder=folder)


@pytest.fixture(scope="module", autouse=True)
def little_search() -> Iterator[None]:
    """Grids are improved once, AWQ tries one exponent, and few rows are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_REFITS", 1)
        patch.setattr(awq, "_EXPONENTS", (0.5,))
        patch.setattr(sensitivity, "_ROWS", 32)
        yield from search_little()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantize-cli")
    write_tiny(path / "model", **ONE_LAYER)
    (path / "play.txt").write_text("\n".join(load_documents(FIXTURES / "valid.jsonl"))[:4000])
    return path


def test_a_budget_a_report_and_a_dry_run_of_an_upload(folder, monkeypatch):
    measure_few_choices(monkeypatch)
    some = dict(list(report.plain_choices(mlx_format.read_config(folder / "model")[0]).items())[:2])
    monkeypatch.setattr(report, "plain_choices", lambda _: some)
    upload = ("--q-bits", 4, "--upload-repo", "me/small", "--dry-run")
    before = sorted(folder.rglob("*"))
    done = run("quantize", "--model", "model", "--mlx-path", "small", *upload, folder=folder)
    assert done.returncode == 0 and "Would write small: 4.5" in done.stdout, done.stderr
    assert "Would upload small; nothing was sent." in done.stdout and sorted(folder.rglob("*")) == before

    done = run("quantize", "--model", "model", "--mlx-path", "small", "--target-bpw", 4.2, "--method", "gptq",
               "--method", "awq", *LEARNING, "--report", "--report-plot", "plot.svg", "--json",
               folder=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bits_per_weight"] <= 4.2 and result["mlx_path"] == str(folder / "small")
    assert set(result["choices"]) == set(mlx_format.read_config(folder / "small")[0].matrix_shapes())
    assert all(set(c) == {"group_size", "bits", "mode", "kl_divergence"} for c in result["choices"].values())
    assert [row["name"] for row in result["report"][:-1]] == ["not quantized", *some]
    assert result["report"][-1]["name"].startswith("this: --target-bpw 4.2 --method awq,gptq")
    assert result["report"][-1]["bits_per_weight"] == result["bits_per_weight"]
    assert (folder / "plot.svg").read_text().startswith("<?xml")
    assert (folder / "small" / "sensitivities.json").is_file()
    info = json.loads(run("info", "--model", "small", "--json", folder=folder).stdout)
    assert info["bits_per_weight"] == pytest.approx(result["bits_per_weight"], rel=1e-6)

    done = run("quantize", "--model", "model", "--mlx-path", "again", "--target-bpw", 4.2, "--sensitivities",
               "small/sensitivities.json", *LEARNING, folder=folder)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Measuring" not in done.stderr
    for path, choice in result["choices"].items():
        line = next(line for line in done.stdout.splitlines() if line.split()[:1] == [path])
        bits, size, cost = line.split()[1:]
        assert (int(bits), int(size)) == (choice["bits"], choice["group_size"])
        assert float(cost) == pytest.approx(choice["kl_divergence"], rel=0.06)
    assert f"Wrote again: {result['bits_per_weight']:.2f} bits per weight" in done.stdout


def test_a_report_is_a_table_and_a_drawing_and_writes_nothing(folder):
    pytest.importorskip("matplotlib")
    before = sorted(path.name for path in folder.iterdir())
    done = run(
        "quantize", "--model", "model", "--report", "--calibration", "play.txt", "--sequence-length", 32, folder=folder
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["bits/weight", "size", "perplexity", "KL", "divergence"]
    rows = {line[4:20].strip(): line.split() for line in lines[1:15]}
    assert rows["not quantized"][0] == "a" and rows["not quantized"][-1] == "0.00000"
    assert rows["affine 4-bit"][0] == "d" and rows["mixed_4_6"][0] == "n"
    field = "".join(line.partition("|")[2] for line in lines[15:] if "|" in line)
    assert sorted(field.replace(" ", "")) == list("bcdefghijklmn")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_methods_may_be_joined_by_commas_or_repeated(folder):
    for name, flags in {
        "joined": ("--method", "gptq,dwq"),
        "repeated": ("--method", "dwq", "--method", "gptq"),
    }.items():
        done = run("quantize", "--model", "model", "--mlx-path", name, "--q-bits", 3, *flags, *LEARNING, folder=folder)
        assert done.returncode == 0, done.stderr
        assert f"Wrote {name}: " in done.stdout and "group size 32, since 64 does not divide 32" in done.stdout
        assert "--method gptq,dwq" in (folder / name / "README.md").read_text()
    first, second = ((folder / name / "model.safetensors").read_bytes() for name in ("joined", "repeated"))
    assert first == second


@pytest.mark.parametrize("flag", ["--recipe", "--quant-predicate"])
def test_convert_takes_recipes_under_both_names(flag, folder):
    name = f"by{flag}"
    done = run("convert", "--model", "model", "--mlx-path", name, "-q", flag, "mixed_4_6", "--json", folder=folder)
    assert done.returncode == 0, done.stderr
    stored = mlx_format.read(folder / name)
    assert stored.quantization == planner(recipe="mixed_4_6")(stored.config)[0]
    assert {choice.bits for choice in stored.quantization.values()} == {4, 6}
    assert json.loads(done.stdout)["bits_per_weight"] == pytest.approx(stored.bits_per_weight)
    assert "--recipe mixed_4_6" in (folder / name / "README.md").read_text()


@pytest.mark.parametrize(
    "flags,message",
    [
        (("quantize", "--target-bpw", 4, "--q-bits", 4), "leave --q-bits out"),
        (("quantize", "--method", "hqq"), "--method must be one or more of"),
        (("quantize", "--q-bits", 4, "--report-plot", "a.png"), "--report-plot needs --report"),
        (("quantize", "--report", "--report-plot", "a.xyz"), "must end in .png"),
        (("quantize", "--report", "--upload-repo", "me/x", "--dry-run"), "--upload-repo needs a model to upload"),
        (("convert", "--recipe", "mixed_4_6"), "--recipe needs -q"),
        (("convert", "--quant-predicate", "mixed_4_6"), "--quant-predicate needs -q"),
        (("quantize", "--quant-predicate", "mixed"), "--quant-predicate must be one of mixed_2_6"),
        (("convert", "-q", "--recipe", "mixed_4_6", "--q-bits", 4), "leave --q-bits and --q-mode out"),
    ],
)
def test_bad_requests_are_one_line_and_exit_with_2(flags, message, folder):
    if "a.xyz" in flags:
        pytest.importorskip("matplotlib")
    done = run(*flags, "--model", "model", "--mlx-path", "refused", folder=folder)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (folder / "refused").exists()
