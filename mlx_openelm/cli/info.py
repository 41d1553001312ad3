"""`mlx-openelm info`: the layer table, which shows the layer-wise scaling, and the memory the model needs."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from typing import Any

from .. import console
from ..errors import RequestError
from ..hub import catalog
from ..inputs import to_path
from ..jobs.summary import Summary, summarize
from ..sources import find_release, tokenizer_advice
from ..wording import size
from . import flags

# Characters of the largest layer's bar. On a terminal without room for a short one there are no bars.
_BAR, _SHORTEST_BAR = 24, 8
# What is said of figures that are not from a model's files.
_NOT_HERE = {
    "published": "The model is not on this machine: these are the published sizes; no file was read.",
    "config": "The weights are not on this machine: these figures are from the repository's config.json.",
}

MAIN_FLAGS = ("--model", "--revision", "--json")
EXAMPLES = """\
  mlx-openelm info 3b
  mlx-openelm info --model OpenELM-270M-4bit --json"""


def add_flags(parser: flags.Parser) -> None:
    """Add the flags of `info` to its parser."""
    parser.usage = f"{parser.prog} [MODEL] [flags]"
    parser.groups["Arguments"].add_argument(
        "name", nargs="?", metavar="MODEL", help="Model to show; the same as --model."
    )
    common = parser.groups["Common flags"]
    common.add_argument(
        "--model",
        metavar="MODEL",
        help="Model: a name (tiny, 270m, 1.1b-instruct), a hub repository, a folder, a .pt or .gguf file, or "
        "corenet:SIZE/NAME.  "
        "[default: tiny]",
    )
    flags.add_shared(common, "--config-yaml", "--revision", "--json")


def run(args: Namespace) -> int:
    """Show a model's layers, its size, and the memory it needs.

    No weights are downloaded: for a model that is not on this machine, the published sizes are shown.
    """
    if args.name is not None and args.model is not None:
        raise RequestError("Give the model once: as the argument or with --model.")
    summary = summarize(args.name or args.model or catalog.TINY, revision=args.revision, config_yaml=args.config_yaml)
    if args.json:
        console.print_json(_to_json(summary))
    else:
        print("\n".join(_layer_lines(summary)), end="\n\n")
        console.print_rows(totals(summary).items())
        if summary.source != "files":
            print("\n" + console.wrap(_NOT_HERE[summary.source], console.columns(sys.stdout)))
    return 0


def _to_json(summary: Summary) -> dict[str, Any]:
    values = dataclasses.asdict(summary)
    values["config"] = summary.config.to_dict()
    values["folder"] = None if summary.folder is None else str(summary.folder)
    values["memory"]["total"] = summary.memory.total
    values["context_length"] = summary.config.max_context_length
    return values


def _layer_lines(summary: Summary) -> list[str]:
    lines = ["layer  query heads  kv heads  inner size  parameters   share"]
    room = (console.columns(sys.stdout) or 100) - len(lines[0]) - 2
    width = min(_BAR, room) if room >= _SHORTEST_BAR else 0
    largest = max(layer.parameters for layer in summary.layers)
    for layer in summary.layers:
        bar = "█" * max(1, round(width * layer.parameters / largest)) if width else ""
        lines.append(
            f"{layer.layer:5d}  {layer.query_heads:11d}  {layer.kv_heads:8d}  {layer.inner_size:10d}  "
            f"{layer.parameters:10,d}  {layer.share:5.1%}  {bar}".rstrip()
        )
    return lines


def totals(summary: Summary) -> dict[str, str]:
    """Labels and what they say."""
    memory, total = summary.memory, summary.parameters
    layers = sum(layer.parameters for layer in summary.layers)
    head = f"{summary.head:,} ({summary.head / total:.1%})" if summary.head else "shared with the embedding"
    quantization = "none"
    if summary.rounded_to is not None:
        quantization = f"{summary.rounded_to}, unpacked to {summary.dtype} when read"
    elif summary.quantization is not None:
        quantization = "{bits} bits, group size {group_size}, mode {mode}; ".format(**summary.quantization)
        quantization += "multiplied as stored" if memory.expanded is None else "unpacked at load, while memory allows"
    needs = f"{size(memory.total)} (weights {size(memory.weights)}, " + (
        f"key-value cache {size(memory.kv_cache)}, computing in {memory.dtype})"
    )
    if memory.expanded is not None:
        unpacked = size(memory.expanded + memory.kv_cache)
        needs += f"; {unpacked} with the weights unpacked, as is the default on a CPU"
    stored = f"{size(summary.storage_bytes)}, {summary.bits_per_weight:.2f} bits per weight"
    if summary.rounded_to is None:
        stored += f", {summary.dtype}"
    return {
        "Model": summary.name,
        "Parameters": f"{total:,}",
        "  embedding": f"{summary.embedding:,} ({summary.embedding / total:.1%})",
        "  layers": f"{layers:,} ({layers / total:.1%})",
        "  head": head,
        "  norms": f"{summary.norms:,} (the norms of the layers are counted there too)",
        "Stored": stored,
        "Quantization": quantization,
        "Context": f"{summary.config.max_context_length:,} tokens, as trained; "
        f"at most {summary.config.rope_max_length:,}",
        f"Memory at {memory.tokens:,} tokens": needs,
        "Tokenizer": _tokenizer_line(summary),
    }


def _tokenizer_line(summary: Summary) -> str:
    if summary.tokenizer is not None:
        return summary.tokenizer
    file = to_path(summary.name)
    path = file if file.is_file() else summary.folder
    where = "not in the repository"
    if path is not None:
        where = f"none in {path}" if path.is_dir() else f"none beside {path}"
    release = find_release(summary.name, path or file, summary.config)
    if release is not None:
        return f"{where}; Llama 2's is used, from {release.tokenizer_repo} or a sibling"
    return "not known" if path is None else f"{where}; {tokenizer_advice(path, summary.config)}"
