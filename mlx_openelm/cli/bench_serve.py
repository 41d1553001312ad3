"""`mlx-openelm bench --serve URL`: how a server answers many clients at once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from .. import console
from ..errors import RequestError, quote
from ..inputs import read_text, to_path
from ..jobs.bench.load import Load, LoadOptions, measure_load
from ..jobs.bench.options import BenchOptions
from ..wording import counted, flag
from . import flags

# Of the flags of `bench`, those that a server has too.
_SHARED = ("prompt_tokens", "generation_tokens")
_LOADING = ("adapter_path", "tokenizer", "config_yaml", "revision", "dtype", "expand", "plot")


def run_load(args: Namespace) -> int:
    """Measure a server, and print what was found; 1 if no request was answered."""
    options = LoadOptions(**flags.given(args, LoadOptions))
    sizes = flags.given(args, BenchOptions)
    others = [name for name in sizes if name not in _SHARED]
    others += [name for name in _LOADING if getattr(args, name, None) is not None]
    others += ["exact_activations"] if args.exact_activations else []
    if others:
        raise RequestError(f"{flag(others[0])} cannot be combined with --serve, which measures a server as it is.")
    counts = {name: _count(name, value) for name, value in sizes.items()}
    key = None if args.api_key_file is None else _first_key(to_path(args.api_key_file))
    with console.Progress("Measuring", unit="seconds") as progress:
        load = measure_load(options, model=args.model, key=key, progress=progress, **counts)
    if args.json:
        console.print_json({"server": options.serve, **load.to_json()})
    else:
        console.print_rows(report(load))
    return 0 if load.answered or load.left else 1


def _first_key(path: Path) -> str:
    """The first API key of a file, as `serve` reads it; this command does not need the server's packages."""
    lines = [line.strip() for line in read_text(path).removeprefix("\ufeff").splitlines()]
    key = next((line for line in lines if line and not line.startswith("#")), None)
    if key is None:
        raise RequestError(f"{path} has no API key; write it on a line.")
    return key


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise RequestError(f"{flag(name)} must be one number with --serve, from 1 to 100000, got {quote(text)}.")
    return int(text)


def report(load: Load) -> Iterator[tuple[str, str]]:
    """What to print: labels and texts."""
    values = load.to_json()
    yield "Model", load.model
    requests = (
        f"{counted(load.answered, 'answer')} in {load.seconds:.1f} s, {values['requests_per_second']:.2f} a second"
    )
    if load.left:
        requests += f"; {counted(load.left, 'client')} left early"
    yield "Requests", requests
    yield "Throughput", f"{values['tokens_per_second']:.1f} tokens/s, of all texts together"
    for label, name in (("First token", "time_to_first_token"), ("Between tokens", "inter_token")):
        found = values[name]
        if found["p50"] is not None:
            yield label, ", ".join(f"{1e3 * found[f'p{share}']:.1f} ms ({share}%)" for share in (50, 95, 99))
    if load.prompt_tokens:
        share = load.cached_tokens / load.prompt_tokens
        yield "Prompts", f"{counted(load.prompt_tokens, 'token')}, of which {share:.0%} were held from earlier requests"
    errors = [f"{count:,} x {name}" for name, count in load.errors.most_common()]
    yield "Errors", ", ".join(errors) or "none"
