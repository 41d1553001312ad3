"""Types by name, by short name, and as MLX's own, in every function and command that takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mlx_openelm import convert, fuse, load, quantize
from mlx_openelm.cli.main import main
from mlx_openelm.errors import RequestError
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.jobs.average import average
from mlx_openelm.jobs.export import export
from mlx_openelm.loading import dtype_name
from mlx_openelm.quantization.options import QuantizeOptions
from mlx_openelm.training.run.preparing import Loading

import mlx.core as mx
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
SAME = [("bf16", "bfloat16", mx.bfloat16), ("fp16", "float16", mx.float16), ("fp32", "float32", mx.float32)]


@pytest.mark.parametrize("names", SAME)
def test_three_names_for_a_type(names: tuple) -> None:
    assert {dtype_name(name) for name in names} == {names[1]}
    assert {load("tiny", dtype=name)[0].transformer.norm["weight"].dtype for name in names} == {names[2]}
    # A run records the full name, so that it can be resumed with another one.
    assert {Loading(dtype=name).dtype for name in names} == {names[1]}


@pytest.mark.parametrize("dtype", ["int8", "BF16", "mlx.core.float16", mx.int32, mx.float64, 16, ["fp16"]], ids=str)
def test_unknown_types_are_refused(dtype: object, tmp_path: Path) -> None:
    for use in (load, lambda model, dtype: convert(model, tmp_path / "out", dtype=dtype)):
        with pytest.raises(RequestError, match="dtype must be one of float32, float16, bfloat16, fp32, fp16, bf16"):
            use("tiny", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_none_means_no_dtype() -> None:
    assert dtype_name(None) is None and Loading().dtype is None


JOBS: dict[str, Callable] = {
    "convert": lambda out, dtype: convert(FOLDER, out, dtype=dtype),
    "export": lambda out, dtype: export(FOLDER, format="huggingface", output=out, dtype=dtype),
    "average": lambda out, dtype: average([FOLDER, FOLDER], out, dtype=dtype),
    "fuse": lambda out, dtype: fuse(FOLDER, FIXTURES / "peft-lora-embedding", out, dtype=dtype),
    "quantize": lambda out, dtype: quantize(FOLDER, out, QuantizeOptions(q_bits=4), dtype=dtype),
}


@pytest.mark.covering
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("dtype", ["fp16", mx.float16], ids=str)
def test_every_job_accepts_every_name_of_a_type(job: str, dtype: str | mx.Dtype, tmp_path: Path) -> None:
    JOBS[job](tmp_path / "out", dtype)
    assert mlx_format.read(tmp_path / "out").dtype == mx.float16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--dtype float16" in card and "mlx.core" not in card


@pytest.mark.parametrize("command", ["convert --mlx-path", "export --format huggingface --output"])
def test_commands_accept_every_name_of_a_type(command: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as done:
        main([*command.split(), str(tmp_path / "out"), "--model", str(FOLDER), "--dtype", "bf16"])
    assert not done.value.code
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_3b_model_refuses_float16_by_every_name() -> None:
    for dtype in SAME[1]:
        with pytest.raises(RequestError, match="float16 cannot hold the 3B model"):
            load("3b", dtype=dtype)
