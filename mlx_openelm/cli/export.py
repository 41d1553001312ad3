"""`mlx-openelm export`: a model as other programs read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError
from ..hub import catalog
from ..jobs.export import Export, export
from ..publishing import upload as publishing
from ..publishing.upload import Upload, UploadOptions
from . import console, flags
from . import upload as upload_command


@flags.of_dataclass(UploadOptions, flags.UPLOAD)
def run(
    format: Annotated[
        str, typer.Option(help="huggingface (a folder as apple/OpenELM-*) or gguf (a file for llama.cpp).")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="A name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a .pt or .gguf file."
        ),
    ] = catalog.TINY,
    output: Annotated[
        str | None, typer.Option(help="The folder or file to write; NAME-hf or NAME-TYPE.gguf unless told.")
    ] = None,
    gguf_type: Annotated[
        str | None,
        typer.Option(help="f32, f16, bf16, q8_0 or q4_0; f16 unless told (bf16 for the 3B model)."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, float16 or bfloat16 for huggingface; the stored type unless told, float32 if quantized."
        ),
    ] = None,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    revision: flags.Revision = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
    **options: Any,
) -> None:
    """Write a model for transformers (huggingface) or llama.cpp (gguf).

    Quantized models are dequantized first. The output appears complete or not at all.
    """
    upload = UploadOptions(**options)
    if format == "gguf" and output is not None and Path(output).suffix.lower() != ".gguf":
        raise RequestError(f"Programs know GGUF files by their ending .gguf, which --output {output} lacks; add it.")
    publishing.check(upload)
    with console.Progress("Writing", unit="bytes") as progress:
        result = export(
            model,
            output,
            format=format,
            gguf_type=gguf_type,
            dtype=dtype,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        values: dict[str, Any] = {"model": model, "format": format, "path": str(result.path), "type": result.type}
        values |= {"size": result.size, "bits_per_weight": result.bits_per_weight, "exceptions": result.exceptions}
        if upload.upload_repo is not None:
            values["upload"] = upload_command.to_json(_publish(result, upload))
        console.print_json(values)
        return
    bits = f"{result.bits_per_weight:.2f} bits per weight"
    print(f"Wrote {result.path}: {result.type}, {bits}, {console.size(result.size)}")
    for name, what in result.exceptions.items():
        print(f"  {name}: {what}")
    if upload.upload_repo is not None:
        upload_command.show(_publish(result, upload))


def _publish(result: Export, options: UploadOptions) -> Upload:
    return publishing.publish(result.path, options, card=result.card, licenses=result.licenses)
