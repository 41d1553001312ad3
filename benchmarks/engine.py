"""The decoding engine: what its parts cost beside a plain step.

    python benchmarks/engine.py                            # the 270M size
    python benchmarks/engine.py --tokenizer FOLDER --json  # with Llama 2's tokenizer, whose masks are the real ones

The model has random weights. Without `--tokenizer`, the packaged one stands in, with rows up to the model's vocabulary.

Constraints: the time to accept a token, compute the mask, apply it and normalize again, all as if nothing overlapped,
beside a decoding step. Medians over the steps of one document, each step measured with its mask.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 60, "maxLength": 80},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 8, "maxItems": 8},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
MASK_BAR = 0.02  # of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the published size to measure: 270M, 450M, 1_1B, 3B, or tiny")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; by default the packaged model's")
    parser.add_argument("--steps", type=int, default=32, help="steps that are measured")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments.size, arguments.tokenizer, arguments.steps):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def as_text(row: dict[str, Any]) -> str:
    end = "pass" if row["pass"] else "FAIL"
    values = f"ours {row['ours']:8.3f}  step {row['other']:8.2f}  ratio {row['ratio']:.4f}"
    return f"{row['name']:52} {values}  (bar {row['bar']:g}: {end})"


def measure(size: str, tokenizer_folder: str | None, steps: int) -> Iterator[dict[str, Any]]:
    from pathlib import Path

    from mlx_openelm import load
    from mlx_openelm.text.tokenizer import Tokenizer

    model, tokenizer = load("tiny")
    if size != "tiny":
        model = random_model(size)
    if tokenizer_folder is not None:
        tokenizer = Tokenizer.from_file(Path(tokenizer_folder))
    for kind, options in (
        ("JSON of a schema", {"json_schema": SCHEMA}),
        ("any JSON object", {"json_object": True}),
        ("regular expression", {"regex": "[A-Za-z ,.]{200,400}"}),
    ):
        masks, plain = times(model, tokenizer, options, steps)
        ours, other = statistics.median(masks), statistics.median(plain)
        name = f"mask and its application (ms), {kind}, {size}"
        yield {"name": name, "ours": ours, "other": other, "ratio": ours / other, "bar": MASK_BAR,
               "pass": ours / other <= MASK_BAR}  # fmt: skip


def random_model(size: str) -> Any:
    from mlx_openelm.config import ModelConfig
    from mlx_openelm.model import OpenELM

    import mlx.core as mx

    mx.random.seed(0)
    model = OpenELM(ModelConfig.from_name(size))
    mx.eval(model.parameters())
    return model


def times(model: Any, tokenizer: Any, options: dict[str, Any], steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each mask with its application, and of each decoding step."""
    from mlx_openelm.generation.constraints import make_constraint
    from mlx_openelm.generation.decoding import Decoder
    from mlx_openelm.generation.options import GenerationOptions

    import mlx.core as mx

    size = model.config.vocab_size
    masks: list[float] = []
    plain: list[float] = []
    mx.random.seed(0)
    while len(masks) < steps + 2:
        constraint = make_constraint(GenerationOptions(**options), tokenizer, size)
        decoder = Decoder(model)
        logprobs = constraint.limit(decoder.prefill(mx.array([[tokenizer.bos_token_id, *constraint.opening]])))
        while not constraint.done and len(masks) < steps + 2:
            token = mx.random.categorical(logprobs)
            mx.eval(token)
            started = time.perf_counter()
            logprobs = decoder.step(token)
            mx.eval(logprobs)
            stepped = time.perf_counter()
            forced = constraint.advance(int(token.item()))
            if constraint.done:
                break
            if forced:
                logprobs = decoder.prefill(mx.array([forced]))
                mx.eval(logprobs)
            else:
                logprobs = constraint.limit(logprobs)
                mx.eval(logprobs)
                masks.append((time.perf_counter() - stepped) * 1e3)
                plain.append((stepped - started) * 1e3)
                continue
            logprobs = constraint.limit(logprobs)
    return masks[2:], plain[2:]  # the first ones build MLX's kernels


if __name__ == "__main__":
    main()
