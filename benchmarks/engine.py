"""The decoding engine: batches, drafts and prompt caches beside mlx-lm, and what its parts cost beside a plain step.

    python benchmarks/engine.py                            # the 270M size
    python benchmarks/engine.py --only batches,prefixes    # some of the parts
    python benchmarks/engine.py --size tiny --quick        # whether everything runs
    python benchmarks/engine.py --tokenizer FOLDER --json  # with Llama 2's tokenizer, whose masks are the real ones

Models of a published size have random weights. Everything is in float32, with one BLAS for both programs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Iterator

from engine_setup import Row, Setup, make_setup

# Each is a module, `engine_NAME`, with a function `measure`.
PARTS = ("batches", "steps", "drafts", "prefixes", "extras", "masks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the published size to measure: 270M, 450M, 1_1B, 3B, or tiny")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; by default the packaged model's")
    parser.add_argument("--steps", type=int, help="steps that are measured; 32, or 4 with --quick")
    parser.add_argument("--quick", action="store_true", help="short texts, once each")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    rows = []
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        setup = make_setup(arguments.size, arguments.tokenizer, arguments.steps, arguments.quick, temporary)
        for row in measure(setup, parts):
            rows.append(row)
            if not arguments.json:
                print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measure(setup: Setup, parts: list[str]) -> Iterator[Row]:
    for part in parts:
        yield from importlib.import_module(f"engine_{part}").measure(setup)


def as_text(row: Row) -> str:
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:72} ours {row['ours']:9.4g}  other {row['other']:9.4g}  ratio {row['ratio']:.4g}{bar}"


if __name__ == "__main__":
    main()
