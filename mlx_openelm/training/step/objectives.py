"""What a training step minimizes: a small protocol, and cross-entropy on the learned tokens, the default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from ...model import OpenELM
from ..data.batches import IGNORED, Batch
from ..options import PARTS
from .forward import hidden_states
from .loss import cross_entropy, split_targets
from .strategy import CHUNK


@dataclass(frozen=True)
class Forward:
    """The model, and how a step runs it.

    Args:
        model: it has the weights of the step, in the type to compute in.
        recompute: what the backward pass computes again, as in `forward.hidden_states`.
        differentiable: False when the loss is only measured, in a validation.
    """

    model: OpenELM
    recompute: str = PARTS
    differentiable: bool = True

    def hidden_states(self, inputs: mx.array, segments: mx.array | None = None) -> mx.array:
        """Hidden states [rows * length, model_dim] of token ids [rows, length], after the final norm."""
        return hidden_states(self.model, inputs, segments, recompute=self.recompute)


@dataclass(frozen=True)
class Sums:
    """What an objective gives for one micro-batch: float32 scalars, each a sum over what the batch counts.

    Args:
        objective: minimized; the only one that needs a gradient.
        loss: reported, and compared in validations.
        metrics: further sums to report, by name.
    """

    objective: mx.array
    loss: mx.array
    metrics: dict[str, mx.array] = field(default_factory=dict)


class Objective(Protocol):
    """What a training step minimizes.

    A step adds up the sums of its micro-batches over all processes and divides them by their count: of learned tokens
    here, of pairs in DPO. `Updater.update` is given that count; each batch has its own as `num_targets`.

    An objective may run the model several times. For a reference model it switches the adapters off in place:

        with without_adapters(forward.model):
            reference = mx.stop_gradient(forward.hidden_states(inputs))
    """

    @property
    def metrics(self) -> Sequence[str]:
        """The names of the further sums that a call gives; the same for every batch.

        Their means are reported. Where those are not what should be, an objective has a method `report`, which takes
        the means and returns what is.
        """

    def arrays(self, batch: Any) -> Any:
        """The arrays that a call takes, in lists, tuples or dictionaries (None is allowed among them).

        This runs outside of compiled code. A new combination of shapes is compiled once, so there should be few.
        """

    def __call__(self, forward: Forward, arrays: Any) -> Sums:
        """The sums of a micro-batch. MLX compiles this, so it may depend on nothing but its arguments."""


def reported(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """The metrics to report, from the means of an objective's further sums: the same, unless it has a `report`."""
    report: Callable[[Mapping[str, float]], dict[str, float]] | None = getattr(objective, "report", None)
    return dict(means) if report is None else report(means)


# The positions to compute logits for (None: all), their targets, and which of them are learned, all [rows].
Learned = tuple[mx.array | None, mx.array, mx.array]


@dataclass(frozen=True)
class CrossEntropy:
    """The negative log-likelihood of the learned tokens; `z_loss` and `label_smoothing` as in `loss.cross_entropy`."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    metrics: Sequence[str] = ()

    def arrays(self, batch: Batch) -> tuple[mx.array, mx.array | None, Learned]:
        return batch.inputs, batch.segments, learned_positions(batch)

    def __call__(self, forward: Forward, arrays: tuple[mx.array, mx.array | None, Learned]) -> Sums:
        inputs, segments, (rows, targets, learned) = arrays
        hidden = forward.hidden_states(inputs, segments)
        hidden = hidden if rows is None else hidden[rows]  # [positions, model_dim]
        objective, likelihood = cross_entropy(
            forward.model,
            hidden,
            targets,
            learned=learned,
            z_loss=self.z_loss,
            label_smoothing=self.label_smoothing,
            differentiable=forward.differentiable,
        )
        return Sums(objective, likelihood)


def learned_positions(batch: Batch) -> Learned:
    """The learned positions in order, and as many others as fill the last chunks of the loss.

    Logits are computed for these alone. Their number is a multiple of the chunk, and of an eighth of the largest power
    of two in it, so that few different shapes have to be compiled.
    """
    chunks = max(1, -(-batch.num_targets // CHUNK))
    unit = CHUNK << max(0, chunks.bit_length() - 4)
    targets = batch.targets.reshape(-1)  # [rows * length]
    count = min(targets.size, -(-chunks * CHUNK // unit) * unit)
    rows = None
    with mx.stream(mx.cpu):  # a GPU would compile a kernel for each of these
        if count < targets.size:
            rows = mx.sort(mx.argsort(targets == IGNORED)[:count])
            targets = targets[rows]
        targets, learned = split_targets(targets)
        mx.eval(rows, targets, learned)  # so that a GPU's stream never waits for the CPU's
    return rows, targets, learned
