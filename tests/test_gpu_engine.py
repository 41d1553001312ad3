"""Many texts at once on a GPU, if there is one: batches, drafts, adapters, prefixes, scores and the server.

A GPU sums in another order for another number of rows, so where two tokens are about equally likely a batch may choose
the other one, and from there on its text is another one. So each token of a text is compared with what a lone run over
the tokens before it gives, on the GPU and, in float32, on the CPU.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from mlx_openelm import Engine, GenerationOptions, GenerationResult, OpenELM, Tokenizer, backend, batch_generate, load
from mlx_openelm.adapters.pool import AdapterPool
from mlx_openelm.evaluation.likelihoods import Request, log_likelihoods
from mlx_openelm.generation import decoding
from mlx_openelm.generation.prefix_tree import PrefixTree
from mlx_openelm.generation.row import Row
from mlx_openelm.generation.sampling import TextSampler
from mlx_openelm.generation.scoring import embedding, prompt_logprobs

import mlx.core as mx
import numpy as np
import pytest
from decoding_models import make_model
from gpu_devices import FIXTURES, SHAKESPEARE, TOLERANCE, assert_close, computed, needs_gpu, needs_real_gpu, on
from test_engine import ADAPTERS, PLAY
from test_likelihoods import drawn

pytestmark = [needs_gpu, pytest.mark.usefixtures("gpu")]

TOKENIZER = Tokenizer.from_folder(SHAKESPEARE, eos_token_ids=())  # texts do not end early
# The largest error of a log-probability, in nats.
ERROR = {"float32": 0.05, "bfloat16": 0.15}
KV_BITS = {"kv_bits": 8, "kv_group_size": 32}


class Subject(NamedTuple):
    """A model, the same weights in float32 for the CPU, and the largest error of a log-probability."""

    model: OpenELM
    exact: OpenELM
    error: float

    def prompt(self, length: int, start: int = 0) -> list[int]:
        """Ids of a play, or as good as random ones if the model has fewer tokens."""
        return [token % self.model.config.vocab_size for token in TOKENIZER.encode(PLAY * 9)[start : start + length]]


def plays(dtype: str = "float32", adapter: Any = None) -> Subject:
    """Shakespeare's plays; the adapter is that of the CPU's model alone."""
    with on("cpu"):
        exact, _ = load(SHAKESPEARE, adapter, dtype="float32")
    return Subject(load(SHAKESPEARE, dtype=dtype)[0], exact, ERROR[dtype])


def wide(packing: tuple[int, int] | None, head_dim: int) -> Subject:
    """Random weights in bfloat16, of sizes that MLX's attention of few positions and our kernel of a token support."""
    model = make_model(mx.bfloat16, [packing], head_dim)
    mx.eval(model.parameters())
    with on("cpu"):
        exact = copy.deepcopy(model)
        exact.set_dtype(mx.float32)
        mx.eval(exact.parameters())
    return Subject(model, exact, ERROR["bfloat16"] if packing is None else 4 * ERROR["bfloat16"])


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "plays": plays,
    "wide": lambda: wide(None, 64),
    "4 bits": lambda: wide((4, 64), 128),
}


@pytest.fixture(params=["plays", "wide", pytest.param("4 bits", marks=needs_real_gpu)])
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]()


def finish(engine: Engine) -> Counter[int]:
    """How many steps had so many rows."""
    sizes: Counter[int] = Counter()
    while engine.is_busy:
        engine.step()
        sizes[len(engine.rows)] += 1
    return sizes


def lone(model: OpenELM, request: decoding.Request, tokens: list[int]) -> mx.array:
    """The log-probabilities [n, vocab] from which a lone run chooses each of these tokens."""
    decoder = decoding.Decoder(model, options=request.options, logits_processors=request.decoder.logits_processors)
    parts = [decoder.prefill(mx.array([request.prompt]), request.options.prefill_step_size)]
    for token in tokens[:-1]:
        parts.append(decoder.step(mx.array([token])))
        mx.eval(parts[-1])
    return mx.concatenate(parts)


def check(found: Row | GenerationResult, subject: Subject, request: decoding.Request, devices: Any = None) -> None:
    """Each token and its log-probability are those of a lone run, to within rounding."""
    error, count = subject.error, request.count
    assert len(found.tokens) == len(found.logprobs) == count and found.finish_reason == "length"
    for device, model in (devices or {"gpu": subject.model, "cpu": subject.exact}).items():
        expected = computed(device, lone, model, request, found.tokens)
        chosen = expected[np.arange(count), found.tokens]
        assert np.abs(np.array(found.logprobs) - chosen).max() < error
        for listed, row in zip(found.top_logprobs, expected, strict=False):
            best = np.sort(row)[::-1][: len(listed)]
            assert np.abs(np.array([logprob for _, logprob in listed]) - best).max(initial=0) < error
        if not isinstance(request.sampler, TextSampler):
            assert (expected.max(axis=1) - chosen).max() < 2 * error
        else:
            again = computed(device, lambda rows=expected: request.sampler.tokens(mx.array(rows), 0))
            assert (again == found.tokens).mean() >= 0.7


def check_row(row: Row, subject: Subject, devices: Any = None) -> None:
    if row.error is not None:
        raise row.error
    check(row, subject, row.request, devices)


def every_third(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor: which tokens are allowed follows from the length of the text."""
    return mx.where(mx.arange(logits.shape[-1]) % 3 == tokens.size % 3, logits, -mx.inf)


# Prompts of these lengths, with these options.
ROWS: list[tuple[int, dict[str, Any]]] = [
    (1, {"max_tokens": 30}),
    (40, {"max_tokens": 3}),
    (9, {"max_tokens": 20, "temp": 0.9, "seed": 3}),
    (25, {"max_tokens": 20, "temp": 1.2, "seed": 4, "top_p": 0.9, "top_k": 40, "top_logprobs": 3}),
    (20, {"max_tokens": 12, **KV_BITS}),
    (12, {"max_tokens": 16, **KV_BITS, "quantized_kv_start": 20}),
    (30, {"max_tokens": 20, "max_kv_size": 16}),
    (7, {"max_tokens": 20, "max_kv_size": 12, "temp": 0.7, "seed": 5}),
    (15, {"max_tokens": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "logit_bias": {7: 2.0}}),
    (33, {"max_tokens": 12, "prefill_step_size": 7, "top_logprobs": 2}),
    (18, {"max_tokens": 12, "logits_processors": [every_third]}),
]


def test_rows_join_and_leave(subject):
    """With a single row in the end: the others' step gives its place to our kernel, where that is supported."""
    engine = Engine(subject.model, TOKENIZER, max_rows=4)
    rows = [engine.submit(subject.prompt(length, 3 * n), **options) for n, (length, options) in enumerate(ROWS)]
    last = engine.submit(subject.prompt(5), max_tokens=40)
    sizes = finish(engine)
    assert set(sizes) >= {1, 2, 3, 4}
    for row in (*rows, last):
        check_row(row, subject)
    start = len(rows[-1].request.prompt)
    assert [token % 3 for token in rows[-1].tokens] == [(start + n) % 3 for n in range(12)]


def test_a_row_that_is_not_finite_harms_no_neighbor(subject):
    engine = Engine(subject.model, TOKENIZER)
    bad = engine.submit(subject.prompt(9), max_tokens=9, logits_processors=[lambda tokens, logits: logits * mx.nan])
    good = engine.submit(subject.prompt(9), max_tokens=9)
    finish(engine)
    assert "not finite" in str(bad.error)
    check_row(good, subject)


def test_an_engine_works_in_a_thread_of_its_own():
    """As the server's does."""

    def run() -> tuple[Subject, list[Row]]:
        subject = wide(None, 64)
        engine = Engine(subject.model, TOKENIZER)
        rows = [engine.submit(subject.prompt(length), max_tokens=9) for length in (3, 20)]
        finish(engine)
        return subject, rows

    with ThreadPoolExecutor(1) as pool:
        subject, rows = pool.submit(run).result()
    for row in rows:
        check_row(row, subject)


def test_a_constraint_is_kept_in_a_batch():
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
    check_row(free, subject)


# Drafts.

# Number of drafted tokens, with these options.
DRAFTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {"top_logprobs": 2}),
    (6, {}),
    (3, KV_BITS),
    (3, {"max_kv_size": 24}),
    (2, {"logits_processors": [every_third]}),
    (0, {}),
]


@pytest.mark.parametrize("source", ["lookup", "draft model"])
def test_drafts_change_nothing(subject, source):
    """Several positions of each row in a step, some of which are taken back."""
    by_lookup = source == "lookup"
    kinds = [*DRAFTS, (2, {"temp": 0.5, "seed": 2})] if by_lookup else DRAFTS
    engine = Engine(subject.model, TOKENIZER, draft_model=None if by_lookup else subject.model)
    rows = [
        engine.submit(
            subject.prompt(20 + n) * 2, max_tokens=24, num_draft_tokens=count, prompt_lookup=by_lookup, **options
        )
        for n, (count, options) in enumerate(kinds)
    ]
    finish(engine)
    for row, (count, _) in zip(rows, kinds, strict=True):
        check_row(row, subject)
        drafts = row.drafts
        assert (drafts is not None and drafts.drafted > 0) == (count > 0)
    drafted, accepted = (sum(getattr(row.drafts, name) for row in rows if row.drafts) for name in ("drafted", "accepted"))
    print(source, drafted, accepted)
    assert 0 < accepted < drafted


def test_drawn_drafts_follow_their_seed(subject):
    """Alone and beside other rows; a draw may be as close as two tokens are."""
    draft = load("tiny", dtype="float32")[0] if subject.model.config.vocab_size == 2048 else subject.model
    options = [{"temp": 0.8, "seed": seed, "num_draft_tokens": 3, "max_tokens": 12} for seed in range(6)]
    together = Engine(subject.model, TOKENIZER, draft_model=draft)
    rows = [together.submit(subject.prompt(12 + n), **each) for n, each in enumerate(options)]
    finish(together)
    same = 0
    for row, each in zip(rows, options, strict=True):
        alone = Engine(subject.model, TOKENIZER, draft_model=draft)
        again = alone.submit(row.request.prompt, **each)
        finish(alone)
        same += again.tokens == row.tokens
        found = computed("cpu", lone, subject.exact, row.request, row.tokens)[np.arange(12), row.tokens]
        assert np.abs(np.array(row.logprobs) - found).max() < subject.error
    assert same >= 3 and sum(row.drafts.accepted for row in rows) > 6


# Adapters and prefixes.


@pytest.mark.parametrize("dtype", ERROR)
def test_rows_have_adapters_of_their_own(dtype):
    subjects = {name: plays(dtype, None if name is None else FIXTURES / name) for name in ADAPTERS}
    base = subjects[None].model
    engine = Engine(base, TOKENIZER, max_rows=6, adapters=AdapterPool(base))
    names = [*ADAPTERS, "peft-lora", *ADAPTERS]
    rows = [
        engine.submit(
            subjects[None].prompt(5 + 6 * n), max_tokens=8, adapter=None if name is None else FIXTURES / name,
            prompt_lookup=n % 2 == 0, num_draft_tokens=2 * (n % 2 == 0),
        )
        for n, name in enumerate(names)
    ]  # fmt: skip
    finish(engine)
    for row, name in zip(rows, names, strict=True):
        check_row(row, subjects[name], {"cpu": subjects[name].exact})
    other = computed("cpu", lone, subjects[None].exact, rows[0].request, rows[0].tokens)
    assert np.abs(other[np.arange(8), rows[0].tokens] - rows[0].logprobs).max() > ERROR[dtype]  # adapters matter


@pytest.mark.parametrize("options", [{}, KV_BITS, {"max_kv_size": 64}], ids=str)
def test_prompts_share_prefixes(subject, options):
    engine = Engine(subject.model, TOKENIZER, prefixes=PrefixTree(subject.model, 1 << 24))
    start = subject.prompt(50)
    prompts = [start, start + subject.prompt(9, 60), start[:40] + subject.prompt(20, 70), start]
    for together in (1, 3):
        rows = [engine.submit(prompt, max_tokens=6, prefill_step_size=16, **options) for prompt in prompts[:together]]
        prompts = prompts[together:]
        finish(engine)
        for row in rows:
            check_row(row, subject)
            assert (row.cached_tokens >= 39) == (together > 1)


# All texts of a call.


def test_batch_generate(subject):
    options = {"temp": [0.0, 0.9, 0.0], "seed": [0, 7, 1], "max_kv_size": [None, None, 16]}
    prompts = [subject.prompt(length) for length in (20, 7, 31)]
    results = batch_generate(subject.model, TOKENIZER, prompts, max_tokens=12, max_rows=2, **options)
    for n, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        each = GenerationOptions(max_tokens=12, **{name: values[n] for name, values in options.items()})
        check(result, subject, decoding.make_request(subject.model, TOKENIZER, prompt, each))


@pytest.mark.parametrize("dtype", ERROR)
def test_likelihoods_of_padded_texts(dtype, reference):
    """Contexts of many lengths, each with several continuations."""
    subject, requests = plays(dtype), drawn(40)
    for ids, following in zip(reference["ids"], reference["greedy"], strict=True):
        requests += [Request(tuple(ids), tuple(following[:6])), Request(tuple(ids), (*following[:5], 700))]
    together = computed("gpu", log_likelihoods, subject.model, requests)
    for device, model, size in (("gpu", subject.model, 1), ("cpu", subject.exact, 16)):
        for request, one, other in zip(
            requests, together, computed(device, lambda m=model, s=size: log_likelihoods(m, requests, batch_size=s)),
            strict=True,
        ):  # fmt: skip
            assert abs(one.logprob - other.logprob) < ERROR[dtype] * len(request.continuation)
    assert [one.is_greedy for one in together[-8:]] == [True, False] * 4


def result_of(steps: Generator[None, None, Any]) -> tuple[int, Any]:
    """How many pieces were done in between, and what a generator returns."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return count, stop.value
        count += 1


def test_scores_and_embeddings_of_a_text(subject, monkeypatch):
    monkeypatch.setattr(backend, "prefill_step_size", lambda *sizes: 100)
    ids = subject.prompt(250)
    found, expected = (
        computed(device, lambda m=model: result_of(prompt_logprobs(m, ids, 2)))
        for device, model in (("gpu", subject.model), ("cpu", subject.exact))
    )
    assert found[0] == 3 and len(found[1]) == 249
    for (one, listed), (other, best) in zip(found[1], expected[1], strict=True):
        assert abs(one - other) < subject.error
        assert [logprob for _, logprob in listed] == pytest.approx([logprob for _, logprob in best], abs=subject.error)
    found, expected = (
        computed(device, lambda m=model: mx.array(result_of(embedding(m, ids))[1]))
        for device, model in (("gpu", subject.model), ("cpu", subject.exact))
    )
    assert_close(found, expected, TOLERANCE["bfloat16"])
