"""The decoding engine: what its parts cost beside a plain step.

    python benchmarks/engine.py                            # the 270M size
    python benchmarks/engine.py --tokenizer FOLDER --json  # with Llama 2's tokenizer, whose masks are the real ones

The model has random weights. Without `--tokenizer`, the packaged one stands in, with rows up to the model's vocabulary.

Constraints: the time to accept a token, compute the mask, apply it and normalize again, all as if nothing overlapped,
beside a decoding step. Medians over the steps of one document, each step measured with its mask.

Drafts: the speed of `prompt_lookup` on text that does not repeat, over that of plain decoding, the median of
interleaved pairs; target steps a token on a passage that is repeated with a word changed; how many drawn drafted tokens
are accepted, beside sum(min(p, q)) and beside mlx-lm; the speed with a draft model that is always right, beside mlx-lm.
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
PLAIN_BAR, STEPS_BAR = 0.97, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="270M", help="the published size to measure: 270M, 450M, 1_1B, 3B, or tiny")
    parser.add_argument("--tokenizer", help="folder of the tokenizer; by default the packaged model's")
    parser.add_argument("--steps", type=int, default=32, help="steps that are measured")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of runs with and without lookup")
    parser.add_argument("--only", choices=["masks", "drafts"], help="measure only this")
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    arguments = parser.parse_args()
    rows = []
    measured: list[Iterator[dict[str, Any]]] = []
    if arguments.only != "drafts":
        measured.append(measure(arguments.size, arguments.tokenizer, arguments.steps))
    if arguments.only != "masks":
        measured.append(measure_drafts(arguments.size, arguments.pairs))
    for row in (row for rows in measured for row in rows):
        rows.append(row)
        if not arguments.json:
            print(as_text(row), flush=True)
    if arguments.json:
        print(json.dumps(rows, indent=2))


def as_text(row: dict[str, Any]) -> str:
    end = "pass" if row["pass"] else "FAIL"
    values = f"ours {row['ours']:9.3f}  other {row['other']:9.3f}  ratio {row['ratio']:.4f}"
    return f"{row['name']:64} {values}  (bar {row['bar']:g}: {end})"


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


def measure_drafts(size: str, pairs: int) -> Iterator[dict[str, Any]]:
    from mlx_openelm import load

    import mlx.core as mx

    tiny, tokenizer = load("tiny")
    for name in dict.fromkeys(("tiny", size)):
        model, count = (tiny, 200) if name == "tiny" else (random_model(size), 24)
        lookup, plain = speeds(model, tokenizer, pairs, count)
        ratio = statistics.median(one / other for one, other in zip(lookup, plain, strict=True))
        yield {
            "name": f"prompt_lookup where nothing repeats (tokens/s), {name}",
            "ours": statistics.median(lookup),
            "other": statistics.median(plain),
            "ratio": ratio,
            "bar": PLAIN_BAR,
            "pass": ratio >= PLAIN_BAR,
        }
    steps, tokens = steps_of_passage(tiny, tokenizer)
    yield {"name": "target steps, and tokens, of a passage repeated with one change", "ours": steps, "other": tokens,
           "ratio": steps / tokens, "bar": STEPS_BAR, "pass": steps / tokens <= STEPS_BAR}  # fmt: skip
    draft, _ = load("tiny")
    draft.update({"transformer": {"norm": {"weight": 0.6 * draft.transformer.norm.weight}}})
    found, expected, error, theirs = acceptance(tiny, draft, tokenizer)
    yield {"name": "accepted share of drawn drafts, beside sum(min(p, q))", "ours": found, "other": expected,
           "ratio": found / expected, "bar": 3 * error / expected,
           "pass": abs(found - expected) <= 3 * error}  # fmt: skip
    if theirs is None:
        return
    yield {"name": "accepted share of drawn drafts, beside mlx-lm", "ours": found, "other": theirs,
           "ratio": found / theirs, "bar": 1, "pass": found > theirs}  # fmt: skip
    ours, theirs = draft_speeds(tiny, tokenizer, pairs)
    ratio = statistics.median(one / other for one, other in zip(ours, theirs, strict=True))
    yield {"name": "3 drafted tokens, all right (tokens/s), beside mlx-lm", "ours": statistics.median(ours),
           "other": statistics.median(theirs), "ratio": ratio, "bar": 1, "pass": ratio >= 1}  # fmt: skip
    mx.clear_cache()


PROMPT = "ROMEO. But soft, what light through yonder window breaks? It is the east, and Juliet is the sun."


def speeds(model: Any, tokenizer: Any, pairs: int, count: int) -> tuple[list[float], list[float]]:
    """Tokens a second with lookup and without, of sampled text, which differs from pair to pair."""
    from mlx_openelm import stream_generate

    found: tuple[list[float], list[float]] = [], []
    for pair in range(pairs + 1):
        for lookup in (True, False) if pair % 2 else (False, True):
            options: dict[str, Any] = {"temp": 1.0, "seed": pair, "max_tokens": count, "prompt_lookup": lookup}
            options["logit_bias"] = {token: -float("inf") for token in tokenizer.eos_token_ids}
            for piece in stream_generate(model, tokenizer, PROMPT, **options):
                last = piece
            if pair:  # the first one warms up
                found[not lookup].append(last.generation_tps)
    return found


def steps_of_passage(model: Any, tokenizer: Any) -> tuple[int, int]:
    """Steps of the target and tokens of a passage that stands in the prompt, with one word changed."""
    from mlx_openelm import Engine

    text = PROMPT + " Arise, fair sun, and kill the envious moon, who is already sick and pale with grief. " * 1
    words = text.split()
    ids = tokenizer.encode(" ".join(f"{word} {words[-n]}" for n, word in enumerate(words)))
    half = len(ids) // 2
    changed = [*ids[1:half], *tokenizer.encode(" Petruchio", add_bos=False), *ids[half + 2 :]]
    engine = Engine(Scripted(model, [*ids, *changed]), tokenizer)  # type: ignore[arg-type]
    row = engine.submit(ids, max_tokens=len(changed), prompt_lookup=True)
    while engine.is_busy:
        engine.step()
    assert row.tokens == changed and row.drafts is not None
    return row.drafts.steps, row.drafts.tokens


class Scripted:
    """A model whose logits produce given tokens; it costs what the model inside costs."""

    def __init__(self, model: Any, script: list[int]):
        import mlx.core as mx

        self.model, self.script = model, mx.array([*script[1:], script[-1]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden_states(self, tokens: Any, cache: Any = None, mask: Any = None) -> Any:
        import mlx.core as mx

        offset = cache[0].offset
        positions = offset[:, None] if isinstance(offset, mx.array) else offset + mx.arange(tokens.shape[1])
        hidden = self.model.hidden_states(tokens, cache)
        marks = mx.broadcast_to(positions, hidden.shape[:2])[..., None].astype(hidden.dtype)
        return mx.concatenate([marks, hidden[..., 1:]], axis=-1)

    def logits(self, hidden: Any) -> Any:
        import mlx.core as mx

        following = self.script[hidden[..., 0].astype(mx.int32)]
        real = self.model.logits(hidden)
        return mx.where(mx.arange(real.shape[-1]) == following[..., None], 50.0, 0 * real)


def acceptance(target: Any, draft: Any, tokenizer: Any, count: int = 800) -> tuple[float, float, float, float | None]:
    """The accepted share of drafted tokens, sum(min(p, q)) at these places, the standard error, and mlx-lm's share."""
    from mlx_openelm import Engine, Piece

    import mlx.core as mx

    bias = {token: -float("inf") for token in tokenizer.eos_token_ids}
    engine, pieces = Engine(target, tokenizer, draft_model=draft), list[Piece]()
    options: dict[str, Any] = {"temp": 1.0, "seed": 5, "max_tokens": count, "logit_bias": bias}
    row = engine.submit(PROMPT, num_draft_tokens=1, on_piece=pieces.append, **options)
    while engine.is_busy:
        engine.step()
    ids = mx.array([[*row.request.prompt, *row.tokens]])
    p, q = (mx.softmax(model(ids)[0, len(row.request.prompt) - 1 :], axis=-1) for model in (target, draft))
    overlaps: Any = mx.minimum(p, q).sum(axis=-1).tolist()
    drafted, place = [], 1
    while place < len(pieces) - 1:
        drafted.append(overlaps[place])
        place += 1 + pieces[place].from_draft
    assert row.drafts is not None and len(drafted) == row.drafts.drafted
    expected = sum(drafted) / len(drafted)
    error = (expected * (1 - expected) / len(drafted)) ** 0.5
    return row.drafts.accepted / row.drafts.drafted, expected, error, mlx_lm_acceptance(target, draft, tokenizer, count)


def mlx_lm_acceptance(target: Any, draft: Any, tokenizer: Any, count: int) -> float | None:
    try:
        from mlx_lm.generate import speculative_generate_step
        from mlx_lm.sample_utils import make_sampler
    except ImportError:
        return None
    import mlx.core as mx

    mx.random.seed(5)
    prompt = mx.array(tokenizer.encode(PROMPT))
    steps = speculative_generate_step(
        prompt, target, draft, num_draft_tokens=1, max_tokens=count, sampler=make_sampler(1.0)
    )
    from_draft = [bool(step[2]) for step in steps]
    return sum(from_draft) / from_draft.count(False)  # each step ends with a token of the target


def draft_speeds(model: Any, tokenizer: Any, pairs: int) -> tuple[list[float], list[float]]:
    """Tokens a second of ours and of mlx-lm's speculative decoding, where the draft model is the model itself."""
    from mlx_openelm import stream_generate

    from mlx_lm import stream_generate as theirs

    found: tuple[list[float], list[float]] = [], []
    ids = tokenizer.encode(PROMPT)
    for pair in range(pairs + 1):
        for ours in (True, False) if pair % 2 else (False, True):
            generate: Any = stream_generate if ours else theirs
            for piece in generate(model, tokenizer, ids, max_tokens=100, draft_model=model, num_draft_tokens=3):
                last = piece
            if pair:
                found[not ours].append(last.generation_tps)
    return found


if __name__ == "__main__":
    main()
