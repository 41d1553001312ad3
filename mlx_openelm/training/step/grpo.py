"""What GRPO minimizes: clipped policy gradients of sampled completions, and the divergence from a reference.

The formulas are TRL 1.16's. How the loss of tokens is averaged is in the weights of the completions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..data.batches import Batch
from ..options.grpo import SEQUENCE
from .likelihoods import log_likelihoods
from .objectives import Forward, Sums, learned_positions

# Sums over tokens, reported as means over them; where ratios are those of completions, sums and means over these.
_CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
_TOKENS, _VALID = "tokens", "valid/"


@dataclass(frozen=True)
class Settings:
    """The numbers of the loss: fields of `GRPOOptions` with the same names; `epsilon_high` is given."""

    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    temp: float = 1.0
    importance_sampling_level: str = "token"


@dataclass(frozen=True)
class CompletionBatch:
    """Completions of a micro-batch, one a row.

    Args:
        tokens: their tokens and prompts; targets are those of the completions that are learned.
        advantages: float32 [rows].
        weights: of the summed loss of each row's tokens, float32 [rows]; the loss is the sum over rows, divided by
            `num_targets` where it is all of a step.
        old, reference: log-probabilities of the tokens that are predicted at each position [rows, length], before the
            first update from these completions, and in the reference model; None where they are not needed.
        statistics: of all completions of the step, float32 [number]; NaN where there is none.
        num_targets: the completions.
    """

    tokens: Batch
    advantages: mx.array
    weights: mx.array
    old: mx.array | None
    reference: mx.array | None
    statistics: mx.array
    num_targets: int


@dataclass(frozen=True)
class GroupRelative:
    """The loss of GRPO and its relatives.

    Args:
        statistics: the names of a batch's `statistics`.
    """

    settings: Settings
    statistics: tuple[str, ...] = ()
    counts = "completions"

    @property
    def metrics(self) -> Sequence[str]:
        return (*self._of_tokens, _TOKENS, *self.statistics, *(_VALID + name for name in self.statistics))

    @property
    def _of_tokens(self) -> Sequence[str]:
        return (*(("kl",) if self.settings.beta else ()), "entropy", *_CLIPPED)

    def arrays(self, batch: CompletionBatch) -> dict[str, Any]:
        arrays = position_arrays(batch.tokens)
        arrays |= {"advantages": batch.advantages, "weights": batch.weights, "statistics": batch.statistics}
        for name, values in (("old", batch.old), ("reference", batch.reference)):
            flat = None if values is None else values.reshape(-1)
            arrays[name] = flat if flat is None or arrays["rows"] is None else flat[arrays["rows"]]
        return arrays

    def __call__(self, forward: Forward, arrays: dict[str, Any]) -> Sums:
        settings, learned, owners = self.settings, arrays["learned"], arrays["owners"]
        logps, entropy = completion_logps(forward, arrays, settings.temp)
        old = mx.stop_gradient(logps) if arrays["old"] is None else arrays["old"]
        log_ratio = mx.where(learned, logps - old, 0.0)
        share = mx.array(1.0)  # of a token in what is clipped
        if settings.importance_sampling_level == SEQUENCE:
            owned = (mx.arange(arrays["advantages"].size)[:, None] == owners) & learned  # [rows, positions]
            share = 1 / mx.maximum(mx.sum(owned, axis=1), 1)[owners]
            log_ratio = mx.sum(mx.where(owned, log_ratio, 0.0), axis=1)[owners] * share
        ratio = mx.exp(log_ratio)
        advantages = arrays["advantages"][owners]
        low, high = 1 - settings.epsilon, 1 + settings.epsilon_high
        limited = ratio if settings.delta is None else mx.minimum(ratio, settings.delta)
        loss = -mx.minimum(limited * advantages, mx.clip(ratio, low, high) * advantages)
        of_tokens = {"entropy": entropy}
        if settings.beta:
            distance = mx.where(learned, arrays["reference"] - logps, 0.0)
            # Weighted by the ratio, as in TRL, so that its gradient is right for completions of an older model.
            divergence = (mx.exp(distance) - distance - 1) * ratio
            loss = loss + settings.beta * divergence
            of_tokens["kl"] = divergence
        is_low, is_high = (limited < low) & (advantages < 0), (limited > high) & (advantages > 0)
        of_tokens |= {n: f * share for n, f in zip(_CLIPPED, (is_low, is_high, is_low | is_high), strict=True)}
        of_tokens[_TOKENS] = mx.ones_like(loss)
        total = mx.sum(mx.where(learned, loss * arrays["weights"][owners], 0.0))
        metrics = {name: mx.sum(mx.where(learned, value, 0.0)) for name, value in of_tokens.items()}
        metrics |= self._statistics(arrays)
        return Sums(total, mx.stop_gradient(total), {name: mx.stop_gradient(value) for name, value in metrics.items()})

    def report(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics as they are logged: means over tokens, and statistics of the steps that have them."""
        found = dict(means)
        tokens = found.pop(_TOKENS)
        by_completion = _CLIPPED if self.settings.importance_sampling_level == SEQUENCE else ()
        for name in set(self._of_tokens) - {*by_completion}:
            found[name] = found[name] / tokens if tokens else 0.0
        for name in self.statistics:
            share, value = found.pop(_VALID + name), found.pop(name)
            if share:
                found[name] = value / share
        return found

    def _statistics(self, arrays: dict[str, Any]) -> dict[str, mx.array]:
        """The statistics, and whether there are any, each as often as there are completions."""
        values, rows = arrays["statistics"], arrays["advantages"].size
        valid = mx.logical_not(mx.isnan(values))
        numbers, shares = rows * mx.where(valid, values, 0.0), rows * valid.astype(mx.float32)
        found = {name: numbers[index] for index, name in enumerate(self.statistics)}
        return found | {_VALID + name: shares[index] for index, name in enumerate(self.statistics)}


def position_arrays(tokens: Batch) -> dict[str, Any]:
    """The positions of a batch whose tokens are learned, as `completion_logps` takes them, and the row of each."""
    rows, targets, learned = learned_positions(tokens)
    positions = mx.arange(tokens.inputs.size) if rows is None else rows
    owners = positions // tokens.inputs.shape[1]
    return {"inputs": tokens.inputs, "rows": rows, "targets": targets, "learned": learned, "owners": owners}


def completion_logps(forward: Forward, arrays: Mapping[str, Any], temp: float) -> tuple[mx.array, mx.array]:
    """The log-probability of each target, and the entropy at its position [positions], at a temperature."""
    hidden = forward.hidden_states(arrays["inputs"])
    hidden = hidden if arrays["rows"] is None else hidden[arrays["rows"]]  # [positions, model_dim]
    # The output layer is linear: this divides the logits.
    hidden = hidden if temp == 1 else hidden / temp
    return log_likelihoods(
        forward.model, hidden, arrays["targets"], differentiable=forward.differentiable, entropies=True
    )
