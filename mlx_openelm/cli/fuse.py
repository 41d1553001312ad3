"""`mlx-openelm fuse`: a model with adapters becomes a model without."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from ..adapters.merging import Deviation
from ..hub import catalog
from ..inputs import to_path
from ..jobs.fuse import Fusion, fuse
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from . import console, flags
from . import upload as upload_command

_UNITS = {"Writing": "bytes", "Reading the text": "batches"}
# Below this share of the adapters' change that is left, a person should know.
_MOSTLY_LOST = 0.5


@flags.of_dataclass(UploadOptions, flags.UPLOAD)
def run(
    model: flags.Model = catalog.TINY,
    adapter_path: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter: mlx-lm's, PEFT's or CoreNet's, a folder, a file or a hub name; repeatable, and with "
            "PATH=WEIGHT each counts so many times.  [default: adapters]"
        ),
    ] = None,
    save_path: Annotated[str, typer.Option(help="The folder to write.")] = "fused_model",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16 for what is not quantized; as it is stored unless told."),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", "-q", help="Pack the matrices of a full model, or those of a packed one anew.")
    ] = False,
    q_bits: flags.QBits = None,
    q_group_size: flags.QGroupSize = None,
    q_mode: flags.QMode = "affine",
    recipe: flags.Recipe = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Unpack a quantized model; otherwise it is packed again.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also measure on text what storing the result costs (KL divergence).")
    ] = False,
    report_data: Annotated[
        str | None, typer.Option(help="That text: a text file, or .jsonl with `text` on every line; one is bundled.")
    ] = None,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    revision: flags.Revision = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
    **options: Any,
) -> None:
    """Fuse adapters into a model, and write it as an MLX folder.

    A quantized model is packed again as it was, and what that costs is told. The folder appears complete or not at
    all, and mlx-lm reads it too. For llama.cpp or transformers, give it to `export`.
    """
    upload = UploadOptions(**options)
    publishing.check(upload)
    with contextlib.ExitStack() as stack:
        bars: dict[str, console.Progress] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = stack.enter_context(console.Progress(stage, unit=_UNITS.get(stage, "")))
            bars[stage](done, total)

        result = fuse(
            model,
            adapter_path or "adapters",
            to_path(save_path),
            dtype=dtype,
            quantize=quantize,
            q_bits=q_bits,
            q_group_size=q_group_size,
            q_mode=q_mode,
            recipe=recipe,
            dequantize=dequantize,
            report=report,
            report_data=report_data,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            revision=revision,
            overwrite=overwrite,
            progress=show,
        )
    sent = publishing.publish(result.path, upload) if upload.upload_repo is not None else None
    if as_json:
        values = {"model": model, "adapter_path": adapter_path or ["adapters"], **_to_json(result)}
        console.print_json(values | ({"upload": upload_command.to_json(sent)} if sent is not None else {}))
        return
    for line in _lines(result):
        print(line)
    if sent is not None:
        upload_command.show(sent)


def _written(result: Fusion) -> int:
    return sum(path.stat().st_size for path in result.path.iterdir())


def _lines(result: Fusion) -> list[str]:
    """What was written, and what the adapters and the storing did to it."""
    overall = result.overall
    lines = [
        f"Wrote {result.path}: {result.bits_per_weight:.2f} bits per weight, {console.size(_written(result))}",
        f"  {len(result.matrices)} tensors changed by {overall.relative_change:.2%} (root mean square)",
    ]
    if overall.relative_error:
        worst = max(result.matrices, key=lambda path: result.matrices[path].relative_error)
        how = "packing them again" if result.requantized else "storing them"
        lines.append(
            f"  {how} costs an error of {overall.relative_error:.2%}, most in {worst} "
            f"({result.matrices[worst].relative_error:.2%}), and keeps {overall.kept:.0%} of the change"
        )
    if result.kl_divergence is not None:
        lines.append(
            f"  KL divergence from the base with the adapter: {result.kl_divergence:.6f} nats a token "
            f"(of the base without it: {result.base_kl_divergence:.6f})"
        )
    if result.untied:
        lines.append("  the adapter changes the embedding alone, so the output layer is now one of its own (lm_head)")
    lines += [f"  {path}: {what}" for path, what in result.exceptions.items()]
    if (result.kl_divergence or 0) > (result.base_kl_divergence or 0):
        way = "with more bits or --dequantize" if result.requantized else "with more bits"
        console.say(f"warning: The result is further from the adapter on the base than the base alone is: fuse {way}.")
    if overall.kept < _MOSTLY_LOST:
        console.say(
            "warning: rounding took most of the adapter's change back. Use --dequantize, or fuse into the model before "
            "it was quantized, with -q if you like."
        )
    return lines


def _to_json(result: Fusion) -> dict[str, Any]:
    values: dict[str, Any] = {
        "save_path": str(result.path),
        "bits_per_weight": result.bits_per_weight,
        "size": _written(result),
        "untied": result.untied,
        "requantized": result.requantized,
        **_deviation(result.overall),
        "matrices": {path: _deviation(deviation) for path, deviation in result.matrices.items()},
        "exceptions": result.exceptions,
    }
    if result.kl_divergence is not None:
        values |= {"kl_divergence": result.kl_divergence, "base_kl_divergence": result.base_kl_divergence}
    return values


def _deviation(deviation: Deviation) -> dict[str, float]:
    return {"change": deviation.relative_change, "error": deviation.relative_error, "kept": deviation.kept}
