"""What a newcomer meets in the first hour: every message that says what to type is taken at its word."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm import native
from mlx_openelm.cli import doctor
from mlx_openelm.cli.main import main
from mlx_openelm.formats import mlx as mlx_format
from mlx_openelm.hub.catalog import TINY_FOLDER

import pytest
from processes import environment

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands run in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def run(*args: object) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in args])
    return int(stop.value.code or 0)


def refused(capfd: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that must fail."""
    capfd.readouterr()
    assert run(*args) == 2
    out, line = capfd.readouterr()
    assert out == "" and line.startswith("error: ") and line.count("\n") == 1
    return line


# Quantizing what is quantized.

SHORT_TEXT = ("--num-samples", "2", "--sequence-length", "32")


@pytest.mark.parametrize(
    ("args", "bits"),
    [
        pytest.param(("convert", "-q", "--q-bits", "3"), 3, marks=pytest.mark.slow),
        pytest.param(
            ("quantize", "--mlx-path", "mlx_model", "--method", "gptq", *SHORT_TEXT), 4, marks=pytest.mark.slow
        ),
        (("quantize", "--mlx-path", "mlx_model", "--q-bits", "3"), 3),
        (("convert", "--model", "my model.gguf", "-q", "--tokenizer", TINY_FOLDER / "tokenizer.model"), 4),
        pytest.param(("convert", "--model", "packed", "-q", "--q-bits", "8"), 8, marks=pytest.mark.slow),
    ],
)
def test_a_quantized_model_is_quantized_by_the_two_commands_of_the_message(
    args: tuple[Any, ...], bits: int, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if "my model.gguf" in args:
        assert run("export", "--format", "gguf", "--gguf-type", "q8_0", "--output", "my model.gguf") == 0
    if "packed" in args:
        assert run("convert", "--mlx-path", "packed") == 0
    line = refused(capfd, *args)
    assert ("quantize the original" in line) == ("--model" in args)  # `tiny` has none
    commands = [
        shlex.split(command) for command in line.partition("with two commands: ")[2].strip("`.\n").split(" && ")
    ]
    assert len(commands) == 2
    for program, *words in commands:
        assert program == "mlx-openelm" and run(*words) == 0
    assert {choice.bits for choice in mlx_format.read(here / "mlx_model").quantization.values()} == {bits}


def test_the_command_for_a_report_alone_has_no_folder(capfd: pytest.CaptureFixture[str]) -> None:
    line = refused(capfd, "quantize", "--report")
    assert line.endswith("tiny-unpacked && mlx-openelm quantize --model tiny-unpacked --report`.\n")


# A slow BLAS.


@pytest.mark.parametrize(
    ("state", "library", "advice"),
    [
        ("loaded", "libopenblas.so.0", None),
        ("missing", "", "pip install scipy-openblas32"),
        ("missing", "none.so", "correct or unset MLX_OPENELM_BLAS=none.so"),
        ("off", "", "unset MLX_OPENELM_BLAS"),
    ],
)
def test_doctor_says_what_a_slow_blas_affects(
    state: str, library: str, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kernels, slow in (
        ("used", "training and learned quantization are slow with it, generating is not: "),
        ("missing", "everything is slow with it: "),
    ):
        monkeypatch.setattr(native, "status", replace(native.status, state=kernels))
        assert doctor._blas_advice(state, library) == (None if advice is None else slow + advice)


# A log that nobody reads any more.


def test_a_closed_log_does_not_end_a_training_run(here: Path) -> None:
    (here / "train.jsonl").write_text('{"text": "To be, or not to be, that is the question."}\n' * 40)
    # Without the picture of the losses, which takes as long as all the rest.
    code = (
        "from mlx_openelm.training.run import metrics; from mlx_openelm.cli.main import main\n"
        "metrics.draw = lambda curves, path, title='': path.write_bytes(b'')\nmain()"
    )
    command = [sys.executable, "-c", code, "lora", "--train", "--data", "train.jsonl", "--iters", "3"]
    command += ["--steps-per-report", "1", "--save-every", "2", "--batch-size", "1", "--num-layers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stderr.readline()
        process.stderr.close()  # as `2>&1 | head -1` does
        out = process.stdout.read().decode()
        assert process.wait(120) == 0
    assert "Trained 3 steps" in out
    assert (here / "adapters" / "adapters.safetensors").is_file()
    assert sorted(path.name for path in (here / "adapters" / "checkpoints").iterdir())


def test_lines_for_a_closed_pipe_are_dropped_and_later_ones_too() -> None:
    code = (
        "import os, sys; from mlx_openelm.messages import say\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 2)\n"
        "say('one'); say('two'); print('three', file=sys.stderr, flush=True); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "done\n")
