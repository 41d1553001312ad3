"""Our server beside mlx_lm.server: tokens a second and the time to the first token, of 8 clients at once.

    python benchmarks/serving.py                         # tiny expanded to float32, and random weights of the 270M size
    python benchmarks/serving.py --size tiny --quick     # whether everything runs
    python benchmarks/serving.py --turns 3 --json        # conversations, whose beginnings both servers may hold

Both servers compute in float32 with the same BLAS and serve the same folder, one after the other in turns; the
load is that of `mlx-openelm bench --serve`, the same for both. Rows of the ratios are medians of the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_openelm  # noqa: F401 (before MLX, for BLAS)
from mlx_openelm import blas
from mlx_openelm.jobs.bench.load import Load, LoadOptions, measure_load

from engine_setup import Row, at_least, at_most, make_setup

# The least tokens a second beside mlx_lm.server's, by size, and the most time to the first token.
SPEEDS, FIRST_TOKEN = {"tiny": 2.0, "270M": 1.3}, 0.6
_START_SECONDS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="tiny or a published size; by default tiny and 270M")
    parser.add_argument("--clients", type=int, default=8, help="clients that ask at the same time")
    parser.add_argument("--turns", type=int, default=1, help="messages of a conversation")
    parser.add_argument("--seconds", type=float, help="seconds of each turn; 30, or 3 with --quick")
    parser.add_argument("--repeats", type=int, help="turns of each server; 3, or 1 with --quick")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--generation-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="short texts, once each")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prompt_tokens, arguments.generation_tokens = 16, 8
    arguments.seconds = arguments.seconds or (3 if arguments.quick else 30)
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 3)
    rows = []
    for size in [arguments.size] if arguments.size else list(SPEEDS):
        with tempfile.TemporaryDirectory(prefix="openelm-benchmark-") as temporary:
            folder = make_setup(size, None, None, arguments.quick, temporary).folder
            fill_vocabulary(folder)
            for row in measure(size, folder, arguments):
                rows.append(row)
                if not arguments.json:
                    bar = "" if row["bar"] is None else f"  (bar {row['bar']:g}: {'pass' if row['pass'] else 'FAIL'})"
                    text = f"ours {row['ours']:9.4g}  other {row['other']:9.4g}  ratio {row['ratio']:.3g}{bar}"
                    print(f"{row['name']:50} {text}", flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def measure(size: str, folder: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """The rows of one model."""
    commands = {"ours": our_command(folder), "other": other_command(folder)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for turn in range(arguments.repeats):
        for name, command in commands.items():
            with server(command) as url:
                options = LoadOptions(
                    serve=url,
                    clients=arguments.clients,
                    seconds=arguments.seconds,
                    turns=arguments.turns,
                    load_seed=turn,
                )
                sizes = {"prompt_tokens": arguments.prompt_tokens, "generation_tokens": arguments.generation_tokens}
                model = "tiny" if name == "ours" else "default_model"
                # Whatever is compiled or read at first. With other texts: those of the turn are not held by then.
                load_for(replace(options, load_seed=turn + 1000), model, 1.0, sizes)
                found[name].append(load_for(options, model, arguments.seconds, sizes).to_json())
    errors = [error for values in found.values() for one in values for error in one["errors"]]
    if errors:
        raise SystemExit(f"a server failed: {errors[0]}")

    def median(name: str, *keys: str) -> float:
        return statistics.median(_at(values, keys) for values in found[name])

    label = f"{size}, {arguments.clients} clients"
    speed = [median(name, "tokens_per_second") for name in commands]
    yield at_least(f"{label}: tokens/s", *speed, SPEEDS.get(size))
    for share in ("p50", "p95"):
        first = [median(name, "time_to_first_token", share) for name in commands]
        yield at_most(f"{label}: time to first token, {share}", *first, FIRST_TOKEN)
    for share in ("p50", "p95"):
        between = [median(name, "inter_token", share) for name in commands]
        yield at_most(f"{label}: between tokens, {share}", *between)


def _at(values: dict[str, Any], keys: tuple[str, ...]) -> float:
    for key in keys:
        values = values[key]
    return float(values)  # type: ignore[arg-type]


def fill_vocabulary(folder: Path) -> None:
    """Give a tokenizer a text for each token of the model, whose random weights take any; mlx-lm needs one."""
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"\u2581filler{token}": token for token in range(max(vocabulary.values()) + 1, size)}
    file.write_text(json.dumps(tokenizer))
    (folder / "tokenizer.model").unlink(missing_ok=True)


def load_for(options: LoadOptions, model: str, seconds: float, sizes: dict[str, int]) -> Load:
    return measure_load(replace(options, seconds=seconds), model=model, **sizes)


def our_command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "mlx_openelm", "serve", "--model", f"tiny={folder}", "--log-level", "ERROR"]


def other_command(folder: Path) -> list[str]:
    """mlx_lm.server, with the BLAS that our package loads."""
    code = (
        "import sys, mlx_openelm, runpy;"
        "sys.argv = ['mlx_lm.server', *sys.argv[1:]];"
        "runpy.run_module('mlx_lm.server', run_name='__main__')"
    )
    template = "{{ messages | map(attribute='content') | join('\\n') }}"
    flags = ["--model", str(folder), "--log-level", "ERROR", "--chat-template", template]
    return [sys.executable, "-c", code, *flags]


@contextmanager
def server(command: list[str]) -> Iterator[str]:
    """A server that runs; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=messages,
            stderr=messages,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        try:
            end = time.monotonic() + _START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > end:
                        messages.seek(0)
                        raise SystemExit(f"a server does not start: {messages.read().decode()[-2000:]}") from None
                    time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    print(f"BLAS: {blas.library or blas.state}", file=sys.stderr)
    main()
