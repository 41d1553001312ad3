"""`mlx-openelm perplexity`: how well models predict a text, and how far they are from another model."""

from __future__ import annotations

import math
import random
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from .. import console
from ..errors import RequestError
from ..evaluation.perplexity import NLL, kl_divergence, measure
from ..evaluation.windows import Window, cut, load_documents, reading_note, window_length
from ..hub import catalog
from ..inputs import to_path
from ..loading import load
from ..model import OpenELM
from ..wording import counted
from . import flags

MAIN_FLAGS = ("--data", "--model", "--reference-model", "--stride", "--adapter-path", "--json")
EXAMPLES = """\
  mlx-openelm perplexity --data my_text.txt --model OpenELM-270M-4bit --reference-model apple/OpenELM-270M
  mlx-openelm perplexity --data my_text.txt --model 270m --model 450m --stride 256 --sequence-length 1024"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `perplexity` to its parser."""
    common, windows, model = (parser.groups[title] for title in ("Common flags", "Windows", "Model"))
    common.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="Text to measure on: a text file, or .jsonl or .parquet with `text` in every record.",
    )
    common.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="Model: a name (tiny, 270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file. Repeat it to "
        f"compare several.  [default: {catalog.TINY}]",
    )
    common.add_argument(
        "--reference-model", metavar="MODEL", help="Also measure the KL divergence from this model, in nats per token."
    )
    flags.add_shared(common, "--json")
    windows.add_argument(
        "--sequence-length",
        type=flags.integer,
        metavar="N",
        help="Tokens per window.  [default: 512, or the model's context if that is shorter]",
    )
    windows.add_argument(
        "--stride",
        type=flags.integer,
        metavar="N",
        help="Begin a window every N tokens, so that windows overlap and each token is measured once, with at least "
        "the window's tokens less N before it.  [default: windows one after the other]",
    )
    windows.add_argument(
        "--num-samples",
        type=flags.integer,
        metavar="N",
        help="Windows to measure, drawn at random; -1 is all.  [default: -1]",
    )
    windows.add_argument(
        "--batch-size",
        type=flags.integer,
        metavar="N",
        default=4,
        help="Windows to process at a time.  [default: %(default)s]",
    )
    windows.add_argument(
        "--seed",
        type=flags.integer,
        metavar="N",
        default=0,
        help="Seed for drawing windows: the same seed draws the same ones.  [default: %(default)s]",
    )
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")


def run(args: Namespace) -> int:
    """Measure how well models predict a text.

    The text is cut into windows, each read from its beginning. The loss is the mean over tokens, in nats. Bits per byte
    and per character can be compared between models with different tokenizers.
    """
    if args.reference_model is not None and args.stride is not None:
        raise RequestError("--stride and --reference-model exclude each other.")
    names: list[str] = args.model or [catalog.TINY]
    if (note := reading_note(args.data)) is not None:
        console.say(note)
    documents = load_documents(to_path(args.data), _loading(args, names[0]))
    reference = None
    if args.reference_model is not None:
        reference, _ = load(args.reference_model, dtype=args.dtype, **_settings(args))
    results = [_measure(name, documents, reference, args) for name in names]
    if args.json:
        console.print_json(results[0] if len(results) == 1 else {"models": results})
    elif len(results) == 1:
        _show(results[0])
    else:
        _show_table(results)
    return 0


def _settings(args: Namespace) -> dict[str, Any]:
    """How the reference model is loaded, and the models that are compared with it."""
    return {"tokenizer": args.tokenizer, "expand": args.expand, "exact_activations": True}


def _measure(name: str, documents: Sequence[str], reference: OpenELM | None, args: Namespace) -> dict[str, Any]:
    """What is reported of one model."""
    given = {"config_yaml": args.config_yaml, "revision": args.revision}  # of --model alone
    model, tokenizer = load(name, args.adapter_path, args.dtype, **given, **_settings(args))
    length = window_length(args.sequence_length, model.config)
    windows = _sample(cut(tokenizer, documents, length, args.stride), args.num_samples, args.seed)
    with console.Progress("Measuring", unit="windows") as progress:
        measured = measure(model, windows, batch_size=args.batch_size, progress=progress)
    values = _values(name, measured, args, length, len(windows))
    if reference is not None:
        tokens = [window.tokens for window in windows]
        with console.Progress("Comparing", unit="windows") as progress:
            divergence = kl_divergence(reference, model, tokens, batch_size=args.batch_size, progress=progress)
        values |= {"reference_model": args.reference_model, "kl_divergence": divergence}
    return values


def _values(name: str, measured: NLL, args: Namespace, length: int, windows: int) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": name,
        "data": args.data,
        "sequence_length": length,
        "stride": args.stride,
        "windows": windows,
        "tokens": measured.tokens,
        "bytes": measured.bytes,
        "characters": measured.characters,
        "nll": measured.nll,
        "standard_error": measured.standard_error,
        "perplexity": measured.perplexity,
    }
    for unit in ("bytes", "characters"):
        bits, error = measured.bits_per(unit)
        values |= {f"bits_per_{unit[:-1]}": bits, f"bits_per_{unit[:-1]}_standard_error": error}
    return values


def _show(values: dict[str, Any]) -> None:
    console.print_line(f"Perplexity: {values['perplexity']:.4f}")
    console.print_line(f"Loss: {values['nll']:.4f} ± {values['standard_error']:.4f} nats per token")
    if not math.isnan(values["bits_per_byte"]):
        parts = (
            f"{values[f'bits_per_{unit}']:.4f} ± {values[f'bits_per_{unit}_standard_error']:.4f} per {unit}"
            for unit in ("byte", "character")
        )
        console.print_line(f"Bits: {', '.join(parts)}")
    if "reference_model" in values:
        console.print_line(
            f"KL divergence from {values['reference_model']}: {values['kl_divergence']:.6f} nats per token"
        )
    stride = "" if values["stride"] is None else f", one every {values['stride']}"
    windows = counted(values["windows"], "window")
    console.print_line(
        f"Measured on {counted(values['tokens'], 'token')}: {windows} of {values['sequence_length']}{stride}"
    )


def _show_table(results: Sequence[dict[str, Any]]) -> None:
    from ..harness import tables

    compared = "kl_divergence" in results[0]
    head = ["model", "perplexity", "nats/token", "bits/byte", "bits/character", "tokens"]
    lines = [[*head, *(["KL divergence"] if compared else [])]]
    for values in results:
        cells = [
            values["model"],
            f"{values['perplexity']:.4f}",
            f"{values['nll']:.4f} ± {values['standard_error']:.4f}",
        ]
        for unit in ("byte", "character"):
            cells.append(f"{values[f'bits_per_{unit}']:.4f} ± {values[f'bits_per_{unit}_standard_error']:.4f}")
        cells.append(f"{values['tokens']:,}")
        lines.append([*cells, *([f"{values['kl_divergence']:.6f}"] if compared else [])])
    for line in tables.text(lines):
        console.print_line(line)


def _loading(args: Namespace, model: str) -> dict[str, Any]:
    """What `lora --test` needs to load the same model; it takes one adapter, so several must be fused first."""
    names = ("adapter_path", "tokenizer", "config_yaml", "revision", "dtype")
    given = {name: getattr(args, name) for name in names}
    return given if model == catalog.TINY else {"model": model, **given}


def _sample(windows: list[Window], count: int | None, seed: int) -> list[Window]:
    """`count` of the windows, in their order; None and -1 mean all."""
    if count is None or count == -1:
        return windows
    if count < 1:
        raise RequestError(f"--num-samples must be 1 or more, or -1 for all, got {count}.")
    chosen = random.Random(seed).sample(range(len(windows)), min(count, len(windows)))
    return [windows[index] for index in sorted(chosen)]
