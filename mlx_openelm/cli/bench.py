"""`mlx-openelm bench`: how fast a model generates, alone or beside mlx-lm."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from .. import backend, console
from ..errors import RequestError
from ..evaluation.timings import Result, Spread
from ..hub import catalog
from ..inputs import to_path
from ..jobs.bench import rows
from ..jobs.bench.load import LoadOptions
from ..jobs.bench.options import BenchOptions, Size
from ..jobs.bench.running import bench
from ..jobs.bench.turns import Measured
from ..publishing.command_line import without_folders
from ..wording import counted, flag
from . import flags

MAIN_FLAGS = (
    *("--model", "--prompt-tokens", "--generation-tokens", "--batch", "--repetitions", "--compare"),
    *("--adapter-path", "--json", "--plot"),
)
EXAMPLES = """\
  mlx-openelm bench --model 270m
  mlx-openelm bench --model 270m -p 128,512 -g 64,128 --compare mlx-lm --dtype float32
  mlx-openelm bench --model 270m --batch 1,8,16
  mlx-openelm bench --model OpenELM-270M-4bit --kv-bits 8 --plot speed.png
  mlx-openelm bench --serve http://127.0.0.1:8080 --rate 4 --disconnects 0.1"""

_WIDTH = 80  # of a table that is piped
_NOTHING = "-"


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `bench` to its parser."""
    common, model = parser.groups["Common flags"], parser.groups["Model"]
    flags.add_shared(common, "--model")
    parser.set_defaults(model=None)  # of a server, the first that it lists
    flags.add_fields(parser, BenchOptions)
    flags.add_fields(parser, LoadOptions)
    parser.groups["Load"].add_argument(
        "--api-key-file", metavar="FILE", help="File whose first line is the API key for --serve."
    )
    flags.add_shared(common, "--json")
    common.add_argument(
        "--plot", metavar="FILE", help="Also draw the result into this PNG, SVG or PDF file; needs matplotlib."
    )
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(model, "--exact-activations")


def run(args: Namespace) -> int:
    """Measure how fast a model generates: prompts, decoding, memory.

    Prompts are random tokens. Text is decoded greedily and beyond its end. Every program runs in a process of its own,
    and they take turns. Ctrl-C shows what was measured by then.
    """
    if "serve" in args:
        from .bench_serve import run_load

        return run_load(args)
    load = [*flags.given(args, LoadOptions), *(["api_key_file"] if args.api_key_file is not None else [])]
    if load:
        raise RequestError(f"{flag(load[0])} is for a server; give its address with --serve.")
    args.model = args.model or catalog.TINY
    options = BenchOptions(**flags.given(args, BenchOptions))
    plot = None if args.plot is None else to_path(args.plot)
    if plot is not None:
        from ..quantization.report import check_picture

        check_picture(plot)
    with console.Progress("Measuring", unit="runs") as progress:
        measured = bench(
            args.model,
            options,
            adapter_path=args.adapter_path,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            expand=args.expand,
            exact_activations=args.exact_activations,
            progress=progress,
        )
    if args.json:
        about = {"model": args.model, "adapter_path": args.adapter_path, "device": backend.device()}
        console.print_json({**about, "options": asdict(options), **rows.to_json(measured)})
    else:
        for line in report(args.model, measured, console.columns(sys.stdout) or _WIDTH):
            console.print_line(line)
    if plot is not None:
        from ..jobs.bench.plot import draw

        draw(measured, plot, f"{without_folders(args.model)} on {_device()}")
        console.say(f"Drew {args.plot}")
    if measured.interrupted:
        console.say("Interrupted; what was measured by then is above.")
        return 130
    return 0


def report(model: str, measured: Measured, width: int) -> Iterator[str]:
    """The lines to print: what was measured, a table, and what its columns mean."""
    for program in measured.programs:
        load = "" if measured.programs[1:] else f"; cold load: {program.load_seconds:.2f} s"
        line = f"{program.name} {program.version}: {model} in {program.dtype} on {_device()}{load}"
        yield from console.wrap(line, width).split("\n")
    yield ""
    results = [measured.result(measured.programs[0], size) for size in measured.complete]
    drafts = any(size.drafts for size in measured.complete)
    yield from _sections(measured) if measured.programs[1:] else _table(measured, width)
    yield ""
    batches = any(result.rows > 1 for result in results)
    notes = "One run."
    if (count := results[0].repetitions) > 1:
        notes = f"Medians of {count} runs, ± half the distance between the fastest and the slowest."
    notes += (
        " Cold load: from the start of a process to the loaded model. "
        f"Bandwidth: weights and cache read per {'step' if batches else 'token'}, as a share of what a copy reads and "
        f"writes, {measured.bandwidth / 1e9:.1f} GB/s."
    )
    if batches:
        notes += " Speeds are those of all rows; the first token is that of the median row."
    if drafts:
        notes += (
            " Prompts are text, since drafts need some. Accepted: the share of drafted tokens that are in the text."
        )
    if len({program.dtype for program in measured.programs}) > 1:
        notes += " The programs compute in different types; --dtype float32 makes them equal."
    yield from console.wrap(notes, width).split("\n")


def _device() -> str:
    """The device, on a CPU with the number of threads."""
    from ..native import thread_count

    return backend.device() if backend.on_gpu() else f"CPU ({counted(thread_count(), 'thread')})"


def _table(measured: Measured, width: int) -> list[str]:
    """A line for each size, as far as they fit; else a part for each."""
    program = measured.programs[0]
    results = [measured.result(program, size) for size in measured.complete if not size.drafts]
    drafted = [size for size in measured.complete if size.drafts]
    below = ["", *_aligned(_drafted_lines(measured, drafted), "  ")] if drafted else []
    for with_spreads, gap in ((True, "  "), (False, "  "), (False, " ")):
        table = _aligned(_lines(results, with_spreads), gap) + below
        if max(map(len, table)) <= width:
            return table
    return _sections(measured)


def _lines(results: Sequence[Result], with_spreads: bool) -> list[list[str]]:
    """The cells of a table with a line for each size."""
    batches = any(result.rows > 1 for result in results)
    rows, per_row = ([("", "rows")], [("per row", "tokens/s")]) if batches else ([], [])
    heads = [("size", "tokens"), *rows, ("first", "s"), ("prompt", "tokens/s"), ("decoding", "tokens/s"), *per_row]
    heads += [("", "50%"), ("ms per", "95%"), ("token", "99%"), ("band-", "width"), ("memory", "MB")]
    lines = [list(line) for line in zip(*heads, strict=True)]
    speed = _cell if with_spreads else _middle
    for result in results:
        per_token = [_number(1e3 * seconds, 3) for seconds in result.token_seconds.values()] or [_NOTHING] * 3
        lines.append(
            [
                f"{result.prompt_tokens}+{result.generation_tokens}",
                *([f"{result.rows}"] if batches else []),
                _number(result.time_to_first_token.median, 3),
                speed(result.prompt_tps),
                speed(result.generation_tps),
                *([_middle(result.row_tps)] if batches else []),
                *per_token,
                _cell(result.bandwidth_share),
                _number(result.peak_memory / 1e6, 3),
            ]
        )
    return lines


def _drafted_lines(measured: Measured, sizes: Sequence[Size]) -> list[list[str]]:
    """The cells of a table with a line for each size with drafts."""
    program = measured.programs[0]
    heads = [("with drafts", "tokens"), ("", "rows"), ("plain", "tokens/s"), ("drafts", "tokens/s"), ("speed-", "up")]
    lines = [list(line) for line in zip(*heads, ("", "accepted"), ("tokens", "a step"), strict=True)]
    for size in sizes:
        plain, result = (measured.result(program, size._replace(drafts=drafts)) for drafts in (False, True))
        speeds = [_middle(plain.generation_tps), _middle(result.generation_tps)]
        others = [measured.speedup(program, size), result.acceptance, result.tokens_per_step]
        lines.append(
            [f"{size.prompt}+{size.generated}", str(size.rows), *speeds, *(_number(value, 3) for value in others)]
        )
    return lines


def _sections(measured: Measured) -> list[str]:
    """A part for each size, with a line for each number; of two programs, both numbers and their ratio."""
    names = [program.name for program in measured.programs]
    sections: list[tuple[str, list[dict[str, rows.Value]]]] = [
        ("", [rows.program_rows(program) for program in measured.programs])
    ]
    for size in measured.complete:
        results = [rows.size_rows(measured, program, size) for program in measured.programs]
        sections.append((_title(size), results))
    lines = [["", *names, *(["ratio"] if len(names) > 1 else [])]]
    for title, columns in sections:
        if title:
            lines += [[], [title]]
        for name in columns[0]:
            values = [column[name] for column in columns]
            share = [_number(rows.ratio(*values), 3)] if len(values) > 1 else []
            lines.append([name, *map(_cell, values), *share])
    return _aligned(lines)


def _title(size: Size) -> str:
    drafts = ", with drafts" if size.drafts else ""
    if size.rows == 1:
        return f"prompt of {counted(size.prompt, 'token')}, {size.generated:,} new{drafts}"
    return f"{size.rows} rows: prompts of {counted(size.prompt, 'token')}, {size.generated:,} new each{drafts}"


def _aligned(lines: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """Columns as wide as their longest cell, all but the first to the right. A line of one cell is a title."""
    table = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [
        gap.join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line))
        if len(line) > 1
        else "".join(line)
        for line in lines
    ]
    return [line.rstrip() for line in aligned]


def _middle(value: rows.Value) -> str:
    """A number; of several measurements, the median."""
    return _number(rows.middle(value), 4 if isinstance(value, Spread) else 3)


def _cell(value: rows.Value) -> str:
    """A number, and if it is the median of several measurements, how far they are apart."""
    text = _middle(value)
    if isinstance(value, Spread) and value.high > value.low:
        text += f" ±{value.margin / value.median:.0%}"
    return text


def _number(value: float | None, digits: int) -> str:
    """A number with so many significant digits, as far as they follow the point."""
    if value is None or not math.isfinite(value):
        return _NOTHING
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"
