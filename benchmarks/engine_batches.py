"""Batches beside mlx-lm's `BatchGenerator`: `mlx-openelm bench --batch 1,8,16 --compare mlx-lm` with bars.

Both programs compute in float32 with the same BLAS, each in a process of its own, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine_setup import Row, Setup, at_least, at_most

BAR = 1.5  # of mlx-lm's decoding
BATCHES = "1,8,16"


def measure(setup: Setup) -> Iterator[Row]:
    from mlx_openelm.jobs.bench.options import BenchOptions
    from mlx_openelm.jobs.bench.running import bench

    prompt, new = (16, 8) if setup.quick else (128, 64)
    options = BenchOptions(
        prompt_tokens=str(prompt),
        generation_tokens=str(new),
        batch=BATCHES,
        compare="mlx-lm",
        repetitions=setup.repeats,
    )
    measured = bench(setup.folder, options, dtype="float32")
    programs = measured.programs
    assert len({program.blas for program in programs}) == 1, "the programs have different BLAS"
    for size in measured.complete:
        ours, other = (measured.result(program, size) for program in programs)
        assert ours.generation_tps is not None and other.generation_tps is not None
        about = f"{size.label}, {setup.size}"
        bar = BAR if size.rows > 1 else None
        yield at_least(f"decoding (tokens/s), {about}", ours.generation_tps.median, other.generation_tps.median, bar)
        yield at_least(f"prompts (tokens/s), {about}", ours.prompt_tps.median, other.prompt_tps.median)
        yield at_most(f"99% of tokens after (ms), {about}", 1e3 * ours.token_seconds[99], 1e3 * other.token_seconds[99])
        yield at_most(f"MLX memory (MB), {about}", ours.peak_memory / 1e6, other.peak_memory / 1e6)
