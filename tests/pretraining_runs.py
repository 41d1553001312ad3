"""Short pretraining runs of tiny models on made-up text, and comparisons of two runs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from mlx_openelm.training.options.pretraining import PretrainOptions
from mlx_openelm.training.run.metrics import read

from quantization_models import SHAKESPEARE
from training_runs import TIMING, WORDS, environment

# Two layers, with layer-wise scaling of attention and feed-forward, and the vocabulary of the tokenizer below.
SIZES = {
    "num_transformer_layers": 2,
    "model_dim": 64,
    "head_dim": 16,
    "ffn_dim_divisor": 32,
    "qkv_multipliers": [0.5, 1.0],
    "ffn_multipliers": [0.5, 2.0],
    "max_context_length": 128,
    "rope_max_length": 256,
}
# Values in metrics that vary between identical runs.
VARYING = {*TIMING, "flops_per_second", "flops_utilization", "data_seconds"}
SHORT: dict[str, Any] = {
    "data": ("data",), "iters": 9, "batch_size": 2, "max_seq_length": 48, "learning_rate": 1e-2, "warmup": 2,
    "steps_per_report": 2, "steps_per_eval": 3, "save_every": 2, "num_workers": 0, "shuffle_buffer": 16,
}  # fmt: skip


def options(**changes: Any) -> PretrainOptions:
    return PretrainOptions(**SHORT | changes)


def write_folder(folder: Path) -> Path:
    """A folder with `tokenizer`, `data` and `run.yaml`, which has the sizes above."""
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(SHAKESPEARE / name, folder / "tokenizer" / name)
    write_text(folder / "data")
    settings = SHORT | {"data": ["data"], "model": SIZES, "tokenizer": "tokenizer"}
    (folder / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return folder


def write_text(folder: Path, documents: int = 40, words: int = 60, valid: int = 4) -> None:
    """Documents of up to `words` random words each, the same in every call."""
    folder.mkdir()
    draw = random.Random(1)
    for name, number in (("train", documents), ("valid", valid)):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, words))) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def command(*args: object, python: tuple[str, ...] = (sys.executable,)) -> list[str]:
    return [*python, "-m", "mlx_openelm", "pretrain", *map(str, args)]


def run(*args: object, folder: Path, timeout: float = 300, pictures: bool = False) -> subprocess.CompletedProcess[str]:
    """`mlx-openelm pretrain` in `folder`."""
    return subprocess.run(
        command(*args), capture_output=True, text=True, env=environment(pictures), cwd=folder, timeout=timeout
    )


def kill_after(lines: int, delay: float, *args: object, folder: Path) -> str:
    """Run the command, kill it `delay` seconds after `lines` lines of progress; returns what it printed."""
    process = subprocess.Popen(command(*args), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env=environment(), cwd=folder)  # fmt: skip
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
    return [
        {name: value for name, value in row.items() if name not in VARYING} for row in read(folder / "metrics.jsonl")
    ]


def trained(folder: Path) -> dict[str, bytes]:
    """What a run has learned: the files of its models, of the last checkpoint's weights and of its optimizer."""
    last = max(path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    files = [last / "weights.safetensors", last / "optimizer.safetensors"]
    files += sorted(path for path in folder.glob("model*/*"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
