"""`mlx-openelm export`: a model as other programs read it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .. import catalog
from ..exporting import export
from . import console, flags


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
    config_yaml: Annotated[str | None, typer.Option(help="The training configuration of a CoreNet .pt file.")] = None,
    revision: flags.Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:
    """Write a model for transformers (huggingface) or llama.cpp (gguf).

    Quantized models are dequantized first. The output appears complete or not at all.
    """
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
        console.print_json({"model": model, "format": format} | asdict(result) | {"path": str(result.path)})
        return
    bits = f"{result.bits_per_weight:.2f} bits per weight"
    print(f"Wrote {result.path}: {result.type}, {bits}, {console.size(result.size)}")
    for name, what in result.exceptions.items():
        print(f"  {name}: {what}")
