"""`mlx-openelm fuse`: merge adapters into the weights of a model."""

from __future__ import annotations

import warnings
from argparse import Namespace
from typing import Any

from .. import console
from ..adapters.merging import Deviation
from ..formats import atomic
from ..inputs import to_path
from ..jobs.fuse import Fusion, fuse
from ..publishing import upload as publishing
from ..publishing.upload import UploadOptions
from ..quantization.recipes import Packing
from ..wording import counted, size
from . import flags
from . import upload as upload_command

# Warn if less than this share of the adapters' change is left.
_MOSTLY_LOST = 0.5


MAIN_FLAGS = (
    *("--model", "--adapter-path", "--save-path", "--quantize", "--q-bits", "--dequantize", "--dtype", "--overwrite"),
    *("--upload-repo", "--json"),
)
EXAMPLES = """\
  mlx-openelm fuse --model 270m --adapter-path my_adapter --save-path my_model
  mlx-openelm fuse --model 270m --adapter-path my_adapter=0.7 --adapter-path my_other=0.3 -q"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `fuse` to its parser."""
    common, measuring, source = (parser.groups[title] for title in ("Common flags", "Measuring", "Source"))
    flags.add_shared(common, "--model")
    common.add_argument(
        "--adapter-path",
        action="append",
        metavar="PATH",
        help="Adapter of mlx-lm, PEFT or CoreNet: a folder, a file or a hub repository. To mix several, repeat it as "
        "PATH=WEIGHT.  [default: adapters]",
    )
    common.add_argument(
        "--save-path", metavar="FOLDER", default="fused_model", help="Folder to write.  [default: %(default)s]"
    )
    common.add_argument(
        "--dtype", metavar=flags.DTYPES, help="Type of the weights that are not quantized.  [default: as stored]"
    )
    flags.add_shared(common, "--overwrite", "--json")
    flags.add_fields(parser, Packing)
    measuring.add_argument(
        "--report",
        **flags.SWITCH,
        help="Also measure on text how far the result is from the model with its adapters (KL divergence).",
    )
    measuring.add_argument(
        "--report-data",
        metavar="FILE",
        help="Text for --report: a text file, or .jsonl with `text` on every line.  [default: a text in the package]",
    )
    flags.add_shared(source, "--tokenizer", "--config-yaml", "--revision")
    flags.add_fields(parser, UploadOptions)


def run(args: Namespace) -> int:
    """Fuse adapters into a model, and write it as an MLX folder.

    A quantized model is packed again as it was, unless --dequantize is given, and the cost of that is printed. The
    folder appears complete or not at all, and mlx-lm reads it too. For llama.cpp or transformers, `export` it.
    """
    upload = UploadOptions(**flags.given(args, UploadOptions))
    publishing.check(upload)
    path = to_path(args.save_path)
    if upload.dry_run:
        atomic.check_target(path, overwrite=args.overwrite, flag="--save-path")
    with upload_command.output_folder(path, upload) as folder:
        result = fuse(
            args.model,
            args.adapter_path or "adapters",
            folder / path.name,
            **flags.given(args, Packing),
            report=args.report,
            report_data=args.report_data,
            tokenizer=args.tokenizer,
            config_yaml=args.config_yaml,
            revision=args.revision,
            overwrite=args.overwrite,
        )
        size_written = sum(file.stat().st_size for file in result.path.iterdir())
        sent = upload_command.publish_written(result.path, upload, path)
    if args.json:
        values = {
            "model": args.model,
            "adapter_path": args.adapter_path or ["adapters"],
            "save_path": str(path.resolve()),
        }
        values |= _to_json(result, size_written)
        console.print_json(values | ({"upload": upload_command.to_json(sent)} if sent is not None else {}))
        return 0
    console.print_line(
        f"{upload_command.wrote(upload)} {path}: {result.bits_per_weight:.2f} bits per weight, {size(size_written)}"
    )
    for line in _lines(result):
        console.print_line(line)
    if sent is not None:
        upload_command.show(sent)
    return 0


def _lines(result: Fusion) -> list[str]:
    """The lines that say how much the adapters and the rounding changed."""
    overall = result.overall
    lines = [
        f"  {counted(len(result.matrices), 'tensor')} changed by {overall.relative_change:.2%} (root mean square)",
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
            f"  KL divergence from the base with the adapter: {result.kl_divergence:.6f} nats per token "
            f"(of the base without it: {result.base_kl_divergence:.6f})"
        )
    if result.untied:
        lines.append("  the adapter changes the embedding alone, so the output layer is now separate (lm_head)")
    lines += [f"  {path}: {what}" for path, what in result.exceptions.items()]
    if (result.kl_divergence or 0) > (result.base_kl_divergence or 0):
        way = "with more bits or --dequantize" if result.requantized else "with more bits"
        warnings.warn(
            f"The result is further from the base with the adapter than the base alone is; fuse {way}.", stacklevel=2
        )
    if overall.kept < _MOSTLY_LOST:
        warnings.warn(
            "Rounding undid most of the adapter's change. Use --dequantize, or fuse into the model before it was "
            "quantized, with -q if you like.",
            stacklevel=2,
        )
    return lines


def _to_json(result: Fusion, size_written: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bits_per_weight": result.bits_per_weight,
        "size": size_written,
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
