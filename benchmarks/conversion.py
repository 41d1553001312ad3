"""Conversion compared with mlx-lm: time and peak memory, from a float32 checkpoint made for the run.

    python benchmarks/conversion.py                    # the 3B size: 12 GB, and as much again for the output
    python benchmarks/conversion.py --size 270M --json

Weights are random. Both programs convert the same folder in turns, each in its own process, after the folder was read
into the system's cache; rows are medians over turns. Memory is the peak of the process (`ru_maxrss`) minus that of a
process that only imports the program. Formats that mlx-lm does not write are measured for ours alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import random_model

TIME_BAR = 1.0
MEMORY_BAR = 1 / 3
PEAK_BAR_MB = 1500
PIECES = 32000
# Keep compiled modules, as on a user's machine, even if the environment turns that off.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
IMPORTS = {
    "ours": "import mlx_openelm.cli.main, mlx_openelm.cli.convert",
    "mlx-lm": "import mlx_lm.convert",
}


@dataclass(frozen=True)
class Plan:
    """One output: the arguments of our command, and of mlx-lm's if it has the same."""

    name: str
    ours: tuple[str, ...]
    other: tuple[str, ...] | None = None
    source: str = "model"


PLANS = (
    Plan("bfloat16", ("convert",), ("--dtype", "bfloat16")),
    Plan("4 bits", ("convert", "-q"), ("--dtype", "bfloat16", "-q")),
    Plan("8 bits", ("convert", "-q", "--q-bits", "8")),
    Plan("mxfp4", ("convert", "-q", "--q-mode", "mxfp4")),
    Plan("Hugging Face, float32", ("export", "--format", "huggingface")),
    Plan("GGUF, f16", ("export", "--format", "gguf", "--gguf-type", "f16")),
    Plan("GGUF, q8_0", ("export", "--format", "gguf", "--gguf-type", "q8_0")),
    Plan("GGUF, q4_0", ("export", "--format", "gguf", "--gguf-type", "q4_0")),
)
PT_PLANS = (
    Plan("bfloat16 from CoreNet's .pt", ("convert",), source="corenet.pt"),
    Plan("4 bits from CoreNet's .pt", ("convert", "-q"), source="corenet.pt"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="3B", help="270M, 450M, 1_1B or 3B")
    parser.add_argument("--repeats", type=int, help="turns of each program; 2 by default for 3B, else 3")
    parser.add_argument("--only", default="", help="measure only outputs whose name contains this")
    parser.add_argument("--with-pt", action="store_true", help="also from a CoreNet checkpoint (needs PyTorch)")
    parser.add_argument("--folder", help="where to put the models; by default the system's temporary folder")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--worker", nargs=3, metavar=("WHAT", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        what, size, folder = arguments.worker
        {"model": make_model, "corenet.pt": make_pt}[what](size, Path(folder))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder is removed
    plans = [plan for plan in PLANS + (PT_PLANS if arguments.with_pt else ()) if arguments.only in plan.name]
    repeats = arguments.repeats or (2 if arguments.size == "3B" else 3)
    rows = []
    with tempfile.TemporaryDirectory(prefix="openelm-benchmark-", dir=arguments.folder) as temporary:
        check_packages(plans)
        check_disk(arguments.size, plans, Path(temporary))
        for row in measure(arguments.size, repeats, plans, Path(temporary)):
            rows.append(row)
            if not arguments.json:
                print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def check_packages(plans: list[Plan]) -> None:
    needed = {"mlx_lm"} if any(plan.other for plan in plans) else set()
    needed |= {"gguf"} if any("gguf" in plan.ours for plan in plans) else set()
    needed |= {"torch"} if any(plan.source != "model" for plan in plans) else set()
    if missing := [name for name in sorted(needed) if importlib.util.find_spec(name) is None]:
        sys.exit(f"These outputs need {', '.join(missing)}; install it, or leave them out with --only.")


def check_disk(size: str, plans: list[Plan], folder: Path) -> None:
    """A float32 model, a second one for the .pt file, and the largest output."""
    from mlx_openelm.config import ModelConfig

    weights = 4 * ModelConfig.from_name(size).num_parameters
    largest = max((1.0 if "huggingface" in plan.ours else 0.54 for plan in plans), default=0)
    needed = weights * (len({plan.source for plan in plans} | {"model"}) + largest) + 10**9
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(f"{folder.parent} has {free / 1e9:.0f} GB free, and this needs {needed / 1e9:.0f}; see --folder.")


def measure(size: str, repeats: int, plans: list[Plan], folder: Path) -> Iterator[dict[str, Any]]:
    source = folder / "model"
    run([sys.executable, __file__, "--worker", "model", size, str(source)])
    os.sync()  # as after every conversion, so that no time includes another one's writes
    base: dict[str, float] = {}
    for plan in plans:
        path = folder / plan.source
        if not path.exists():
            run([sys.executable, __file__, "--worker", plan.source, size, str(source)])
            os.sync()
        if not base:
            base["ours"] = peak_of_imports("ours", repeats)
        if plan.other is not None and "mlx-lm" not in base:
            base["mlx-lm"] = peak_of_imports("mlx-lm", repeats)
        seconds: dict[str, list[float]] = {"ours": [], "mlx-lm": []}
        peaks: dict[str, list[float]] = {"ours": [], "mlx-lm": []}
        for _ in range(repeats):
            for whose in ("ours", "mlx-lm"):
                if whose == "ours" or plan.other is not None:
                    elapsed, peak = convert(plan, whose, path, folder / "out")
                    seconds[whose].append(elapsed)
                    peaks[whose].append(peak - base[whose])
        ours = {"s": statistics.median(seconds["ours"]), "MB": statistics.median(peaks["ours"])}
        if plan.other is not None:
            other = {"s": statistics.median(seconds["mlx-lm"]), "MB": statistics.median(peaks["mlx-lm"])}
            yield row(f"time (s), {size} to {plan.name}", ours["s"], other["s"], TIME_BAR)
            # In small models one tensor is a large share of the whole, so the bar applies to the largest size only.
            bar = MEMORY_BAR if size == "3B" else None
            yield row(f"peak memory (MB), {size} to {plan.name}", ours["MB"], other["MB"], bar)
        else:
            yield row(f"time (s), {size} to {plan.name}", ours["s"], None, None)
        yield row(f"peak memory (MB), {size} to {plan.name}, below 1.5 GB", ours["MB"], None, PEAK_BAR_MB)


def row(name: str, ours: float, other: float | None, bar: float | None) -> dict[str, Any]:
    """A row of the table; without another program the bar applies to our own number."""
    ratio = None if other is None else ours / other
    passed = bar is None or (ours if ratio is None else ratio) <= bar
    return {"name": name, "ours": ours, "other": other, "ratio": ratio, "bar": bar, "pass": passed}


def as_text(row: dict[str, Any]) -> str:
    other = " " * 34 if row["other"] is None else f"  mlx-lm {row['other']:10.4g}  ratio {row['ratio']:.3f}"
    bar = "" if row["bar"] is None else f"  (bar {row['bar']:.4g}: {'pass' if row['pass'] else 'FAIL'})"
    return f"{row['name']:62} ours {row['ours']:10.4g}{other}{bar}"


def convert(plan: Plan, whose: str, source: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak memory in MB of one conversion; its output is removed."""
    if whose == "ours":
        command, *options = plan.ours
        out = out.with_suffix(".gguf") if "gguf" in options else out
        target = "--mlx-path" if command == "convert" else "--output"
        arguments = ["-m", "mlx_openelm", command, "--model", str(source), *options, target, str(out)]
        if source.is_file():
            arguments += ["--tokenizer", str(source.parent / "model" / "tokenizer.json")]
    else:
        arguments = ["-m", "mlx_lm", "convert", "--hf-path", str(source), "--mlx-path", str(out), *(plan.other or ())]
    read(source)
    try:
        return timed(arguments)
    finally:
        if out.is_dir():
            shutil.rmtree(out)
        out.unlink(missing_ok=True)
        os.sync()


def read(source: Path) -> None:
    """Read the model once, so that both programs find it in the system's cache."""
    for path in [source] if source.is_file() else sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def peak_of_imports(whose: str, repeats: int) -> float:
    return statistics.median(timed(["-c", IMPORTS[whose]])[1] for _ in range(repeats))


def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB (1e6 bytes) of a Python process."""
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=errors, env=ENVIRONMENT
        )
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            sys.exit(f"python {' '.join(arguments)} failed:\n{errors.read().decode()}")
    return elapsed, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")


# Making the models to convert, each in its own process.


def make_model(size: str, folder: Path) -> None:
    """Write a float32 folder of a published size in Hugging Face's layout, with a tokenizer of the right size."""
    random_model.write(size, folder)

    from mlx_openelm.hub import catalog
    from mlx_openelm.text.tokenizer import Tokenizer

    Tokenizer.from_folder(catalog.ASSETS / "tiny").save(folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"piece{number}": number for number in range(len(vocabulary), PIECES)}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def make_pt(_: str, folder: Path) -> None:
    """Write the same weights as a CoreNet checkpoint, next to `folder`."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):  # mapped, not read
        tensors |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    torch.save(tensors, folder.parent / "corenet.pt")


if __name__ == "__main__":
    main()
