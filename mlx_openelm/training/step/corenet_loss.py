"""The loss of CoreNet's pretraining, number for number (corenet/loss_fn/language_modeling/cross_entropy.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..data.batches import Batch
from .loss import cross_entropy
from .objectives import Forward, Learned, Sums, learned_positions


@dataclass(frozen=True)
class DeviceBatch:
    """What one device has of CoreNet's in a step.

    Args:
        batch: its rows.
        weight: of its tokens in the step's mean. The loss of CoreNet is a mean of the devices' means, whatever their
            numbers of tokens are: this is the step's tokens over its number of devices and the tokens of this one.
        padding: the positions of its rows that are padding, to the full length.
    """

    batch: Batch
    weight: float
    padding: int

    @property
    def num_targets(self) -> int:
        return self.batch.num_targets


@dataclass(frozen=True)
class CoreNetCrossEntropy:
    """Cross-entropy with z-loss, a mean of the means of devices.

    CoreNet zeroes the logits of padding and counts their z-loss too: `total_loss`, what its log shows, is higher by
    z_loss * log(vocab_size)^2 for each padded position, over the learned ones. It has no gradient.
    """

    z_loss: float
    metrics: Sequence[str] = ("total_loss", "z_loss")

    def arrays(self, batch: DeviceBatch | Batch) -> tuple[mx.array, Learned, mx.array]:
        if isinstance(batch, Batch):  # of a validation: a mean over tokens, without padding
            batch = DeviceBatch(batch, 1.0, 0)
        numbers = mx.array([batch.weight, float(batch.padding)])
        return batch.batch.inputs, learned_positions(batch.batch), numbers

    def __call__(self, forward: Forward, arrays: tuple[mx.array, Learned, mx.array]) -> Sums:
        inputs, (rows, targets, learned), numbers = arrays
        hidden = forward.hidden_states(inputs)
        objective, likelihood = cross_entropy(
            forward.model,
            hidden if rows is None else hidden[rows],
            targets,
            learned=learned,
            z_loss=self.z_loss,
            differentiable=forward.differentiable,
        )
        weight, padding = numbers[0], numbers[1]
        of_padding = self.z_loss * math.log(forward.model.config.vocab_size) ** 2 * padding
        total = mx.stop_gradient(objective) + of_padding
        sums = {"total_loss": weight * total, "z_loss": weight * (total - likelihood)}
        return Sums(weight * objective, weight * likelihood, sums)
