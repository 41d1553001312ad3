"""Generation and training on an NVIDIA or Apple GPU, compared with mlx-lm; under five minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --sizes 270M,3B --only decode,prompt --json rows.json
    python benchmarks/gpu.py --smoke            # a model of two layers, also on a CPU: checks that everything runs

It prints a Markdown table, line by line. Both programs run in one process, in turns, on the same random weights, in
bfloat16 or packed in 4 bits in groups of 64. Rows are medians over turns; first runs, which compile kernels, are not
timed.

- Decoding: 128 tokens after the first one, with a prompt of 32. "Bandwidth" is the rate of reading every weight once
  per token, as a share of the rate of a copy. The time of a prompt ends with its first token.
- Steps of LoRA (rank 8 on the four matrices of every layer) and of full fine-tuning (the weights of every layer) with
  Adam, on equal full batches. Memory is the peak of MLX's buffers above the model in bfloat16, including everything
  that training keeps. Each program trains with its defaults: in full fine-tuning our weights and Adam's moments are
  float32, mlx-lm's bfloat16.
- Cold start: from the command to the first character, with `tiny` in bfloat16, in a separate process.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_openelm import backend, convert
from mlx_openelm.config import ModelConfig
from mlx_openelm.formats.mlx import Checkpoint, Quantization
from mlx_openelm.formats.packing import quantize_weights
from mlx_openelm.formats.safetensors import Weights
from mlx_openelm.loading import build_model

import generation
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import random_model
import training

OURS, THEIRS = PROGRAMS = ("ours", "mlx-lm")
PARTS = ("start", "decode", "prompt", "lora", "full")
METHODS = {"lora": "LoRA", "full": "full fine-tuning"}
# The minimum ratio of ours to mlx-lm's; for memory and seconds, the maximum.
BARS = {"start": 1.0, "decode": 1.15, "prompt": 1.0, "step": 1.3, "memory": 1.0}
PACKING = Quantization.make()
PROMPT_OF_DECODING = 32
COLUMNS = "| | ours | mlx-lm | ratio | bandwidth |\n| --- | --- | --- | --- | --- |"

Row = dict[str, Any]
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class Work:
    """What to measure: models by name, lengths, and shapes [rows, length] of training by method and model."""

    configs: dict[str, ModelConfig]
    decoded: int
    prompts: tuple[int, ...]
    shapes: dict[str, dict[str, tuple[int, int]]]
    steps: int  # timed per turn


FULL = Work(
    configs={size: ModelConfig.from_name(size) for size in ("270M", "1.1B", "3B")},
    decoded=128,
    prompts=(512, 1900),
    shapes={
        "lora": {"270M": (4, 512), "1.1B": (4, 1024), "3B": (2, 1024)},
        "full": {"270M": (8, 1024), "1.1B": (2, 1024)},
    },
    steps=5,
)
_TWO_LAYERS = ModelConfig(
    num_transformer_layers=2,
    model_dim=128,
    head_dim=32,
    vocab_size=2048,
    num_gqa_groups=4,
    ffn_multipliers=(1.0, 2.0),
    normalize_qk_projections=True,
    share_input_output_layers=True,
)
SMOKE = Work(
    configs={"smoke": _TWO_LAYERS},
    decoded=4,
    prompts=(8, 24),
    shapes={"lora": {"smoke": (2, 16)}, "full": {"smoke": (2, 16)}},
    steps=1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=names, help="of 270M, 1.1B and 3B; by default all, comma-separated")
    parser.add_argument("--only", type=names, default=PARTS, help=f"of {', '.join(PARTS)}; by default all")
    parser.add_argument("--repeats", type=int, help="turns of each program, by default 5; rows are medians")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which no more turns are started")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was measured to this file")
    parser.add_argument("--smoke", action="store_true", help="a model of two layers, one turn, also on a CPU")
    arguments = parser.parse_args()
    work = SMOKE if arguments.smoke else FULL
    sizes = arguments.sizes or tuple(work.configs)
    for given, known in ((sizes, work.configs), (arguments.only, PARTS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not (backend.on_gpu() or arguments.smoke):
        sys.exit(
            "MLX has no GPU to use here. benchmarks/cpu.py measures a CPU; --smoke only checks that this one runs."
        )
    repeats = arguments.repeats or (1 if arguments.smoke else 5)
    with backend.wired_limit():
        failed = Benchmark(work, Turns(repeats, arguments.budget), arguments.json).run(sizes, arguments.only)
    sys.exit(1 if failed else 0)


def names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Turns:
    """Iterates over as many turns as time allows, at least one."""

    def __init__(self, repeats: int, budget: float):
        self.repeats, self.budget, self.cut = repeats, budget, False
        self.started = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def __iter__(self) -> Iterator[int]:
        for turn in range(self.repeats):
            if turn and self.seconds() > self.budget:
                self.cut = True
                return
            yield turn


@dataclass
class Benchmark:
    work: Work
    turns: Turns
    file: Path | None
    bandwidth: float = 0.0  # bytes per second
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False

    def run(self, sizes: Iterable[str], only: Iterable[str]) -> bool:
        """Print the table; returns whether something failed."""
        self.bandwidth = copy_bandwidth()
        release()
        print(f"{self.title()}\n\n{COLUMNS}", flush=True)
        if "start" in only:
            self.attempt("cold start", lambda: cold_start(self.turns))
        for size in sizes:
            self.measure(size, self.work.configs[size], only)
        if self.turns.cut:
            self.notes.append(f"The time limit of {self.turns.budget:g} s was reached: some rows have fewer turns.")
        print("\n" + "\n".join([*self.notes, f"Total time: {self.turns.seconds():.0f} s."]))
        self.save()
        return self.failed

    def title(self) -> str:
        facts = backend.describe()
        return (
            f"{facts['device_name']} ({facts['device']}), MLX {facts['mlx_version']}, mlx-lm {version('mlx-lm')}; "
            f"a copy reads and writes {self.bandwidth / 1e9:,.0f} GB/s"
        )

    def measure(self, size: str, config: ModelConfig, only: Iterable[str]) -> None:
        """Print the rows of a size. Both programs share its weights; each part frees its arrays before the next."""
        generating = [part for part in ("decode", "prompt") if part in only]
        trained = [method for method in METHODS if method in only and size in self.work.shapes[method]]
        needs = {"generating": 2.6 * config.num_parameters} if generating else {}
        needs |= {method: training_needs(config, method, self.work.shapes[method][size]) for method in trained}
        fitting = self.fitting(size, needs)
        if not fitting:
            return
        arrays = random_weights(config)
        if "generating" in fitting:
            for kind in ("bfloat16", "4 bits"):
                own = arrays if kind == "bfloat16" else pack(arrays, config)
                self.attempt(
                    f"{kind}, {size}", lambda own=own, kind=kind: self.generate(config, own, kind, size, generating)
                )
                del own
        for method in trained:
            if method in fitting:
                self.attempt(f"{method}, {size}", lambda method=method: self.train(config, arrays, method, size))

    def fitting(self, size: str, needs: dict[str, float]) -> list[str]:
        """Those of `needs` (bytes by name) that fit into the device's memory; a note lists the others."""
        room = memory_of_device()
        for name, count in needs.items():
            if count > room:
                need = f"{count / 1e9:.0f} GB, and there are {room / 1e9:.0f}"
                self.notes.append(f"Left out: {name}, {size}, which needs about {need}.")
        return [name for name, count in needs.items() if count <= room]

    def attempt(self, name: str, part: Callable[[], Iterable[Row]]) -> None:
        """Print the rows of a part; a failure does not stop the other parts."""
        try:
            for row in part():
                self.rows.append(row)
                print(as_markdown(row), flush=True)
        except (Exception, SystemExit) as error:  # a program that fails to start exits
            self.failed = True
            traceback.print_exc()
            self.notes.append(f"Failed: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        release()
        self.save()

    def save(self) -> None:
        if self.file is not None:
            answer = {
                "title": self.title(),
                "copy_bytes_per_second": self.bandwidth,
                "rows": self.rows,
                "notes": self.notes,
                "seconds": self.turns.seconds(),
            }
            self.file.write_text(json.dumps(answer, indent=2) + "\n")

    def generate(self, config: ModelConfig, arrays: Arrays, kind: str, size: str, parts: list[str]) -> Iterator[Row]:
        """Rows of decoding and of prompts."""
        quantization = packing_of(config) if kind == "4 bits" else {}
        models = {OURS: our_model(config, arrays, quantization), THEIRS: their_model(config, arrays, quantization)}
        streams = {whose: generation.token_stream(whose, model) for whose, model in models.items()}
        if "decode" in parts:
            measured = in_turns(self.turns, lambda whose: [1 / token_seconds(streams[whose], self.work.decoded)])
            row = make_row(f"decoding, {kind}, {size} (tokens/s)", measured, BARS["decode"])
            size_of_weights = sum(array.nbytes for array in arrays.values())
            yield row | {"bandwidth": row["ours"] * size_of_weights / self.bandwidth}
        for length in self.work.prompts if "prompt" in parts else ():
            measured = in_turns(self.turns, lambda whose, n=length: [n / prompt_seconds(streams[whose], n)])
            yield make_row(f"prompt of {length}, {kind}, {size} (tokens/s)", measured, BARS["prompt"])

    def train(self, config: ModelConfig, arrays: Arrays, method: str, size: str) -> Iterator[Row]:
        """Rows of the speed and the memory of a step."""
        shape = self.work.shapes[method][size]
        steps, memory = {}, {}
        for whose, make in ((OURS, our_step), (THEIRS, their_step)):
            release()
            before = mx.get_active_memory()
            steps[whose] = make(config, arrays, method)
            memory[whose] = [(peak_of_step(steps[whose], training.token_batch(whose, *shape)) - before) / 1e9]
        if method == "full":  # the old weights were replaced, and only `arrays` still holds them
            replaced = sum(array.nbytes for name, array in arrays.items() if ".layers." in name) / 1e9
            memory = {whose: [peak - replaced for peak in peaks] for whose, peaks in memory.items()}

        def rates(whose: str) -> list[float]:
            batch = training.token_batch(whose, *shape)
            mx.clear_cache()
            steps[whose](batch)
            return [shape[0] * shape[1] / seconds_of(lambda: steps[whose](batch)) for _ in range(self.work.steps)]

        name = f"{METHODS[method]}, {shape[0]} × {shape[1]}, {size}"
        yield make_row(f"{name} (tokens/s)", in_turns(self.turns, rates), BARS["step"])
        yield make_row(f"memory above the weights (GB), {name}", memory, BARS["memory"], larger=False)


def in_turns(turns: Iterable[int], run: Callable[[str], list[float]]) -> dict[str, list[float]]:
    """The results of `run` for each program in every turn, after a first run that is discarded."""
    measured: dict[str, list[float]] = {whose: [] for whose in PROGRAMS}
    for whose in PROGRAMS:
        run(whose)
    for _ in turns:
        for whose in PROGRAMS:
            measured[whose] += run(whose)
    return measured


def make_row(name: str, measured: dict[str, list[float]], bar: float, larger: bool = True) -> Row:
    ours, theirs = (statistics.median(measured[whose]) for whose in PROGRAMS)
    return training.make_row(name, ours, theirs, bar, larger) | {"bandwidth": None}


def as_markdown(row: Row) -> str:
    values = [f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in (row["ours"], row["other"])]
    share = "" if row["bandwidth"] is None else f"{row['bandwidth']:.2f}"
    return f"| {row['name']} | {values[0]} | {values[1]} | {row['ratio']:.2f} | {share} |"


# The device.


def memory_of_device() -> float:
    """Bytes available to this process; infinite if MLX does not know, as on a CPU."""
    facts = mx.device_info()
    held = mx.get_active_memory()  # by earlier measurements
    if "free_memory" in facts:
        return float(facts["free_memory"]) + held + mx.get_cache_memory()
    return float(facts.get("max_recommended_working_set_size", "inf"))


def training_needs(config: ModelConfig, method: str, shape: tuple[int, int]) -> float:
    """Bytes of a training step of the more demanding program, mlx-lm, as measured for LoRA on an H200.

    For full fine-tuning this adds the weights, moments and gradients of both programs.
    """
    activations = shape[0] * shape[1] * (75 * config.num_transformer_layers * config.model_dim + 12 * config.vocab_size)
    return activations + config.num_parameters * (26 if method == "full" else 2)


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes, the best of several; it flips signs, at no extra cost."""
    passes, numbers = 8, 1 << 20 if not backend.on_gpu() else 1 << 28
    values = mx.ones(numbers)
    mx.eval(values)

    def run() -> None:
        copy = values
        for _ in range(passes):
            copy = -copy
        mx.eval(copy)

    run()
    best = min(seconds_of(run) for _ in range(5))
    return passes * 2 * values.nbytes / best


def seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def release() -> None:
    gc.collect()
    mx.clear_cache()


# Models.


def random_weights(config: ModelConfig) -> Arrays:
    made = {}
    for name, array in random_model.weights(config, mx.bfloat16).items():
        mx.eval(array)
        made[name] = array
    return made


def packing_of(config: ModelConfig) -> dict[str, Quantization]:
    return dict.fromkeys(config.matrix_shapes(), PACKING)


def pack(arrays: Arrays, config: ModelConfig) -> Arrays:
    packed = quantize_weights(Weights.of_arrays(arrays), packing_of(config))
    made = {name: packed.take(name) for name in list(packed)}
    mx.eval(made)
    return made


def our_model(config: ModelConfig, arrays: Arrays, quantization: dict[str, Quantization]) -> Any:
    return build_model(Checkpoint(config, Weights.of_arrays(arrays), quantization), dtype=mx.bfloat16)


def their_model(config: ModelConfig, arrays: Arrays, quantization: dict[str, Quantization]) -> Any:
    from mlx_lm.models.openelm import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config.to_dict()))
    if quantization:
        nn.quantize(model, PACKING.group_size, PACKING.bits)
    # The random initial weights of its layers are never computed.
    model.load_weights(list(arrays.items()))
    model.eval()
    mx.eval(mx.random.state)
    return model


# Generating.


def token_seconds(stream: Callable[[list[int], int], Iterator[Any]], count: int) -> float:
    """Seconds of each of `count` tokens after the first."""
    tokens = stream(generation.make_prompt(PROMPT_OF_DECODING), count + 1)
    next(tokens)
    seconds = seconds_of(lambda: sum(1 for _ in tokens))
    settle()
    return seconds / count


def prompt_seconds(stream: Callable[[list[int], int], Iterator[Any]], length: int) -> float:
    """Seconds to the first of two tokens: both programs return it once the second one is queued.

    An untimed run comes first, so that MLX's buffers are those that the program itself leaves behind.
    """
    seconds = []
    for _ in range(2):
        tokens = stream(generation.make_prompt(length), 2)
        seconds.append(seconds_of(lambda tokens=tokens: next(tokens)))
        for _ in tokens:
            pass
        settle()
    return seconds[-1]


def settle() -> None:
    """Wait for work that a program has queued beyond its last token."""
    from mlx_lm.generate import generation_stream

    mx.synchronize()
    mx.synchronize(generation_stream)


# Training.


def our_step(config: ModelConfig, arrays: Arrays, method: str) -> Callable[[Any], float]:
    model = our_model(config, arrays, {})
    options = {"compute_dtype": mx.bfloat16} if method == "full" else {}
    return training.our_step(model, method, optim.Adam(training.RATE), **options)


def their_step(config: ModelConfig, arrays: Arrays, method: str) -> Callable[[Any], float]:
    model = their_model(config, arrays, {})
    return training.their_step(model, method, optim.Adam(training.RATE))


def peak_of_step(step: Callable[[Any], float], batch: Any) -> int:
    """The most bytes that MLX holds during a step, after two others."""
    for _ in range(2):
        step(batch)
    mx.clear_cache()
    mx.reset_peak_memory()
    step(batch)
    return mx.get_peak_memory()


# The command.


def cold_start(turns: Turns) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        folder = convert("tiny", Path(temporary) / "tiny", dequantize=True, dtype="bfloat16").path
        measured = in_turns(turns, lambda whose: [generation.cold_start(whose, folder)])
    yield make_row("cold start of generate, tiny (s)", measured, BARS["start"], larger=False)


if __name__ == "__main__":
    main()
