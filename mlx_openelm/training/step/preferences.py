"""What preference tuning minimizes: DPO and its relatives on pairs, KTO on labeled answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..data.pairs import PreferenceBatch
from . import preference_losses as losses
from .likelihoods import log_likelihoods
from .objectives import Forward, Sums, learned_positions
from .preference_losses import Scores, Settings

_OF_PAIRS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
)
_LIKELIHOOD, _ODDS_RATIO, _ODDS = "nll_loss", "log_odds_ratio", "log_odds_chosen"


@dataclass(frozen=True)
class Answered:
    """A micro-batch after the forward pass.

    Args:
        totals: the log-probability of each answer's completion [answers].
        logits: the logits of its positions, averaged over the vocabulary and summed [answers].
        likelihood: the log-probabilities of all learned tokens of each answer, summed [answers].
        learned: their number [answers].
    """

    totals: mx.array
    logits: mx.array
    likelihood: mx.array
    learned: mx.array


def answer_arrays(batch: PreferenceBatch) -> dict[str, Any]:
    """The arrays that `answered` takes."""
    rows, targets, learned = learned_positions(batch.tokens)
    owners, completed = batch.owners.reshape(-1), batch.completed.reshape(-1)
    if rows is not None:
        owners, completed = owners[rows], completed[rows]
    return {
        "inputs": batch.tokens.inputs,
        "segments": batch.tokens.segments,
        "rows": rows,
        "targets": targets,
        "learned": learned,
        "owners": owners,
        "completed": completed,
        "lengths": batch.lengths,
        "reference": batch.reference,
    }


def answered(forward: Forward, arrays: Mapping[str, Any]) -> Answered:
    """Run the model on the answers of a micro-batch."""
    hidden = forward.hidden_states(arrays["inputs"], arrays["segments"])
    hidden = hidden if arrays["rows"] is None else hidden[arrays["rows"]]  # [positions, model_dim]
    found, means = log_likelihoods(forward.model, hidden, arrays["targets"], differentiable=forward.differentiable)
    # Which answer each position belongs to [answers, positions]. A sum over it is the same in every run, which that of
    # a scatter is not on a GPU.
    owned = mx.arange(arrays["lengths"].size)[:, None] == arrays["owners"]

    def by_answer(values: mx.array, mask: mx.array) -> mx.array:
        return mx.sum(mx.where(owned & mask, values, 0.0), axis=1)

    completed = arrays["completed"] & arrays["learned"]
    return Answered(
        by_answer(found, completed),
        by_answer(means, completed),
        by_answer(found, arrays["learned"]),
        by_answer(mx.ones_like(found), arrays["learned"]),
    )


@dataclass(frozen=True)
class Preference:
    """The losses of pairs. A mean over tokens is that of a micro-batch, and counts as often as it has pairs.

    Args:
        weights: the weight of each loss of `preference_losses.PAIRED`, by name.
        uses_reference: whether scores are relative to the reference model.
    """

    weights: Mapping[str, float]
    settings: Settings = field(default_factory=Settings)
    uses_reference: bool = True
    counts = "pairs"

    @property
    def likelihood_weight(self) -> float:
        """The weight of the chosen answers' negative log-likelihood, a mean over tokens."""
        shares = {"orpo": 1.0, "sft": 1.0, "cpo": self.settings.cpo_alpha, "simpo": self.settings.cpo_alpha}
        return sum(weight * shares.get(name, 0.0) for name, weight in self.weights.items())

    @property
    def metrics(self) -> Sequence[str]:
        own: tuple[str, ...] = (_LIKELIHOOD, _ODDS_RATIO, _ODDS) if "orpo" in self.weights else ()
        own = own or ((_LIKELIHOOD,) if {"cpo", "simpo", "sft"} & self.weights.keys() else ())
        return (*_OF_PAIRS, *own)

    def arrays(self, batch: PreferenceBatch) -> dict[str, Any]:
        return answer_arrays(batch)

    def __call__(self, forward: Forward, arrays: dict[str, Any]) -> Sums:
        found = answered(forward, arrays)
        relative = found.totals - arrays["reference"] if self.uses_reference else found.totals
        lengths = arrays["lengths"]
        scores = Scores(relative[0::2], relative[1::2], lengths[0::2], lengths[1::2])
        pairs = scores.chosen.size
        likelihood = -mx.sum(found.likelihood[0::2]) / mx.sum(found.learned[0::2])
        per_pair = sum(
            (weight * losses.PAIRED[name](scores, self.settings) for name, weight in self.weights.items()),
            start=mx.zeros(pairs),
        )
        loss = mx.sum(per_pair)
        if self.likelihood_weight:
            loss = loss + pairs * self.likelihood_weight * likelihood
        metrics = self._metrics(found, scores, lengths)
        if _LIKELIHOOD in self.metrics:
            metrics[_LIKELIHOOD] = pairs * likelihood
        if _ODDS in self.metrics:
            odds = losses.log_odds(scores)
            metrics |= {_ODDS: mx.sum(odds), _ODDS_RATIO: -mx.sum(mx.logaddexp(0.0, -odds))}
        return Sums(loss, mx.stop_gradient(loss), {name: mx.stop_gradient(value) for name, value in metrics.items()})

    def _metrics(self, found: Answered, scores: Scores, lengths: mx.array) -> dict[str, mx.array]:
        (name, *_) = self.weights
        chosen, rejected = losses.rewards(name, scores, self.settings)
        plain = Scores(found.totals[0::2], found.totals[1::2], scores.chosen_length, scores.rejected_length)
        logps = losses.rewards(name, plain, replace(self.settings, beta=1.0))
        sides = [mx.sum(found.logits[side::2]) / mx.sum(lengths[side::2]) for side in (0, 1)]
        values = (
            *(
                mx.sum(chosen),
                mx.sum(rejected),
                mx.sum(chosen > rejected).astype(mx.float32),
                mx.sum(chosen - rejected),
            ),
            *(mx.sum(logps[0]), mx.sum(logps[1]), chosen.size * sides[0], chosen.size * sides[1]),
        )
        return dict(zip(_OF_PAIRS, values, strict=True))


# Sums over the desirable answers, and over the others, which `LabeledPreference.report` divides by their numbers.
_SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class LabeledPreference:
    """KTO's loss of labeled answers. TRL calls the desirable ones chosen and the others rejected."""

    settings: Settings = field(default_factory=Settings)
    uses_reference: bool = True
    counts = "answers"
    metrics = (
        "kl",
        *(f"{what}/{side}" for what in ("rewards", "logps", "logits") for side in _SIDES),
        *(f"{what}/{side}" for what in ("answers", "tokens") for side in _SIDES),
    )

    def arrays(self, batch: PreferenceBatch) -> dict[str, Any]:
        assert batch.others is not None
        return {"own": answer_arrays(batch), "others": answer_arrays(batch.others), "labels": batch.labels}

    def __call__(self, forward: Forward, arrays: dict[str, Any]) -> Sums:
        own, others, labels = arrays["own"], arrays["others"], arrays["labels"]
        mismatched = answered(replace(forward, differentiable=False), others).totals
        found = answered(forward, own)
        scores = found.totals
        if self.uses_reference:
            mismatched, scores = mismatched - others["reference"], scores - own["reference"]
        drift = mx.stop_gradient(mx.maximum(mx.mean(mismatched), 0.0))
        loss = mx.sum(losses.kto(scores, labels, drift, self.settings))
        metrics = {"kl": labels.size * drift}
        for side, mask in zip(_SIDES, (labels, 1 - labels), strict=True):
            metrics |= {
                f"rewards/{side}": mx.sum(mask * self.settings.beta * scores),
                f"logps/{side}": mx.sum(mask * found.totals),
                f"logits/{side}": mx.sum(mask * found.logits),
                f"answers/{side}": mx.sum(mask),
                f"tokens/{side}": mx.sum(mask * own["lengths"]),
            }
        return Sums(loss, mx.stop_gradient(loss), {name: mx.stop_gradient(value) for name, value in metrics.items()})

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """TRL's metrics: means over the desirable answers and over the others, where there are any."""
        found = {"kl": means["kl"]}
        for side in _SIDES:
            if means[f"answers/{side}"]:
                for what in ("rewards", "logps"):
                    found[f"{what}/{side}"] = means[f"{what}/{side}"] / means[f"answers/{side}"]
                found[f"logits/{side}"] = means[f"logits/{side}"] / means[f"tokens/{side}"]
        if all(f"rewards/{side}" in found for side in _SIDES):
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found
