"""The loss of a model on batches that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ...model import OpenELM
from .objectives import CrossEntropy, Forward, Objective, reported

_CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class Evaluation:
    """A mean loss, in nats a token for cross-entropy, and the number of tokens (or what the objective counts).

    `metrics` has the means of the objective's further sums.
    """

    loss: float
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: OpenELM,
    batches: Iterable[Any],
    *,
    objective: Objective = _CROSS_ENTROPY,
    group: mx.distributed.Group | None = None,
    progress: Callable[[Any], None] | None = None,
) -> Evaluation:
    """The mean loss of `batches`, without dropout.

    Args:
        group: processes that each evaluate their own batches; the result is that of all.
        progress: called with each batch when it is done.
    """
    model.eval()
    forward = Forward(model, differentiable=False)
    sums, count = [0.0] * (1 + len(objective.metrics)), 0
    for batch in batches:
        if batch.num_targets:
            found = objective(forward, objective.arrays(batch))
            scalars = [found.loss, *(found.metrics[name] for name in objective.metrics)]
            mx.eval(scalars)
            sums = [total + float(scalar.item()) for total, scalar in zip(sums, scalars, strict=True)]  # type: ignore[arg-type]
            count += batch.num_targets
        if progress is not None:
            progress(batch)
    if group is not None and group.size() > 1:
        # A count is split into two halves, each exact in float32; sums of losses do not need that.
        parts = mx.distributed.all_sum(mx.array([count // 65536, count % 65536, *sums]), group=group)
        high, low, *sums = (float(part.item()) for part in parts)  # type: ignore[arg-type]
        count = int(high) * 65536 + int(low)
    loss, *metrics = (total / count if count else math.nan for total in sums)
    return Evaluation(loss, count, reported(objective, dict(zip(objective.metrics, metrics, strict=True))))
