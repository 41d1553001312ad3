"""The numbers of a benchmark, from the times at which tokens came: speeds, spreads, percentiles, share of bandwidth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# The shares of the times between tokens, in percent, that a result gives.
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Run:
    """One run: the prompt's tokens, and when each new token came, in seconds since the run began.

    `peak_memory` is the most that MLX held meanwhile, in bytes; `position_bytes` what the cache holds per position.
    """

    prompt_tokens: int
    times: Sequence[float]
    peak_memory: int = 0
    position_bytes: float = 0.0

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second, up to the first new token."""
        return self.prompt_tokens / self.times[0]

    @property
    def generation_tps(self) -> float | None:
        """New tokens per second after the first one; None if there is only that."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0]) if len(self.times) > 1 else None

    @property
    def intervals(self) -> list[float]:
        """Seconds between each new token and the next."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


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
        time_to_first_token: seconds.
        prompt_tps, generation_tps: tokens per second; there is no `generation_tps` for a single new token.
        token_seconds: the percentiles of the seconds between two tokens, by percent, over all runs.
        peak_memory: bytes that MLX held at most.
        bandwidth_share: the rate of reading weights and cache while decoding, as a share of the memory's bandwidth.
    """

    prompt_tokens: int
    generation_tokens: int
    repetitions: int
    time_to_first_token: Spread
    prompt_tps: Spread
    generation_tps: Spread | None
    token_seconds: dict[int, float]
    peak_memory: int
    bandwidth_share: float | None


def summarize(runs: Sequence[Run], *, weight_bytes: float, bandwidth: float, window: int | None = None) -> Result:
    """The numbers of at least one run; all have the same size.

    Args:
        weight_bytes: bytes of weights that decoding reads per token.
        bandwidth: of the memory, in bytes per second.
        window: positions that the cache keeps at most; None is all.
    """
    first = runs[0]
    speeds = [run.generation_tps for run in runs if run.generation_tps is not None]
    intervals = [interval for run in runs for interval in run.intervals]
    decoding = Spread.of(speeds) if speeds else None
    positions = mean_positions(first.prompt_tokens, len(first.times), window)
    read = weight_bytes + first.position_bytes * positions
    return Result(
        prompt_tokens=first.prompt_tokens,
        generation_tokens=len(first.times),
        repetitions=len(runs),
        time_to_first_token=Spread.of([run.times[0] for run in runs]),
        prompt_tps=Spread.of([run.prompt_tps for run in runs]),
        generation_tps=decoding,
        token_seconds={percent: percentile(intervals, percent) for percent in PERCENTILES} if intervals else {},
        peak_memory=max(run.peak_memory for run in runs),
        bandwidth_share=None if decoding is None or not bandwidth else decoding.median * read / bandwidth,
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
