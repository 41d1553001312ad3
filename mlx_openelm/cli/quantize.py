"""`mlx-openelm quantize`: few bits, knowing what they cost."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Annotated, Any, Self

import typer

from ..cuda.compiling import notice
from ..errors import RequestError
from ..hub import catalog
from ..inputs import to_path
from ..jobs.quantize import Quantized, quantize
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from ..quantization.options import QuantizeOptions
from ..quantization.report import Row, chart, check_picture, draw, letter
from . import console, flags
from . import upload as upload_command

# What each stage counts; the others are one piece of work.
_UNITS = {
    "Writing": "bytes",
    "Reading the text": "batches",
    "Reading the held-out text": "batches",
    "Measuring sensitivities": "matrices",
    "Quantizing": "matrices",
    "Distilling": "steps",
    "Comparing": "choices",
}


@flags.of_dataclass(UploadOptions, flags.UPLOAD)
@flags.of_dataclass(QuantizeOptions, flags.QUANTIZE)
def run(
    model: flags.Model = catalog.TINY,
    mlx_path: Annotated[str, typer.Option(help="The folder to write.")] = "mlx_model",
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 for what is not quantized; bfloat16 unless told.")
    ] = None,
    report_plot: Annotated[
        str | None, typer.Option(help="Also draw the report into this PNG, SVG or PDF file; needs matplotlib.")
    ] = None,
    tokenizer: flags.Tokenizer = None,
    config_yaml: flags.ConfigYaml = None,
    revision: flags.Revision = None,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    debug: flags.Debug = False,
    **values: Any,
) -> None:
    """Quantize a model, knowing what it costs.

    With --q-bits, --q-mode or --recipe as `convert -q` does; with --target-bpw each matrix gets the bits it needs
    most, as measured on text; with --method rounding is learned from text. With --report alone nothing is written.
    """
    upload = UploadOptions(**{field.name: values.pop(field.name) for field in fields(UploadOptions)})
    options = QuantizeOptions(**values | {"method": tuple(values["method"] or ())})
    if report_plot is not None and not options.report:
        raise RequestError("--report-plot needs --report.")
    if report_plot is not None:
        check_picture(to_path(report_plot))
    if upload.upload_repo is not None and not options.writes:
        raise RequestError("--upload-repo needs a model to upload; say how to quantize, with --q-bits for one.")
    publishing.check(upload)
    with _Stages() as stages, notice("Quantizing", console.say):
        result = quantize(
            model,
            to_path(mlx_path),
            options,
            dtype=dtype,
            tokenizer=tokenizer,
            config_yaml=config_yaml,
            revision=revision,
            overwrite=overwrite,
            progress=stages,
        )
    if report_plot is not None:
        draw(result.report, to_path(report_plot))
    sent = None
    if result.path is not None and upload.upload_repo is not None:
        sent = publishing.publish(result.path, upload)
    if as_json:
        console.print_json(_to_json(model, result) | ({"upload": upload_command.to_json(sent)} if sent else {}))
        return
    _show(result)
    if report_plot is not None:
        print(f"Drew {report_plot}")
    if sent is not None:
        upload_command.show(sent)


class _Stages:
    """One progress bar after the other, each named after what is being done."""

    def __init__(self) -> None:
        self._stage, self._bar = "", console.Progress("", unit="")

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._bar.close()
            self._stage, self._bar = stage, console.Progress(stage, unit=_UNITS.get(stage, ""))
        self._bar(done, total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _show(result: Quantized) -> None:
    if result.report:
        for line in _table(result.report):
            print(line)
    if result.path is None:
        return
    if result.costs:
        print("Bits, group size and cost (KL divergence of the output when that matrix alone is rounded):")
        for path, choice in result.choices.items():
            print(f"  {path:44} {choice.bits} {choice.group_size:>4}  {result.costs[path]:.2g}")
    if result.calibrated_on is not None:
        print(f"Learned from {result.calibrated_on}")
    written = sum(path.stat().st_size for path in result.path.iterdir())
    print(f"Wrote {result.path}: {result.bits_per_weight:.2f} bits per weight, {console.size(written)}")
    for path, what in result.exceptions.items():
        print(f"  {path}: {what}")


def _table(rows: list[Row]) -> list[str]:
    """The rows, marked as in the drawing below them."""
    width = max(len(row.name) for row in rows)
    head = f"    {'':{width}}  bits/weight       size  perplexity  KL divergence"
    lines = [
        f"  {letter(index)} {row.name:{width}}  {row.bits_per_weight:11.2f}  {console.size(row.size):>9}"
        f"  {row.perplexity:10.3f}  {row.kl_divergence:13.5f}"
        for index, row in enumerate(rows)
    ]
    return [head, *lines, "", "  KL divergence from the full model, in nats a token", *chart(rows)]


def _to_json(model: str, result: Quantized) -> dict[str, Any]:
    values: dict[str, Any] = {"model": model, "report": [asdict(row) for row in result.report]}
    if result.path is None:
        return values
    choices = {
        path: choice.to_dict() | ({"kl_divergence": result.costs[path]} if path in result.costs else {})
        for path, choice in result.choices.items()
    }
    return values | {
        "mlx_path": str(result.path),
        "bits_per_weight": result.bits_per_weight,
        "choices": choices,
        "exceptions": result.exceptions,
    }
