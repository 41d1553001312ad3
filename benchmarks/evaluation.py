"""Multiple choice compared with mlx_lm.evaluate: requests/s and memory.

    python benchmarks/evaluation.py                       # tiny and the 270M size
    python benchmarks/evaluation.py --only tiny --json

Both programs score the same four choices of the same real questions, with contexts of a few examples, through their
models for lm-eval, on the same folder. Models of published sizes have random weights, made for the run. Each program
runs in a process of its own, in turns, with the same BLAS; rows are medians. Log-likelihoods are compared too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import random_model

ROOT = Path(__file__).parent.parent
QUESTIONS = ROOT / "tests/fixtures/evaluation/commonsense/openbookqa/test.json"
SHOTS = 3
# Log-likelihoods may differ by this much: in float32, and in 16 bits.
CLOSE = {"float32": 0.01, "other": 2.0}


class Plan(NamedTuple):
    """A model to measure: its name, size, type or packing, and the least ratio of requests/s."""

    name: str
    size: str
    dtype: str
    bits: int | None
    bar: float

    @property
    def label(self) -> str:
        return f"{self.name}, {self.dtype if self.bits is None else f'{self.bits} bits'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the published size to measure, besides tiny")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each program; rows are medians")
    parser.add_argument("--questions", type=int, default=16, help="the number of questions, of four choices each")
    parser.add_argument("--only", default="", help="measure only models whose name contains this")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("WHOSE", "FOLDER", "COUNT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        whose, folder, count = arguments.worker
        print(json.dumps(worker(whose, folder, int(count))))
        return
    rows = []
    for row in measure(arguments):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def requests(count: int) -> list[tuple[str, str]]:
    """Contexts of a few solved questions and a new one, each with four choices; questions are repeated if needed."""
    items = []
    for record in json.loads(QUESTIONS.read_text()):
        text, answers, _ = record["instruction"].split("\n\n")
        question = text.partition("question: ")[2]
        choices = re.split(r" ?Answer\d: ", answers)[1:]
        items.append((question, choices, choices[int(record["answer"][-1]) - 1]))
    pairs = []
    for number in range(count):
        examples = [items[(number + shot + 1) % len(items)] for shot in range(SHOTS)]
        solved = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, _, answer in examples)
        question, choices, _ = items[number % len(items)]
        pairs += [(f"{solved}Question: {question}\nAnswer:", f" {choice}") for choice in choices]
    return pairs


def worker(whose: str, folder: str, count: int) -> dict[str, Any]:
    """Requests/s, the most memory of MLX in MB, and the log-likelihoods."""
    from mlx_openelm import blas  # before MLX, for both programs

    import mlx.core as mx
    from lm_eval.api.instance import Instance

    if whose == "ours":
        from mlx_openelm.harness.lm import OpenELMLM

        lm: Any = OpenELMLM(folder)
    else:
        from mlx_lm.evaluate import MLXLM

        lm = MLXLM(folder, use_chat_template=False)
    instances = [Instance("loglikelihood", {}, pair, 0) for pair in requests(count)]
    lm.loglikelihood(instances[:4])  # compiles
    if whose == "ours":
        lm.scorer.answers = type(lm.scorer.answers)(lm.scorer.setting)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    found = lm.loglikelihood(instances)
    seconds = time.perf_counter() - started
    return {
        "requests_per_second": len(instances) / seconds,
        "memory": mx.get_peak_memory() / 1e6,
        "logprobs": [float(logprob) for logprob, _ in found],
        "blas": f"{blas.state} {Path(blas.library).name}".strip(),
    }


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    size = arguments.size
    plans = [
        Plan("tiny", "tiny", "float32", None, 3.0),
        Plan(size, size, "float32", None, 1.3),
        Plan(size, size, "bfloat16", None, 10.0),
        Plan(size, size, "bfloat16", 4, 10.0),
    ]
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        for plan in plans:
            if arguments.only in plan.label:
                folder = make(plan, Path(temporary))
                yield from compare(plan, folder, arguments)
                shutil.rmtree(folder)


def make(plan: Plan, root: Path) -> Path:
    """The folder of a model, with tiny's tokenizer."""
    folder, source = root / plan.label.replace(" ", "-"), "tiny"
    if plan.size != "tiny":
        source = str(root / "random")
        random_model.write(plan.size, root / "random")
        assets = ROOT / "mlx_openelm/assets/tiny"
        for file in assets.glob("tokenizer*"):
            shutil.copy(file, root / "random")
    command = ["-m", "mlx_openelm", "convert", "--model", source, "--dtype", plan.dtype, "--mlx-path", str(folder)]
    command += ["--dequantize"] if plan.size == "tiny" else []
    run([sys.executable, *command, *(["-q", "--q-bits", str(plan.bits)] if plan.bits else [])])
    shutil.rmtree(root / "random", ignore_errors=True)
    return folder


def compare(plan: Plan, folder: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    results: dict[str, list[dict[str, Any]]] = {"ours": [], "mlx-lm": []}
    for _ in range(arguments.repeats):
        for whose, found in results.items():
            command = [sys.executable, __file__, "--worker", whose, str(folder), str(arguments.questions)]
            found.append(json.loads(run(command).splitlines()[-1]))
    about = {"type": plan.dtype, "bits": plan.bits, "blas": results["ours"][0]["blas"]}
    for name, key, bar, larger in (
        (f"four choices (requests/s), {plan.label}", "requests_per_second", plan.bar, True),
        (f"peak memory of MLX (MB), {plan.label}", "memory", 1.0, False),
    ):
        ours, other = (statistics.median(one[key] for one in results[whose]) for whose in results)
        passed = ours / other >= bar if larger else ours / other <= bar
        yield {"name": name, "ours": ours, "other": other, "ratio": ours / other, "bar": bar, "pass": passed, **about}
    pairs = zip(results["ours"][0]["logprobs"], results["mlx-lm"][0]["logprobs"], strict=True)
    furthest = max(abs(one - other) for one, other in pairs)
    bar = CLOSE["float32" if plan.dtype == "float32" else "other"]
    yield {"name": f"largest difference of log-likelihoods, {plan.label}", "ours": furthest, "other": 0.0, "ratio": 0.0,
           "bar": bar, "pass": furthest <= bar, **about}  # fmt: skip


def as_text(row: dict[str, Any]) -> str:
    bar = f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:52} ours {row['ours']:9.4g}  mlx-lm {row['other']:9.4g}  ratio {row['ratio']:.3f}{bar}"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
