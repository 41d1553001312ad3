"""`mlx-openelm export`: a model as other programs read it."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..jobs.export import Export, export
from ..publishing import upload as publishing
from ..publishing.upload import Upload, UploadOptions
from ..wording import size
from . import console, flags
from . import upload as upload_command

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
        help="A folder like apple/OpenELM-*, or a file for llama.cpp.",
    )
    flags.add_shared(common, "--model")
    common.add_argument(
        "--output", metavar="PATH", help="The folder or file to write; NAME-hf or NAME-TYPE.gguf by default."
    )
    common.add_argument(
        "--gguf-type",
        metavar="f32|f16|bf16|q8_0|q4_0",
        help="The type of a GGUF file's matrices; f16 by default (bf16 for the 3B model).",
    )
    common.add_argument(
        "--dtype", metavar=flags.DTYPES, help="For huggingface; the stored type by default, float32 if quantized."
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
    result = export(
        args.model,
        args.output,
        format=args.format,
        gguf_type=args.gguf_type,
        dtype=args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        overwrite=args.overwrite,
    )
    if args.json:
        values: dict[str, Any] = {"model": args.model, "format": args.format, "path": str(result.path)}
        values |= {
            "type": result.type,
            "size": result.size,
            "bits_per_weight": result.bits_per_weight,
            "exceptions": result.exceptions,
        }
        if upload.upload_repo is not None:
            values["upload"] = upload_command.to_json(_publish(result, upload))
        console.print_json(values)
        return 0
    bits = f"{result.bits_per_weight:.2f} bits per weight"
    print(f"Wrote {result.path}: {result.type}, {bits}, {size(result.size)}")
    for name, what in result.exceptions.items():
        print(f"  {name}: {what}")
    if upload.upload_repo is not None:
        upload_command.show(_publish(result, upload))
    return 0


def _publish(result: Export, options: UploadOptions) -> Upload:
    return publishing.publish(result.path, options, card=result.card, licenses=result.licenses)
