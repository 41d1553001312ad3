"""The turns of a benchmark: a warm-up, then every size by every program, again and again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...evaluation import bandwidth
from ...evaluation.timings import Result, Run, summarize
from ...messages import say
from ...wording import counted, duration
from .options import BenchOptions, Size

# A benchmark that takes longer than this is announced, in seconds.
_LONG_SECONDS = 15.0
# The tokens of the prompt and of the text in a program's first runs, which its speed is estimated from.
_PROBE = Size(64, 3)

Progress = Callable[[int, int], None]
MakePrompts = Callable[[int, int], Sequence[Sequence[int]]]


class Program(Protocol):
    """A program with a loaded model.

    Attributes:
        name, version, dtype: the program, and the type it computes in.
        blas: `blas.state` in its process.
        load_seconds: from the start of its process to the loaded model.
        weight_bytes: bytes of weights that a step of decoding reads.
        process_memory: bytes of memory that its process has held at most.
    """

    name: str
    version: str
    dtype: str
    blas: str
    load_seconds: float
    weight_bytes: float
    process_memory: int

    def run(self, prompts: Sequence[Sequence[int]], count: int, drafts: bool = False) -> Run:
        """Generate `count` tokens after each of the prompts, together, greedily and beyond the end of the text."""


@dataclass
class Measured:
    """What was measured so far: every program's runs by size, and the memory's bandwidth in bytes per second."""

    programs: Sequence[Program]
    sizes: Sequence[Size]
    window: int | None = None
    runs: dict[tuple[str, Size], list[Run]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)
    interrupted: bool = False

    @property
    def bandwidth(self) -> float:
        return statistics.median(self.bandwidths) if self.bandwidths else 0.0

    @property
    def complete(self) -> list[Size]:
        """The sizes that every program has run at least once."""
        return [size for size in self.sizes if all((program.name, size) in self.runs for program in self.programs)]

    def result(self, program: Program, size: Size) -> Result:
        """The numbers of a program with one of the `complete` sizes; of runs that every program has."""
        count = min(len(self.runs[other.name, size]) for other in self.programs)
        runs = self.runs[program.name, size][:count]
        return summarize(runs, weight_bytes=program.weight_bytes, bandwidth=self.bandwidth, window=self.window)

    def speedup(self, program: Program, size: Size) -> float | None:
        """How many times as fast a program decodes with drafts; None for a size without."""
        if not size.drafts:
            return None
        speeds = [self.result(program, size._replace(drafts=drafts)).generation_tps for drafts in (True, False)]
        with_drafts, plain = speeds
        return None if with_drafts is None or plain is None else with_drafts.median / plain.median


def measure(
    measured: Measured,
    options: BenchOptions,
    make_prompts: MakePrompts,
    *,
    copy: Callable[[], int],
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fill `measured`: a warm-up, then in each repetition every size, by all programs one after the other.

    The order of the programs is reversed every time, so that neither always runs on the hotter machine.

    Args:
        make_prompts: maps a number of tokens and a number of rows to the prompts.
        copy: see `bandwidth.copier`; the bandwidth is measured in each repetition.
    """
    prompts = {(size.prompt, size.rows): make_prompts(size.prompt, size.rows) for size in measured.sizes}
    # Sizes that differ in the number of new tokens have one.
    warmed_up = list(dict.fromkeys(size._replace(generated=_PROBE.generated) for size in measured.sizes))
    total = (len(warmed_up) + options.repetitions * len(measured.sizes)) * len(measured.programs)
    done = 0

    def run(program: Program, size: Size) -> Run:
        nonlocal done
        if progress is not None:
            progress(done, total)
        if options.delay:
            sleep(options.delay)
        done += 1
        return program.run(prompts[size.prompt, size.rows], size.generated, size.drafts)

    _announce(estimate(measured, options, make_prompts), options.repetitions, len(measured.sizes))
    for size in warmed_up:
        for program in measured.programs:
            run(program, size)
    for turn in range(options.repetitions):
        measured.bandwidths.append(bandwidth.rate(copy, clock))
        for size in measured.sizes:
            for program in measured.programs[:: -1 if turn % 2 else 1]:
                measured.runs.setdefault((program.name, size), []).append(run(program, size))
    if progress is not None:
        progress(total, total)


def estimate(measured: Measured, options: BenchOptions, make_prompts: MakePrompts) -> float:
    """About how many seconds everything takes, from short runs of each program without drafts."""
    seconds = 0.0
    length = min(_PROBE.prompt, max(size.prompt for size in measured.sizes))
    for program in measured.programs:
        probes = {}
        for rows in dict.fromkeys(size.rows for size in measured.sizes):
            for _ in range(2):  # the first one also compiles kernels
                probes[rows] = program.run(make_prompts(max(1, length // rows), rows), _PROBE.generated)
        for prompt, rows, _ in dict.fromkeys((size.prompt, size.rows, size.drafts) for size in measured.sizes):
            seconds += rows * prompt / probes[rows].prompt_tps + options.delay
        for size in measured.sizes:
            probe = probes[size.rows]
            run = size.rows * size.prompt / probe.prompt_tps + size.generated * statistics.median(probe.intervals)
            seconds += options.repetitions * (run + options.delay)
    return seconds


def _announce(seconds: float, repetitions: int, sizes: int) -> None:
    if seconds > _LONG_SECONDS:
        what = counted(repetitions, "repetition") + (f" of {sizes} sizes" if sizes > 1 else "")
        say(f"This takes about {duration(seconds)}: {what}. Ctrl-C shows what was measured by then.")
