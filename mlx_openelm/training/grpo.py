"""GRPO: from a model's name, prompts and rewards to an adapter (`mlx-openelm grpo`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from ..loading import load
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .data.kinds import Record
from .data.prompts import PROMPTS, Prompts, tokenize_prompts
from .finetune import FineTuned, tune
from .options.grpo import GRPOOptions
from .run.group_steps import GroupSteps
from .run.listener import Listener
from .run.method import Measure, Method
from .run.preparing import Loading, Prepared, prepare
from .run.request import Request
from .run.rewarding import Measure as RewardMeasure
from .run.rewarding import PromptMaker, examples_of
from .run.rewards import RewardFunction, Rewards, make_rewards
from .run.rollouts import Roller, Sampler, statistics_names
from .step.grpo import GroupRelative, Settings
from .step.objectives import Objective
from .step.updater import Updater

_DEFAULT_LOADING = Loading()


def grpo(
    model: str | Path,
    options: GRPOOptions,
    *,
    reward_funcs: RewardFunction | Sequence[RewardFunction] = (),
    loading: Loading = _DEFAULT_LOADING,
    overwrite: bool = False,
    listener: Listener | None = None,
    progress: bool | None = True,
) -> FineTuned:
    """Train an adapter, or the weights themselves, on rewards of the model's own completions; test it; or both.

    Every step samples completions of some prompts, and makes those likelier whose reward is higher than that of others
    to the same prompt (group-relative policy optimization, arXiv:2402.03300).

    Args:
        model: as `load` takes it.
        reward_funcs: functions, or one, beside those that the options name, with TRL's arguments: they are called with
            `prompts`, `completions`, `completion_ids` and the data's other columns, each a list, and give as many
            numbers. Those that a function does not take are left out.
        overwrite: replace the run that is in `options.adapter_path`.
        listener: its callbacks report the run, in place of the lines and the bar that are shown by default.
        progress: whether to show the run, if there is no `listener`.

    Raises:
        RequestError: a request that cannot work; nothing was trained.
        OpenELMError: a reward function that fails, a loss that is not finite, a full disk, or a lost process; the last
            checkpoint is intact.
    """
    return tune(GroupTuning(reward_funcs), model, options, loading, overwrite, listener, progress)


class GroupTuning(Method):
    """Training on rewards; the options of its requests are `GRPOOptions`.

    Args:
        functions: reward functions, or one, beside those that the options name.
    """

    options = GRPOOptions

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction] = ()):
        self._functions = (functions,) if callable(functions) else functions
        self._rewards = Rewards({}, ())
        self._reference: OpenELM | None = None

    def prepare(self, request: Request) -> Prepared:
        """Load the rewards, the model and the prompts."""
        options = _options(request)
        self._rewards = make_rewards(
            options.reward_funcs, options.reward_regex, options.reward_weights, self._functions
        )

        def tokenize(split: str, records: Sequence[Record], tokenizer: Tokenizer, max_seq_length: int) -> Prompts:
            return tokenize_prompts(
                records,
                tokenizer,
                max_seq_length=max_seq_length,
                max_completion_length=options.max_completion_length,
                chat_template=request.loading.chat_template,
                refuse_long=options.long_examples == "refuse",
                progress=partial(request.listener.working, f"Tokenizing {split}"),
            )

        return prepare(request.model, options, request.loading, request.listener, kinds=(PROMPTS,), tokenize=tokenize)

    def complete(self, request: Request, prepared: Prepared, *, keep: bool) -> None:
        """Load the reference model, where it is another one than the model without its adapters."""
        options = _options(request)
        for name, split in prepared.examples.items():
            if isinstance(split, Prompts):
                prepared.makers[name] = PromptMaker(split.examples)
        if not (options.beta and options.train):
            return
        self._reference = prepared.model
        if options.fine_tune_type == "full":
            values = dataclasses.asdict(request.loading)
            del values["chat_template"]
            self._reference, _ = load(request.model, exact_activations=True, **values)
        elif options.resume_adapter_file is not None:
            request.listener.say(
                "The reference is the model without the adapter that training starts from; to make that one part "
                "of the reference too, fuse it into the model first (`mlx-openelm fuse`)."
            )

    def batches(self, request: Request, prepared: Prepared, updater: Updater) -> GroupSteps:
        """The prompts and completions of each update; shows a few completions first."""
        prompts = prepared.examples["train"]
        assert isinstance(prompts, Prompts)
        sampler = self._sampler(request, prepared)
        if request.processes.leads and not request.options.resume:
            with updater.computing() as model:
                for line in examples_of(sampler, model, prompts.examples[0]):
                    request.listener.say(line)
        roller = Roller(sampler, request.processes, self._reference)
        return GroupSteps(prompts.examples, roller, updater, request.listener)

    def further_memory(self, request: Request, prepared: Prepared) -> tuple[int, int]:
        """Bytes of a second model as the reference, and of generation."""
        options, prompts = _options(request), prepared.examples["train"]
        assert isinstance(prompts, Prompts)
        held = 0
        if self._reference is not None and self._reference is not prepared.model:
            held = sum(value.nbytes for _, value in tree_flatten(self._reference.parameters()))  # type: ignore
        longest = max(prompts.examples, key=lambda prompt: len(prompt.tokens))
        count = options.prompts_per_step * options.num_generations // request.processes.size
        return held, self._sampler(request, prepared).memory(prepared.model, longest, count)

    def measure(self, request: Request, prepared: Prepared, updater: Updater | None) -> Measure:
        """Measures the reward of held-out prompts."""
        computing = updater.computing if updater is not None else partial(_evaluating, prepared.model)
        return RewardMeasure(self._sampler(request, prepared), request.processes, computing)

    def record(self) -> dict[str, Any]:
        """The names of the rewards."""
        return {"rewards": self._rewards.names}

    def objective(self, request: Request) -> Objective:
        """The loss that the options choose."""
        options = _options(request)
        settings = Settings(
            beta=options.beta,
            epsilon=options.epsilon,
            epsilon_high=options.upper_epsilon,
            delta=options.delta,
            temp=options.temp,
            importance_sampling_level=options.importance_sampling_level,
        )
        return GroupRelative(settings, statistics_names(self._rewards))

    def counts(self, request: Request) -> str:
        """What a step counts."""
        return "completions"

    def title(self, request: Request) -> str:
        """The beginning of the plot's title."""
        return "GRPO of"

    def _sampler(self, request: Request, prepared: Prepared) -> Sampler:
        options = dataclasses.replace(_options(request), max_seq_length=prepared.max_seq_length)
        return Sampler(prepared.tokenizer, options, self._rewards)


@contextmanager
def _evaluating(model: OpenELM) -> Iterator[OpenELM]:
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def _options(request: Request) -> GRPOOptions:
    assert isinstance(request.options, GRPOOptions)
    return request.options
