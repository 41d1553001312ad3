"""`mlx-openelm convert`: from a name to an MLX folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..hub import catalog
from ..inputs import to_path
from ..jobs.convert import convert
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from . import console, flags
from . import upload as upload_command


@flags.of_dataclass(UploadOptions, flags.UPLOAD)
def run(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "--hf-path",
            help="A name (270m, 1.1b-instruct, tiny), a hub repository, a folder, a CoreNet checkpoint (.pt), "
            "a .gguf file, or corenet:SIZE/NAME.",
        ),
    ] = catalog.TINY,
    mlx_path: Annotated[str, typer.Option(help="The folder to write.")] = "mlx_model",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16 for what is not quantized; bfloat16 unless told."),
    ] = None,
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Pack every matrix into few bits.")] = False,
    q_bits: flags.QBits = None,
    q_group_size: flags.QGroupSize = None,
    q_mode: flags.QMode = "affine",
    recipe: flags.Recipe = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", "-d", help="Unpack a quantized model.")] = False,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    revision: flags.Revision = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
    **options: Any,
) -> None:
    """Write a model as an MLX folder, quantized if you like.

    The folder appears complete or not at all, and mlx-lm reads it too.
    """
    upload = UploadOptions(**options)
    publishing.check(upload)
    with console.Progress("Writing", unit="bytes") as progress:
        result = convert(
            model,
            to_path(mlx_path),
            dtype=dtype,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            recipe=recipe,
            dequantize=dequantize,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    written = sum(path.stat().st_size for path in result.path.iterdir())
    if as_json:
        values = {"model": model, "mlx_path": str(result.path), "bits_per_weight": result.bits_per_weight}
        values |= {"size": written, "exceptions": result.exceptions}
        if upload.upload_repo is not None:
            values["upload"] = upload_command.to_json(publishing.publish(result.path, upload))
        console.print_json(values)
        return
    print(f"Wrote {result.path}: {result.bits_per_weight:.2f} bits per weight, {console.size(written)}")
    for path, what in result.exceptions.items():
        print(f"  {path}: {what}")
    if upload.upload_repo is not None:
        upload_command.show(publishing.publish(result.path, upload))
