"""Short fine-tuning runs of tiny models, and comparisons of two runs."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_openelm.training.run.listener import Listener
from mlx_openelm.training.run.metrics import read

import processes
from quantization_models import write_tiny

ROOT = Path(__file__).parent.parent
BLANK_PICTURES = Path(__file__).parent / "blank_pictures"
# Values that vary between identical runs: times and memory.
TIMING = {
    *("tokens_per_second", "iterations_per_second", "pairs_per_second", "answers_per_second"),
    "completions_per_second",
    *("peak_memory", "val_seconds"),
    *("flops_per_second", "flops_utilization", "data_seconds"),  # of pretraining
}
WORDS = ["the", "king", "and", "his", "friends", "went", "to", "see", "if", "winter", "comes", "before", "wine"]


class Notes(Listener):
    """Keeps what a run says and warns of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    warn = say


def write_data(folder: Path, train: int = 23, valid: int = 6, test: int = 6) -> Path:
    """Random texts of mixed lengths, the same in every call."""
    folder.mkdir()
    draw = random.Random(0)
    for name, number in (("train", train), ("valid", valid), ("test", test)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 30))) for _ in range(number)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_run_folder(folder: Path) -> Path:
    """A folder with `model` and `data`, for the commands below."""
    write_tiny(folder / "model")
    write_data(folder / "data")
    return folder


def environment(pictures: bool = False) -> dict[str, str]:
    """The variables of a process with a training run; without `pictures`, that of its losses is blank."""
    return processes.environment(*([] if pictures else [BLANK_PICTURES]), COLUMNS="160")


PROGRAM = ("-m", "mlx_openelm")


def command(
    *args: object, python: tuple[str, ...] = (sys.executable,), start: tuple[str, ...] = PROGRAM, name: str = "lora"
) -> list[str]:
    return [*python, *start, name, *map(str, args)]


def run(
    *args: object,
    folder: Path,
    timeout: float = 120,
    start: tuple[str, ...] = PROGRAM,
    name: str = "lora",
    pictures: bool = False,
) -> subprocess.CompletedProcess[str]:
    """`mlx-openelm lora`, or the command `name`, in `folder`."""
    return subprocess.run(
        command(*args, start=start, name=name),
        capture_output=True,
        text=True,
        env=environment(pictures),
        cwd=folder,
        timeout=timeout,
    )


def kill_after(
    lines: int, delay: float, *args: object, folder: Path, start: tuple[str, ...] = PROGRAM, name: str = "lora"
) -> str:
    """Run `mlx-openelm lora` (or `name`) and kill it `delay` seconds after `lines` lines of progress; its output."""
    process = subprocess.Popen(command(*args, start=start, name=name), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=environment(), cwd=folder)  # fmt: skip
    assert process.stderr is not None
    printed = []
    while lines and (line := process.stderr.readline()):
        printed.append(line)
        lines -= line.startswith("Step")
    try:
        process.wait(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    rest = process.stderr.read()
    process.wait()
    process.stderr.close()
    return "".join(printed) + rest


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged numbers of a run, without those that depend on timing."""
    rows = read(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMING} for row in rows]


def trained(folder: Path) -> dict[str, bytes]:
    """What a run has learned: the adapter or the models, and the last checkpoint's weights and optimizer."""
    last = max(path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    results = [*folder.glob("adapters.safetensors"), *sorted(folder.glob("model*/*"))]
    assert results
    files = [*results, last / "weights.safetensors", last / "optimizer.safetensors"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
