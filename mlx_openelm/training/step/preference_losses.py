"""The losses of preference tuning, as formulas on log-probabilities of completions; all as in TRL 1.16.

The names are TRL's. Every loss is one number for each pair, or for each labeled answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Settings:
    """The numbers of a loss: fields of `PreferenceOptions` with the same names."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0
    simpo_gamma: float = 0.5
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Scores:
    """What a loss takes of each pair, float32 [pairs].

    Args:
        chosen, rejected: the log-probability of the completion, minus that in the reference model if there is one.
        chosen_length, rejected_length: the tokens of the completion.
    """

    chosen: mx.array
    rejected: mx.array
    chosen_length: mx.array
    rejected_length: mx.array

    @property
    def mean_chosen(self) -> mx.array:
        """The score of a token of the chosen completion, on average."""
        return self.chosen / self.chosen_length

    @property
    def mean_rejected(self) -> mx.array:
        """The score of a token of the rejected completion, on average."""
        return self.rejected / self.rejected_length


def sigmoid(scores: Scores, settings: Settings) -> mx.array:
    """DPO (arXiv:2305.18290, equation 7); label smoothing makes it conservative (its authors' cDPO)."""
    return _logistic(settings.beta * (scores.chosen - scores.rejected), settings.label_smoothing)


def sigmoid_norm(scores: Scores, settings: Settings) -> mx.array:
    """DPO with scores per token (as in Tülu 3, arXiv:2411.15124, section 5.1.2)."""
    return _logistic(settings.beta * (scores.mean_chosen - scores.mean_rejected), settings.label_smoothing)


def hinge(scores: Scores, settings: Settings) -> mx.array:
    """A margin of 1 (SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657)."""
    return mx.maximum(1 - settings.beta * (scores.chosen - scores.rejected), 0)


def ipo(scores: Scores, settings: Settings) -> mx.array:
    """The squared distance of the margin per token from 1 / (2 beta) (arXiv:2310.12036, equation 17)."""
    return mx.square(scores.mean_chosen - scores.mean_rejected - 1 / (2 * settings.beta))


def robust(scores: Scores, settings: Settings) -> mx.array:
    """DPO for labels of which the share `label_smoothing` is wrong, without bias (arXiv:2403.00409)."""
    margin, wrong = settings.beta * (scores.chosen - scores.rejected), settings.label_smoothing
    return ((1 - wrong) * _logistic(margin) - wrong * _logistic(-margin)) / (1 - 2 * wrong)


def apo_zero(scores: Scores, settings: Settings) -> mx.array:
    """Raises the chosen completion and lowers the rejected one (arXiv:2408.06266, equation 7)."""
    return 1 - mx.sigmoid(settings.beta * scores.chosen) + mx.sigmoid(settings.beta * scores.rejected)


def cpo(scores: Scores, settings: Settings) -> mx.array:
    """CPO's preference part, which is DPO without a reference (arXiv:2401.08417)."""
    return sigmoid(scores, settings)


def simpo(scores: Scores, settings: Settings) -> mx.array:
    """Log-probabilities per token, and a margin of `simpo_gamma` (arXiv:2405.14734)."""
    margin = settings.beta * (scores.mean_chosen - scores.mean_rejected) - settings.simpo_gamma
    return _logistic(margin, settings.label_smoothing)


def orpo(scores: Scores, settings: Settings) -> mx.array:
    """ORPO's preference part: the odds of the chosen completion over the rejected one's (arXiv:2403.07691)."""
    return settings.beta * _logistic(log_odds(scores))


def sft(scores: Scores, settings: Settings) -> mx.array:
    """No preference: the likelihood of the chosen completion, which the objective adds."""
    return mx.zeros_like(scores.chosen)


# The losses of pairs. TRL has the first ones in its DPO trainer, where they may be added up.
COMBINED: dict[str, Callable[[Scores, Settings], mx.array]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "apo_zero": apo_zero,
    "sigmoid_norm": sigmoid_norm,
    "sft": sft,
}
REFERENCE_FREE = {"orpo": orpo, "cpo": cpo, "simpo": simpo}
PAIRED = COMBINED | REFERENCE_FREE


def rewards(name: str, scores: Scores, settings: Settings) -> tuple[mx.array, mx.array]:
    """The implicit rewards of chosen and rejected completions, as TRL reports them for this loss."""
    per_token = name in ("orpo", "simpo")
    pair = (scores.mean_chosen, scores.mean_rejected) if per_token else (scores.chosen, scores.rejected)
    return settings.beta * pair[0], settings.beta * pair[1]


def log_odds(scores: Scores) -> mx.array:
    """The logarithm of the ratio of both completions' odds, from the mean probability of a token."""
    chosen, rejected = scores.mean_chosen, scores.mean_rejected
    return (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))


def kto(scores: mx.array, labels: mx.array, drift: mx.array, settings: Settings) -> mx.array:
    """The loss of each labeled answer (arXiv:2402.01306, equation 7).

    Args:
        scores: log-probabilities minus those in the reference model [answers].
        labels: 1 for desirable answers, 0 for the others [answers].
        drift: the estimated divergence from the reference model, a scalar, not below 0.
    """
    good = settings.desirable_weight * (1 - mx.sigmoid(settings.beta * (scores - drift)))
    bad = settings.undesirable_weight * (1 - mx.sigmoid(settings.beta * (drift - scores)))
    return mx.where(labels > 0, good, bad)


def _logistic(margin: mx.array, smoothing: float = 0.0) -> mx.array:
    """-log sigmoid(margin); with `smoothing` that share of the label is the other one."""
    loss = -nn.log_sigmoid(margin)
    return (1 - smoothing) * loss - smoothing * nn.log_sigmoid(-margin) if smoothing else loss


def _log_of_rest(logarithm: mx.array) -> mx.array:
    """log(1 - exp(x)) for x below 0, exact near 0 and far from it."""
    is_near = logarithm > -math.log(2)
    near = mx.log(-mx.expm1(mx.where(is_near, logarithm, -1.0)))
    return mx.where(is_near, near, mx.log1p(-mx.exp(mx.where(is_near, -1.0, logarithm))))
