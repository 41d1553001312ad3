"""Decoding steps of 8 and 16 rows beside a prompt, in tokens per second with the same weights.

A prompt is computed with the head at each of its tokens, since a step needs it for each row. Prompts and steps take
turns, and ratios are medians of those of each turn: the machine's speed changes meanwhile. A step of few rows reads all
weights for little arithmetic, so with large weights it shows the speed of memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from engine_setup import Row, Setup, at_least

KINDS = {"4 bits": 0.85, "bfloat16": 0.85, "float32": None}  # bars for steps beside a prompt
ROWS = (8, 16)


def measure(setup: Setup) -> Iterator[Row]:
    for kind, bar in KINDS.items():
        prompts, steps = speeds(a_model(setup, kind), setup)
        for count in ROWS:
            name = f"a step of {count} rows beside a prompt (tokens/s), {kind}, {setup.size}"
            yield a_row(name, steps[count], prompts, bar)
        yield a_row(f"a step of 16 rows beside 8 (tokens/s), {kind}, {setup.size}", steps[16], steps[8], 1)


def a_row(name: str, ours: list[float], other: list[float], bar: float | None) -> Row:
    """A row of medians, whose ratio is the median of the turns' ratios."""
    ratio = median(one / two for one, two in zip(ours, other, strict=True))
    return at_least(name, ratio * median(other), median(other), bar)


def a_model(setup: Setup, kind: str) -> Any:
    """The model with weights of a kind, as `load` leaves them for a CPU: norms stay in float32."""
    from mlx_openelm.model import QuantizedEmbedding, QuantizedLinear

    model, _ = setup.load()
    if kind == "4 bits":
        nn.quantize(model, group_size=64, bits=4)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            module.rounds_activations = True
        elif kind == "bfloat16" and "weight" in module and module["weight"].ndim == 2:
            module.weight = module["weight"].astype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def speeds(model: Any, setup: Setup) -> tuple[list[float], dict[int, list[float]]]:
    """Tokens per second of a prompt and of steps of each number of rows, one of each a turn."""
    from mlx_openelm.cache import make_cache, step_caches

    length, start, repeats = (32, 4, 1) if setup.quick else (256, 20, 3)
    prompt = mx.array([[i % 900 + 1 for i in range(length)]])
    caches = [make_cache(len(model.layers)) for _ in range(max(ROWS))]
    for row in caches:
        mx.eval(model.hidden_states(prompt[:, :start], row))

    def compute_prompt() -> None:
        mx.eval(model.logits(model.hidden_states(prompt, make_cache(len(model.layers)))))

    def step(count: int) -> None:
        mx.eval(model.logits(model.hidden_states(mx.array([[5]] * count), step_caches(caches[:count]))))

    prompts: list[float] = []
    steps: dict[int, list[float]] = {count: [] for count in ROWS}
    for turn in range(setup.repeats + 1):
        found = length / seconds(compute_prompt)
        if turn:  # the first one warms up
            prompts.append(found)
        for count, speeds in steps.items():
            found = count / median(seconds(lambda count=count: step(count)) for _ in range(repeats))
            if turn:
                speeds.append(found)
    return prompts, steps


def seconds(compute: Callable[[], None]) -> float:
    started = time.perf_counter()
    compute()
    return time.perf_counter() - started
