"""Drafts: what they gain where text repeats, and what they cost where it does not.

The speed of `prompt_lookup` on text that does not repeat, over that of plain decoding, the median of interleaved pairs;
target steps a token on a passage that is repeated with a word changed; how many drawn drafted tokens are accepted,
beside sum(min(p, q)) and beside mlx-lm; the speed with a draft model that is always right, beside mlx-lm.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from engine_setup import Row, Setup, at_least, at_most

PLAIN_BAR, STEPS_BAR = 0.97, 0.3


def measure(setup: Setup) -> Iterator[Row]:
    from mlx_openelm import load

    tiny, tokenizer = load("tiny")
    pairs = 2 if setup.quick else 20
    for name in dict.fromkeys(("tiny", setup.size)):
        model, count = (tiny, 200) if name == "tiny" else (setup.load()[0], 24)
        lookup, plain = speeds(model, tokenizer, pairs, count)
        row = at_least(f"prompt_lookup where nothing repeats (tokens/s), {name}", *medians(lookup, plain), PLAIN_BAR)
        ratio = statistics.median(one / other for one, other in zip(lookup, plain, strict=True))
        yield row | {"ratio": ratio, "pass": ratio >= PLAIN_BAR}
    steps, tokens = steps_of_passage(tiny, tokenizer)
    yield at_most("target steps, and tokens, of a passage repeated with one change", steps, tokens, STEPS_BAR)
    draft, _ = load("tiny")
    draft.update({"transformer": {"norm": {"weight": 0.6 * draft.transformer.norm.weight}}})
    found, expected, error, theirs = acceptance(tiny, draft, tokenizer, 80 if setup.quick else 800)
    row = at_least("accepted share of drawn drafts, beside sum(min(p, q))", found, expected)
    yield row | {"bar": 1 - 3 * error / expected, "pass": abs(found - expected) <= 3 * error}
    if theirs is None:
        return
    yield at_least("accepted share of drawn drafts, beside mlx-lm", found, theirs, 1)
    ours, others = draft_speeds(tiny, tokenizer, pairs)
    yield at_least("3 drafted tokens, all right (tokens/s), beside mlx-lm", *medians(ours, others), 1)


def medians(ours: list[float], others: list[float]) -> tuple[float, float]:
    return statistics.median(ours), statistics.median(others)


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

    text = PROMPT + " Arise, fair sun, and kill the envious moon, who is already sick and pale with grief. "
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
        self.model, self.script = model, mx.array([*script[1:], script[-1]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden_states(self, tokens: Any, cache: Any = None, mask: Any = None) -> Any:
        offset = cache[0].offset
        positions = offset[:, None] if isinstance(offset, mx.array) else offset + mx.arange(tokens.shape[1])
        hidden = self.model.hidden_states(tokens, cache)
        marks = mx.broadcast_to(positions, hidden.shape[:2])[..., None].astype(hidden.dtype)
        return mx.concatenate([marks, hidden[..., 1:]], axis=-1)

    def logits(self, hidden: Any) -> Any:
        following = self.script[hidden[..., 0].astype(mx.int32)]
        real = self.model.logits(hidden)
        return mx.where(mx.arange(real.shape[-1]) == following[..., None], 50.0, 0 * real)


def acceptance(target: Any, draft: Any, tokenizer: Any, count: int = 800) -> tuple[float, float, float, float | None]:
    """The accepted share of drafted tokens, sum(min(p, q)) at these places, the standard error, and mlx-lm's share."""
    from mlx_openelm import Engine, Piece

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
