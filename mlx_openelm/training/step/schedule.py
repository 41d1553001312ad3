"""The learning rate of each step."""

from __future__ import annotations

import math

from ...errors import RequestError
from ..options import TrainOptions


def learning_rate(options: TrainOptions, step: int, total_steps: int) -> float:
    """The rate of an update; the first is step 0, the last `total_steps - 1`.

    It rises linearly from `warmup_init` at step 0 to `learning_rate` at step `warmup`. Then it stays constant, or falls
    along half a cosine or linearly to `min_learning_rate`, which it reaches at the last step or after `decay_steps`.

    Raises:
        RequestError: the warm-up takes the whole run, whose length is that of the schedule.
    """
    top, low = options.learning_rate, options.min_learning_rate
    if options.decay_steps is None and options.warmup >= total_steps:
        raise RequestError(f"--warmup {options.warmup} takes all {total_steps} steps of the run; give fewer.")
    if step < options.warmup:
        return options.warmup_init + (top - options.warmup_init) * step / options.warmup
    if options.lr_schedule == "constant":
        return top
    length = options.decay_steps or max(1, total_steps - 1 - options.warmup)
    done = min(1.0, (step - options.warmup) / length)
    if options.lr_schedule == "linear":
        return top + (low - top) * done
    return low + (top - low) * (1 + math.cos(math.pi * done)) / 2
