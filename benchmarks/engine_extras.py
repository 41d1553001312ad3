"""What log-probabilities and adapters add to a step of several rows, beside the same step without them.

Two engines with the same prompts advance in turns, step by step, so that other work on the machine affects both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from engine_setup import Row, Setup, at_most

ROWS = 8
ADAPTERS, RANK = 4, 8
TOP = 10


def measure(setup: Setup) -> Iterator[Row]:
    from mlx_openelm.adapters.pool import AdapterPool
    from mlx_openelm.generation.engine import Engine

    model, tokenizer = setup.load()
    tokenizer.eos_token_ids = set()

    def engine(adapters: Sequence[str] = (), **options: Any) -> Engine:
        """An engine whose rows have all drawn their first tokens."""
        pool = AdapterPool(model, read=lambda name: low_rank(model, int(name))) if adapters else None
        made = Engine(model, tokenizer, adapters=pool, prompts_first=True)
        names = [adapters[n % len(adapters)] if adapters else None for n in range(ROWS)]
        for n, name in enumerate(names):
            made.submit([n + 1] * 16, max_tokens=setup.steps + 8, adapter=name, **options)
        made.step()
        return made

    about = f"a step of {ROWS} rows (ms), {setup.size}"
    plain = engine()
    with_top = engine(top_logprobs=TOP)
    yield at_most(f"the top {TOP} log-probabilities, {about}", *in_turns([with_top, plain], setup.steps))
    kinds = {f"{ADAPTERS} adapters of rank {RANK}": [str(n) for n in range(ADAPTERS)], f"one of rank {RANK}": ["0"]}
    for kind, adapters in kinds.items():
        yield at_most(f"{kind}, {about}", *in_turns([engine(adapters), engine()], setup.steps))


def in_turns(engines: Sequence[Any], steps: int) -> list[float]:
    """The milliseconds of a step of each engine: medians."""
    times: list[list[float]] = [[] for _ in engines]
    for turn in range(steps + 2):
        for which in range(len(engines))[:: -1 if turn % 2 else 1]:
            started = time.perf_counter()
            engines[which].step()
            mx.synchronize()  # a step begins the work of the next one
            times[which].append((time.perf_counter() - started) * 1e3)
    return [statistics.median(its[2:]) for its in times]  # the first ones build MLX's kernels


def low_rank(model: Any, seed: int) -> Any:
    """A random adapter on all matrices of the layers that are adapted by default."""
    from mlx_openelm.adapters.attaching import target_paths
    from mlx_openelm.formats.adapter import Adapter, LowRank

    shapes, changes = model.config.matrix_shapes(), {}
    for number, path in enumerate(target_paths(model.config)):
        outputs, inputs = shapes[path]
        a, b = mx.random.split(mx.random.key(1000 * seed + number))
        changes[path] = LowRank(
            mx.random.normal((inputs, RANK), key=a) / inputs**0.5, mx.random.normal((RANK, outputs), key=b), 0.1
        )
    return Adapter(changes)
