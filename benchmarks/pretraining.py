"""A step of pretraining compared with a plain MLX loop over mlx-lm's model: tokens per second and memory.

    python benchmarks/pretraining.py                               # the 270M size, a row of 2048; needs 15 GB
    python benchmarks/pretraining.py --layers 4 --length 1024      # its widths in fewer layers
    python benchmarks/pretraining.py --size tiny --length 256 --json

Both train all weights from the same random ones, in float32 on a CPU and in bfloat16 with float32 masters on a GPU
(the loop: in bfloat16 throughout), on the same batches, with AdamW and clipping, with the same BLAS. Each program has a
process of its own, since both together would not fit into memory; the processes take turns, and speeds are medians of
all timed steps. Memory is the peak of MLX's buffers in those steps: as a whole, and above what stays between steps
(weights and the optimizer's state). Processor time varies less than tokens per second on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
# Bars of speed and of memory, on a CPU and on a GPU.
SPEED, GPU_SPEED, MEMORY = 1.1, 1.4, 0.6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="tiny, 270M, 450M, 1_1B")
    parser.add_argument("--layers", type=int, help="so many layers, with the widths of the size's")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--turns", type=int, default=3, help="processes of each program")
    parser.add_argument("--steps", type=int, default=1, help="steps of a process that are measured, after a first one")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=2, metavar=("WHAT", "ARGUMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, values = arguments.worker
        print(json.dumps(WORKERS[what](**json.loads(values))))
        return
    rows = []
    for row in measure(arguments):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    layers = "" if arguments.layers is None else f" in {arguments.layers} layers"
    where = f"{arguments.size}{layers}, {arguments.rows} x {arguments.length}"
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        shape = {"size": arguments.size, "layers": arguments.layers, "rows": arguments.rows, "length": arguments.length}
        shape["folder"] = str(Path(temporary) / "model")
        worker("make", **shape)
        found: dict[str, list[Measured]] = {"ours": [], "loop": []}
        for _ in range(arguments.turns):
            for whose, processes in found.items():
                processes.append(worker("run", whose=whose, steps=arguments.steps, **shape))
        yield from compare(where, arguments.rows * arguments.length, found["ours"], found["loop"])


def compare(where: str, tokens: int, ours: list[Measured], loop: list[Measured]) -> Iterator[dict[str, Any]]:
    """The rows, from what the processes of both programs measured."""

    def both(numbers: Callable[[Measured], Iterable[float]]) -> tuple[float, float]:
        medians = [statistics.median(n for process in each for n in numbers(process)) for each in (ours, loop)]
        return medians[0], medians[1]

    on_gpu = ours[0]["gpu"]
    speeds = both(lambda process: (tokens / seconds for seconds in process["seconds"]))
    yield make_row(f"pretraining step (tokens/s), {where}", *speeds, GPU_SPEED if on_gpu else SPEED)
    processor = both(lambda process: process["processor"])
    yield make_row("  processor seconds of a step", *processor, None, larger=False)
    pairs = zip(ours[0]["losses"], loop[0]["losses"], strict=True)
    difference = max(abs(a - b) / b for a, b in pairs)
    bar = 0.02 if on_gpu else 1e-3
    yield make_row("  largest relative difference of the losses", difference, None, bar, larger=False)
    yield make_row(f"peak memory (GB), {where}", *both(lambda process: [process["peak"]]), MEMORY, larger=False)
    above = both(lambda process: [process["above"]])
    yield make_row("  the same above weights and optimizer", *above, None, larger=False)


def make_row(name: str, ours: float, other: float | None, bar: float | None, larger: bool = True) -> dict[str, Any]:
    """A row; without a number to compare with, the bar applies to ours."""
    ratio = ours if other is None else ours / other
    passed = bar is None or (ratio >= bar if larger else ratio <= bar)
    return {"name": name, "ours": ours, "other": other, "ratio": None if other is None else ratio, "bar": bar,
            "pass": passed}  # fmt: skip


def as_text(row: dict[str, Any]) -> str:
    other = "" if row["other"] is None else f"  loop {row['other']:10.4g}  ratio {row['ratio']:.3f}"
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:72} ours {row['ours']:10.4g}{other}{bar}"


def worker(what: str, **values: Any) -> Any:
    command = [sys.executable, __file__, "--worker", what, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# The rest runs in worker processes.


class Measured(TypedDict):
    """What a process measured: seconds and processor seconds of its steps but the first, the losses of all, and the
    peak memory in GB (1e9 bytes), as a whole and above what stays between steps."""

    seconds: list[float]
    processor: list[float]
    losses: list[float]
    peak: float
    above: float
    gpu: bool


def make(folder: str, size: str, layers: int | None, **_: int) -> None:
    """Write a float32 folder with CoreNet's initial weights."""
    import mlx_openelm  # noqa: F401 (before MLX, for BLAS)
    from mlx_openelm.config import ModelConfig
    from mlx_openelm.formats import mlx as mlx_format
    from mlx_openelm.formats.safetensors import Weights
    from mlx_openelm.hub import catalog
    from mlx_openelm.training.step.initial_weights import initial_weights

    config = ModelConfig.from_file(catalog.TINY_FOLDER) if size == "tiny" else ModelConfig.from_name(size)
    if layers is not None:
        config = replace(config, num_transformer_layers=layers, num_query_heads=(), num_kv_heads=(),
                         qkv_multipliers=(0.5, 1.0), ffn_multipliers=(0.5, 4.0))  # fmt: skip
    Path(folder).mkdir()
    weights = Weights.of_arrays(initial_weights(config, seed=0))
    mlx_format.write(Path(folder), mlx_format.Checkpoint(config, weights))


def our_step(folder: str) -> Callable[[Any], float]:
    """A function that makes one update as `mlx-openelm pretrain` does, and waits for it."""
    from mlx_openelm import backend
    from mlx_openelm.training.options.pretraining import PretrainOptions
    from mlx_openelm.training.run.planning import plan
    from mlx_openelm.training.step.objectives import CrossEntropy
    from mlx_openelm.training.step.optimizers import make_optimizer
    from mlx_openelm.training.step.updater import Updater

    import mlx.core as mx

    options = PretrainOptions(optimizer="adamw", beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY,
                              max_grad_norm=CLIP, learning_rate=RATE)  # fmt: skip
    model = load_weights(folder)
    model.train()
    dtype = mx.bfloat16 if backend.on_gpu() else None
    updater = Updater(model, make_optimizer(options), objective=CrossEntropy(), max_grad_norm=CLIP, compute_dtype=dtype)
    numbers = iter(range(10**9))

    def step(tokens: Any) -> float:
        batch = our_batch(tokens)
        number = next(numbers)
        if number == 0:
            updater.recompute = plan(updater, options, batch.inputs.shape).recompute
        update = updater.update([batch], batch.num_targets, RATE, number)
        mx.eval(update.loss, update.objective, update.grad_norm, updater.state())
        return float(update.loss.item())

    return step


def load_weights(folder: str) -> Any:
    """Our model with the folder's weights; it has no tokenizer."""
    from mlx_openelm.formats import mlx as mlx_format
    from mlx_openelm.loading import build_model

    return build_model(mlx_format.read(Path(folder)), dtype="float32")


def our_batch(tokens: Any) -> Any:
    from mlx_openelm.training.data.batches import Batch

    rows, length = tokens.shape[0], tokens.shape[1] - 1
    return Batch(tokens[:, :-1], tokens[:, 1:], None, tuple(range(rows)), rows * length, rows * length)


def loop_step(folder: str) -> Callable[[Any], float]:
    """A function that makes one update of mlx-lm's model in a plain MLX loop, compiled, and waits for it."""
    from mlx_openelm import backend

    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    if backend.on_gpu():
        model.set_dtype(mx.bfloat16)
    model.train()
    mx.eval(model.parameters())
    optimizer = optim.AdamW(RATE, list(BETAS), weight_decay=DECAY, bias_correction=True)

    def loss_of(model: Any, tokens: Any) -> Any:
        logits = model(tokens[:, :-1])
        return nn.losses.cross_entropy(logits.astype(mx.float32), tokens[:, 1:], reduction="mean")

    value_and_grad = nn.value_and_grad(model, loss_of)
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def update(tokens: Any) -> Any:
        loss, gradients = value_and_grad(model, tokens)
        gradients, _ = optim.clip_grad_norm(gradients, CLIP)
        optimizer.update(model, gradients)
        return loss

    def step(tokens: Any) -> float:
        loss = update(tokens)
        mx.eval(state, loss)
        return float(loss.item())

    return step


STEPS = {"ours": our_step, "loop": loop_step}


def random_tokens(rows: int, length: int, seed: int) -> Any:
    import mlx.core as mx

    tokens = mx.random.randint(3, 2000, (rows, length + 1), key=mx.random.key(seed))
    mx.eval(tokens)
    return tokens


def run(whose: str, steps: int, folder: str, rows: int, length: int, **_: Any) -> Measured:
    """Make a step, which traces and compiles, and measure the following ones."""
    import mlx_openelm  # noqa: F401 (before MLX; the same BLAS for both)
    from mlx_openelm import backend

    import mlx.core as mx

    step = STEPS[whose](folder)
    found = Measured(seconds=[], processor=[], losses=[], peak=0.0, above=0.0, gpu=backend.on_gpu())
    found["losses"].append(step(random_tokens(rows, length, 0)))
    for number in range(1, 1 + steps):
        tokens = random_tokens(rows, length, number)
        mx.clear_cache()
        between = mx.get_active_memory()
        mx.reset_peak_memory()
        started, used = time.perf_counter(), time.process_time()
        found["losses"].append(step(tokens))
        found["seconds"].append(time.perf_counter() - started)
        found["processor"].append(time.process_time() - used)
        found["peak"] = max(found["peak"], mx.get_peak_memory() / 1e9)
        found["above"] = max(found["above"], (mx.get_peak_memory() - between) / 1e9)
    return found


WORKERS: dict[str, Callable[..., Any]] = {"make": make, "run": run}

if __name__ == "__main__":
    main()
