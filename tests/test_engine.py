"""Many texts at once: each must be what it is alone, whatever its neighbors and whenever they join and leave."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_openelm import Engine, batch_generate, generate, load, native, stream_generate
from mlx_openelm.adapters.pool import AdapterPool
from mlx_openelm.errors import OpenELMError, RequestError
from mlx_openelm.generation import drawn
from mlx_openelm.generation import engine as engine_module
from mlx_openelm.generation.drawing import listed
from mlx_openelm.generation.piece import Piece
from mlx_openelm.generation.prefix_tree import PrefixTree
from mlx_openelm.generation.row import Row
from mlx_openelm.model import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer

import mlx.core as mx
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
PLAY = (
    "ROMEO. But soft, what light through yonder window breaks? It is the east, and Juliet is the sun. Arise, fair sun"
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temp": 0.9, "seed": 3},
    {"temp": 1.2, "seed": 4, "top_p": 0.9, "top_k": 40},
    {"kv_bits": 8, "kv_group_size": 32},
    {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 12, "repetition_penalty": 1.3},
    {"max_kv_size": 16},
    {"max_kv_size": 24, "temp": 0.7, "seed": 5},
    {"stop": ["the", "e"], "top_logprobs": 3},
    {"logit_bias": {260: 4.0}, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    {"prefill_step_size": 7},
    {"echo": True, "max_tokens": 3},
]


def shortened(name: str, **options: Any) -> tuple[OpenELM, Tokenizer]:
    """Two layers of a model, which take a third of the time; with these its text is still of many words."""
    model, tokenizer = load(name if name.startswith("tiny") else FIXTURES / name, **options)
    model.transformer.layers = model.transformer.layers[:4:3]
    names = ("num_query_heads", "num_kv_heads", "ffn_multipliers")
    lists: dict[str, Any] = {name: getattr(model.config, name)[:4:3] for name in names}
    model.config = replace(model.config, num_transformer_layers=2, **lists)
    return model, tokenizer


@pytest.fixture(scope="module", params=["shakespeare-hf", "tiny"])
def loaded(request: pytest.FixtureRequest) -> tuple[OpenELM, Tokenizer]:
    return shortened(request.param)


def cases(count: int, seed: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of random lengths, each with other options."""
    draw, found = random.Random(seed), []
    for number in range(count):
        start = draw.randrange(len(PLAY) // 2)
        prompt = PLAY[start : start + draw.choice([1, 5, 40, 300])]
        found.append((prompt, {"max_tokens": draw.randrange(1, 14)} | OPTIONS[number % len(OPTIONS)]))
    return found


def alone(model: OpenELM, tokenizer: Tokenizer, prompt: str, options: dict[str, Any], **more: Any) -> tuple[Any, ...]:
    pieces = list(stream_generate(model, tokenizer, prompt, **more, **options))
    return (
        "".join(piece.text for piece in pieces),
        [piece.token for piece in pieces],
        [piece.logprob for piece in pieces],
        [piece.top_logprobs for piece in pieces],
        pieces[-1].finish_reason,
    )


@pytest.fixture(scope="module")
def lone(loaded: tuple[OpenELM, Tokenizer]) -> Callable[[str, dict[str, Any]], tuple[Any, ...]]:
    """`alone` with the loaded model, once for each prompt with its options."""
    found: dict[str, tuple[Any, ...]] = {}

    def run(prompt: str, options: dict[str, Any]) -> tuple[Any, ...]:
        key = repr((prompt, options))
        if key not in found:
            found[key] = alone(*loaded, prompt, options)
        return found[key]

    return run


def result_of(row: Row) -> tuple[Any, ...]:
    return row.text, row.tokens, row.logprobs, row.top_logprobs, row.finish_reason


def finish(engine: Engine) -> Counter[int]:
    """Decode all texts; how many steps ended with so many rows."""
    sizes: Counter[int] = Counter()
    while engine.is_busy:
        engine.step()
        sizes[len(engine.rows)] += 1
    return sizes


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Bit for bit with the CPU kernels; without them to rounding, since a BLAS sums in an order of its own."""
    if native.kernels is not None:
        assert found == expected
        return
    assert (found[0], found[1], found[4]) == (expected[0], expected[1], expected[4])
    assert found[2] == pytest.approx(expected[2], abs=1e-4)


@pytest.mark.covering
@pytest.mark.parametrize("count", [1, 2, 11, 12, 16, 33])
def test_each_row_is_its_lone_run(
    loaded: tuple[OpenELM, Tokenizer], lone: Callable[..., tuple[Any, ...]], count: int
) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, max_rows=count, prompts_first=True)
    texts = cases(count)
    rows = [engine.submit(prompt, **options) for prompt, options in texts]
    finish(engine)
    for row, (prompt, options) in zip(rows, texts, strict=True):
        assert_equal(result_of(row), lone(prompt, options))


def test_rows_join_and_leave_at_any_step(
    loaded: tuple[OpenELM, Tokenizer], lone: Callable[..., tuple[Any, ...]]
) -> None:
    model, tokenizer = loaded
    draw = random.Random(1)
    engine, texts, rows = Engine(model, tokenizer, max_rows=5), cases(24), list[Row]()
    cancelled = set[int]()
    while len(rows) < len(texts) or engine.is_busy:
        for _ in range(draw.randrange(3)):
            if len(rows) < len(texts):
                prompt, options = texts[len(rows)]
                rows.append(engine.submit(prompt, **options))
        if rows and draw.random() < 0.15:
            victim = draw.randrange(len(rows))
            if not rows[victim].is_done:
                rows[victim].cancel()
                cancelled.add(victim)
        engine.step()
        assert len(engine.rows) <= 5
    assert cancelled
    for number, (row, (prompt, options)) in enumerate(zip(rows, texts, strict=True)):
        expected = lone(prompt, options)
        if number in cancelled:
            assert row.finish_reason == "cancelled"
            assert row.tokens == expected[1][: len(row.tokens)]
        else:
            assert_equal(result_of(row), expected)
    assert engine.budget.reserved == 0


def test_without_kernels_the_texts_are_the_same(
    loaded: tuple[OpenELM, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "kernels", None)
    model, tokenizer = loaded
    results = batch_generate(model, tokenizer, [PLAY[:40], PLAY[5:9]], max_tokens=6)
    for result, prompt in zip(results, [PLAY[:40], PLAY[5:9]], strict=True):
        text, tokens, logprobs, *_ = alone(model, tokenizer, prompt, {"max_tokens": 6})
        assert (result.text, result.tokens) == (text, tokens)
        assert result.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_others_flow_while_a_long_prompt_is_processed(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer)
    first = engine.submit(PLAY[:20], max_tokens=40)
    while len(first.tokens) < 3:
        engine.step()
    long = engine.submit([5] * 200, max_tokens=2, prefill_step_size=20)
    seen = []
    while not long.tokens:
        seen += [row for row, _ in engine.step()]
    assert seen.count(first) >= 9  # one for each of the ten pieces, but for the last


def test_short_prompts_share_the_time_of_a_piece(loaded: tuple[OpenELM, Tokenizer]) -> None:
    """On 64 positions a step: eight prompts at most, each of them alone; a long one takes whole steps."""
    ids = [list(range(5, 5 + count)) for count in (3, 30, 20, 20, 100, *[2] * 10)]
    engine = Engine(*loaded)
    rows = [engine.submit(prompt, max_tokens=3, prefill_step_size=64) for prompt in ids]
    processed = []
    while any(row.prompt for row in rows):
        before = [len(row.prompt) for row in rows]
        engine.step()
        processed.append([count - len(row.prompt) for count, row in zip(before, rows, strict=True)])
    assert processed == [
        [3, 30, 20, 0, 0, *[0] * 10],  # the first counts as 8
        [0, 0, 0, 20, 0, *[0] * 10],
        [0, 0, 0, 0, 64, *[0] * 10],
        [0, 0, 0, 0, 36, *[2] * 3, *[0] * 7],
        [0, 0, 0, 0, 0, *[0] * 3, *[2] * 7],
    ]
    finish(engine)
    for row, prompt in zip(rows, ids, strict=True):
        assert row.tokens == [piece.token for piece in stream_generate(*loaded, prompt, max_tokens=3)]


def test_pieces_are_those_of_the_rows(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine, heard = Engine(model, tokenizer), []
    rows = [engine.submit(PLAY[:20], max_tokens=5, on_piece=heard.append), engine.submit(PLAY[3:9], max_tokens=4)]
    pieces = []
    while engine.is_busy:
        pieces += engine.step()
    for row in rows:
        own = [piece for other, piece in pieces if other is row]
        assert "".join(piece.text for piece in own) == row.text
        assert [piece.token for piece in own] == row.tokens
        assert [piece.generation_tokens for piece in own] == list(range(1, len(own) + 1))
    assert [piece.token for piece in heard] == rows[0].tokens


def test_a_row_that_fails_leaves_the_others(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer)

    def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits * mx.nan if tokens.size > 12 else logits

    good = engine.submit(PLAY[:20], max_tokens=9)
    bad = engine.submit(PLAY[:20], max_tokens=9, logits_processors=[spoil])
    finish(engine)
    assert isinstance(bad.error, OpenELMError) and "not finite" in str(bad.error)
    assert bad.finish_reason is None
    assert_equal(result_of(good), alone(model, tokenizer, PLAY[:20], {"max_tokens": 9}))


def test_rows_wait_for_memory(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    one = Engine(model, tokenizer).submit(PLAY[:20], max_tokens=9)
    budget = Engine(model, tokenizer).budget
    needed, two = budget.total([one]), budget.total([one, one])
    engine = Engine(model, tokenizer, max_bytes=two)
    rows = [engine.submit(PLAY[:20], max_tokens=9) for _ in range(5)]
    most = 0
    while engine.is_busy:
        engine.step()
        most = max(most, len(engine.rows))
        assert engine.budget.reserved <= engine.budget.max_bytes
    assert most == 2 and len({row.text for row in rows}) == 1
    with pytest.raises(RequestError, match="needs up to .* for keys and values"):
        Engine(model, tokenizer, max_bytes=needed - 1).submit(PLAY[:20], max_tokens=9)


@pytest.mark.covering(2)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_kv_size": 64}, {"kv_bits": 8, "kv_group_size": 32}], ids=str)
def test_prompts_share_prefixes(loaded: tuple[OpenELM, Tokenizer], exact: bool, options: dict[str, Any]) -> None:
    model, tokenizer = loaded
    options = options | {"prefill_step_size": 16, "max_tokens": 5}
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24), exact_prefixes=exact)
    prompts = [PLAY, PLAY + " and kill", PLAY[:90] + " moon, and the maid that is more fair than she", PLAY]
    for number, prompt in enumerate(prompts):
        row = engine.submit(prompt, **options)
        finish(engine)
        assert (row.cached_tokens > 0) == (number > 0)
        expected = alone(model, tokenizer, prompt, options)
        if exact:
            assert row.cached_tokens % (16 if len(options) > 2 else 1) == 0
            assert_equal(result_of(row), expected)
        else:
            assert row.tokens == expected[1]


@pytest.mark.skipif(native.kernels is None, reason="only whole pieces are shared without the kernels")
def test_rows_that_come_together_share_what_the_first_processes(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24), exact_prefixes=True)
    ends = " and kill the envious moon,", " Who is already sick and pale,", " with grief, that"
    prompts = [PLAY + end for end in ends]
    rows = [engine.submit(prompt, max_tokens=4) for prompt in prompts]
    finish(engine)
    shared = len(tokenizer.encode(PLAY))
    assert [row.cached_tokens == 0 for row in rows] == [True, False, False]
    assert all(abs(row.cached_tokens - min(shared, len(row.request.prompt) - 12)) <= 1 for row in rows[1:])
    for row, prompt in zip(rows, prompts, strict=True):
        assert_equal(result_of(row), alone(model, tokenizer, prompt, {"max_tokens": 4}))


def test_a_row_that_fails_while_its_draft_is_checked_harms_no_neighbor(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode("the king, the king, the king, the king")

    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        if tokens.size > len(ids) + 2:
            raise ValueError
        return logits

    engine = Engine(model, tokenizer)
    options = {"prompt_lookup": True, "num_draft_tokens": 4, "logits_processors": [fail]}
    failing = engine.submit(ids, max_tokens=20, **options)  # type: ignore[arg-type]
    row = engine.submit(PLAY, max_tokens=12)
    finish(engine)
    assert isinstance(failing.error, ValueError) and failing.drafts is not None
    assert_equal(result_of(row), alone(model, tokenizer, PLAY, {"max_tokens": 12}))


@pytest.mark.covering
@pytest.mark.parametrize("adapter", [None, "peft-lora"])
@pytest.mark.parametrize("size", [None, 5, 16])
def test_shared_prompts_are_exact_wherever_they_part(adapter: str | None, size: int | None) -> None:
    """Also where bits depend on how a prompt is cut: with adapters, and in pieces as short as steps."""
    model, tokenizer = load(FIXTURES / "shakespeare-hf", None if adapter is None else FIXTURES / adapter)
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24), exact_prefixes=True)
    ids = tokenizer.encode(PLAY * 3)
    expected = {}
    for count in (len(ids), 13, 30, 31, 64, 77, len(ids)):
        options = {"max_tokens": 2, "prefill_step_size": size}
        row = engine.submit([*ids[:count], 50, 60, 70, 80, 90, 100], **options)
        finish(engine)
        if count not in expected:
            expected[count] = alone(model, tokenizer, row.request.prompt, options)
        assert_equal(result_of(row), expected[count])
    to_the_token = adapter is None and native.kernels is not None
    assert row.cached_tokens >= (len(ids) - 24 if size or to_the_token else 0)


@pytest.mark.covering
@pytest.mark.parametrize("options", [{}, {"max_kv_size": 24}], ids=str)
def test_only_prompts_are_exact(loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any]) -> None:
    """Not what a constraint forces, though it is processed like a prompt: the tokens before it were not."""
    pytest.importorskip("llguidance")
    model, tokenizer = loaded
    options = options | {"prefill_step_size": 16, "max_tokens": 50}
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24), exact_prefixes=True)
    first = engine.submit(PLAY, regex="[a-z]{3}, qzxjkvwqzxjkvwqzxjkvwqzxjkvwq[a-z]{3}", **options)
    finish(engine)
    assert first.finish_reason == "stop"
    ids = [*first.request.prompt, *first.tokens, *tokenizer.encode(" my lord", add_bos=False)]
    second = engine.submit(ids, **options)
    finish(engine)
    assert 0 < second.cached_tokens <= len(first.request.prompt)
    assert_equal(result_of(second), alone(model, tokenizer, ids, options))  # type: ignore[arg-type]


def test_what_was_generated_is_found_again(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24))
    first = engine.submit(PLAY, max_tokens=8)
    finish(engine)
    ids = [*first.request.prompt, *first.tokens, *tokenizer.encode(" my lord", add_bos=False)]
    second = engine.submit(ids, max_tokens=3)
    finish(engine)
    assert second.cached_tokens >= len(first.request.prompt) + 7


@pytest.mark.parametrize("exact", [False, True])
def test_a_callback_may_cancel_another_row(loaded: tuple[OpenELM, Tokenizer], exact: bool) -> None:
    model, tokenizer = loaded
    engine = Engine(model, tokenizer, prefixes=PrefixTree(model, 1 << 24), exact_prefixes=exact)
    rows: list[Row] = []

    def cancel_the_second(piece: Piece) -> None:
        if piece.generation_tokens == 4:
            rows[1].cancel()

    rows.append(engine.submit(PLAY, max_tokens=8, on_piece=cancel_the_second))
    rows.append(engine.submit(PLAY[:20], max_tokens=8))
    rows.append(engine.submit(PLAY[:20], max_tokens=8))
    finish(engine)
    assert [row.finish_reason for row in rows] == ["length", "cancelled", "length"]
    assert [row.error for row in rows] == [None] * 3


def test_batch_generate_takes_one_value_or_one_per_prompt(loaded: tuple[OpenELM, Tokenizer]) -> None:
    model, tokenizer = loaded
    prompts = [PLAY[:20], PLAY[:20], tokenizer.encode(PLAY[:9])]
    heard: list[tuple[int, int]] = []
    progress: list[tuple[int, int]] = []
    results = batch_generate(
        model,
        tokenizer,
        prompts,
        max_tokens=[6, 4, 6],
        temp=[0.0, 0.9, 0.0],
        seed=[0, 7, 1],
        stop=[[], [","], []],
        top_logprobs=2,
        callback=lambda number, piece: heard.append((number, piece.token)),
        progress=lambda done, total: progress.append((done, total)),
    )
    assert [result.tokens for result in results] == [[t for n, t in heard if n == i] for i in range(3)]
    assert progress[-1] == (3, 3)
    assert results[0].text == generate(model, tokenizer, PLAY[:20], max_tokens=6)
    assert results[1].text == generate(model, tokenizer, PLAY[:20], max_tokens=4, temp=0.9, seed=7, stop=[","])
    assert all(len(row) == 2 for result in results for row in result.top_logprobs)
    assert [result.finish_reason for result in results[::2]] == ["length", "length"]


@pytest.mark.covering
@pytest.mark.parametrize("stop", [[None, ["I"]], [[], "I"]])
def test_stop_strings_per_prompt_may_be_missing(loaded: tuple[OpenELM, Tokenizer], stop: Any) -> None:
    model, tokenizer = loaded
    results = batch_generate(model, tokenizer, [PLAY[:20]] * 2, max_tokens=24, stop=stop)
    expected = [generate(model, tokenizer, PLAY[:20], max_tokens=24, stop=one) for one in (None, "I")]
    assert [result.text for result in results] == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a text"}, r"^prompts must be a list of texts"),
        ({"max_tokens": [1, 2, 3]}, r"^max_tokens has 3 values for 2 prompts; give one, or one per prompt\.$"),
        ({"prompts": ["a", ""]}, r"^Prompt 2: The prompt is empty"),
        ({"temp": [0.0, -1.0]}, r"^Prompt 2: temp must be between"),
        ({"tmp": 1.0}, r"temp"),
        ({"adapter_path": [None]}, r"^adapter_path has 1 values for 2 prompts"),
        ({"adapter_path": 3}, r"^Prompt 1: adapter_path must be a path, or several, got 3\.$"),
        ({"stop": 3}, r"^Prompt 1: stop must be text, or a list of texts, got 3\.$"),
        ({"stop": {"a": 1}}, r"^Prompt 1: stop must be text, or a list of texts"),
        ({"echo": "no"}, r"^Prompt 1: echo must be True or False, got 'no'\.$"),
        ({"prompt_lookup": [True, 0]}, r"^Prompt 2: prompt_lookup must be True or False, got 0\.$"),
        ({"json_object": "no"}, r"^Prompt 1: json_object must be True or False, got 'no'\.$"),
    ],
)
def test_bad_batches_are_refused(loaded: tuple[OpenELM, Tokenizer], arguments: dict[str, Any], message: str) -> None:
    arguments = {"prompts": ["a", "b"]} | arguments
    with pytest.raises(RequestError, match=message):
        batch_generate(*loaded, **arguments)


@pytest.mark.parametrize("function", [generate, lambda *a: next(stream_generate(*a)), batch_generate, Engine])
def test_the_name_of_a_model_is_not_a_model(loaded: tuple[OpenELM, Tokenizer], function: Any) -> None:
    further = [] if function is Engine else [["a"]] if function is batch_generate else ["a"]
    message = r"^model must be a loaded model, not its name: model, tokenizer = load\(.tiny.\)\.$"
    with pytest.raises(RequestError, match=message):
        function("tiny", loaded[1], *further)


def test_no_prompts_give_no_results(loaded: tuple[OpenELM, Tokenizer]) -> None:
    assert batch_generate(*loaded, []) == []


ADAPTERS = ["peft-lora", None, "peft-rslora-attention", "peft-dora", "peft-lora-embedding"]


@pytest.mark.parametrize("count", [3, 11])
def test_rows_have_adapters_of_their_own(count: int) -> None:
    base, tokenizer = load(FIXTURES / "shakespeare-hf")
    pool = AdapterPool(base)
    engine = Engine(base, tokenizer, adapters=pool, prefixes=PrefixTree(base, 1 << 24), exact_prefixes=True)
    texts = [(PLAY[: 10 + 3 * number], ADAPTERS[number % 5]) for number in range(count)]
    rows = [
        engine.submit(prompt, max_tokens=6, adapter=None if name is None else FIXTURES / name) for prompt, name in texts
    ]
    finish(engine)
    models = {
        name: load(FIXTURES / "shakespeare-hf", None if name is None else FIXTURES / name)[0]
        for name in ADAPTERS[:count]
    }
    for row, (prompt, name) in zip(rows, texts, strict=True):
        assert_equal(result_of(row), alone(models[name], tokenizer, prompt, {"max_tokens": 6}))
    results = batch_generate(
        base,
        tokenizer,
        [prompt for prompt, _ in texts],
        max_tokens=6,
        adapter_path=[None if name is None else FIXTURES / name for _, name in texts],
    )
    assert [result.tokens for result in results] == [row.tokens for row in rows]
    assert all(not held.users for held in pool._held.values())


def test_a_prefix_belongs_to_its_adapter() -> None:
    model, tokenizer = load(FIXTURES / "shakespeare-hf")
    engine = Engine(model, tokenizer, adapters=AdapterPool(model), prefixes=PrefixTree(model, 1 << 24))
    found = []
    for name in ("peft-lora", None, "peft-lora", "peft-dora"):
        row = engine.submit(PLAY, max_tokens=2, adapter=None if name is None else FIXTURES / name)
        finish(engine)
        found.append(row.cached_tokens > 0)
    assert found == [False, False, True, False]


def test_adapters_that_cannot_be_had_are_refused() -> None:
    model, tokenizer = load(FIXTURES / "shakespeare-hf")
    with pytest.raises(RequestError, match="no adapters"):
        Engine(model, tokenizer).submit(PLAY, adapter=FIXTURES / "peft-lora")
    with pytest.raises(RequestError, match="adapter"):
        Engine(model, tokenizer, adapters=AdapterPool(model)).submit(PLAY, adapter=FIXTURES)


def test_rows_wait_for_room_for_their_adapters() -> None:
    model, tokenizer = load(FIXTURES / "shakespeare-hf")
    largest = AdapterPool(model).acquire(FIXTURES / "peft-lora").nbytes
    engine = Engine(model, tokenizer, adapters=AdapterPool(model, max_bytes=largest))
    rows = [
        engine.submit(PLAY[:9], max_tokens=3, adapter=FIXTURES / name)
        for name in ("peft-lora", "peft-rslora-attention", "peft-lora")
    ]
    while engine.is_busy:
        engine.step()
        assert len({row.adapter for row in engine.rows}) <= 1
    assert [row.finish_reason for row in rows] == ["length"] * 3


CONSTRAINED: list[dict[str, Any]] = [
    {"json_object": True},
    {"json_schema": {"type": "object", "properties": {"a_rather_long_property_name": {"enum": ["red", "a long blue"]}},
                     "required": ["a_rather_long_property_name"], "additionalProperties": False}},
    {"regex": "[A-Z][a-z]{3,9}, the (king|queen) of [a-z]{4}"},
    {"choice": ["To be, or not to be", "not to be"]},
    {"grammar": 'start: /[a-z]{2,5}/ ("," /[a-z]+/)~3'},
]  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("count", [5, 11])
def test_constrained_rows_are_their_lone_runs(loaded: tuple[OpenELM, Tokenizer], count: int) -> None:
    pytest.importorskip("llguidance")
    model, tokenizer = loaded
    engine, draw = Engine(model, tokenizer, max_rows=count), random.Random(2)
    texts = []
    for number in range(count):
        more = [{"temp": 0.9, "seed": number}, {"top_logprobs": 2}, {}, {"max_kv_size": 16}][number % 4]
        limits = CONSTRAINED[number % len(CONSTRAINED)] if number % 7 else {}
        texts.append((PLAY[: draw.randrange(3, 60)], {"max_tokens": draw.choice([3, 9, 30])} | more | limits))
    with pytest.warns(UserWarning, match="cut off"):
        rows = [engine.submit(prompt, **options) for prompt, options in texts]
        finish(engine)
        for row, (prompt, options) in zip(rows, texts, strict=True):
            assert_equal(result_of(row), alone(model, tokenizer, prompt, options))
    assert {row.finish_reason for row in rows} == {"stop", "length"}


def test_batch_generate_names_the_texts_that_are_cut_off(loaded: tuple[OpenELM, Tokenizer]) -> None:
    pytest.importorskip("llguidance")
    for prompts, place in ((["a"], ""), (["b", "a"], "Prompt 2: ")):
        with pytest.warns(UserWarning) as found:
            batch_generate(*loaded, prompts, max_tokens=3, regex=[None, "[a-z]{40}"][-len(prompts) :])
        rest = "The text was cut off after 3 tokens, at max_tokens; it may be incomplete."
        assert [str(one.message) for one in found] == [place + rest]


@pytest.mark.parametrize("options", [{}, {"temp": 0.9, "seed": 1, "top_logprobs": 2}, {"repetition_penalty": 1.2}])
def test_reading_tokens_waits_for_nothing_that_was_started_after_them(
    loaded: tuple[OpenELM, Tokenizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that is made when a token is read would be computed after the next step, which has begun by then."""
    started: list[mx.array] = []
    start, read = mx.async_eval, drawn.read
    read_steps = 0

    def noting(*arrays: mx.array) -> None:
        started.extend(arrays)
        start(*arrays)

    def checking(groups: Sequence[drawn.Drawn]) -> Any:
        nonlocal read_steps
        for group in groups:
            for array in (group.tokens, group.logprobs, *(group.likeliest or ())):
                assert any(array is one for one in started)
            read_steps += 1
        return read(groups)

    monkeypatch.setattr(mx, "async_eval", noting)
    monkeypatch.setattr(engine_module, "read", checking)
    engine = Engine(*loaded)
    rows = [engine.submit(PLAY, max_tokens=4, **options), engine.submit("ROMEO.", max_tokens=4, **options)]
    while engine.is_busy:
        engine.step()
    assert [len(row.tokens) for row in rows] == [4, 4]
    assert read_steps >= 4


def test_listing_the_likeliest_tokens_computes_nothing() -> None:
    class Values:
        """Like an array, but no part of it can be taken on the device."""

        def __init__(self, values: list[list[float]]):
            self.tolist = lambda: values

    likeliest: Any = Values([[1, 2], [3, 4]]), Values([[-2.0, -1.0], [-0.5, -float("inf")]])
    assert [listed(likeliest, row) for row in (0, 1)] == [[(2, -1.0), (1, -2.0)], [(3, -0.5)]]
