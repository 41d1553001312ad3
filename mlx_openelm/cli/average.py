"""`mlx-openelm average`: the mean of several checkpoints."""

from __future__ import annotations

from argparse import Namespace

from .. import console
from ..inputs import to_path
from ..jobs.average import average
from ..wording import size
from . import flags

MAIN_FLAGS = ("--mlx-path", "--dtype", "--overwrite", "--json")
EXAMPLES = """\
  mlx-openelm average my_checkpoint_1.pt my_checkpoint_2.pt --mlx-path mean"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `average` to its parser."""
    parser.usage = f"{parser.prog} MODEL [MODEL ...] [flags]"
    parser.groups["Arguments"].add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="Two or more checkpoints: folders, names, CoreNet's .pt files, .gguf files, corenet:SIZE/NAME.",
    )
    common = parser.groups["Common flags"]
    flags.add_shared(common, "--mlx-path")
    common.add_argument(
        "--dtype", metavar=flags.DTYPES, help="Type to write.  [default: as stored; float32 if they differ]"
    )
    flags.add_shared(common, "--overwrite", "--json")
    flags.add_shared(parser.groups["Source"], "--tokenizer", "--config-yaml")


def run(args: Namespace) -> int:
    """Write the mean of several checkpoints of one model, of any format, as an MLX folder.

    Means are computed in float32, tensor by tensor. CoreNet averages the last five checkpoints of a training.
    """
    path = average(
        args.models,
        to_path(args.mlx_path),
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        overwrite=args.overwrite,
    )
    written = sum(file.stat().st_size for file in path.iterdir())
    if args.json:
        console.print_json({"models": args.models, "mlx_path": str(path), "size": written})
        return 0
    console.print_line(f"Wrote {path}: the mean of {len(args.models)} checkpoints, {size(written)}")
    return 0
