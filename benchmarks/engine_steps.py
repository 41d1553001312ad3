"""Decoding steps of several rows beside a prompt: tokens per second of CPU time, with the same weights.

    python benchmarks/engine_steps.py                    # the 270M size in 4 bits, bfloat16 and float32
    python benchmarks/engine_steps.py --only bfloat16    # some of the kinds
    python benchmarks/engine_steps.py --repeats 20       # on a busy machine

Weights are random. A prompt of 256 tokens is computed with the head at each of them, as a step needs it for each row.
One thread computes, and times are the least of the process's CPU time over some repeats, so that other processes matter
little, except that they share the memory's bandwidth: steps of few rows read all weights for little arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

KINDS = ("4 bits", "bfloat16", "float32")
ROWS = (1, 8, 16)
BAR = 0.85  # of 8 and 16 rows, in 4 bits and bfloat16
PROMPT, START = 256, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the published size to measure: 270M, 450M, 1_1B or 3B")
    parser.add_argument("--only", default=",".join(KINDS), help=f"kinds, separated by commas: {', '.join(KINDS)}")
    parser.add_argument("--repeats", type=int, default=4, help="of a prompt; steps are repeated three times as often")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    kinds = arguments.only.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when MLX is imported
    rows = []
    for row in measure(arguments.size, kinds, arguments.repeats):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def as_text(row: dict[str, Any]) -> str:
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:60} ours {row['ours']:8.1f}  other {row['other']:8.1f}  ratio {row['ratio']:.3f}{bar}"


def measure(size: str, kinds: list[str], repeats: int) -> Iterator[dict[str, Any]]:
    for kind in kinds:
        prompt, steps = speeds(a_model(size, kind), repeats)
        for count, speed in steps.items():
            bar = BAR if count > 1 and kind != "float32" else None
            yield a_row(f"decoding, {count} rows, over prompt speed, {kind}, {size}", speed, prompt, bar)
        bar = 1.0 if kind != "float32" else None
        yield a_row(f"decoding, 16 rows over 8, {kind}, {size}", steps[16], steps[8], bar)


def a_row(name: str, ours: float, other: float, bar: float | None) -> dict[str, Any]:
    """In tokens per second."""
    ratio = ours / other
    return {"name": name, "ours": ours, "other": other, "ratio": ratio, "bar": bar,
            "pass": None if bar is None else ratio >= bar}  # fmt: skip


def a_model(size: str, kind: str) -> Any:
    from mlx_openelm.config import ModelConfig
    from mlx_openelm.model import OpenELM, QuantizedEmbedding, QuantizedLinear

    import mlx.core as mx
    import mlx.nn as nn

    mx.random.seed(0)
    model = OpenELM(ModelConfig.from_name(size))
    if kind == "4 bits":
        nn.quantize(model, group_size=64, bits=4)
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            module.rounds_activations = True  # as `load` does on a CPU
        elif kind == "bfloat16" and "weight" in module and module["weight"].ndim == 2:
            module.weight = module["weight"].astype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def speeds(model: Any, repeats: int) -> tuple[float, dict[int, float]]:
    """Of a prompt and of steps of each number of rows, in turns: the machine's speed changes meanwhile."""
    from mlx_openelm.cache import make_cache, step_caches

    import mlx.core as mx

    prompt = mx.array([[i % 900 + 1 for i in range(PROMPT)]])
    ids = mx.array([[5]] * max(ROWS))
    caches = [make_cache(len(model.layers)) for _ in range(max(ROWS))]
    for row in caches:
        mx.eval(model.hidden_states(prompt[:, :START], row))

    def compute_prompt() -> None:
        mx.eval(model.logits(model.hidden_states(prompt, make_cache(len(model.layers)))))

    def step(count: int) -> None:
        mx.eval(model.logits(model.hidden_states(ids[:count], step_caches(caches[:count]))))

    best = dict.fromkeys((0, *ROWS), float("inf"))
    for _ in range(repeats):
        best[0] = min(best[0], seconds(compute_prompt))
        for count in ROWS:
            best[count] = min(best[count], *(seconds(lambda count=count: step(count)) for _ in range(3)))
    return PROMPT / best[0], {count: count / best[count] for count in ROWS}


def seconds(compute: Callable[[], None]) -> float:
    started = time.process_time()
    compute()
    return time.process_time() - started


if __name__ == "__main__":
    main()
