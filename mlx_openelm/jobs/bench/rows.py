"""What was measured as rows of numbers: for tables, for JSON, and for the comparison of two programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ...evaluation.timings import Spread
from .options import Size
from .turns import Measured, Program

Value = Spread | float | None


def program_rows(program: Program) -> dict[str, Value]:
    """What does not depend on the sizes, by name."""
    return {"cold load (s)": program.load_seconds, "process memory (MB)": program.process_memory / 1e6}


def size_rows(measured: Measured, program: Program, size: Size) -> dict[str, Value]:
    """The numbers of a program with one size, by name; None where there is nothing to decode."""
    result = measured.result(program, size)
    drafts: dict[str, Value] = {
        "speed-up by drafts": measured.speedup(program, size),
        "drafted tokens accepted": result.acceptance,
        "tokens per step": result.tokens_per_step,
    }
    return {
        "first token (s)": result.time_to_first_token,
        "prompt (tokens/s)": result.prompt_tps,
        "decoding (tokens/s)": result.generation_tps,
        **({"decoding per row (tokens/s)": result.row_tps} if result.rows > 1 else {}),
        **{f"time per token (ms), {p}%": 1e3 * seconds for p, seconds in result.token_seconds.items()},
        **(drafts if size.drafts else {"share of the bandwidth": result.bandwidth_share}),
        "MLX memory (MB)": result.peak_memory / 1e6,
    }


def middle(value: Value) -> float | None:
    """The median, if there were several measurements."""
    return value.median if isinstance(value, Spread) else value


def ratio(ours: Value, other: Value) -> float | None:
    """Ours over the other's; None if there is one number only."""
    numerator, denominator = middle(ours), middle(other)
    return None if numerator is None or not denominator else numerator / denominator


def to_json(measured: Measured) -> dict[str, Any]:
    """Everything; with two programs, also `rows` of name, ours, other and ratio. Bytes, seconds, tokens per second."""
    programs = [
        {
            "name": program.name,
            "version": program.version,
            "dtype": program.dtype,
            "blas": program.blas,
            "load_seconds": program.load_seconds,
            "process_memory": program.process_memory,
            "weight_bytes": program.weight_bytes,
            "results": [
                asdict(measured.result(program, size))
                | {"drafts": size.drafts, "speedup": measured.speedup(program, size)}
                for size in measured.complete
            ],
        }
        for program in measured.programs
    ]
    values: dict[str, Any] = {"bandwidth": measured.bandwidth, "interrupted": measured.interrupted}
    values["programs"] = programs
    return values | ({"rows": compared(measured)} if len(programs) > 1 else {})


def compared(measured: Measured) -> list[dict[str, Any]]:
    """Our numbers beside the other program's; a name ends with its size: `Size.label`."""
    ours, other = measured.programs
    named = {name: (value, program_rows(other)[name]) for name, value in program_rows(ours).items()}
    for size in measured.complete:
        theirs = size_rows(measured, other, size)
        for name, value in size_rows(measured, ours, size).items():
            named[f"{name}, {size.label}"] = value, theirs[name]
    return [
        {"name": name, "ours": middle(value), "other": middle(theirs), "ratio": ratio(value, theirs)}
        for name, (value, theirs) in named.items()
    ]
