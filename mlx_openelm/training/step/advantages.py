"""Advantages: how much better the reward of a completion is than those of others to the same prompt.

As in TRL 1.16: rewards are summed with their weights; a reward of NaN does not count, and a completion without any
reward has no advantage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..options.grpo import BATCH, NONE

_EPSILON = 1e-4
_ZERO = 1e-8  # a standard deviation that is none


@dataclass(frozen=True)
class Scored:
    """The completions of a step.

    Args:
        rewards: the weighted sum of each completion's rewards; NaN where none applies.
        advantages: of each completion.
        is_constant: whether the rewards that a completion is compared with are all equal.
    """

    rewards: list[float]
    advantages: list[float]
    is_constant: list[bool]


def score(rewards: Sequence[Sequence[float]], weights: Sequence[float], group: int, scale: str) -> Scored:
    """The advantages of completions.

    Args:
        rewards: for each completion one of each function, NaN where it does not apply.
        weights: of each function.
        group: the completions of a prompt, which follow each other.
        scale: what advantages are divided by, one of `options.grpo.SCALES`.
    """
    sums = [weighted(row, weights) for row in rewards]
    groups = [sums[start : start + group] for start in range(0, len(sums), group)]
    means = [mean(part) for part in groups]
    deviations = [deviation(sums if scale == BATCH else part) for part in groups]
    advantages = []
    for number, value in enumerate(sums):
        advantage = value - means[number // group]
        if scale != NONE:
            advantage /= deviations[number // group] + _EPSILON
        advantages.append(0.0 if math.isnan(advantage) else advantage)
    constant = [deviations[number // group] <= _ZERO for number in range(len(sums))]
    return Scored(sums, advantages, constant)


def weighted(row: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted sum of a completion's rewards; NaN if none applies."""
    parts = [value * weight for value, weight in zip(row, weights, strict=True) if not math.isnan(value)]
    return math.fsum(parts) if parts else math.nan


def mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN if there are none."""
    kept = [value for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else math.nan


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a sample (Bessel's) from the values that are not NaN; NaN for fewer than two."""
    kept = [value for value in values if not math.isnan(value)]
    if len(kept) < 2:
        return math.nan
    middle = math.fsum(kept) / len(kept)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in kept) / (len(kept) - 1))
