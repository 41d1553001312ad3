"""Batches that are skipped because their loss or gradient norm is far above those of the last steps."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from ..step.updater import Limits
from .state import RunState


@dataclass(frozen=True)
class Spikes:
    """Which batches to skip.

    Args:
        deviations: the standard deviations above the mean beyond which a loss or a gradient norm is a spike.
        window: the last steps that mean and deviation are of. Until half of it is full, only numbers that are not
            finite are spikes.
    """

    deviations: float
    window: int = 128

    def limits(self, state: RunState) -> Limits:
        """The highest loss and gradient norm of the next batch that is learned from."""
        if len(state.recent) < max(2, self.window // 2):
            return Limits(_LARGEST, _LARGEST)
        losses, norms = zip(*state.recent, strict=True)
        return Limits(self._limit(losses), self._limit(norms))

    def _limit(self, values: tuple[float, ...]) -> float:
        return statistics.fmean(values) + self.deviations * statistics.stdev(values)

    def remember(self, state: RunState, loss: float, grad_norm: float) -> None:
        """Add the numbers of a step, also of one that was skipped: a level that lasts is no spike for long."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.recent = [*state.recent, (loss, grad_norm)][-self.window :]


_LARGEST = 3.4e38  # the largest finite float32, about
