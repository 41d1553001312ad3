"""`mlx-openelm perplexity`: how well a model predicts a text, and how far it is from another model."""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from .. import console
from ..errors import RequestError
from ..evaluation.perplexity import kl_divergence, load_documents, make_windows, mean_nll, window_length
from ..hub import catalog
from ..inputs import to_path
from ..loading import load
from ..wording import counted
from . import flags

MAIN_FLAGS = ("--data", "--model", "--reference-model", "--adapter-path", "--json")
EXAMPLES = """\
  mlx-openelm perplexity --data my_text.txt --model OpenELM-270M-4bit --reference-model apple/OpenELM-270M"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `perplexity` to its parser."""
    common, windows, model = (parser.groups[title] for title in ("Common flags", "Windows", "Model"))
    common.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="Text to measure on: a text file, or .jsonl with `text` on every line.",
    )
    flags.add_shared(common, "--model")
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
    """Measure how well a model predicts a text.

    The text is cut into windows, each read from its beginning. The loss is the mean over tokens, in nats.
    """
    documents = load_documents(to_path(args.data), _loading(args))
    settings = {"tokenizer": args.tokenizer, "expand": args.expand, "exact_activations": True}
    given = {"config_yaml": args.config_yaml, "revision": args.revision}  # of --model alone
    model, tokenizer = load(args.model, args.adapter_path, args.dtype, **given, **settings)
    length = window_length(args.sequence_length, model.config)
    windows = _sample(make_windows(tokenizer, documents, length), args.num_samples, args.seed)
    with console.Progress("Measuring", unit="windows") as progress:
        measured = mean_nll(model, windows, batch_size=args.batch_size, progress=progress)
    values: dict[str, Any] = {
        "model": args.model,
        "data": args.data,
        "sequence_length": length,
        "windows": len(windows),
        "tokens": measured.tokens,
        "nll": measured.nll,
        "standard_error": measured.standard_error,
        "perplexity": measured.perplexity,
    }
    if args.reference_model is not None:
        reference, _ = load(args.reference_model, dtype=args.dtype, **settings)
        with console.Progress("Comparing", unit="windows") as progress:
            divergence = kl_divergence(reference, model, windows, batch_size=args.batch_size, progress=progress)
        values |= {"reference_model": args.reference_model, "kl_divergence": divergence}
    if args.json:
        console.print_json(values)
        return 0
    print(f"Perplexity: {measured.perplexity:.4f}")
    print(f"Loss: {measured.nll:.4f} ± {measured.standard_error:.4f} nats per token")
    if args.reference_model is not None:
        print(f"KL divergence from {args.reference_model}: {values['kl_divergence']:.6f} nats per token")
    print(f"Measured on {counted(measured.tokens, 'token')}: {counted(len(windows), 'window')} of {length}")
    return 0


def _loading(args: Namespace) -> dict[str, Any]:
    """What `lora --test` needs to load the same model; it takes one adapter, so several must be fused first."""
    names = ("model", "adapter_path", "tokenizer", "config_yaml", "revision", "dtype")
    return {name: getattr(args, name) for name in names if name != "model" or args.model != catalog.TINY}


def _sample(windows: list[list[int]], count: int | None, seed: int) -> list[list[int]]:
    """`count` of the windows, in their order; None and -1 mean all."""
    if count is None or count == -1:
        return windows
    if count < 1:
        raise RequestError(f"--num-samples must be 1 or more, or -1 for all, got {count}.")
    chosen = random.Random(seed).sample(range(len(windows)), min(count, len(windows)))
    return [windows[index] for index in sorted(chosen)]
