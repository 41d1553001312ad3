"""Measuring the reward of completions of held-out prompts, and showing a few of them before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...errors import OpenELMError
from ...model import OpenELM
from ...wording import counted
from ..data.batches import Row
from ..data.prompts import Prompt
from ..step.advantages import mean, weighted
from ..step.evaluation import Evaluation
from .distributed import Processes
from .rewards import Completion
from .rollouts import Sampler

_SHOWN = 400  # characters of a completion


@dataclass(frozen=True)
class PromptBatch:
    """Held-out prompts of one process, with their numbers in the split."""

    numbers: tuple[int, ...]
    prompts: list[Prompt]

    @property
    def num_targets(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class PromptMaker:
    """Makes batches of held-out prompts, as `batches.Make`."""

    prompts: Sequence[Prompt]

    def __call__(self, rows: Sequence[Row], rank: int, world_size: int) -> PromptBatch:
        numbers = tuple(n for row in rows[rank::world_size] for n in row)
        return PromptBatch(numbers, [self.prompts[n] for n in numbers])


class _Moments:
    """A count, a sum and a sum of squares, which processes can add up."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0, 0.0]

    def add(self, value: float) -> None:
        if not math.isnan(value):
            self.sums = [total + part for total, part in zip(self.sums, (1.0, value, value * value), strict=True)]

    @property
    def mean(self) -> float:
        return self.sums[1] / self.sums[0] if self.sums[0] else math.nan

    @property
    def deviation(self) -> float:
        """The standard deviation of a sample."""
        count, total, squares = self.sums
        return math.sqrt(max(0.0, squares - total * total / count) / (count - 1)) if count > 1 else math.nan


@dataclass(frozen=True)
class Measure:
    """Measures the mean reward of prompts; the same completions' seeds every time.

    Args:
        computing: a context in which the model has its weights, and no dropout.
    """

    sampler: Sampler
    processes: Processes
    computing: Callable[[], AbstractContextManager[OpenELM]]

    def __call__(self, batches: Iterable[PromptBatch]) -> Evaluation:
        """The loss is minus the mean reward, so that the best adapter is that with the highest.

        Raises:
            OpenELMError: a reward function fails, or no reward applies to any of the completions.
        """
        sampler, each = self.sampler, self.sampler.options.generations_eval
        names = sampler.rewards.names
        reward, length, clipped = _Moments(), _Moments(), _Moments()
        by_name = {name: _Moments() for name in names}
        completions = 0
        with self.computing() as model:
            for batch in batches:
                prompts = [prompt for prompt in batch.prompts for _ in range(each)]
                numbers = [each * n + k for n in batch.numbers for k in range(each)]
                found = sampler.sample(model, prompts, sampler.seeds("held out", numbers))
                rows = sampler.rewards([completion for completion, _ in found])
                for (completion, finished), row in zip(found, rows, strict=True):
                    reward.add(weighted(row, sampler.rewards.weights))
                    length.add(len(completion.tokens))
                    clipped.add(float(not finished))
                    for name, value in zip(names, row, strict=True):
                        by_name[name].add(value)
                completions += len(found)
        self._add_up([reward, length, clipped, *by_name.values()])
        if math.isnan(reward.mean):
            raise OpenELMError(
                f"No reward applies to any of the {counted(int(length.sums[0]), 'completion')} of held-out prompts: "
                f"{', '.join(names)} returned None or NaN for all of them; look at --reward-funcs, or give other data."
            )
        values = {"reward": reward.mean, "reward_std": reward.deviation}
        for name, moments in by_name.items():
            values |= {f"rewards/{name}/mean": moments.mean, f"rewards/{name}/std": moments.deviation}
        values |= {"completions/mean_length": length.mean, "completions/clipped_ratio": clipped.mean}
        kept = {name: value for name, value in values.items() if not math.isnan(value)}
        return Evaluation(-reward.mean, int(length.sums[0]), kept)

    def _add_up(self, moments: Sequence[_Moments]) -> None:
        if self.processes.size == 1:
            return
        own = mx.array([one.sums for one in moments])
        total = mx.distributed.all_sum(own, group=self.processes.group, stream=mx.cpu)
        rows: Any = total.tolist()
        for one, row in zip(moments, rows, strict=True):
            one.sums = row


def examples_of(sampler: Sampler, model: OpenELM, prompt: Prompt) -> Iterator[str]:
    """Lines that show completions of a prompt with their rewards."""
    count = sampler.options.num_generations
    found = [one for one, _ in sampler.sample(model, [prompt] * count, sampler.seeds("shown", range(count)))]
    yield f"Completions of it between ⟦ and ⟧, sampled before training, with their rewards ({_names(sampler)}):"
    rows = sampler.rewards(found)
    for completion, row in zip(found, rows, strict=True):
        yield f"{', '.join(_number(value) for value in row)}: ⟦{_cut(completion)}⟧"
    total = mean([weighted(row, sampler.rewards.weights) for row in rows])
    yield f"Their mean reward is {_number(total)}."


def _names(sampler: Sampler) -> str:
    return ", ".join(sampler.rewards.names)


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.3g}"


def _cut(completion: Completion) -> str:
    text = completion.text
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} [...] {text[-_SHOWN // 2 :]}"
