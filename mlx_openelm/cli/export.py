"""`mlx-openelm export`: a model as other programs read it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from .. import console
from ..errors import RequestError
from ..inputs import to_path
from ..jobs.export import check_output, export
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from ..wording import size
from . import flags
from . import upload as upload_command

MAIN_FLAGS = ("--format", "--model", "--output", "--gguf-type", "--dtype", "--overwrite", "--upload-repo", "--json")
EXAMPLES = """\
  mlx-openelm export --format huggingface --output tiny-hf
  mlx-openelm export --format gguf --gguf-type q8_0 --output tiny-q8_0.gguf"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `export` to its parser."""
    common, source = (parser.groups[title] for title in ("Common flags", "Source"))
    common.add_argument(
        "--format",
        required=True,
        metavar="huggingface|gguf",
        help="Format to write: a folder like apple/OpenELM-* for transformers, or a file for llama.cpp.",
    )
    flags.add_shared(common, "--model")
    common.add_argument(
        "--output", metavar="PATH", help="Folder or file to write.  [default: NAME-hf or NAME-TYPE.gguf]"
    )
    common.add_argument(
        "--gguf-type",
        metavar="f32|f16|bf16|q8_0|q4_0",
        help="Type of the matrices in a GGUF file.  [default: f16; bf16 for the 3B model]",
    )
    common.add_argument(
        "--dtype",
        metavar=flags.DTYPES,
        help="Type to write, for --format huggingface.  [default: as stored; float32 if quantized]",
    )
    flags.add_shared(common, "--overwrite", "--json")
    flags.add_shared(source, "--tokenizer", "--config-yaml", "--revision")
    flags.add_fields(parser, UploadOptions)


def run(args: Namespace) -> int:
    """Write a model for transformers (huggingface) or llama.cpp (gguf).

    Quantized models are dequantized first. The output appears complete or not at all.
    """
    upload = UploadOptions(**flags.given(args, UploadOptions))
    if args.format == "gguf" and args.output is not None and Path(args.output).suffix.lower() != ".gguf":
        raise RequestError(f"A GGUF file's name must end in .gguf, and --output {args.output} does not; add it.")
    publishing.check(upload)
    # Without --output, `export` names the output and the folder is the current one.
    output = None if args.output is None else to_path(args.output)
    with upload_command.output_folder(output or Path("export"), upload) as folder:
        result = export(
            args.model,
            None if output is None else folder / output.name,
            format=args.format,
            gguf_type=args.gguf_type,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            overwrite=args.overwrite,
            folder=folder,
        )
        path = output or Path(result.path.name)
        if upload.dry_run:
            check_output(path, args.format, overwrite=args.overwrite)
        if not args.json:  # before an upload, which can fail
            bits = f"{result.bits_per_weight:.2f} bits per weight"
            console.print_line(f"{upload_command.wrote(upload)} {path}: {result.type}, {bits}, {size(result.size)}")
            for name, what in result.exceptions.items():
                console.print_line(f"  {name}: {what}")
        sent = upload_command.publish_written(result.path, upload, path, card=result.card, licenses=result.licenses)
    if args.json:
        values: dict[str, Any] = {"model": args.model, "format": args.format, "path": str(path)}
        values |= {
            "type": result.type,
            "size": result.size,
            "bits_per_weight": result.bits_per_weight,
            "exceptions": result.exceptions,
        }
        if sent is not None:
            values["upload"] = upload_command.to_json(sent)
        console.print_json(values)
        return 0
    if sent is not None:
        upload_command.show(sent)
    return 0
