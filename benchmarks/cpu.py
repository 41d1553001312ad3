"""Generation and QLoRA on a CPU, compared with llama.cpp, mlx-lm and the memory bandwidth.

    python benchmarks/cpu.py                                        # the 270M size, and tiny
    python benchmarks/cpu.py --only "4 bit" --cache /tmp/m --json   # keeps the models it makes
    python benchmarks/cpu.py --size 1_1B --without QLoRA            # slow

Models of published sizes have random weights, the same in every program's files. Programs take turns, each in its own
process; rows are medians over turns. On a busy machine llama.cpp suffers most, because its threads wait for each other.
Its rows need `pip install llama-cpp-python`, which compiles for about ten minutes. mlx-lm uses the BLAS of MLX's wheel
or OpenBLAS, as the name of a row says. In rows named float32, mlx-lm computes in float32: with packed weights it is
then several times faster than in bfloat16, which it would choose because of their scales. Linux only: memory is read
from /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import generation
import training

PROMPT_LENGTHS = generation.PROMPT_LENGTHS
# Rows and length of a QLoRA batch; even this small one takes mlx-lm half a minute.
QLORA_SHAPE = (1, 64)

OURS, LLAMA_CPP, WHEEL, OPENBLAS = "ours", "llama.cpp", "mlx-lm as its wheel comes", "mlx-lm with OpenBLAS"
WHEEL_FLOAT32 = f"{WHEEL}, in float32"
# Tokens generated before and during the timing of decoding, if not 16 and 48; with the wheel's BLAS mlx-lm needs two
# seconds per token.
DECODED = {"tiny": (16, 256), WHEEL: (1, 6), WHEEL_FLOAT32: (1, 6)}


@dataclass(frozen=True)
class Type:
    """How weights are stored: flags of `mlx-openelm convert`, llama.cpp's nearest type, and the bars.

    `decode` and `prompt` are ours / llama.cpp's tokens a second, `share` what decoding uses of the memory's bandwidth.
    """

    flags: tuple[str, ...]
    gguf: str
    decode: float
    prompt: float
    share: float | None


TYPES = {
    "4 bit": Type(("-q",), "q4_0", decode=1.1, prompt=0.5, share=0.55),
    "8 bit": Type(("-q", "--q-bits", "8"), "q8_0", decode=1.0, prompt=0.7, share=None),
    "bfloat16": Type(("--dtype", "bfloat16"), "bf16", decode=1.0, prompt=0.5, share=0.85),
    "float32": Type(("--dtype", "float32"), "f32", decode=1.0, prompt=0.7, share=0.85),
}


class Job(NamedTuple):
    """A number to measure: `key` in the result of worker `what` for a program and a model."""

    what: str
    program: str
    model: str
    key: str


@dataclass(frozen=True)
class Plan:
    """A row to measure; of several other programs the fastest counts."""

    name: str
    ours: Job
    others: tuple[Job, ...] = ()
    bar: float | None = None
    larger: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the true size to measure: 270M, 450M, 1_1B, 3B")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program; rows are medians")
    parser.add_argument("--only", default="", help="measure only rows whose name contains this")
    parser.add_argument("--without", help="leave out rows whose name contains this, such as QLoRA")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every program; by default all cores")
    parser.add_argument("--cache", type=Path, help="make models in this folder and keep them for the next run")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=4, metavar=("WHAT", "PROGRAM", "MODEL", "KEYS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, program, model, keys = arguments.worker
        answer = WORKERS[what](program, model, keys.split(","))
        if not callable(answer):
            print(json.dumps(answer))
            return
        for _ in sys.stdin:  # one turn per line
            print(json.dumps(answer()), flush=True)
        return
    os.environ["OMP_NUM_THREADS"] = generation.ENVIRONMENT["OMP_NUM_THREADS"] = str(arguments.threads)
    groups = choose(plans(arguments.size, arguments.threads), arguments.only, arguments.without)
    rows = []
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        models = Models(arguments.size, arguments.cache or Path(temporary))
        for row in measure(groups, models, arguments.repeats):
            rows.append(row)
            if not arguments.json:
                print(training.as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def plans(size: str, threads: int) -> Iterator[list[Plan]]:
    """The rows, grouped by those that are measured in the same turns."""
    bandwidth = Job("bandwidth", "memory", "", "read")
    yield [Plan(f"memory bandwidth, {threads} threads (GB/s)", bandwidth)]
    for name, kind in TYPES.items():
        compared = partial(plan_compared, name, size)
        share = Job("speed", OURS, name, "read")
        yield [
            Plan(f"decoding's share of the bandwidth (GB/s), {name}, {size}", share, (bandwidth,), kind.share),
            compared("decoding (tokens/s)", "speed", "decode", kind.decode),
            *(compared("decoding (tokens/s)", "speed", "decode", bar, program)
              for program, bar in ((WHEEL, 30), (WHEEL_FLOAT32, None)) if name == "4 bit"),
            *(compared(f"prompt of {n} (tokens/s)", "speed", f"prompt_{n}", kind.prompt) for n in PROMPT_LENGTHS),
            compared("peak memory (MB)", "memory", "peak", 1.2, larger=False),
        ]  # fmt: skip
    both = tuple(Job("speed", OPENBLAS, model, "decode") for model in ("tiny", "tiny-float32"))
    yield [Plan(f"decoding (tokens/s), tiny, {OPENBLAS}", Job("speed", OURS, "tiny", "decode"), both, 8)]
    ours, theirs = (Job("qlora", "both", "4 bit", whose) for whose in ("ours", "mlx-lm"))
    yield [Plan(f"QLoRA step (tokens/s), {size}, {OPENBLAS}, in float32", ours, (theirs,), 3)]


def plan_compared(
    name: str, size: str, title: str, what: str, key: str, bar: float | None, program: str = LLAMA_CPP, **options: Any
) -> Plan:
    """A row of ours and another program, both with weights of the type `name`."""
    own, other = (Job(what, whose, name, key) for whose in (OURS, program))
    gguf = f" {TYPES[name].gguf}" if program == LLAMA_CPP else ""
    return Plan(f"{title}, {name}, {size}, {program}{gguf}", own, (other,), bar, **options)


def choose(groups: Iterator[list[Plan]], only: str, without: str | None) -> list[list[Plan]]:
    """The selected rows, without llama.cpp's if it is not installed."""
    chosen = [[row for row in rows if only in row.name and (not without or without not in row.name)] for rows in groups]
    if not any(LLAMA_CPP in row.name for rows in chosen for row in rows):
        return chosen
    if subprocess.run([sys.executable, "-c", "import llama_cpp"], capture_output=True).returncode == 0:
        return chosen
    advice = "`pip install llama-cpp-python` brings them (it compiles for about ten minutes)."
    print(f"llama.cpp's rows are left out; {advice}", file=sys.stderr)
    return [[row for row in rows if LLAMA_CPP not in row.name] for rows in chosen]


def measure(groups: list[list[Plan]], models: Models, repeats: int) -> Iterator[dict[str, Any]]:
    for group in groups:
        measured = in_turns({job for plan in group for job in (plan.ours, *plan.others)}, models, repeats)
        for plan in group:
            other = max((measured[job] for job in plan.others), default=None)
            yield training.make_row(plan.name, measured[plan.ours], other, plan.bar, plan.larger)


def in_turns(jobs: set[Job], models: Models, repeats: int) -> dict[Job, float]:
    """The median of every job; in each turn every program answers all its jobs, in its own process.

    Jobs that measure speed stay loaded from turn to turn. So turns follow each other within seconds, and other load on
    the machine affects all programs equally. The bandwidth is the best of all turns.
    """
    processes: dict[tuple[str, str, str], list[Job]] = {}
    for job in sorted(jobs):
        processes.setdefault((job.what, job.model, job.program), []).append(job)
    paths = {process: models.path(process[2], process[1]) for process in processes}
    measured: dict[Job, list[float]] = {job: [] for job in jobs}
    with contextlib.ExitStack() as stack:
        loaded = {
            process: stack.enter_context(Loaded("speed", process[2], paths[process], keys_of(requested)))
            for process, requested in processes.items()
            if process[0] == "speed"
        }
        for _ in range(repeats):
            for process, requested in processes.items():
                what, _, program = process
                if process in loaded:
                    answer = loaded[process].turn()
                else:
                    answer = worker(what, program, paths[process], keys_of(requested))
                for job in requested:
                    measured[job].append(answer[job.key])
    return {job: (max if job.what == "bandwidth" else statistics.median)(values) for job, values in measured.items()}


def keys_of(jobs: Sequence[Job]) -> str:
    return ",".join(job.key for job in jobs)


def worker(*arguments: str) -> dict[str, float]:
    output = generation.run([sys.executable, __file__, "--worker", *arguments], **environment_of(arguments[1]))
    return json.loads(output.splitlines()[-1])


def environment_of(program: str) -> dict[str, str]:
    return {"MLX_OPENELM_BLAS": "0"} if program.startswith(WHEEL) else {}


class Loaded:
    """A worker that keeps its model from turn to turn."""

    def __init__(self, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=generation.ENVIRONMENT | environment_of(arguments[1]),
        )  # fmt: skip

    def turn(self) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("a worker failed; its error is above")

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


@dataclass
class Models:
    """The same weights in every type and format, each made at its first use."""

    size: str
    folder: Path

    def path(self, program: str, model: str) -> str:
        """The path of a model for a program: one of `TYPES`, `tiny` as packaged, `tiny-float32`, or none."""
        if not model:
            return ""
        if model == "tiny":
            from mlx_openelm.hub.catalog import TINY_FOLDER

            return str(TINY_FOLDER)
        self.folder.mkdir(parents=True, exist_ok=True)
        if model == "tiny-float32":
            return self._make(model, ["convert", "--model", "tiny", "--dequantize", "--dtype", "float32", "--mlx-path"])
        random = self.folder / f"{self.size}-float32"
        if not random.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as unfinished:
                worker("weights", self.size, f"{unfinished}/model", "")
                Path(unfinished, "model").rename(random)
        kind = TYPES[model]
        if program == LLAMA_CPP:
            flags = ["export", "--format", "gguf", "--gguf-type", kind.gguf, "--model", str(random), "--output"]
            return self._make(f"{self.size}-{kind.gguf}.gguf", flags)
        name = f"{self.size}-{model.replace(' ', '-')}"
        return self._make(name, ["convert", "--model", str(random), *kind.flags, "--mlx-path"])

    def _make(self, name: str, command: list[str]) -> str:
        path = self.folder / name
        if not path.exists():  # nothing appears there half-written
            generation.run([sys.executable, "-m", "mlx_openelm", *command, str(path)])
        return str(path)


# Workers, each in its own process. They return numbers by name.


def weights(size: str, folder: str, _: Sequence[str]) -> dict[str, float]:
    """Make the float32 folder that all others are made from, with the tokenizer of `tiny`."""
    from mlx_openelm.hub.catalog import TINY_FOLDER

    generation.make_weights(size, Path(folder), TINY_FOLDER)
    return {}


def bandwidth(_: str, __: str, ___: Sequence[str]) -> dict[str, float]:
    """GB (1e9 bytes) per second of threads that together read 1 GiB, the best of ten times.

    The maximum is cheap to compute with SIMD, so only memory limits the speed.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    threads = int(os.environ["OMP_NUM_THREADS"])
    values = np.ones(1 << 28, np.float32)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            started = time.perf_counter()
            list(pool.map(np.max, np.array_split(values, threads)))
            seconds.append(time.perf_counter() - started)
    return {"read": values.nbytes / min(seconds) / 1e9}


def speed(program: str, path: str, keys: Sequence[str]) -> Callable[[], dict[str, float]]:
    """A turn: tokens per second of a program's own decoding loop, and GB per second of weights read in decoding."""
    seconds = generate(program, path)
    prompts = [int(key.removeprefix("prompt_")) for key in keys if key.startswith("prompt_")]
    start, count = DECODED.get("tiny" if Path(path).name.startswith("tiny") else program, (16, 48))
    seconds(max(prompts, default=start), 2)

    def turn() -> dict[str, float]:
        answer = {}
        if {"decode", "read"} & set(keys):
            answer["decode"] = 1 / seconds(start, count)
        if "read" in keys:
            answer["read"] = answer["decode"] * bytes_of_matrices(path) / 1e9
        return answer | {f"prompt_{n}": n / seconds(n, 1) for n in prompts}

    return turn


def generate(program: str, path: str) -> Callable[[int, int], float]:
    """A function from prompt length and new tokens to seconds: of the prompt if one token, else per further token."""
    if program == LLAMA_CPP:
        return generate_with_llama_cpp(path)
    if program == OURS:
        return generation.generation("ours", generation.load_ours(path)[0])
    model = generation.load_theirs(path)[0]
    if program == WHEEL_FLOAT32:
        in_float32(model)
    return generation.generation("mlx-lm", model)


def in_float32(model: Any) -> None:
    """Make a model compute in float32; packed weights stay packed."""
    import mlx.core as mx

    model.set_dtype(mx.float32)


def generate_with_llama_cpp(path: str) -> Callable[[int, int], float]:
    """`generate`, through llama.cpp's own functions: its Python classes copy and sample more slowly.

    Flash attention is on, as llama.cpp has it by default where it can; its Python package would turn it off, which
    costs a sixth of the speed.
    """
    import llama_cpp
    import numpy as np

    threads = int(os.environ["OMP_NUM_THREADS"])
    llama = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads,
                            flash_attn=True, verbose=False)  # fmt: skip
    vocabulary = llama.n_vocab()

    def step(tokens: list[int]) -> int:
        """The most likely token after these and the earlier ones."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # the batch only points to it
        if llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            sys.exit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    def seconds(prompt_length: int, count: int) -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        prompt = [1 + i % 1000 for i in range(prompt_length)]
        started = time.perf_counter()
        token = step(prompt)
        first = time.perf_counter()
        for _ in range(count - 1):
            token = step([token])
        return first - started if count == 1 else (time.perf_counter() - first) / (count - 1)

    return seconds


def bytes_of_matrices(folder: str) -> int:
    """Of all matrices as stored, with scales: decoding reads each once per token, the shared embedding for logits."""
    import mlx.core as mx

    files = Path(folder).glob("*.safetensors")
    return sum(array.nbytes for file in files for array in mx.load(str(file)).values() if array.ndim > 1)


def memory(program: str, path: str, _: Sequence[str]) -> dict[str, float]:
    """Peak MB (1e6 bytes) of loading, a prompt of 512 and 16 tokens, above a bare interpreter.

    Resident pages count, including those of mapped files, which llama.cpp reads its weights from: the system may drop
    them, but decoding reads all of them for every token.
    """
    generate(program, path)(max(PROMPT_LENGTHS), 16)
    status = Path("/proc/self/status").read_text()
    bare = generation.run([sys.executable, "-c", "print(open('/proc/self/status').read())"])
    own_kib, bare_kib = (int(text.split("VmHWM:")[1].split()[0]) for text in (status, bare))
    return {"peak": (own_kib - bare_kib) * 1024 / 1e6}


def qlora(_: str, path: str, __: Sequence[str]) -> dict[str, float]:
    """Tokens per second of one update of both programs, with the same adapter on the same packed weights."""
    answer = {}
    programs = training.both(path, "lora")
    in_float32(programs["mlx-lm"].model)
    for whose, program in programs.items():
        program.step(training.token_batch(whose, 1, 4))  # a small batch, to compile
        batch = training.token_batch(whose, *QLORA_SHAPE)
        started = time.perf_counter()
        program.step(batch)
        answer[whose] = QLORA_SHAPE[0] * QLORA_SHAPE[1] / (time.perf_counter() - started)
    return answer


WORKERS: dict[str, Callable[[str, str, Sequence[str]], Any]] = {
    "weights": weights,
    "bandwidth": bandwidth,
    "speed": speed,
    "memory": memory,
    "qlora": qlora,
}

if __name__ == "__main__":
    main()
