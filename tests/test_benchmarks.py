"""benchmarks/gpu.py runs on a model of two layers, on the CPU if there is no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from processes import environment

pytest.importorskip("mlx_lm")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
ROWS = [
    "cold start of generate, tiny (s)",
    "decoding, bfloat16, smoke (tokens/s)",
    "prompt of 8, bfloat16, smoke (tokens/s)",
    "prompt of 24, bfloat16, smoke (tokens/s)",
    "decoding, 4 bits, smoke (tokens/s)",
    "prompt of 8, 4 bits, smoke (tokens/s)",
    "prompt of 24, 4 bits, smoke (tokens/s)",
    "LoRA, 2 × 16, smoke (tokens/s)",
    "memory above the weights (GB), LoRA, 2 × 16, smoke",
    "full fine-tuning, 2 × 16, smoke (tokens/s)",
    "memory above the weights (GB), full fine-tuning, 2 × 16, smoke",
]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.fixture
def benchmark(gpu: ModuleType) -> Any:
    return gpu.Benchmark(gpu.SMOKE, gpu.Turns(1, 60), None, bandwidth=1e9)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_every_row_is_printed(tmp_path: Path) -> None:
    done = run("--smoke", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in answer["rows"]] == ROWS
    assert answer["notes"] == []
    assert all(row["ours"] > 0 and row["other"] > 0 for row in answer["rows"])
    shares = {row["name"]: row["bandwidth"] for row in answer["rows"] if row["bandwidth"] is not None}
    assert list(shares) == [ROWS[1], ROWS[4]]
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == ROWS
    assert {line.count("|") for line in lines} == {6}
    assert answer["title"] in done.stdout


def test_a_machine_without_a_gpu_is_refused() -> None:
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run()
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("MLX has no GPU to use here.") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--only", "decoding"], ["--sizes", "7B"]])
def test_unknown_sizes_and_rows_are_refused(
    flags: list[str], gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", *flags])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2 and f"unknown: {flags[1]}" in capsys.readouterr().err


def test_both_programs_share_the_weights_and_free_them(gpu: ModuleType, benchmark: Any) -> None:
    config = gpu.SMOKE.configs["smoke"]
    arrays = gpu.random_weights(config)
    size = sum(array.nbytes for array in arrays.values())
    assert size == 2 * config.num_parameters
    list(benchmark.train(config, arrays, "lora", "smoke"))  # allocates what lives for the whole run
    gpu.release()
    before = mx.get_active_memory()
    models = gpu.our_model(config, arrays, {}), gpu.their_model(config, arrays, {})
    mx.eval([model.parameters() for model in models])
    assert mx.get_active_memory() - before < size / 100
    del models
    for method in ("lora", "full"):
        list(benchmark.train(config, arrays, method, "smoke"))
        gpu.release()
        assert mx.get_active_memory() - before < size / 100


def test_the_programs_compute_the_same(gpu: ModuleType) -> None:
    config = gpu.SMOKE.configs["smoke"]
    arrays = gpu.random_weights(config)
    tokens = mx.array([gpu.generation.make_prompt(12)])
    for packing in ({}, gpu.packing_of(config)):
        own = gpu.pack(arrays, config) if packing else arrays
        ours, theirs = (make(config, own, packing)(tokens) for make in (gpu.our_model, gpu.their_model))
        # Logits have a standard deviation of 1, and the programs round to bfloat16 in different places.
        assert mx.abs(ours - theirs).astype(mx.float32).mean().item() < 0.05


def test_the_time_budget_ends_the_turns_after_the_first(gpu: ModuleType) -> None:
    turns = gpu.Turns(3, 60)
    assert list(turns) == [0, 1, 2] and not turns.cut
    turns = gpu.Turns(3, -1)
    assert list(turns) == [0] and turns.cut


def test_a_failure_is_noted_and_does_not_stop_the_rest(gpu: ModuleType, benchmark: Any, capsys: Any) -> None:
    def fails() -> list[Any]:
        raise RuntimeError("[malloc] no memory\nfor this")

    def exits() -> list[Any]:
        raise SystemExit("mlx_lm generate printed nothing")

    row = gpu.make_row("a row", {"ours": [3.0], "mlx-lm": [2.0]}, 1.0)
    for name, part in (("one", fails), ("two", exits), ("three", lambda: [row])):
        benchmark.attempt(name, part)
    assert benchmark.failed and benchmark.rows == [row]
    assert benchmark.notes == [
        "Failed: one: RuntimeError: [malloc] no memory for this",
        "Failed: two: SystemExit: mlx_lm generate printed nothing",
    ]
    assert "| a row | 3 | 2 | 1.50 |  |" in capsys.readouterr().out


def test_work_that_does_not_fit_in_memory_is_skipped(
    gpu: ModuleType, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    needs = {
        method: gpu.training_needs(gpu.FULL.configs[size], method, gpu.FULL.shapes[method][size])
        for method, size in (("lora", "1.1B"), ("full", "1.1B"))
    }
    # mlx-lm's peak was 19.2 GB above weights of 2.2 GB on an H200.
    assert needs["lora"] == pytest.approx(21.4e9, rel=0.05)
    assert benchmark.fitting("1.1B", needs | {"generating": 2.8e9}) == ["generating"]
    assert [note.split(",")[0] for note in benchmark.notes] == ["Left out: lora", "Left out: full"]
