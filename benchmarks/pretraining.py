"""A step of pretraining compared with a plain MLX loop over mlx-lm's model: tokens per second and memory.

    python benchmarks/pretraining.py                               # the 270M size
    python benchmarks/pretraining.py --layers 4 --length 1024      # its widths in fewer layers
    python benchmarks/pretraining.py --size tiny --json

Both train all weights from the same random ones, in float32 on a CPU and in bfloat16 with float32 masters on a GPU
(the loop: in bfloat16 throughout), on the same batch, with AdamW and clipping, with the same BLAS. They alternate in
one process, a step of ours, a step of the loop's, and the times are medians. Memory is the peak of MLX's buffers,
measured in one process per program: as a whole, and above what stays between steps (weights and the optimizer's state).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

RATE, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
# Bars of speed and of memory, on a CPU and on a GPU.
SPEED, GPU_SPEED, MEMORY = 1.1, 1.4, 0.6
# The first steps trace and compile.
WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="tiny, 270M, 450M, 1_1B")
    parser.add_argument("--layers", type=int, help="so many layers, with the widths of the size's")
    parser.add_argument("--rows", type=int, default=1, help="rows of the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--turns", type=int, default=4, help="steps of each program that are timed")
    parser.add_argument("--only", choices=("speed", "memory"), help="leave the other out")
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
        if arguments.only != "memory":
            found = worker("speed", turns=arguments.turns, **shape)
            bar = GPU_SPEED if found["gpu"] else SPEED
            yield make_row(f"pretraining step (tokens/s), {where}", found["ours"], found["loop"], bar)
            name = "largest relative difference of the losses"
            yield make_row(f"  {name}", found["difference"], None, 0.02 if found["gpu"] else 1e-3, larger=False)
        if arguments.only != "speed":
            ours, loop = (worker("memory", whose=whose, **shape) for whose in ("ours", "loop"))
            yield make_row(f"peak memory (GB), {where}", ours["peak"], loop["peak"], None, larger=False)
            name = f"peak memory above weights and optimizer (GB), {where}"
            yield make_row(name, ours["above"], loop["above"], MEMORY, larger=False)
            yield make_row("  seconds of those steps, each alone", ours["seconds"], loop["seconds"], None, larger=False)


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


def make(folder: str, size: str, layers: int | None, rows: int, length: int) -> None:
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
        mx.eval(update.loss, updater.state())
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


def speed(folder: str, size: str, layers: int | None, rows: int, length: int, turns: int) -> dict[str, Any]:
    """Tokens per second on the same full batches, and the largest relative difference between their losses."""
    import mlx_openelm  # noqa: F401 (the same BLAS for both)
    from mlx_openelm import backend

    steps = {whose: make_step(folder) for whose, make_step in STEPS.items()}
    seconds: dict[str, list[float]] = {whose: [] for whose in steps}
    losses: dict[str, list[float]] = {whose: [] for whose in steps}
    for number in range(WARM + turns):
        tokens = random_tokens(rows, length, number)
        for whose, step in steps.items():
            started = time.perf_counter()
            losses[whose].append(step(tokens))
            if number >= WARM:
                seconds[whose].append(time.perf_counter() - started)
    differences = [abs(ours - loop) / loop for ours, loop in zip(losses["ours"], losses["loop"], strict=True)]
    answer: dict[str, Any] = {whose: rows * length / statistics.median(times) for whose, times in seconds.items()}
    return answer | {"difference": max(differences), "gpu": backend.on_gpu()}


def memory(whose: str, folder: str, size: str, layers: int | None, rows: int, length: int) -> dict[str, float]:
    """The peak of the third step in GB (1e9 bytes), as a whole and above what stays between steps."""
    import mlx_openelm  # noqa: F401 (before MLX)

    import mlx.core as mx

    step = STEPS[whose](folder)
    for number in range(WARM):
        step(random_tokens(rows, length, number))
    mx.clear_cache()
    kept = mx.get_active_memory()
    mx.reset_peak_memory()
    tokens, started = random_tokens(rows, length, WARM), time.perf_counter()
    step(tokens)
    seconds = time.perf_counter() - started
    return {"peak": mx.get_peak_memory() / 1e9, "above": (mx.get_peak_memory() - kept) / 1e9, "seconds": seconds}


WORKERS: dict[str, Callable[..., Any]] = {"make": make, "speed": speed, "memory": memory}

if __name__ == "__main__":
    main()
