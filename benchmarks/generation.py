"""Generation compared with mlx-lm: cold start, graph size, prompts, decoding, memory.

    python benchmarks/generation.py                    # tiny and the 270M size
    python benchmarks/generation.py --size 1_1B --json

Models of published sizes have random weights, made for the run. Both programs read the same folder; rows are medians
over turns. Graphs and speeds are measured in turns within one process, and so with the same BLAS. Cold starts, memory,
and mlx-lm with the BLAS of MLX's wheel are measured in a separate process for each program.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import random_model

PROMPT_LENGTHS = (128, 512)
TEXT = "To be, or not to be"
# Keep compiled modules, as on a user's machine, even if the environment turns that off.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", default="270M", help="the published size to measure, besides tiny: 270M, 450M, 1_1B, 3B"
    )
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program; rows are medians")
    parser.add_argument("--only", help="measure only rows whose name contains this")
    parser.add_argument("--without-bundled", action="store_true", help="leave out the rows that take minutes")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "WHOSE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker[0]](*arguments.worker[1:])))
        return
    rows = []
    for row in measure(arguments.size, arguments.repeats, arguments.only or "", not arguments.without_bundled):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measure(size: str, repeats: int, only: str, with_bundled: bool) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
        tiny = Path(temporary) / "tiny"
        run([sys.executable, "-m", "mlx_openelm", "convert", "--model", "tiny", "--dequantize", "--dtype", "float32",
             "--mlx-path", str(tiny)])  # fmt: skip
        large = Path(temporary) / size
        # Each plan: name, worker, folder, bar on ours / theirs, larger is better.
        plans: list[tuple[str, str, Path, float | None, bool]] = [
            ("cold start (s), tiny", "cold", tiny, 0.15, False),
            ("primitives in a token's graph, tiny", "graph.primitives", tiny, 0.6, False),
            ("time to build it (ms), tiny", "graph.build_ms", tiny, 0.6, False),
            ("decoding (tokens/s), tiny", "speed.decode", tiny, 1.6, True),
            *((f"prompt of {n} (tokens/s), tiny", f"speed.prompt_{n}", tiny, 1.0, True) for n in PROMPT_LENGTHS),
            ("peak memory of the process (MB), tiny", "memory.process", tiny, 1.0, False),
            ("peak memory of MLX (MB), tiny", "memory.mlx", tiny, 1.0, False),
            (f"primitives in a token's graph, {size}", "graph.primitives", large, 0.6, False),
            (f"time to build it (ms), {size}", "graph.build_ms", large, 0.6, False),
            (f"decoding (tokens/s), {size}", "speed.decode", large, 1.08, True),
            *((f"prompt of {n} (tokens/s), {size}", f"speed.prompt_{n}", large, 1.0, True) for n in PROMPT_LENGTHS),
            (f"peak memory of the process (MB), {size}", "memory.process", large, 1.0, False),
            (f"peak memory of MLX (MB), {size}", "memory.mlx", large, 1.0, False),
            *((f"prompt of {n} (tokens/s), {size}, mlx-lm as its wheel comes", f"bundled.prompt_{n}", large, 15.0, True)
              for n in PROMPT_LENGTHS),
        ]  # fmt: skip
        plans = [plan for plan in plans if only in plan[0] and (with_bundled or not plan[1].startswith("bundled"))]
        if any(plan[2] == large for plan in plans):
            make_weights(size, large, tiny)
        results: dict[tuple[str, Path], dict[str, dict[str, list[float]]]] = {}
        for name, what, folder, bar, larger in plans:
            worker, _, key = what.partition(".")
            if (worker, folder) not in results:
                results[worker, folder] = in_turns(worker, folder, repeats)
            measured = results[worker, folder]
            ours, other = (statistics.median(measured[whose][key or "value"]) for whose in ("ours", "mlx-lm"))
            ratio = ours / other
            passed = bar is None or (ratio >= bar if larger else ratio <= bar)
            yield {"name": name, "ours": ours, "other": other, "ratio": ratio, "bar": bar, "pass": passed}


def as_text(row: dict[str, Any]) -> str:
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:68} ours {row['ours']:10.4g}  mlx-lm {row['other']:10.4g}  ratio {row['ratio']:.3f}{bar}"


def in_turns(worker: str, folder: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Every result of `worker` by program and key, the programs taking turns."""
    collected: dict[str, dict[str, list[float]]] = {"ours": {}, "mlx-lm": {}}
    turns = ("both",) if worker in ("graph", "speed") else ("ours", "mlx-lm")
    for _ in range(repeats):
        for whose in turns:
            if worker == "cold":
                answer = {"value": cold_start(whose, folder)}
            else:
                answer = in_process(worker, whose, folder)
            for program, values in answer.items() if whose == "both" else [(whose, answer)]:
                for key, value in values.items():
                    collected[program].setdefault(key, []).extend(value if isinstance(value, list) else [value])
    return collected


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def in_process(worker: str, whose: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", worker, whose, str(folder)]
    # Without another BLAS, mlx-lm gets the one of MLX's wheel.
    environment = {"MLX_OPENELM_BLAS": "0"} if (worker, whose) == ("bundled", "mlx-lm") else {}
    return json.loads(run(command, **environment).splitlines()[-1])


def cold_start(whose: str, folder: Path) -> float:
    """Seconds from starting a process to the first character of generated text."""
    module = "mlx_openelm" if whose == "ours" else "mlx_lm"
    arguments = ["generate", "--model", str(folder), "--prompt", TEXT, "--max-tokens", "8", "--temp", "0"]
    if whose == "mlx-lm":
        arguments += ["--ignore-chat-template", "--verbose", "True"]
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env=ENVIRONMENT)  # fmt: skip
    assert process.stdout is not None
    seen = b""
    while True:
        byte = os.read(process.stdout.fileno(), 1)
        seen += byte
        # mlx-lm prints a line of = before the text.
        if not byte or seen.lstrip(b"=\n"):
            break
    elapsed = time.perf_counter() - started
    process.communicate()
    if not byte:
        sys.exit(f"{module} generate printed nothing")
    return elapsed


def make_weights(size: str, folder: Path, tokenizer: Path) -> None:
    """A float32 MLX folder of a published size with random weights and the tokenizer of another folder."""
    random_model.write(size, folder)

    from mlx_openelm.text.tokenizer import Tokenizer

    Tokenizer.from_folder(tokenizer).save(folder)


# Workers, each in its own process. They return numbers by name.


def load_both(folder: str) -> dict[str, tuple[Any, Callable[[], list[Any]]]]:
    """Each program's model, loaded by the program, and a function that makes its caches."""
    return {"ours": load_ours(folder), "mlx-lm": load_theirs(folder)}


def load_ours(folder: str) -> tuple[Any, Callable[[], list[Any]]]:
    from mlx_openelm import load
    from mlx_openelm.cache import make_cache

    model, _ = load(folder)
    return model, lambda: make_cache(len(model.layers))


def load_theirs(folder: str) -> tuple[Any, Callable[[], list[Any]]]:
    import mlx_openelm  # noqa: F401 (the same BLAS, except with MLX_OPENELM_BLAS=0)

    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder))
    return model, lambda: make_prompt_cache(model)


def graph(_: str, folder: str) -> dict[str, dict[str, Any]]:
    """Primitives in the uncompiled graph of one token's logits after 64, and the milliseconds to build it.

    Nothing is evaluated in between, so only the building is timed.
    """
    models = load_both(folder)
    import mlx.core as mx

    mx.disable_compile()
    answer: dict[str, dict[str, Any]] = {whose: {"build_ms": []} for whose in models}
    prompt, token = mx.arange(64)[None], mx.array([[3]])
    for whose, (model, make_cache) in models.items():
        cache = make_cache()
        mx.eval(model(prompt, cache=cache))
        answer[whose]["primitives"] = count_primitives(model(token, cache=cache))
    gc.disable()
    for _ in range(100):
        for whose, (model, make_cache) in models.items():
            cache = make_cache()
            model(prompt, cache=cache)
            started = time.perf_counter()
            logits = model(token, cache=cache)
            answer[whose]["build_ms"].append((time.perf_counter() - started) * 1e3)
            del logits
    return answer


def count_primitives(output: Any) -> int:
    import mlx.core as mx

    with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
        mx.export_to_dot(file.name, output)
        return len(re.findall(r"shape=rectangle", file.read()))


def speed(_: str, folder: str) -> dict[str, dict[str, float]]:
    """Tokens per second of both programs' own loops, in turns within one process, so with the same BLAS."""
    models = load_both(folder)
    return interleaved({whose: generation(whose, model) for whose, (model, _) in models.items()}, folder)


def bundled(whose: str, folder: str) -> dict[str, float]:
    """Prompt speed of one program alone; mlx-lm without our BLAS."""
    model, _ = load_ours(folder) if whose == "ours" else load_theirs(folder)
    runs = generation(whose, model)
    lengths = PROMPT_LENGTHS
    return {f"prompt_{n}": n / runs(n, 1) for n in lengths}


def token_stream(whose: str, model: Any) -> Callable[[list[int], int], Iterator[Any]]:
    """A function from a prompt and a number of new tokens to these tokens, by the program's own decoding loop."""
    import mlx.core as mx

    if whose == "ours":
        from mlx_openelm.generation.generate_step import generate_step as step

        return lambda prompt, count: step(model, prompt, max_tokens=count)
    from mlx_lm.generate import generate_step

    return lambda prompt, count: generate_step(mx.array(prompt), model, max_tokens=count)


def make_prompt(length: int) -> list[int]:
    return [1 + i % 1000 for i in range(length)]


def generation(whose: str, model: Any) -> Callable[[int, int], float]:
    """A function from prompt length and new tokens to seconds, by the program's own decoding loop."""
    tokens = token_stream(whose, model)

    def seconds(prompt_length: int, count: int) -> float:
        prompt = make_prompt(prompt_length)
        started = time.perf_counter()
        first = started
        for n, _ in enumerate(tokens(prompt, count)):
            if n == 0:
                first = time.perf_counter()
        # One token measures the prompt; several measure the time between the first and the last.
        return first - started if count == 1 else (time.perf_counter() - first) / (count - 1)

    return seconds


def interleaved(runs: dict[str, Callable[[int, int], float]], folder: str) -> dict[str, dict[str, float]]:
    count = 128 if Path(folder).name == "tiny" else 24
    for seconds in runs.values():
        seconds(PROMPT_LENGTHS[0], 4)
    answer: dict[str, dict[str, float]] = {}
    for whose, seconds in runs.items():
        answer[whose] = {"decode": 1 / seconds(16, count)}
    for n in PROMPT_LENGTHS:
        for whose, seconds in runs.items():
            answer[whose][f"prompt_{n}"] = n / seconds(n, 1)
    return answer


def memory(whose: str, folder: str) -> dict[str, float]:
    """Peak memory of loading and generating from a prompt of 128, in MB (1e6 bytes): resident, and MLX's buffers."""
    import resource

    import mlx_openelm  # noqa: F401 (before MLX, for BLAS)

    import mlx.core as mx

    model, _ = load_ours(folder) if whose == "ours" else load_theirs(folder)
    generation(whose, model)(128, 8)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if sys.platform.startswith("linux"):
        # On Linux ru_maxrss starts from the parent's memory; VmHWM is the process's own.
        status = Path("/proc/self/status").read_text()
        process = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6  # type: ignore[index]
    return {"process": process, "mlx": mx.get_peak_memory() / 1e6}


WORKERS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "graph": graph,
    "speed": speed,
    "bundled": bundled,
    "memory": memory,
}

if __name__ == "__main__":
    main()
