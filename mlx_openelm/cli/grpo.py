"""`mlx-openelm grpo`: training on rewards. Flags, YAML keys and Python arguments are the fields of `GRPOOptions`."""

from __future__ import annotations

from argparse import Namespace

from ..training.grpo import GroupTuning, grpo
from ..training.options.grpo import GRPOOptions
from . import flags, tuning

MAIN_FLAGS = (
    *("--model", "--train", "--data", "--reward-funcs", "--num-generations", "--beta", "--iters", "--batch-size"),
    *("--learning-rate", "--num-layers", "--adapter-path", "--resume"),
)
EXAMPLES = """\
  mlx-openelm grpo --model 270m-instruct --train --data my_prompts --reward-funcs rewards.py:is_short --iters 200
  mlx-openelm grpo --train --data my_prompts --reward-regex '[0-9]+' --max-completion-length 64
  mlx-openelm grpo --resume --adapter-path adapters
  mlx-openelm grpo --train -c lora/json/run.yaml"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `grpo` to its parser."""
    tuning.add_flags(parser, GRPOOptions)


def run(args: Namespace) -> int:
    """Train a model on rewards of its own completions: group-relative policy optimization (GRPO).

    Each line of the data has a prompt. Every step samples completions of some prompts, and makes those likelier whose
    rewards are higher than others'. Rewards are Python functions or regular expressions. --train trains an adapter, or
    with --fine-tune-type full the weights themselves; --test measures the reward. Ctrl-C saves, and --resume continues
    exactly where the run stopped, after a crash too.
    """
    return tuning.run(args, GroupTuning(), grpo)
