"""`mlx-openelm convert`: from a name to an MLX folder."""

from __future__ import annotations

from argparse import Namespace

from .. import console
from ..formats import atomic
from ..hub import catalog
from ..inputs import to_path
from ..jobs.convert import convert
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from ..quantization.recipes import Packing
from ..wording import size
from . import flags
from . import upload as upload_command

MAIN_FLAGS = (
    *("--model", "--mlx-path", "--quantize", "--q-bits", "--q-group-size", "--q-mode", "--dtype", "--overwrite"),
    *("--upload-repo", "--json"),
)
EXAMPLES = """\
  mlx-openelm convert --model apple/OpenELM-270M -q --mlx-path OpenELM-270M-4bit
  mlx-openelm convert --model my_checkpoint.pt --config-yaml my_run.yaml --tokenizer my_tokenizer.model"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `convert` to its parser."""
    common, source = (parser.groups[title] for title in ("Common flags", "Source"))
    common.add_argument(
        "--model",
        "--hf-path",
        metavar="MODEL",
        default=catalog.TINY,
        help="Model: a name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a CoreNet checkpoint (.pt), "
        "a .gguf file, or corenet:SIZE/NAME.  [default: %(default)s]",
    )
    flags.add_shared(common, "--mlx-path")
    common.add_argument(
        "--dtype", metavar=flags.DTYPES, help="Type of the weights that are not quantized.  [default: bfloat16]"
    )
    flags.add_shared(common, "--overwrite", "--json")
    flags.add_fields(parser, Packing)
    flags.add_shared(source, "--tokenizer", "--config-yaml", "--revision")
    flags.add_fields(parser, UploadOptions)


def run(args: Namespace) -> int:
    """Write a model as an MLX folder, quantized if you like.

    The folder appears complete or not at all, and mlx-lm reads it too.
    """
    upload = UploadOptions(**flags.given(args, UploadOptions))
    publishing.check(upload)
    path = to_path(args.mlx_path)
    if upload.dry_run:
        atomic.check_target(path, overwrite=args.overwrite)
    with upload_command.output_folder(path, upload) as folder:
        result = convert(
            args.model,
            folder / path.name,
            **flags.given(args, Packing),
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            overwrite=args.overwrite,
        )
        written = sum(file.stat().st_size for file in result.path.iterdir())
        if not args.json:
            console.print_line(
                f"{upload_command.wrote(upload)} {path}: {result.bits_per_weight:.2f} bits per weight, {size(written)}"
            )
            for name, what in result.exceptions.items():
                console.print_line(f"  {name}: {what}")
        sent = upload_command.publish_written(result.path, upload, path)
    if args.json:
        values = {"model": args.model, "mlx_path": str(path.resolve()), "bits_per_weight": result.bits_per_weight}
        values |= {"size": written, "exceptions": result.exceptions}
        console.print_json(values | ({"upload": upload_command.to_json(sent)} if sent else {}))
    elif sent is not None:
        upload_command.show(sent)
    return 0
