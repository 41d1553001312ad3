"""The numbers of a benchmark, from the times at which tokens came: speeds, spreads, percentiles, share of bandwidth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# The shares of the times between tokens, in percent, that a result gives.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Run:
    """One run of one or several rows, which begin together.

    Attributes:
        prompt_tokens: of each row.
        times: for each row, when each new token came, in seconds since the run began.
        peak_memory: the most that MLX held meanwhile, in bytes.
        position_bytes: what the cache of a row holds per position.
        drafted, accepted: tokens of all rows that were drafted, and those of them that are in the text.
        steps, step_tokens: steps of all rows after the prompt, and the tokens that they gave; 0 without drafts.
    """

    prompt_tokens: int
    times: Sequence[Sequence[float]]
    peak_memory: int = 0
    position_bytes: float = 0.0
    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    step_tokens: int = 0

    @property
    def time_to_first_token(self) -> float:
        """Seconds that a row waits for its first token: the median row."""
        return statistics.median(row[0] for row in self.times)

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens of all rows per second, up to the first new token of the last row."""
        return self.prompt_tokens * len(self.times) / max(row[0] for row in self.times)

    @property
    def generation_tps(self) -> float | None:
        """New tokens of all rows per second, while every row decodes; None if there is no such time.

        That is from the first token of the last row to begin, to the last token of the first row to end.
        """
        start, end = max(row[0] for row in self.times), min(row[-1] for row in self.times)
        count = sum(start < moment <= end for row in self.times for moment in row)
        return count / (end - start) if end > start else None

    @property
    def intervals(self) -> list[float]:
        """Seconds between each new token of a row and its next."""
        return [after - before for row in self.times for before, after in pairwise(row)]


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, the lowest, and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def margin(self) -> float:
        """Half the distance between the lowest and the highest: what a table gives after ±."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Result:
    """All runs of one program with one size of prompt and text.

    Attributes:
        rows: the texts that are generated together.
        time_to_first_token: seconds.
        prompt_tps, generation_tps: tokens of all rows per second; no `generation_tps` for a single new token.
        row_tps: `generation_tps` of each row.
        token_seconds: the percentiles of the seconds between two tokens, by percent, over all runs.
        peak_memory: bytes that MLX held at most.
        bandwidth_share: the rate of reading weights and cache while decoding, as a share of the memory's bandwidth;
            None with drafts, whose steps give any number of tokens.
        acceptance: the share of drafted tokens that are in the text; None without any.
        tokens_per_step: of a row; None without drafts.
    """

    prompt_tokens: int
    generation_tokens: int
    rows: int
    repetitions: int
    time_to_first_token: Spread
    prompt_tps: Spread
    generation_tps: Spread | None
    row_tps: Spread | None
    token_seconds: dict[int, float]
    peak_memory: int
    bandwidth_share: float | None
    acceptance: float | None = None
    tokens_per_step: float | None = None


def summarize(runs: Sequence[Run], *, weight_bytes: float, bandwidth: float, window: int | None = None) -> Result:
    """The numbers of at least one run; all have the same size.

    Args:
        weight_bytes: bytes of weights that a step of decoding reads.
        bandwidth: of the memory, in bytes per second.
        window: positions that the cache keeps at most; None is all.
    """
    first, rows, count = runs[0], len(runs[0].times), len(runs[0].times[0])
    speeds = [run.generation_tps for run in runs if run.generation_tps is not None]
    intervals = [interval for run in runs for interval in run.intervals]
    decoding = Spread.of(speeds) if speeds else None
    per_row = Spread.of([speed / rows for speed in speeds]) if speeds else None
    # A step reads the weights once, and the caches of all rows.
    read = weight_bytes + rows * first.position_bytes * mean_positions(first.prompt_tokens, count, window)
    drafted, steps = sum(run.drafted for run in runs), sum(run.steps for run in runs)
    return Result(
        prompt_tokens=first.prompt_tokens,
        generation_tokens=count,
        rows=rows,
        repetitions=len(runs),
        time_to_first_token=Spread.of([run.time_to_first_token for run in runs]),
        prompt_tps=Spread.of([run.prompt_tps for run in runs]),
        generation_tps=decoding,
        row_tps=per_row,
        token_seconds={percent: percentile(intervals, percent) for percent in PERCENTILES} if intervals else {},
        peak_memory=max(run.peak_memory for run in runs),
        bandwidth_share=None if per_row is None or not bandwidth or steps else per_row.median * read / bandwidth,
        acceptance=sum(run.accepted for run in runs) / drafted if drafted else None,
        tokens_per_step=sum(run.step_tokens for run in runs) / steps if steps else None,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` percent of `values` do not exceed, with linear interpolation, as in numpy."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def mean_positions(prompt_tokens: int, generation_tokens: int, window: int | None = None) -> float:
    """The mean number of positions that decoding a token attends to; the first new token belongs to the prompt."""
    held = [prompt_tokens + n for n in range(1, generation_tokens)]
    return statistics.fmean(min(count, window or count) for count in held) if held else 0.0
