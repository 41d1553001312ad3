"""`mlx-openelm dpo`: preference tuning. Flags, YAML keys and Python arguments are the fields of `PreferenceOptions`."""

from __future__ import annotations

from argparse import Namespace

from ..training.options.preference import PreferenceOptions
from ..training.preference import PREFERENCE_TUNING, dpo
from . import flags, tuning

MAIN_FLAGS = (
    *("--model", "--train", "--data", "--loss-type", "--beta", "--iters", "--batch-size", "--learning-rate"),
    *("--num-layers", "--adapter-path", "--resume"),
)
EXAMPLES = """\
  mlx-openelm dpo --model 270m-instruct --train --data my_pairs --iters 500
  mlx-openelm dpo --resume --adapter-path adapters
  mlx-openelm dpo --model 270m-instruct --test --data my_pairs --adapter-path adapters
  mlx-openelm dpo --train --data my_pairs -c lora/configs/dpo-270m.yaml"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `dpo` to its parser."""
    tuning.add_flags(parser, PreferenceOptions)


def run(args: Namespace) -> int:
    """Train a model to prefer some answers to others: DPO and its relatives, ORPO, CPO, SimPO and KTO.

    Each line of the data has a prompt with a chosen and a rejected answer; for kto, an answer and a label. --train
    trains an adapter, or with --fine-tune-type full the weights themselves; --test measures how often the chosen answer
    wins. Ctrl-C saves, and --resume continues exactly where the run stopped, after a crash too.
    """
    return tuning.run(args, PREFERENCE_TUNING, dpo)
