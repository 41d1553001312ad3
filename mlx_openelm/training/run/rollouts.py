"""Sampled completions of a step: generated with the weights of the moment, rewarded, and made into batches.

Each process generates and rewards its share, and all know everything about all completions. The seed of a completion
follows from the run's seed, the number of its step and its place, so that a resumed run samples the same.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...adapters.switching import without_adapters
from ...generation.batch import batch_generate
from ...generation.engine import MAX_ROWS, Engine
from ...model import OpenELM
from ...text.tokenizer import Tokenizer
from ..data.batches import make_batch
from ..data.examples import Example
from ..data.prompts import Prompt
from ..options.grpo import GRPOOptions
from ..step.advantages import Scored, deviation, mean, score
from ..step.grpo import CompletionBatch, completion_logps, position_arrays
from ..step.objectives import Forward
from .distributed import Processes
from .rewards import Completion, Rewards

# Called with the completions that are done, and their number.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """The completions of a step, those of each prompt after each other.

    Args:
        prompts: of each completion.
        tokens: the ids of each completion, with the token that ends it.
        finished: whether each ended by itself, not at the limit.
        rewards: of each completion, one for each function.
        old: the log-probability of each of its tokens before the first update; None where one update is made.
    """

    prompts: list[Prompt]
    tokens: list[list[int]]
    finished: list[bool]
    rewards: list[list[float]]
    old: list[list[float]] | None = None

    @property
    def num_tokens(self) -> int:
        """The tokens that the model reads to learn from them."""
        return sum(len(p.tokens) + len(ids) - 1 for p, ids in zip(self.prompts, self.tokens, strict=True))


def statistics_names(rewards: Rewards) -> tuple[str, ...]:
    """The names of `statistics`, which are TRL's."""
    lengths = [f"{which}_{kind}" for kind in ("length", "terminated_length") for which in ("mean", "min", "max")]
    own = [f"rewards/{name}/{what}" for name in rewards.names for what in ("mean", "std")]
    return (
        *("reward", "reward_std", "frac_reward_zero_std"),
        *own,
        *(f"completions/{name}" for name in (*lengths, "clipped_ratio")),
    )


def statistics(group: Group, scored: Scored) -> list[float]:
    """Numbers about the completions of a step, in the order of `statistics_names`; NaN where there is none."""
    columns = list(zip(*group.rewards, strict=True))
    lengths = [float(len(ids)) for ids in group.tokens]
    # As in TRL: 0 if no completion ended by itself.
    ended = [length for length, finished in zip(lengths, group.finished, strict=True) if finished] or [0.0]
    return [
        mean(scored.rewards),
        deviation(scored.rewards),
        mean([float(is_constant) for is_constant in scored.is_constant]),
        *(value for column in columns for value in (mean(column), deviation(column))),
        *(value for part in (lengths, ended) for value in (mean(part), min(part), max(part))),
        mean([float(not finished) for finished in group.finished]),
    ]


@dataclass(frozen=True)
class Sampler:
    """Generates completions and rewards them.

    Args:
        tokenizer: the model's.
        options: how completions are sampled, and the seed of all.
        rewards: what each is given.
    """

    tokenizer: Tokenizer
    options: GRPOOptions
    rewards: Rewards

    def sample(
        self, model: OpenELM, prompts: Sequence[Prompt], seeds: Sequence[int], progress: Progress | None = None
    ) -> list[tuple[Completion, bool]]:
        """A completion of each prompt, and whether it ended by itself.

        Args:
            model: in evaluation mode, with the weights of the moment.
        """
        if not prompts:
            return []
        options = self.options
        results = batch_generate(
            model,
            self.tokenizer,
            [prompt.tokens for prompt in prompts],
            max_tokens=options.max_completion_length,
            temp=options.temp,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=list(seeds),
            progress=progress,
        )
        pairs = zip(prompts, results, strict=True)
        return [
            (Completion(prompt, found.tokens, found.text), found.finish_reason == "stop") for prompt, found in pairs
        ]

    def seeds(self, place: str, numbers: Sequence[int]) -> list[int]:
        """The seeds of completions with these numbers, of a step or a split."""
        return [random.Random(f"{self.options.seed} {place} {number}").getrandbits(63) for number in numbers]

    def memory(self, model: OpenELM, longest: Prompt, count: int) -> int:
        """The most bytes that generating `count` completions takes beside the model's weights."""
        engine = Engine(model, self.tokenizer)
        for _ in range(min(count, MAX_ROWS)):
            engine.submit(longest.tokens, max_tokens=self.options.max_completion_length, temp=self.options.temp, seed=0)
        return engine.budget.most([*engine.waiting], MAX_ROWS)


@dataclass(frozen=True)
class Roller:
    """Makes the completions of a step and its batches, in every process of a run at the same time.

    Args:
        reference: the reference model, with adapters that are switched off; None computes no divergence.
    """

    sampler: Sampler
    processes: Processes
    reference: OpenELM | None = None

    def roll(self, model: OpenELM, prompts: Sequence[Prompt], place: str, progress: Progress | None = None) -> Group:
        """Generate and reward `num_generations` completions of each prompt.

        Args:
            place: what seeds derive from, with the number of a completion.
        """
        sampler, options = self.sampler, self.sampler.options
        each = [prompt for prompt in prompts for _ in range(options.num_generations)]
        own = self._own(len(each))
        found = sampler.sample(model, [each[n] for n in own], sampler.seeds(place, own), progress)
        completions = [completion for completion, _ in found]
        rewards = dict(zip(own, sampler.rewards(completions), strict=True))
        tokens = self._gathered(len(each), {n: one.tokens for n, one in zip(own, completions, strict=True)}, mx.int32)
        ended = {n: [float(finished)] for n, (_, finished) in zip(own, found, strict=True)}
        numbers = self._gathered(len(each), {n: [*ended[n], *rewards[n]] for n in own}, mx.float32)
        group = Group(each, tokens, [bool(row[0]) for row in numbers], [row[1:] for row in numbers])
        if options.num_iterations == 1:
            return group
        old = self._gathered(len(each), self._likelihoods(model, group), mx.float32)
        return Group(group.prompts, group.tokens, group.finished, group.rewards, old)

    def batches(self, group: Group) -> list[CompletionBatch]:
        """This process's batches of a step."""
        options = self.sampler.options
        scored = score(group.rewards, self.sampler.rewards.weights, options.num_generations, options.scale_rewards)
        numbers = mx.array(statistics(group, scored))
        learned = [self._num_learned(group, n) for n in range(len(group.tokens))]
        batches = []
        for part in self._parts(len(group.tokens)):
            own = part[self.processes.rank :: self.processes.size]
            if not own:
                continue
            weights = self._weights(learned, part)
            tokens = self._tokens(group, own)
            batch = CompletionBatch(
                tokens=tokens,
                advantages=mx.array([scored.advantages[n] for n in own]),
                weights=mx.array([weights[n] for n in own]),
                old=None if group.old is None else self._placed(group, own, group.old, tokens.inputs.shape),
                reference=None,
                statistics=numbers,
                num_targets=len(own),
            )
            batches.append(self._with_reference(batch))
        return batches

    def _with_reference(self, batch: CompletionBatch) -> CompletionBatch:
        if self.reference is None:
            return batch
        was_training = self.reference.training
        self.reference.eval()
        with without_adapters(self.reference):
            values = self._at_positions(self.reference, batch.tokens)
            mx.eval(values)
        self.reference.train(was_training)
        return CompletionBatch(**{**vars(batch), "reference": values})

    def _likelihoods(self, model: OpenELM, group: Group) -> dict[int, list[float]]:
        """The log-probabilities of the tokens of this process's completions."""
        found: dict[int, list[float]] = {}
        for part in self._parts(len(group.tokens)):
            own = part[self.processes.rank :: self.processes.size]
            if not own:
                continue
            rows: Any = self._at_positions(model, self._tokens(group, own, everything=True)).tolist()
            for n, row in zip(own, rows, strict=True):
                start = len(group.prompts[n].tokens) - 1
                found[n] = row[start : start + len(group.tokens[n])]
        return found

    def _at_positions(self, model: OpenELM, tokens: Any) -> mx.array:
        """The log-probabilities of the learned targets of a batch [rows, length], 0 elsewhere."""
        arrays = position_arrays(tokens)
        values, _ = completion_logps(Forward(model, differentiable=False), arrays, self.sampler.options.temp)
        flat = mx.zeros(tokens.inputs.size)
        where = mx.arange(tokens.inputs.size) if arrays["rows"] is None else arrays["rows"]
        flat[where] = mx.where(arrays["learned"], values, 0.0)
        return flat.reshape(tokens.inputs.shape)

    def _weights(self, learned: Sequence[int], part: Sequence[int]) -> dict[int, float]:
        """What the summed loss of each completion of a micro-batch is multiplied by.

        The update divides by the number of the step's completions.
        """
        kind, limit = self.sampler.options.loss_type, self.sampler.options.max_completion_length
        if kind == "grpo":
            return {n: 1 / max(1, learned[n]) for n in part}
        if kind == "dr_grpo":
            return dict.fromkeys(part, 1 / limit)
        counted = part if kind == "bnpo" else range(len(learned))
        return dict.fromkeys(part, len(counted) / max(1, sum(learned[n] for n in counted)))

    def _num_learned(self, group: Group, n: int) -> int:
        masked = self.sampler.options.mask_truncated_completions and not group.finished[n]
        return 0 if masked else len(group.tokens[n])

    def _tokens(self, group: Group, numbers: Sequence[int], everything: bool = False) -> Any:
        """The rows of these completions, each after its prompt."""
        examples = []
        for n in numbers:
            prompt, ids = group.prompts[n].tokens, group.tokens[n]
            end = len(prompt) + (len(ids) if everything else self._num_learned(group, n))
            learned = ((len(prompt), end),) if end > len(prompt) else ()
            examples.append(Example(array("i", [*prompt, *ids]), learned, group.prompts[n].source))
        longest = max(len(example.tokens) for example in examples)
        limit = max(longest, self.sampler.options.max_seq_length)
        return make_batch(examples, [(n,) for n in range(len(examples))], limit)

    def _placed(
        self, group: Group, numbers: Sequence[int], values: Sequence[Sequence[float]], shape: Sequence[int]
    ) -> mx.array:
        """Values of the tokens of completions at the positions that predict them [rows, length]."""
        rows = []
        for n in numbers:
            start = len(group.prompts[n].tokens) - 1
            row = [0.0] * start + list(values[n])
            rows.append(row + [0.0] * (shape[1] - len(row)))
        return mx.array(rows)

    def _parts(self, count: int) -> list[range]:
        """The numbers of the completions of each micro-batch, over all processes."""
        size = self.sampler.options.batch_size
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def _own(self, count: int) -> list[int]:
        """The numbers of the completions that this process generates: those it learns from."""
        return [n for part in self._parts(count) for n in part[self.processes.rank :: self.processes.size]]

    def _gathered(self, count: int, own: dict[int, Any], dtype: mx.Dtype) -> list[list[Any]]:
        """The lists of all processes, in the order of their numbers."""
        if self.processes.size == 1:
            return [own[n] for n in range(count)]
        width = self.processes.largest(max(map(len, own.values()), default=0))
        lengths = [len(own[n]) if n in own else 0 for n in range(count)]
        rows = [[*own.get(n, ()), *([0] * (width - lengths[n]))] for n in range(count)]
        # Every number is in one process and 0 in the others; as integers, so that each keeps its bits.
        table = mx.array(rows, dtype=dtype).reshape(count, width).view(mx.int32)
        total = mx.distributed.all_sum(mx.concatenate([mx.array(lengths)[:, None], table], axis=1),
                                       group=self.processes.group, stream=mx.cpu)  # fmt: skip
        ends: Any = total[:, 0].tolist()
        values: Any = total[:, 1:].view(dtype).tolist()
        return [row[:end] for row, end in zip(values, ends, strict=True)]
