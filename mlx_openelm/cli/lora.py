"""`mlx-openelm lora`: fine-tuning. Flags, YAML keys and Python arguments are the fields of `FineTuneOptions`."""

from __future__ import annotations

from argparse import Namespace

from ..training.finetune import finetune
from ..training.options import FineTuneOptions
from ..training.run.method import Method
from . import flags, tuning

MAIN_FLAGS = (
    *("--model", "--train", "--data", "--iters", "--batch-size", "--learning-rate", "--num-layers", "--mask-prompt"),
    *("--adapter-path", "--resume"),
)
EXAMPLES = """\
  mlx-openelm lora --model 270m --train --data my_data --mask-prompt --iters 1000
  mlx-openelm lora --resume --adapter-path adapters
  mlx-openelm lora --model 270m --test --data my_data --adapter-path adapters
  mlx-openelm lora --train --data my_data -c my_run.yaml"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `lora` to its parser."""
    tuning.add_flags(parser, FineTuneOptions)


def run(args: Namespace) -> int:
    """Fine-tune a model on your examples.

    --train trains an adapter, or with --fine-tune-type full the weights themselves; --test measures its perplexity.
    Ctrl-C saves, and --resume continues exactly where the run stopped, after a crash too.
    """
    return tuning.run(args, Method(), finetune)
