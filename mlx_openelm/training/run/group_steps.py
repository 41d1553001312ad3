"""The steps of GRPO: which prompts each update completes, and batches that are made when they are needed."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

from ...errors import name_options
from ..data.batches import Batches, padded
from ..data.prompts import Prompt
from ..step.grpo import CompletionBatch
from ..step.updater import Updater
from .listener import Listener
from .rollouts import Group, Roller


class GroupStep:
    """The data of an update, as `batches.Step`; completions are generated when its batches are first read."""

    def __init__(self, make: Callable[[], tuple[Group, list[CompletionBatch]]], examples: tuple[int, ...],
                 epoch: float, num_targets: int):  # fmt: skip
        self._make = make
        self.examples, self.epoch, self.num_targets = examples, epoch, num_targets

    @cached_property
    def _made(self) -> tuple[Group, list[CompletionBatch]]:
        return self._make()

    @property
    def batches(self) -> Sequence[Any]:
        return self._made[1]

    @property
    def num_tokens(self) -> int:
        return self._made[0].num_tokens


class GroupSteps(Batches):
    """The prompts of each update, as `Batches` orders them; `num_iterations` updates have the same completions.

    A run that stops between such updates keeps their completions in its checkpoint.
    """

    def __init__(self, prompts: Sequence[Prompt], roller: Roller, updater: Updater, listener: Listener):
        options = roller.sampler.options
        super().__init__(
            prompts,
            batch_size=options.prompts_per_step,
            max_seq_length=options.max_seq_length,
            seed=options.seed,
            make=lambda rows, rank, size: rows,
        )
        self._roller, self._updater, self._listener = roller, updater, listener
        self._warned = False
        self._iterations, self._generations = options.num_iterations, options.num_generations
        self._prompt_steps = self.steps_per_epoch
        self.steps_per_epoch *= self._iterations
        self._group: tuple[int, Group] | None = None

    def step(self, index: int, rank: int = 0) -> Any:
        """The data of update `index`; its completions are those of the weights that it begins with."""
        number = index // self._iterations
        epoch, within = divmod(number, self._prompt_steps)
        indices = tuple(n for row in self.plan(epoch)[within] for n in row)
        return GroupStep(
            lambda: self._make_batches(number, [self.examples[n] for n in indices]),
            indices,
            epoch,
            len(indices) * self._generations,
        )

    def largest_shape(self) -> tuple[int, int]:
        """A shape [rows, length] that no batch exceeds; memory must be enough for it."""
        options = self._roller.sampler.options
        rows = -(-min(options.batch_size, len(self.examples) * self._generations) // self._roller.processes.size)
        longest = max(self._lengths) + options.max_completion_length - 1
        return rows, min(padded(longest), options.max_seq_length)

    def position(self, step: int) -> dict[str, Any] | None:
        """What a checkpoint after `step` updates keeps: the completions that are still learned from."""
        if step % self._iterations == 0 or self._group is None:
            return None
        number, group = self._group
        values = [group.tokens, group.finished, group.rewards, group.old]
        packed = zlib.compress(json.dumps(values, separators=(",", ":")).encode())
        return {"group": number, "completions": base64.b64encode(packed).decode()}

    def restore(self, position: dict[str, Any] | None) -> None:
        """Continue from what `position` gave."""
        if position is None:
            return
        tokens, finished, rewards, old = json.loads(zlib.decompress(base64.b64decode(position["completions"])))
        number = position["group"]
        epoch, within = divmod(number, self._prompt_steps)
        prompts = [self.examples[n] for row in self.plan(epoch)[within] for n in row for _ in range(self._generations)]
        self._group = number, Group(prompts, tokens, finished, rewards, old)

    def _make_batches(self, number: int, prompts: Sequence[Prompt]) -> tuple[Group, list[CompletionBatch]]:
        if self._group is None or self._group[0] != number:
            with self._updater.computing() as model:
                progress = partial(self._listener.working, "Generating")
                group = self._roller.roll(model, prompts, f"step {number}", progress)
            self._warn_of_missing_rewards(number, group)
            self._group = number, group
        group = self._group[1]
        return group, self._roller.batches(group)

    def _warn_of_missing_rewards(self, number: int, group: Group) -> None:
        """Say once in a run that completions got no reward."""
        missing = sum(all(map(math.isnan, row)) for row in group.rewards)
        if not missing or self._warned:
            return
        self._warned = True
        names = ", ".join(self._roller.sampler.rewards.names)
        self._listener.warn(
            name_options(
                f"No reward applies to {missing} of the {len(group.rewards)} completions of step "
                f"{number * self._iterations + 1}: {names} returned None or NaN, and nothing is learned from such "
                "completions; look at --reward-funcs."
            )
        )
