"""`mlx-openelm quantize`: fewer bits, and a measure of what they cost."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from typing import Any

from .. import console
from ..cuda.compiling import notice
from ..errors import RequestError
from ..formats import atomic
from ..inputs import to_path
from ..jobs.quantize import Quantized, quantize
from ..publishing import upload as publishing
from ..publishing.command_line import without_folders
from ..publishing.upload import UploadOptions
from ..quantization.options import QuantizeOptions
from ..quantization.report import Row, chart, check_picture, letter
from ..wording import size
from . import flags
from . import upload as upload_command

MAIN_FLAGS = (
    *("--model", "--mlx-path", "--q-bits", "--q-group-size", "--target-bpw", "--method", "--report", "--overwrite"),
    *("--upload-repo", "--json"),
)
EXAMPLES = """\
  mlx-openelm quantize --model 270m --report
  mlx-openelm quantize --model 270m --target-bpw 4.2 --mlx-path OpenELM-270M-4.2bpw
  mlx-openelm quantize --model 270m --q-bits 3 --method awq,gptq --calibration my_text.txt"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `quantize` to its parser."""
    common, quantization, source = (parser.groups[title] for title in ("Common flags", "Quantization", "Source"))
    flags.add_shared(common, "--model", "--mlx-path")
    flags.add_fields(parser, QuantizeOptions)
    parser.groups["Report"].add_argument(
        "--report-plot",
        metavar="FILE",
        help="Also draw the --report into this PNG, SVG or PDF file; needs matplotlib.",
    )
    quantization.add_argument(
        "--dtype", metavar=flags.DTYPES, help="Type of the weights that are not quantized.  [default: bfloat16]"
    )
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
    path = to_path(args.mlx_path)
    if upload.dry_run:
        atomic.check_target(path, overwrite=args.overwrite)
    with upload_command.output_folder(path, upload) as folder, notice("Quantizing", console.say):
        result = quantize(
            args.model,
            folder / path.name,
            options,
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            overwrite=args.overwrite,
        )
        size_written, sent = 0, None
        if result.path is not None:
            size_written = sum(file.stat().st_size for file in result.path.iterdir())
            sent = upload_command.publish_written(result.path, upload, path)
            result = replace(result, path=path)
    if plot is not None:
        from ..quantization.report_plot import draw

        draw(result.report, plot, f"Quantizations of {without_folders(args.model)}\nmeasured on {result.measured_on}")
    if args.json:
        console.print_json(_to_json(args.model, result) | ({"upload": upload_command.to_json(sent)} if sent else {}))
        return 0
    _show(result)
    if result.path is not None:
        console.print_line(
            f"{upload_command.wrote(upload)} {path}: {result.bits_per_weight:.2f} bits per weight, {size(size_written)}"
        )
    for name, what in result.exceptions.items():
        console.print_line(f"  {name}: {what}")
    if plot is not None:
        console.print_line(f"Drew {args.report_plot}")
    if sent is not None:
        upload_command.show(sent)
    return 0


def _show(result: Quantized) -> None:
    if result.report:
        for line in _table(result.report):
            console.print_line(line)
    if result.path is None:
        return
    if result.costs:
        console.print_line("Bits, group size and cost (KL divergence of the output when only that matrix is rounded):")
        for path, choice in result.choices.items():
            console.print_line(f"  {path:44} {choice.bits} {choice.group_size:>4}  {result.costs[path]:.2g}")
    if result.calibrated_on is not None:
        console.print_line(f"Learned from {result.calibrated_on}")


def _table(rows: list[Row]) -> list[str]:
    """The rows, with the letters that mark them in the chart below."""
    width = max(len(row.name) for row in rows)
    head = f"    {'':{width}}  bits/weight       size  perplexity  KL divergence"
    lines = [
        f"  {letter(index)} {row.name:{width}}  {row.bits_per_weight:11.2f}  {size(row.size):>9}"
        f"  {row.perplexity:10.3f}  {row.kl_divergence:13.5f}"
        for index, row in enumerate(rows)
    ]
    columns = console.columns(sys.stdout)
    drawn = chart(rows, columns)
    title = console.wrap("  KL divergence from the full model, in nats per token (lower is better)", columns, "  ")
    return [head, *lines, *(["", title, *drawn] if drawn else [])]


def _to_json(model: str, result: Quantized) -> dict[str, Any]:
    values: dict[str, Any] = {"model": model, "report": [asdict(row) for row in result.report]}
    if result.path is None:
        return values
    choices = {
        path: choice.to_dict() | ({"kl_divergence": result.costs[path]} if path in result.costs else {})
        for path, choice in result.choices.items()
    }
    return values | {
        "mlx_path": str(result.path.resolve()),
        "bits_per_weight": result.bits_per_weight,
        "choices": choices,
        "exceptions": result.exceptions,
    }
