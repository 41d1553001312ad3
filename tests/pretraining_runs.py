"""Short pretraining runs of tiny models on made-up text, and comparisons of two runs."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from mlx_openelm.training.options.pretraining import PretrainOptions

import training_runs
from quantization_models import SHAKESPEARE
from training_runs import WORDS

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
SHORT: dict[str, Any] = {
    "data": ("data",), "iters": 9, "batch_size": 2, "max_seq_length": 48, "learning_rate": 1e-2, "warmup": 2,
    "steps_per_report": 2, "steps_per_eval": 3, "save_every": 2, "num_workers": 0, "shuffle_buffer": 16,
}  # fmt: skip


def options(**changes: Any) -> PretrainOptions:
    short = SHORT | changes
    if short.get("mode") == "corenet":
        short["shuffle_buffer"] = PretrainOptions.shuffle_buffer  # the mode has none
    return PretrainOptions(**short)


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


# Windows of packed rows as small as these runs, which need not read their text a hundred times.
WINDOW = 1 << 12
START = (
    f"import sys; from mlx_openelm.training.data.corpus import packed; packed.WINDOW = {WINDOW}; "
    "from mlx_openelm.cli.main import main; main(sys.argv[1:])"
)
command = partial(training_runs.command, name="pretrain", start=("-c", START))
run = partial(training_runs.run, name="pretrain", start=("-c", START), timeout=300)
kill_after = partial(training_runs.kill_after, name="pretrain", start=("-c", START))
