"""Many texts at once on a GPU, if there is one: batches, drafts, adapters and prefixes."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_openelm import Engine, GenerationOptions, batch_generate, load
from mlx_openelm.adapters.pool import AdapterPool
from mlx_openelm.generation.decoding import make_request
from mlx_openelm.generation.drafting import DraftCounts
from mlx_openelm.generation.prefix_tree import PrefixTree
from mlx_openelm.generation.row import Row

import mlx.core as mx
import numpy as np
import pytest
from decoding_models import make_model
from gpu_devices import FIXTURES, SHAKESPEARE, STAND_IN, computed, needs_gpu, slow_on_a_stand_in
from lone_runs import ERROR, TOKENIZER, Subject, check, each_dtype, each_subject, lone, plays, wide
from test_engine import ADAPTERS, finish

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

KV_BITS: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32}


def few(tokens: int) -> int:
    """So many tokens; on a stand-in, which is slow, half as many of a long text."""
    return tokens // 2 if STAND_IN and tokens > 6 else tokens


def every_third(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor: which tokens are allowed follows from the length of the text."""
    return mx.where(mx.arange(logits.shape[-1]) % 3 == tokens.size % 3, logits, -mx.inf)


# Prompts of these lengths, with these options.
ROWS: list[tuple[int, dict[str, Any]]] = [
    (1, {"max_tokens": few(30)}),
    (40, {"max_tokens": 3}),
    (9, {"max_tokens": few(20), "temp": 0.9, "seed": 3}),
    (25, {"max_tokens": few(20), "temp": 1.2, "seed": 4, "top_p": 0.9, "top_k": 40, "top_logprobs": 3}),
    (20, {"max_tokens": few(12), **KV_BITS}),
    (12, {"max_tokens": 16, **KV_BITS, "quantized_kv_start": 20}),
    (30, {"max_tokens": few(20), "max_kv_size": 16}),
    (7, {"max_tokens": few(20), "max_kv_size": 12, "temp": 0.7, "seed": 5}),
    (15, {"max_tokens": few(12), "repetition_penalty": 1.3, "frequency_penalty": 0.3, "logit_bias": {7: 2.0}}),
    (33, {"max_tokens": few(12), "prefill_step_size": 7, "top_logprobs": 2}),
    (254, {"max_tokens": 6}),
    (18, {"max_tokens": few(12), "logits_processors": [every_third]}),
]


@each_subject
def test_rows_join_and_leave(make):
    """Until a single one is left, which our kernel of a token takes over where it is supported."""
    subject = make()
    engine = Engine(subject.model, TOKENIZER, max_rows=4)
    rows = [engine.submit(subject.prompt(length, 3 * n), **options) for n, (length, options) in enumerate(ROWS)]
    rows.append(engine.submit(subject.prompt(5), max_tokens=few(40)))
    assert set(finish(engine)) >= {1, 2, 3, 4}
    for row in rows:
        check(row, subject)
    start = len(rows[-2].request.prompt)
    assert [token % 3 for token in rows[-2].tokens] == [(start + n) % 3 for n in range(few(12))]


@each_subject
def test_a_row_that_is_not_finite_harms_no_neighbor(make):
    subject = make()
    engine = Engine(subject.model, TOKENIZER)
    bad = engine.submit(subject.prompt(9), max_tokens=9, logits_processors=[lambda tokens, logits: logits * mx.nan])
    good = engine.submit(subject.prompt(9), max_tokens=9)
    finish(engine)
    assert "not finite" in str(bad.error)
    check(good, subject)


def test_an_engine_works_in_a_thread_of_its_own():
    """As the server's does."""

    def run() -> tuple[Subject, list[Row]]:
        subject = wide(mx.bfloat16)
        engine = Engine(subject.model, TOKENIZER)
        rows = [engine.submit(subject.prompt(length), max_tokens=9) for length in (3, 20)]
        finish(engine)
        return subject, rows

    with ThreadPoolExecutor(1) as pool:
        subject, rows = pool.submit(run).result()
    for row in rows:
        check(row, subject)


def test_constraints_in_a_batch():
    pytest.importorskip("llguidance")
    subject, (_, tokenizer) = plays(), load(SHAKESPEARE)
    pattern = r"[A-Z]{3,8}\. (My lord|Your grace), [a-z ]{20}"
    options: list[dict[str, Any]] = [{}, {"temp": 0.9, "seed": 3}, {"prompt_lookup": True, "num_draft_tokens": 3}]
    engine = Engine(subject.model, tokenizer)
    rows = [engine.submit(subject.prompt(30), regex=pattern, max_tokens=60, **each) for each in options]
    free = engine.submit(subject.prompt(9), max_tokens=9)
    finish(engine)
    for row in rows:
        assert row.error is None and row.finish_reason == "stop" and re.fullmatch(pattern, row.text.strip())
    check(free, subject)


@each_subject
def test_batch_generate(make):
    subject = make()
    options: dict[str, Any] = {"temp": [0.0, 0.9, 0.0], "seed": [0, 7, 1], "max_kv_size": [None, None, 16]}
    prompts = [subject.prompt(length) for length in (20, 7, 31)]
    results = batch_generate(subject.model, TOKENIZER, prompts, max_tokens=few(12), max_rows=2, **options)
    for n, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        each = GenerationOptions(max_tokens=few(12), **{name: values[n] for name, values in options.items()})
        check(result, subject, make_request(subject.model, TOKENIZER, prompt, each))


# Drafts: so many drafted tokens after prompts of these lengths, twice, with these options.
DRAFTS: list[tuple[int, int, dict[str, Any]]] = [
    (1, 20, {}),
    (2, 21, {"top_logprobs": 2}),
    (6, 22, {}),
    (4, 130, {}),
    (3, 23, KV_BITS),
    (3, 24, {"max_kv_size": 24}),
    (2, 25, {"logits_processors": [every_third]}),
    (0, 26, {}),
]


@pytest.mark.parametrize("source", ["lookup", "draft model"])
@each_subject
def test_drafts_change_nothing(make, source):
    """Several positions of each row in a step, some of which are taken back."""
    subject = make()
    by_lookup = source == "lookup"
    kinds = [*DRAFTS, (2, 27, {"temp": 0.5, "seed": 2})] if by_lookup else DRAFTS
    engine = Engine(subject.model, TOKENIZER, draft_model=None if by_lookup else subject.model)
    common: dict[str, Any] = {"max_tokens": few(24 if by_lookup and STAND_IN else 16), "prompt_lookup": by_lookup}
    rows = [
        engine.submit(subject.prompt(length) * 2, num_draft_tokens=count, **common, **options)
        for count, length, options in kinds
    ]
    finish(engine)
    for row, (count, *_) in zip(rows, kinds, strict=True):
        check(row, subject)
        assert (row.drafts is not None and row.drafts.drafted > 0) == (count > 0)
    counts, growing = (
        DraftCounts.sum(row.drafts for row in some if row.drafts is not None) for some in (rows, rows[:4])
    )
    if by_lookup:
        assert 0 < counts.accepted < counts.drafted
    else:  # the model drafts what it would write
        assert growing.accepted > 0.8 * growing.drafted


@pytest.mark.filterwarnings("ignore:draft_model has")
@each_subject
@slow_on_a_stand_in
def test_drawn_drafts_follow_their_seed(make):
    """Beside other rows as alone, unless a draw is as close as two tokens can be."""
    subject = make()
    is_play = subject.model.config.vocab_size == 2048
    draft = load("tiny", dtype="float32")[0] if is_play else make_model(mx.bfloat16, [None], 128)
    together = Engine(subject.model, TOKENIZER, draft_model=draft)
    options: dict[str, Any] = {"temp": 0.8, "num_draft_tokens": 3, "max_tokens": 12}
    rows = [together.submit(subject.prompt(12 + seed), seed=seed, **options) for seed in range(3)]
    finish(together)
    same = 0  # texts
    for seed, row in enumerate(rows):
        check(row, subject, draws=False)
        alone = Engine(subject.model, TOKENIZER, draft_model=draft)
        again = alone.submit(row.request.prompt, seed=seed, **options)
        finish(alone)
        same += int(again.tokens == row.tokens)
    counts = DraftCounts.sum(row.drafts for row in rows if row.drafts is not None)
    assert same >= 1 and 0 < counts.accepted < counts.drafted


@each_dtype
def test_rows_have_adapters_of_their_own(dtype):
    subjects = {name: plays(dtype, None if name is None else FIXTURES / name) for name in ADAPTERS}
    base = subjects[None].model
    engine = Engine(base, TOKENIZER, max_rows=6, adapters=AdapterPool(base))
    names = [*ADAPTERS, "peft-lora", *ADAPTERS]
    rows = []
    for n, name in enumerate(names):
        options: dict[str, Any] = {"adapter": None if name is None else FIXTURES / name, "num_draft_tokens": n % 3}
        rows.append(
            engine.submit(subjects[None].prompt(5 + 6 * n), max_tokens=few(8), prompt_lookup=n % 3 > 0, **options)
        )
    finish(engine)
    for row, name in zip(rows, names, strict=True):
        check(row, subjects[name])
    other = computed("cpu", lone, subjects[None].exact, rows[0].request, rows[0].tokens)
    assert np.abs(other[np.arange(few(8)), rows[0].tokens] - rows[0].logprobs).max() > ERROR[dtype]  # adapters matter


@pytest.mark.parametrize("options", [{}, KV_BITS, {"max_kv_size": 64}], ids=str)
@each_subject
def test_prompts_share_prefixes(make, options):
    subject = make()
    engine = Engine(subject.model, TOKENIZER, prefixes=PrefixTree(subject.model, 1 << 24))
    start = subject.prompt(50)
    prompts = [start, start + subject.prompt(9, 60), start[:40] + subject.prompt(20, 70), start]
    for some in (prompts[:1], prompts[1:]):
        rows = [engine.submit(prompt, max_tokens=6, prefill_step_size=16, **options) for prompt in some]
        finish(engine)
        for row in rows:
            check(row, subject)
            assert (row.cached_tokens >= 39) == (len(some) > 1)
