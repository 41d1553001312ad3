"""Means with standard errors, and tests of two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean, from the sample's standard deviation, as in lm-eval; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions.

    Attributes:
        difference, standard_error: the mean of the differences question by question, the first model's minus the
            second's, and its standard error.
        better, worse: questions on which the first model scores more, and less.
        p_value: how likely so uneven a split of these questions is if both models are equal (the sign test, which for
            right and wrong answers is McNemar's exact test).
    """

    questions: int
    difference: float
    standard_error: float
    better: int
    worse: int
    p_value: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare two models, whose scores are in the order of the same questions."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    better, worse = (sum(sign * value > 0 for value in differences) for sign in (1, -1))
    return Paired(
        len(differences), mean(differences), standard_error(differences), better, worse, _sign_test(better, worse)
    )


def _sign_test(better: int, worse: int) -> float:
    """The two-sided probability of a split at least as uneven, if each side is as likely."""
    count, fewer = better + worse, min(better, worse)
    if better == worse:
        return 1.0
    # Logarithms, since with thousands of questions 0.5 ** count is 0.
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))
