"""`mlx-openelm quantize`: fewer bits, and a measure of what they cost."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict
from typing import Any, Self

from ..cuda.compiling import notice
from ..errors import RequestError
from ..inputs import to_path
from ..jobs.quantize import Quantized, quantize
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from ..quantization.options import QuantizeOptions
from ..quantization.report import Row, chart, check_picture, draw, letter
from ..wording import size
from . import console, flags
from . import upload as upload_command

# The unit that each stage counts; other stages have none.
_UNITS = {
    "Writing": "bytes",
    "Reading the text": "batches",
    "Reading the held-out text": "batches",
    "Measuring sensitivities": "matrices",
    "Quantizing": "matrices",
    "Distilling": "steps",
    "Comparing": "choices",
}


EXAMPLES = """\
  mlx-openelm quantize --model 270m --report
  mlx-openelm quantize --model 270m --target-bpw 4.2 --mlx-path OpenELM-270M-4.2bpw
  mlx-openelm quantize --model 270m --q-bits 3 --method awq,gptq --calibration my_text.txt"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `quantize` to its parser."""
    common, source = (parser.groups[title] for title in ("Common flags", "Source"))
    flags.add_shared(common, "--model", "--mlx-path")
    flags.add_fields(parser, QuantizeOptions)
    parser.groups["Report"].add_argument(
        "--report-plot",
        metavar="FILE",
        help="Also draw the report into this PNG, SVG or PDF file; needs matplotlib.",
    )
    common.add_argument("--dtype", metavar=flags.DTYPES, help="The type of what is not quantized; bfloat16 by default.")
    flags.add_shared(common, "--overwrite", "--json")
    flags.add_shared(source, "--tokenizer", "--config-yaml", "--revision")
    flags.add_fields(parser, UploadOptions)


def run(args: Namespace) -> int:
    """Quantize a model and measure what it costs.

    --q-bits, --q-mode and --recipe quantize as `convert -q` does. --target-bpw measures on text which matrices need
    more bits, and gives them more. --method learns from text how to round. --report alone writes nothing.
    """
    upload = UploadOptions(**flags.given(args, UploadOptions))
    options = QuantizeOptions(**flags.given(args, QuantizeOptions))
    plot = None if args.report_plot is None else to_path(args.report_plot)
    if plot is not None:
        if not options.report:
            raise RequestError("--report-plot needs --report.")
        check_picture(plot)
    if upload.upload_repo is not None and not options.writes:
        raise RequestError("--upload-repo needs a model to upload; say how to quantize, for example with --q-bits.")
    publishing.check(upload)
    with _Stages() as stages, notice("Quantizing", console.say):
        result = quantize(
            args.model,
            to_path(args.mlx_path),
            options,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            overwrite=args.overwrite,
            progress=stages,
        )
    if plot is not None:
        draw(result.report, plot)
    sent = None
    if result.path is not None and upload.upload_repo is not None:
        sent = publishing.publish(result.path, upload)
    if args.json:
        console.print_json(_to_json(args.model, result) | ({"upload": upload_command.to_json(sent)} if sent else {}))
        return 0
    _show(result)
    if plot is not None:
        print(f"Drew {args.report_plot}")
    if sent is not None:
        upload_command.show(sent)
    return 0


class _Stages:
    """One progress bar after another, each labeled with its stage."""

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
        print("Bits, group size and cost (KL divergence of the output when only that matrix is rounded):")
        for path, choice in result.choices.items():
            print(f"  {path:44} {choice.bits} {choice.group_size:>4}  {result.costs[path]:.2g}")
    if result.calibrated_on is not None:
        print(f"Learned from {result.calibrated_on}")
    written = sum(path.stat().st_size for path in result.path.iterdir())
    print(f"Wrote {result.path}: {result.bits_per_weight:.2f} bits per weight, {size(written)}")
    for path, what in result.exceptions.items():
        print(f"  {path}: {what}")


def _table(rows: list[Row]) -> list[str]:
    """The rows, with the letters that mark them in the chart below."""
    width = max(len(row.name) for row in rows)
    head = f"    {'':{width}}  bits/weight       size  perplexity  KL divergence"
    lines = [
        f"  {letter(index)} {row.name:{width}}  {row.bits_per_weight:11.2f}  {size(row.size):>9}"
        f"  {row.perplexity:10.3f}  {row.kl_divergence:13.5f}"
        for index, row in enumerate(rows)
    ]
    return [head, *lines, "", "  KL divergence from the full model, in nats per token", *chart(rows)]


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
