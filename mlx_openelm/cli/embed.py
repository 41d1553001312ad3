"""`mlx-openelm embed`: a vector for each text, as lines of JSON."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Generator
from contextlib import nullcontext, redirect_stdout

from .. import console
from ..errors import RequestError
from ..generation.scoring import embedding
from ..inputs import read_stream, read_text_source, split_lines, to_path
from ..loading import load
from . import flags

MAIN_FLAGS = ("--model", "--text-file", "--dimensions", "--normalize", "--adapter-path")
EXAMPLES = """\
  mlx-openelm embed "To be, or not to be" "Enter a KING"
  mlx-openelm embed --model 270m --text-file notes.txt --normalize > vectors.jsonl"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `embed` to its parser."""
    common, model = parser.groups["Common flags"], parser.groups["Model"]
    parser.usage = f"{parser.prog} [TEXT ...] [flags]"
    parser.groups["Arguments"].add_argument("words", nargs="*", metavar="TEXT", help="Text to embed; repeatable.")
    flags.add_shared(common, "--model")
    common.add_argument("--text-file", metavar="FILE", help="File with a text on each line; - reads standard input.")
    common.add_argument(
        "--dimensions",
        type=flags.integer,
        metavar="N",
        help="Numbers of each vector to keep, from the first.  [default: all]",
    )
    common.add_argument("--normalize", **flags.SWITCH, help="Scale each vector to length 1, for scalar products.")
    flags.add_shared(model, "--adapter-path", "--tokenizer", "--config-yaml", "--revision", "--dtype", "--expand")
    flags.add_shared(model, "--exact-activations")


def run(args: Namespace) -> int:
    """Print a vector for each text: the mean of the last hidden states of its tokens.

    Each line is a JSON object with text, tokens (their number, BOS included) and embedding. Texts are the arguments,
    or the lines of a file or of standard input.
    """
    texts = _texts(args)
    model, tokenizer = load(
        args.model,
        args.adapter_path,
        args.dtype,
        tokenizer=args.tokenizer,
        config_yaml=args.config_yaml,
        revision=args.revision,
        expand=args.expand,
        exact_activations=args.exact_activations,
    )
    size, most = model.config.model_dim, model.config.rope_max_length
    if args.dimensions is not None and not 1 <= args.dimensions <= size:
        raise RequestError(f"--dimensions must be from 1 to {size}, the model's, got {args.dimensions}.")
    encoded = [tokenizer.encode(text) for text in texts]
    for number, ids in enumerate(encoded, 1):
        if len(ids) > most:
            raise RequestError(f"Text {number} has {len(ids)} tokens, and the model's context has {most}; shorten it.")
    stdout = sys.stdout
    progress = None if stdout.isatty() else console.Progress("Embedding", unit="texts")
    with progress or nullcontext():
        for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), 1):
            vector = _result(embedding(model, ids))[: args.dimensions]
            if args.normalize:
                length = math.hypot(*vector) or 1.0
                vector = [value / length for value in vector]
            with redirect_stdout(stdout):  # a progress bar takes what is printed for its own terminal
                console.print_json({"text": text, "tokens": len(ids), "embedding": vector})
            if progress is not None:
                progress(number, len(texts))
    return 0


def _result(work: Generator[None, None, list[float]]) -> list[float]:
    """What a generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def _texts(args: Namespace) -> list[str]:
    """The texts to embed; RequestError if there are none."""
    if args.text_file is not None and args.words:
        raise RequestError("Give the texts once: as arguments, or with --text-file.")
    if args.words:
        texts = list(args.words)
    elif args.text_file in (None, "-"):
        if args.text_file is None and sys.stdin.isatty():
            raise RequestError("There is no text; give one as an argument, with --text-file or on standard input.")
        texts = _lines(read_stream(sys.stdin.buffer, "Standard input"), "Standard input")
    else:
        texts = _lines(read_text_source(to_path(args.text_file)), args.text_file)
    if not texts or not all(texts):
        raise RequestError("A text is empty; give some." if texts else "There are no texts; write one on each line.")
    return texts


def _lines(data: bytes, source: str) -> list[str]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not UTF-8 text (byte {error.start}).") from None
    return [line for line in split_lines(text) if line.strip()]
