"""Constraints: what a mask and its application cost beside a decoding step.

The time to accept a token, compute the mask, apply it and normalize again, all as if nothing overlapped. Medians over
the steps of one document, each step measured with its mask.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from engine_setup import Row, Setup, at_most

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
BAR = 0.02  # of a step


def measure(setup: Setup) -> Iterator[Row]:
    model, tokenizer = setup.load()
    for kind, options in (
        ("JSON of a schema", {"json_schema": SCHEMA}),
        ("any JSON object", {"json_object": True}),
        ("regular expression", {"regex": "[A-Za-z ,.]{200,400}"}),
    ):
        masks, plain = times(model, tokenizer, options, setup.steps)
        name = f"mask and its application beside a step (ms), {kind}, {setup.size}"
        yield at_most(name, statistics.median(masks), statistics.median(plain), BAR)


def times(model: Any, tokenizer: Any, options: dict[str, Any], steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each mask with its application, and of each decoding step."""
    from mlx_openelm.generation.constraints import make_constraint
    from mlx_openelm.generation.decoding import Decoder
    from mlx_openelm.generation.options import GenerationOptions

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
