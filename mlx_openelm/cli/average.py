"""`mlx-openelm average`: several checkpoints become their mean."""

from __future__ import annotations

from typing import Annotated

import typer

from ..inputs import to_path
from ..jobs.average import average
from . import console, flags


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two checkpoints or more: folders, names, CoreNet's .pt files, .gguf files, corenet:SIZE/NAME."
        ),
    ],
    mlx_path: Annotated[str, typer.Option(help="The folder to write.")] = "mlx_model",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16; as stored unless told, float32 where they differ."),
    ] = None,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
) -> None:
    """Write the mean of several checkpoints of one model, of any format, as an MLX folder.

    Means are computed in float32, tensor by tensor. CoreNet averages the last five checkpoints of a training.
    """
    with console.Progress("Writing", unit="bytes") as progress:
        path = average(
            models,
            to_path(mlx_path),
            dtype=dtype,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            overwrite=overwrite,
            progress=progress,
        )
    written = sum(file.stat().st_size for file in path.iterdir())
    if as_json:
        console.print_json({"models": models, "mlx_path": str(path), "size": written})
        return
    print(f"Wrote {path}: the mean of {len(models)} checkpoints, {console.size(written)}")
