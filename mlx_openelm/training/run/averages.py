"""Averages of the weights of a run: the moving one that the optimizer keeps, and the mean of the last checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from .state import Checkpoints

_WEIGHTS, _AVERAGE = "weights.", "optimizer.average."


def weights_of(state: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The weights by name, from what `Updater.state` returns."""
    return _part(state, _WEIGHTS)


def moving_average(state: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The moving average of the weights by name; empty if the optimizer keeps none."""
    return _part(state, _AVERAGE)


def with_weights(state: Mapping[str, mx.array], weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A state for `Updater.restore` with other weights."""
    return dict(state) | {_WEIGHTS + name: value for name, value in weights.items()}


def regular_steps(checkpoints: Checkpoints, number: int, save_every: int) -> list[int]:
    """The last `number` steps with a checkpoint that are multiples of `save_every`."""
    return [step for step in checkpoints.steps() if step > 0 and step % save_every == 0][-number:]


def mean_of_checkpoints(checkpoints: Checkpoints, steps: Sequence[int]) -> dict[str, mx.array]:
    """The mean of the weights of checkpoints, in float32, one checkpoint in memory at a time.

    Raises:
        OpenELMError: a checkpoint is missing or damaged.
    """
    total: dict[str, mx.array] = {}
    for step in steps:
        weights = _part(checkpoints.weights(step), _WEIGHTS)
        total = {name: total[name] + value if total else value for name, value in weights.items()}
        mx.eval(total)
    return {name: value / len(steps) for name, value in total.items()}


def _part(state: Mapping[str, mx.array], prefix: str) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
