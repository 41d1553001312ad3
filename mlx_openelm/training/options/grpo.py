"""The options of GRPO: those of fine-tuning, and those of sampling, rewards and the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...errors import RequestError, quote
from ...options import Option
from ...wording import flag, one_of
from . import FineTuneOptions

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo")
GROUP, BATCH, NONE = "group", "batch", "none"
SCALES = (GROUP, BATCH, NONE)
TOKEN, SEQUENCE = "token", "sequence"
LEVELS = (TOKEN, SEQUENCE)
_CHOICES = {"loss_type": LOSSES, "scale_rewards": SCALES, "importance_sampling_level": LEVELS}


@dataclass(frozen=True, kw_only=True, repr=False)
class GRPOOptions(FineTuneOptions):
    """The options of `mlx-openelm grpo`, apart from the model. Names and defaults are those of TRL's `GRPOConfig`.

    Args:
        batch_size: completions whose gradient is computed at once. An update learns from `batch_size` times
            `grad_accumulation_steps` completions, which must be a multiple of `num_generations`.
        num_generations_eval: completions of each prompt in validation and test; None is `num_generations`.
        reward_funcs: functions, each as `FILE.py:NAME`.
        reward_regex: regular expressions, each a reward of 1 where it is found.
        reward_weights: one for each function, and then for each regular expression; None is 1 each.
        epsilon_high: None is `epsilon`.
        delta: an upper limit of the probability ratio; None is off.
        mask_prompt, packing, z_loss, label_smoothing: of fine-tuning; they must keep their defaults.
    """

    command = "grpo"
    length_option = "max_completion_length"

    batch_size: Annotated[
        int, Option("Completions per batch; with --grad-accumulation-steps, a multiple of --num-generations.")
    ] = 8
    max_seq_length: Annotated[
        int, Option("Tokens of a prompt with its completion; longer prompts are left out.", group="Data")
    ] = 2048
    long_examples: Annotated[
        str,
        Option(
            "What to do with prompts that leave no room for --max-completion-length: leave them out, or refuse.",
            group="Data",
            metavar="truncate|refuse",
        ),
    ] = "truncate"
    test: Annotated[
        bool,
        Option(
            "Measure the reward on the test prompts: after training, or of the adapter in --adapter-path.",
            group="Validation and test",
        ),
    ] = False
    learning_rate: Annotated[float, Option("Learning rate, after the warm-up if there is one.")] = 1e-6

    num_generations: Annotated[int, Option("Completions of each prompt, which are compared with each other.")] = 8
    num_generations_eval: Annotated[
        int | None,
        Option(
            "Completions of each prompt in validation and test.",
            group="Validation and test",
            default="--num-generations",
        ),
    ] = None
    max_completion_length: Annotated[int, Option("Tokens of a completion at most.", group="Generation")] = 512
    temp: Annotated[float, Option("Sampling temperature.", group="Generation")] = 1.0
    top_p: Annotated[
        float,
        Option(
            "Sample from the most likely tokens that together have this probability; 0 or 1 is off.",
            group="Generation",
        ),
    ] = 1.0
    top_k: Annotated[int, Option("Sample from the N most likely tokens; 0 is off.", group="Generation")] = 0
    min_p: Annotated[
        float,
        Option(
            "Sample from tokens with at least this share of the most likely token's probability; 0 is off.",
            group="Generation",
        ),
    ] = 0.0

    reward_funcs: Annotated[
        tuple[str, ...],
        Option(
            "Python function that gives each completion a reward; repeatable, or with commas.",
            metavar="FILE.py:NAME",
        ),
    ] = ()
    reward_regex: Annotated[
        tuple[str, ...],
        Option(
            "Regular expression: a reward of 1 for completions in which it is found; repeatable.",
            group="Rewards",
            metavar="REGEX",
        ),
    ] = ()
    reward_weights: Annotated[
        tuple[float, ...] | None,
        Option(
            "Weights of the rewards, with commas: of the functions, then of the regular expressions.",
            group="Rewards",
            metavar="NUMBERS",
            default="1 each",
        ),
    ] = None
    scale_rewards: Annotated[
        str,
        Option(
            "Divide advantages by the standard deviation of the rewards of a prompt, of the step, or not.",
            group="Rewards",
            metavar="|".join(SCALES),
        ),
    ] = GROUP

    loss_type: Annotated[str, Option("How the loss of tokens is averaged.", group="Loss", metavar="|".join(LOSSES))] = (
        "dapo"
    )
    beta: Annotated[
        float, Option("Weight of the divergence (KL) from the model without adapters; 0 computes none.")
    ] = 0.0
    epsilon: Annotated[
        float, Option("Clip the ratio of new to old probabilities at 1 minus and plus this.", group="Loss")
    ] = 0.2
    epsilon_high: Annotated[
        float | None, Option("Clip the ratio at 1 plus this instead.", group="Loss", default="--epsilon")
    ] = None
    delta: Annotated[
        float | None,
        Option(
            "Limit the ratio where the advantage is negative too (two-sided clipping).", group="Loss", default="off"
        ),
    ] = None
    num_iterations: Annotated[int, Option("Updates from the same completions.", group="Loss")] = 1
    importance_sampling_level: Annotated[
        str,
        Option("Ratios of tokens (GRPO), or of whole completions (GSPO).", group="Loss", metavar="|".join(LEVELS)),
    ] = TOKEN
    mask_truncated_completions: Annotated[
        bool, Option("Do not learn from completions that reach --max-completion-length.", group="Loss")
    ] = False
    # Without flags: they mean nothing here.
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    mask_prompt: bool = False
    packing: bool = False

    @property
    def prompts_per_step(self) -> int:
        """The prompts whose completions an update learns from."""
        return self.batch_size * self.grad_accumulation_steps // self.num_generations

    @property
    def generations_eval(self) -> int:
        """`num_generations_eval`, or its default."""
        return self.num_generations if self.num_generations_eval is None else self.num_generations_eval

    @property
    def held_out_rows(self) -> int:
        """The prompts of a batch of a validation."""
        return max(1, self.batch_size // self.generations_eval)

    @property
    def upper_epsilon(self) -> float:
        """`epsilon_high`, or its default."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def check(self) -> None:
        """Check all values, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        super().check()
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise RequestError(f"{flag(field)} must be {one_of(choices)}, got {quote(getattr(self, field))}.")
        for field in ("z_loss", "label_smoothing", "mask_prompt", "packing"):
            if getattr(self, field):
                raise RequestError(f"{flag(field)} is for `mlx-openelm lora`; here rewards are learned from.")
        self._check_sizes()
        if self.temp <= 0:
            raise RequestError(f"--temp must be more than 0, got {self.temp:g}: completions must differ.")
        for field in ("top_p", "min_p", "epsilon"):
            if not 0 <= getattr(self, field) <= 1:
                raise RequestError(f"{flag(field)} must be 0 to 1, got {getattr(self, field):g}.")

    def _check_sizes(self) -> None:
        total = self.batch_size * self.grad_accumulation_steps
        if total % self.num_generations:
            more = -(-total // self.num_generations) * self.num_generations
            raise RequestError(
                f"--batch-size {self.batch_size} x --grad-accumulation-steps {self.grad_accumulation_steps} = {total} "
                f"completions are not whole groups of --num-generations {self.num_generations}; take a multiple of "
                f"it, such as {more}."
            )
        if self.max_completion_length >= self.max_seq_length:
            raise RequestError(
                f"--max-completion-length must be less than --max-seq-length ({self.max_seq_length}), got "
                f"{self.max_completion_length}: the prompt needs room."
            )
