"""How long a pretraining run waits for its data: the share of the time of steps as long as the 270M size's.

    python benchmarks/pretraining_data.py --data shakespeare/train.jsonl
    python benchmarks/pretraining_data.py --data shakespeare/train.jsonl --tokens-per-second 150000 --json

A step sleeps for as long as a device of this speed computes. The wait for the first batch, for which worker processes
start and fill the shuffle buffer, is a row of its own; in a run, it passes while the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

from mlx_openelm.hub import catalog
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.data.corpus.loader import PretrainingData
from mlx_openelm.training.options.corpus import MODES, DataOptions

BAR = 0.02  # the largest share of the time
BATCH_SIZE, LENGTH = 16, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a file, a folder or a pattern")
    parser.add_argument("--tokens-per-second", type=float, default=20_000, help="of the device, for the 270M size")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, help="worker processes; by default as many as in training")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            rows += measure(mode, None, arguments)
        # The first run writes the cache, the second reads it.
        measure(MODES[0], folder, arguments, steps=130)
        rows += measure(MODES[0], folder, arguments)
    print(json.dumps(rows, indent=2) if arguments.json else "\n".join(map(as_text, rows)))


def measure(mode: str, cache: str | None, arguments: argparse.Namespace, steps: int | None = None) -> list[dict]:
    """Rows of the share of the time spent waiting, and of the wait for the first batch."""
    options = DataOptions(data=arguments.data, mode=mode, num_workers=arguments.workers, token_cache=cache)
    seconds = 0.0 if steps else BATCH_SIZE * LENGTH / arguments.tokens_per_second
    started = time.perf_counter()
    tokenizer = Tokenizer.from_folder(catalog.TINY_FOLDER)
    with PretrainingData(options, tokenizer, batch_size=BATCH_SIZE, max_seq_length=LENGTH) as data:
        data.step()
        first, waited, begun = time.perf_counter() - started, data.waited, time.perf_counter()
        for _ in range(steps or arguments.steps):
            time.sleep(seconds)
            data.step()
        share = (data.waited - waited) / (time.perf_counter() - begun)
        padding = data.record()["padding"] / data.record()["positions"]
    name = f"{mode}{', cached' if cache else ''}, {options.workers} workers"
    return [
        {"name": f"{name}: share of the time waiting", "ours": share, "bar": BAR, "pass": share < BAR},
        {"name": f"{name}: seconds to the first batch", "ours": first, "bar": None, "pass": None},
        {"name": f"{name}: share of positions that are padding", "ours": padding, "bar": None, "pass": None},
    ]


def as_text(row: dict[str, Any]) -> str:
    verdict = "" if row["pass"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:<60} {row['ours']:8.4f}{verdict}"


if __name__ == "__main__":
    main()
