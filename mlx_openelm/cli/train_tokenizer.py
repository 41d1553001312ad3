"""`mlx-openelm train-tokenizer`: a tokenizer for a model that is trained from the beginning."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict

from .. import console
from ..training.options.tokenizer import TokenizerOptions
from ..training.train_tokenizer import train_tokenizer
from ..wording import counted
from . import flags

MAIN_FLAGS = ("--data", "--vocab-size", "--output", "--json")
EXAMPLES = """\
  mlx-openelm train-tokenizer --data my_text --vocab-size 4096 --output my_tokenizer"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `train-tokenizer` to its parser."""
    common = parser.groups["Common flags"]
    common.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="PATH",
        help="Text, as for pretrain: a file, a folder, a pattern, or a data set on the hub; repeatable.",
    )
    common.add_argument("--output", required=True, metavar="FOLDER", help="Folder to write, which must be new.")
    flags.add_fields(parser, TokenizerOptions)
    flags.add_shared(common, "--json")


def run(args: Namespace) -> int:
    """Train a tokenizer on text: a SentencePiece BPE model as Llama's, with bytes for characters that it lacks.

    It is written as `tokenizer.model` and `tokenizer.json`, which give the same ids. Train it before the model:
    a trained model works with its own tokenizer only.
    """
    trained = train_tokenizer(args.data, args.output, **flags.given(args, TokenizerOptions))
    if args.json:
        console.print_json(asdict(trained) | {"path": str(trained.path)})
        return 0
    text = f"{counted(trained.documents, 'document')}, {counted(trained.characters, 'character')}"
    console.print_line(f"Wrote {trained.path}: a tokenizer of {counted(trained.vocab_size, 'token')}")
    console.print_line(f"Trained on {text}")
    return 0
