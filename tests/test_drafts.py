"""Drafts in the engine: each text must be what it is without them, whatever is drafted and whatever else is on."""

from __future__ import annotations

import gc
import math
import random
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_openelm import Engine, Piece, RequestError, load, make_prompt_cache, native, stream_generate
from mlx_openelm.adapters.pool import AdapterPool
from mlx_openelm.cache import RowCaches
from mlx_openelm.generation import drafted
from mlx_openelm.generation.draft_length import Plan, StepCosts
from mlx_openelm.generation.draft_model import DraftModel, ModelDrafter, propose_together
from mlx_openelm.generation.drafting import LEAST_CHANCE, Draft
from mlx_openelm.generation.lookup import EarlierTexts, Lookup
from mlx_openelm.generation.prefix_tree import PrefixTree
from mlx_openelm.generation.row import Row
from mlx_openelm.generation.sampling import SamplingParams, TextSampler, make_key
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import pytest
from test_engine import CONSTRAINED, PLAY, alone, assert_equal, finish, result_of, shortened

FIXTURES = Path(__file__).parent / "fixtures"
DRAW = random.Random(1)
WORDS = " ".join(DRAW.choice(PLAY.split()) + DRAW.choice(["", "s", " of", "ly"]) for _ in range(200))
OPTIONS: list[dict[str, Any]] = [
    {},
    {"top_logprobs": 3},
    {"kv_bits": 8, "kv_group_size": 32},
    {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 15},
    {"max_kv_size": 16},
    {"max_kv_size": 30},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.1, "logit_bias": {260: 2.0}},
    {"temp": 0.9, "seed": 3},
    {"temp": 1.2, "seed": 4, "top_p": 0.9, "xtc_probability": 0.5, "repetition_penalty": 1.2},
    {"stop": ["e ", "th"]},
    {"prefill_step_size": 7},
]


@pytest.fixture(scope="module", params=["shakespeare-hf", pytest.param("tiny", marks=pytest.mark.slow)])
def loaded(request: pytest.FixtureRequest) -> tuple[OpenELM, Tokenizer]:
    return shortened(request.param)


class Oracle:
    """Drafts the text that will come, with mistakes."""

    def __init__(self, prompt: int, tokens: Sequence[int], mistakes: float, seed: int):
        self.tokens, self.mistakes, self.random = tokens, mistakes, random.Random(seed)
        self.heard: list[int] = []
        self.prompt = prompt
        self.accepted = self.proposed = 0

    def begin(self, prompt: Sequence[int], known: int = 0) -> None:
        self.heard += prompt

    def prepare(self, size: int) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        return 0

    def extend(self, tokens: Sequence[int]) -> None:
        self.heard += tokens

    def plan(self, limit: int, least: float = LEAST_CHANCE, unread: int = 0) -> Plan:
        return Plan([1.0] * limit)

    def propose(self, count: int, place: int = 0) -> Draft:
        done = len(self.heard) - self.prompt
        assert self.heard[self.prompt :] == list(self.tokens[:done])
        following = list(self.tokens[done : done + self.random.randrange(count + 1)])
        return Draft([token if self.random.random() > self.mistakes else 300 for token in following])

    def observe(self, accepted: int, proposed: int) -> None:
        self.accepted, self.proposed = self.accepted + accepted, self.proposed + proposed


def submit(engine: Engine, expected: Sequence[int], prompt: str, mistakes: float = 0.3, **options: Any) -> Row:
    """A row whose drafts are what a lone run gave, with mistakes."""
    row = engine.submit(prompt, prompt_lookup=True, **options)
    row.drafter = Oracle(len(row.request.prompt), expected, mistakes, seed=len(expected))
    return row


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_text_with_drafts_is_the_text_without(loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any]) -> None:
    for length, count, drafts, mistakes in ((5, 24, 3, 0.25), (70, 24, 8, 0.0)):
        expected = alone(*loaded, PLAY[:length], {"max_tokens": count, **options})
        engine = Engine(*loaded)
        row = submit(engine, expected[1], PLAY[:length], mistakes, max_tokens=count, num_draft_tokens=drafts, **options)
        finish(engine)
        if row.error is not None:
            raise row.error
        assert_equal(result_of(row), expected)
        assert row.drafts is not None and row.drafts.drafted > 0
        if mistakes == 0 and len(expected[1]) > 20:
            assert row.drafts.acceptance == 1
            assert row.drafts.tokens_per_step > 1.5


@pytest.mark.covering
@pytest.mark.parametrize("constraint", CONSTRAINED, ids=str)
@pytest.mark.parametrize("options", [{}, {"temp": 0.9, "seed": 5}, {"max_kv_size": 16, "top_logprobs": 2}], ids=str)
def test_drafts_with_constraints(
    loaded: tuple[OpenELM, Tokenizer], constraint: dict[str, Any], options: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    options = {"max_tokens": 30, **constraint, **options}
    for length, mistakes in ((5, 0.0), (30, 0.2)):
        expected = alone(*loaded, PLAY[:length], options)
        engine = Engine(*loaded)
        row = submit(engine, expected[1], PLAY[:length], mistakes, num_draft_tokens=3, **options)
        finish(engine)
        if row.error is not None:
            raise row.error
        assert_equal(result_of(row), expected)


def mixed(loaded: tuple[OpenELM, Tokenizer], draft_model: OpenELM | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Prompts with options, some of which draft."""
    kinds: list[dict[str, Any]] = [
        {"prompt_lookup": True},
        {},
        {"prompt_lookup": True, "num_draft_tokens": 2, "temp": 0.8, "seed": 6},
        {"num_draft_tokens": 0, "top_logprobs": 2},
        {"prompt_lookup": True, "num_draft_tokens": 1, "kv_bits": 8, "kv_group_size": 32},
        {"prompt_lookup": True, "num_draft_tokens": 1, "max_kv_size": 16},
    ]
    draw = random.Random(7)
    return [(PLAY[: draw.randrange(3, 50)] * 2, {"max_tokens": draw.randrange(5, 30)} | kind) for kind in kinds]


def without_drafts(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("prompt_lookup", "num_draft_tokens")}


@pytest.mark.parametrize("has_draft_model", [False, True])
def test_rows_with_drafts_of_their_own(loaded: tuple[OpenELM, Tokenizer], has_draft_model: bool) -> None:
    texts = mixed(loaded)
    engine = Engine(*loaded, max_rows=4, draft_model=loaded[0] if has_draft_model else None)
    if has_draft_model:  # else the draft model draws, and the text is another one
        texts = [(prompt, options) for prompt, options in texts if "temp" not in options]
    rows = [engine.submit(prompt, **options) for prompt, options in texts]
    cancelled = engine.submit(PLAY, max_tokens=200, prompt_lookup=True, num_draft_tokens=3)
    while engine.is_busy:
        engine.step()
        if len(cancelled.tokens) > 5:
            cancelled.cancel()
    assert engine.budget.reserved == 0
    for row, (prompt, options) in zip(rows, texts, strict=True):
        expected = alone(*loaded, prompt, without_drafts(options))
        assert_equal(result_of(row), expected)
    assert 5 < len(cancelled.tokens) < 20
    assert cancelled.tokens == alone(*loaded, PLAY, {"max_tokens": 20})[1][: len(cancelled.tokens)]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 20, "repetition_penalty": 1.2}, {"regex": "[a-z ]{30}, the (king|queen)"}, {"max_kv_size": 16}],
    ids=str,
)
def test_a_seed_gives_the_same_text_alone_and_in_a_batch(
    loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any]
) -> None:
    if "regex" in options:
        pytest.importorskip("llguidance")
    draft, _ = shortened("tiny")
    options = {"max_tokens": 16, "temp": 0.9, "seed": 11, "num_draft_tokens": 2, **options}
    lone = alone(*loaded, PLAY[:9], options, draft_model=draft)
    assert lone == alone(*loaded, PLAY[:9], options, draft_model=draft)
    engine = Engine(*loaded, draft_model=draft)
    rows = [engine.submit(PLAY[:9], **options), engine.submit(PLAY[:30], max_tokens=9, num_draft_tokens=1)]
    finish(engine)
    assert (rows[0].text, rows[0].tokens) == lone[:2]
    assert rows[0].drafts is not None and rows[0].drafts.accepted > 0
    assert rows[0].finish_reason == lone[4]


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 2, 11, 12, pytest.param(16, marks=pytest.mark.slow), 33]
)
def test_drawn_drafts_of_many_rows_are_those_of_each_alone(loaded: tuple[OpenELM, Tokenizer], count: int) -> None:
    """Bit for bit, so that each seed gives its text."""
    if native.kernels is None:
        pytest.skip("a BLAS sums in an order of its own")
    texts = [[1, *range(300 + n, 302 + 3 * n)] for n in range(count)]
    shared, drafters = DraftModel(loaded[0]), list[ModelDrafter]()
    for number in range(2 * count):  # together, and then each alone
        drafters.append(ModelDrafter(shared, TextSampler(SamplingParams(temp=1.0), (), make_key(number % count))))
        drafters[-1].begin(texts[number % count])
        while drafters[-1].prepare(64):
            pass
    together = propose_together(drafters[:count], [4] * count, [0] * count)
    for one, drafter in zip(together, drafters[count:], strict=True):
        expected = drafter.propose(4)
        assert one.tokens == expected.tokens and one.logprobs is not None
        assert mx.array_equal(one.logprobs, expected.logprobs)


@pytest.mark.parametrize("mistakes", [0.0, 0.3])
def test_caches_hold_what_the_text_says(loaded: tuple[OpenELM, Tokenizer], mistakes: float) -> None:
    model, tokenizer = loaded
    for options in ({"stop": "e "}, {"max_tokens": 7}, {}):
        cache = make_prompt_cache(model)
        expected = alone(model, tokenizer, PLAY, {"max_tokens": 20, **options})
        engine = Engine(model, tokenizer)
        row = submit(
            engine, expected[1], PLAY, mistakes, prompt_cache=cache, num_draft_tokens=5, **{"max_tokens": 20, **options}
        )
        finish(engine)
        ids = [*row.request.prompt, *row.tokens]
        held = cache[0].offset
        assert len(ids) - 1 <= held <= len(ids)
        other = make_prompt_cache(model)
        model(mx.array([ids[:held]]), other)
        for layer, plain in zip(cache, other, strict=True):
            assert mx.allclose(layer.state[0][:, :, :held], plain.state[0][:, :, :held], atol=1e-3)


def test_a_reader_who_stops_early_gets_caches_without_drafts(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    cache, ids = make_prompt_cache(model), tokenizer.encode(PLAY)
    pieces = stream_generate(
        model, tokenizer, ids, prompt_cache=cache, draft_model=model, num_draft_tokens=4, max_tokens=50
    )
    for piece in pieces:
        ids.append(piece.token)
        if len(ids) > 60:
            break
    pieces.close()
    assert cache[0].offset <= len(ids) + 5
    rest = ids[cache[0].offset :] if cache[0].offset < len(ids) else []
    assert len(rest) <= 5


def test_drafts_with_adapters_and_prefixes() -> None:
    base, tokenizer = load(FIXTURES / "shakespeare-hf")
    engine = Engine(
        base, tokenizer, draft_model=base, adapters=AdapterPool(base), prefixes=PrefixTree(base, 1 << 24),
        exact_prefixes=True,
    )  # fmt: skip
    expected = {}
    for name in ("peft-lora", None, "peft-dora"):
        model, _ = load(FIXTURES / "shakespeare-hf", None if name is None else FIXTURES / name)
        expected[name] = alone(model, tokenizer, PLAY * 2, {"max_tokens": 12, "prefill_step_size": 16})
    for _ in range(2):
        rows = {
            name: engine.submit(
                PLAY * 2, max_tokens=12, num_draft_tokens=2, prompt_lookup=True, prefill_step_size=16,
                adapter=None if name is None else FIXTURES / name,
            )
            for name in expected
        }  # fmt: skip
        finish(engine)
        for name, row in rows.items():
            assert_equal(result_of(row), expected[name])
            assert row.drafts is not None and row.drafts.drafted > 0
    assert all(row.cached_tokens > 0 for row in rows.values())


class Scripted:
    """A model whose logits produce given tokens, whatever it is fed; it costs what the model inside costs."""

    def __init__(self, model: OpenELM, script: Sequence[int]):
        self.model, self.script = model, mx.array([*script[1:], script[-1]])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return OpenELM

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def hidden_states(self, tokens: mx.array, cache: Any = None, mask: Any = None) -> mx.array:
        first = cache[0]
        positions = first.offset[:, None] if isinstance(first, RowCaches) else first.offset + mx.arange(tokens.shape[1])
        hidden = self.model.hidden_states(tokens, cache)
        marks = mx.broadcast_to(positions, hidden.shape[:2])[..., None].astype(hidden.dtype)
        return mx.concatenate([marks, hidden[..., 1:]], axis=-1)

    def logits(self, hidden: mx.array) -> mx.array:
        following = self.script[hidden[..., 0].astype(mx.int32)]
        real = self.model.logits(hidden)
        return mx.where(mx.arange(real.shape[-1]) == following[..., None], 50.0, 0 * real)


def passage(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """A text of 300 tokens, and the same with a word in its middle changed."""
    ids = tokenizer.encode(WORDS)[:300]
    changed = [*ids[1:150], *tokenizer.encode(" Petruchio", add_bos=False), *ids[152:]]
    return ids, changed


def test_a_repeated_passage_takes_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = StepCosts.observe
    # Step times like those of a CPU, where the test does not depend on what else the machine does.
    monkeypatch.setattr(StepCosts, "observe", lambda self, n, _: observe(self, n, 1 + 0.05 * (n - 1)))
    model, tokenizer = shortened("tiny")
    ids, changed = passage(tokenizer)
    engine = Engine(Scripted(model, [*ids, *changed]), tokenizer)  # type: ignore[arg-type]
    row = engine.submit(ids, max_tokens=len(changed), prompt_lookup=True)
    finish(engine)
    assert row.tokens == changed
    assert row.drafts is not None
    assert row.drafts.steps <= 0.3 * row.drafts.tokens
    assert row.drafts.speedup > 2


def test_earlier_texts_are_looked_up(loaded: tuple[OpenELM, Tokenizer]) -> None:
    engine = Engine(*loaded)
    rows = []
    for _ in range(2):
        rows.append(engine.submit(PLAY[:30], max_tokens=40, prompt_lookup=True, num_draft_tokens=3))
        finish(engine)
    assert rows[0].tokens == rows[1].tokens
    assert rows[1].drafts.accepted > rows[0].drafts.accepted
    assert rows[1].drafts.acceptance > 0.9


def test_later_texts_know_what_drafting_costs() -> None:
    """Otherwise each would try again whether it pays. Other threads do, and other models later."""
    drafted._lengths.clear()
    pair = [*load(FIXTURES / "shakespeare-hf")]
    found = []

    def generate_some(temp: float) -> None:
        pieces = stream_generate(*pair, PLAY[:40], temp=temp, max_tokens=12, prompt_lookup=True)
        assert len(list(pieces)) == 12
        found.append({key: lengths._costs.step for key, lengths in drafted._lengths.items()})

    for temp in (1.0, 1.0, 0.0):
        generate_some(temp)
    (key, first), *_ = found[0].items()
    assert found[1] == {key: pytest.approx(2 * first, abs=3)} and first > 3
    assert len(found[2]) == 2 and found[2][key] == found[1][key]
    thread = threading.Thread(target=generate_some, args=(0.0,))
    thread.start()
    thread.join()
    assert len(found[3]) == 3 and found[2].items() <= found[3].items()
    pair.clear()
    gc.collect()
    assert not drafted._lengths


def test_threads_that_look_up_share_what_was_generated() -> None:
    """The automata stay right, so that a text is found again."""
    earlier = EarlierTexts(1 << 16)
    texts = [random.Random(number).choices(range(3, 1000), k=400) for number in range(8)]
    threads = [threading.Thread(target=earlier.add, args=(text,)) for text in texts]
    previous = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(previous)
    for text in texts:
        lookup = Lookup(earlier)
        for token in text[:200]:
            lookup.extend(token)
        match = lookup.match()
        assert match.length == 200 and match.following(100) == text[200:300]


def test_acceptance_is_the_overlap_of_the_distributions() -> None:
    """sum(min(p, q)) of the first drafted token, computed from both models' distributions."""
    (target, tokenizer), (draft, _) = shortened("tiny"), shortened("tiny")
    draft.update({"transformer": {"norm": {"weight": 0.6 * draft.transformer.norm.weight}}})
    pieces: list[Piece] = []
    options = {"max_tokens": 200, "temp": 1.0, "seed": 5, "logit_bias": {2: -math.inf}}
    engine = Engine(target, tokenizer, draft_model=draft)
    row = engine.submit(PLAY[:20], num_draft_tokens=1, on_piece=pieces.append, **options)
    finish(engine)
    ids = mx.array([[*row.request.prompt, *row.tokens]])
    p, q = (mx.softmax(model(ids)[0, len(row.request.prompt) - 1 :], axis=-1) for model in (target, draft))
    overlaps = mx.minimum(p, q).sum(axis=-1).tolist()
    drafted, accepted, place = [], 0, 1
    while place < len(pieces) - 1:  # a step gives one token, or two if the first was drafted
        drafted.append(overlaps[place])
        accepted += pieces[place].from_draft
        place += 1 + pieces[place].from_draft
    assert row.drafts is not None
    assert (len(drafted), accepted) == (row.drafts.drafted, row.drafts.accepted)
    found, expected = accepted / len(drafted), sum(drafted) / len(drafted)
    assert 0.3 < expected < 0.95
    assert abs(found - expected) < 4 * (expected * (1 - expected) / len(drafted)) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 2}, r"^num_draft_tokens needs draft_model or prompt_lookup\.$"),
        ({"num_draft_tokens": -1}, r"^num_draft_tokens must be a whole number from 0 to 64, got -1"),
        ({"draft_model": "tiny"}, r"^draft_model must be a model"),
    ],
)
def test_bad_drafts_are_refused(loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        stream_generate(*loaded, "To be", **options)


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the pieces of prompts that draft models read."""
    found: list[int] = []
    read_piece = DraftModel.read_piece

    def counted(self: DraftModel, cache: list[Any], tokens: Sequence[int]) -> None:
        found.append(len(tokens))
        read_piece(self, cache, tokens)

    monkeypatch.setattr(DraftModel, "read_piece", counted)
    return found


@pytest.mark.parametrize(
    "options", [{"num_draft_tokens": 3}, {"num_draft_tokens": 3, "temp": 0.9, "seed": 5}, {}], ids=str
)
def test_others_flow_while_a_draft_model_reads_a_prompt(
    loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any], lengths: list[int]
) -> None:
    """In pieces of the prompt's size, at most one in a step; the text is that of the row alone."""
    model, tokenizer = loaded
    prompt, more = [5, 9, 300] * 64, {"max_tokens": 12, "prefill_step_size": 20}
    expected = alone(model, tokenizer, prompt, more | options, draft_model=model)  # type: ignore[arg-type]
    assert lengths == [20] * 9 + [12]
    if "temp" not in options:
        assert_equal(expected, alone(model, tokenizer, prompt, more))  # type: ignore[arg-type]
    engine = Engine(model, tokenizer, draft_model=model)
    first = engine.submit(PLAY[:20], max_tokens=100, num_draft_tokens=0)
    while len(first.tokens) < 3:
        engine.step()
    long = engine.submit(prompt, **more, **options)
    while not long.tokens:
        before = len(first.tokens), len(lengths)
        engine.step()
        assert len(first.tokens) > before[0]
        assert len(lengths) <= before[1] + 1
    assert lengths == 2 * ([20] * 9 + [12])
    while not long.is_done:
        engine.step()
    if options:  # otherwise what is drafted depends on times, and only greedy text does not
        assert_equal(result_of(long), expected)


def test_the_draft_model_reads_what_the_engine_has_kept(loaded: tuple[OpenELM, Tokenizer], lengths: list[int]) -> None:
    """A long prompt that the target need not process: all of it for a fixed number of tokens, else its end."""
    model, tokenizer = loaded
    cases: list[tuple[dict[str, Any], int]] = [({"num_draft_tokens": 2}, 400), ({}, 1 + 63 + 400 - 388)]
    for options, count in cases:
        engine = Engine(model, tokenizer, draft_model=model, prefixes=PrefixTree(model, 1 << 26), exact_prefixes=True)
        for number in range(2):
            row = engine.submit([5, 9, 300, 7] * 100, max_tokens=6, prefill_step_size=64, **options)
            finish(engine)
            assert row.cached_tokens == (388 if number else 0)
            assert sum(lengths) == (count if number else 400)
            lengths.clear()


def test_a_row_that_is_cancelled_while_its_draft_model_reads(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, draft_model=model)
    row = engine.submit([5] * 200, max_tokens=6, prefill_step_size=20)
    engine.step()
    row.cancel()
    finish(engine)
    assert (row.finish_reason, row.nbytes, engine.budget.reserved) == ("cancelled", 0, 0)


def test_the_python_of_the_guide_runs_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[1] / "docs" / "drafts.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
        assert len(capsys.readouterr().out) > 20
