"""Thousands of short texts with everything mixed: memory stays flat, and each text is what it is alone."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_openelm import Engine, load, native, stream_generate
from mlx_openelm.adapters.pool import AdapterPool
from mlx_openelm.errors import RequestError
from mlx_openelm.generation.cache_files import make_prompt_cache
from mlx_openelm.generation.cache_origin import Origin
from mlx_openelm.generation.lookup import EarlierTexts
from mlx_openelm.generation.prefix_disk import PrefixDisk
from mlx_openelm.generation.prefix_tree import PrefixTree
from mlx_openelm.generation.row import Row
from mlx_openelm.model import OpenELM

import mlx.core as mx
import pytest

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "shakespeare-hf"
PLAY = (
    "ROMEO. But soft, what light through yonder window breaks? It is the east, and Juliet is the sun. Arise, fair sun, "
    "and kill the envious moon, who is already sick and pale with grief that thou her maid art far more fair than she."
)
MAX_ROWS = 16
WARM = 100  # requests after which nothing may grow
ADAPTERS = ["peft-lora", "peft-rslora-attention", "peft-dora", "peft-lora-embedding"]
KINDS: list[dict[str, Any]] = [
    {},
    {"kv_bits": 8, "kv_group_size": 32},
    {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 12},
    {"max_kv_size": 16},
    {"max_kv_size": 24},
]
SAMPLING: list[dict[str, Any]] = [
    {},
    {"temp": 0.9},
    {"temp": 1.2, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    {"temp": 0.8, "xtc_probability": 0.5},
]
PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {260: 4.0}},
    {"repetition_penalty": 1.1, "repetition_context_size": 5},
]
OTHERS: list[dict[str, Any]] = [
    {},
    {"stop": "the"},
    {"stop": ["e", "\n"]},
    {"top_logprobs": 3},
    {"echo": True},
    {"prefill_step_size": 7},
]
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_object": True},
    {"regex": "[A-Z][a-z]{3,9}, the (king|queen) of [a-z]{4}"},
    {"choice": ["To be, or not to be", "not to be"]},
    {"grammar": 'start: /[a-z]{2,5}/ ("," /[a-z]+/)~3'},
    {"json_schema": {"type": "object", "properties": {"a_rather_long_name": {"enum": ["red", "a long blue"]}},
                     "required": ["a_rather_long_name"], "additionalProperties": False}},
]  # fmt: skip
BAD: list[dict[str, Any]] = [
    {"regex": "("},
    {"json_schema": {"type": "nothing"}},
    {"choice": [""]},
    {"temp": -1.0},
    {"max_kv_size": 3},
    {"num_draft_tokens": 65},
    {"adapter": FIXTURES},
]
# Classes whose number follows from what prefixes and earlier texts are held.
HELD = ("_Node", "Content", "Entry", "SuffixAutomaton")


class Spoiled(Exception):
    """What a processor or a callback of a request raises."""


@dataclass(eq=False)
class Case:
    """A request to one of the engines, and what becomes of it."""

    engine: Engine
    prompt: list[int]
    options: dict[str, Any]
    adapter: str | None = None
    past: list[int] = field(default_factory=list)  # ids in a given prompt cache
    fails: str | None = None
    row: Row | None = None
    heard: list[int] = field(default_factory=list)


def spoil(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits * mx.nan if tokens.size % 5 == 0 else logits


def fail(tokens: mx.array, logits: mx.array) -> mx.array:
    if tokens.size % 7 == 0:
        raise Spoiled
    return logits


def flatten(tokens: mx.array, logits: mx.array) -> mx.array:
    return logits[0]


class Soak:
    """Two engines, one of which has a draft model, random requests, and the models to compare with.

    The engines share a prefix tree with a disk, and adapters.
    """

    def __init__(self, folder: Path, seed: int):
        self.draw = random.Random(seed)
        self.model, self.tokenizer = load(FOLDER)
        self.alone = {name: load(FOLDER, FIXTURES / name)[0] for name in ADAPTERS} | {None: load(FOLDER)[0]}
        disk = PrefixDisk(folder, Origin("shakespeare"), self.model.config, max_bytes=1_000_000)
        self.prefixes = PrefixTree(self.model, 300_000, disk)
        self.pool = AdapterPool(self.model)
        self.draft_model = load(FOLDER, FIXTURES / "peft-lora")[0]  # right often, but not always
        self.engines = [self.engine(None), self.engine(self.draft_model)]
        self.ids = self.tokenizer.encode(PLAY)
        self.has_constraints = importlib.util.find_spec("llguidance") is not None
        self.cases: list[Case] = []
        self.counts: Counter[str] = Counter()
        self.most = 0  # rows at a time

    def engine(self, draft_model: OpenELM | None) -> Engine:
        return Engine(
            self.model,
            self.tokenizer,
            max_rows=MAX_ROWS,
            draft_model=draft_model,
            earlier=EarlierTexts(500),
            adapters=self.pool,
            prefixes=self.prefixes,
            exact_prefixes=True,
        )

    def drafts(self, engine: Engine, is_sampled: bool) -> dict[str, Any]:
        """Random options of drafts with which the text is that of a lone run."""
        draw = self.draw
        if engine.speculation.draft_model is None:
            return draw.choice([{}, {"prompt_lookup": True}, {"prompt_lookup": True, "num_draft_tokens": 4}])
        # Sampled text with a draft model follows from the seed only if the number of tokens is fixed, without lookup.
        options: dict[str, Any] = {"num_draft_tokens": draw.choice([0, 1, 4] if is_sampled else [0, None, 2, 7])}
        return options if is_sampled else options | {"prompt_lookup": draw.random() < 0.5}

    def case(self) -> Case:
        """A random request."""
        draw = self.draw
        start = draw.choice([0, 0, 0, draw.randrange(30)])  # many begin alike
        prompt = self.ids[start : start + draw.choice([1, 3, 12, 30, len(self.ids)])]
        options: dict[str, Any] = {"max_tokens": draw.randrange(1, 15), "prefill_step_size": draw.choice([None, 8, 16])}
        options |= draw.choice(KINDS) | draw.choice(SAMPLING) | draw.choice(PENALTIES) | draw.choice(OTHERS)
        if "temp" in options:
            options["seed"] = draw.randrange(1000)
        if self.has_constraints and draw.random() < 0.2:
            options |= draw.choice(CONSTRAINTS)
        engine = draw.choice(self.engines)
        options |= self.drafts(engine, "temp" in options)
        case = Case(engine, prompt, options, draw.choice([None, None, *ADAPTERS]))
        if draw.random() < 0.1 and not {"max_kv_size", "kv_bits"} & {*options} and case.adapter is None:
            case.past = self.ids[: draw.randrange(1, 20)]
        if draw.random() < 0.08:
            case.fails = draw.choice(["nan", "processor", "shape", "callback", "sampler"])
        return case

    def submit(self) -> None:
        case = self.case()
        more: dict[str, Any] = {"on_piece": lambda piece: case.heard.append(piece.token)}
        if case.fails in ("nan", "processor", "shape"):
            more["logits_processors"] = [{"nan": spoil, "processor": fail, "shape": flatten}[case.fails]]
        elif case.fails == "callback":
            more["on_piece"] = self.failing
        elif case.fails == "sampler" and not {"temp", "seed"} & {*case.options}:
            more["sampler"] = self.failing
        if case.past:
            more |= self.cached(case, self.model)
        if case.adapter is not None:
            more["adapter"] = FIXTURES / case.adapter
        case.row = case.engine.submit(case.prompt, **more, **case.options)
        self.cases.append(case)

    def failing(self, _: Any) -> Any:
        raise Spoiled

    def cached(self, case: Case, model: Any) -> dict[str, Any]:
        cache = make_prompt_cache(model)
        model(mx.array([case.past]), cache)
        return {"prompt_cache": [copy(layer) for layer in cache], "prompt_cache_tokens": case.past}

    def refuse(self) -> None:
        """A request that is not right takes nothing, and harms nobody."""
        options = self.draw.choice(BAD)
        with pytest.raises(RequestError):
            self.draw.choice(self.engines).submit(self.ids[:9], **options)
        self.counts["refused"] += 1

    def cancel(self) -> None:
        case = self.draw.choice(self.cases)
        assert case.row is not None
        case.row.cancel()

    def settle(self) -> None:
        """Compare the texts that have ended with their lone runs, and forget them."""
        for case in [case for case in self.cases if case.row is not None and case.row.is_done]:
            self.check(case)
            self.cases.remove(case)

    def check(self, case: Case) -> None:
        row = case.row
        assert row is not None
        if row.error is not None:
            assert case.fails is not None, (case, row.error)
            self.counts["failed"] += 1
            return
        if case.fails is not None and case.fails != "sampler":
            assert row.finish_reason == "cancelled" or len(row.tokens) < 15
        self.counts[str(row.finish_reason)] += 1
        assert case.fails == "callback" or case.heard == row.tokens
        if case.fails is not None:
            return
        model = self.alone[case.adapter]
        past = self.cached(case, model) if case.past else {}
        options = {k: v for k, v in case.options.items() if k not in ("prompt_lookup", "num_draft_tokens")}
        if "temp" in options and case.options.get("num_draft_tokens") and "prompt_lookup" not in case.options:
            past["draft_model"], options["num_draft_tokens"] = self.draft_model, case.options["num_draft_tokens"]
        pieces = list(stream_generate(model, self.tokenizer, case.prompt, **past, **options))
        count = len(row.tokens)
        if row.drafts is not None:
            self.counts["drafted"] += row.drafts.drafted
            self.counts["accepted"] += row.drafts.accepted
        self.counts["from prefixes"] += row.cached_tokens > 0
        found = row.tokens, row.logprobs, row.top_logprobs, row.text
        expected = (
            [piece.token for piece in pieces][:count],
            [piece.logprob for piece in pieces][:count],
            [piece.top_logprobs for piece in pieces][:count],
            "".join(piece.text for piece in pieces[:count]),
        )
        if row.finish_reason != "cancelled":
            assert (count, row.finish_reason) == (len(pieces), pieces[-1].finish_reason), case
        if native.kernels is not None:
            assert found == expected, (case, found, expected)
        elif row.finish_reason != "cancelled":
            assert found[3] == expected[3], case

    def run(self, count: int) -> None:
        """Submit requests at random steps, cancel some, and finish all."""
        submitted = 0
        while submitted < count or any(engine.is_busy for engine in self.engines):
            for _ in range(self.draw.randrange(10)):
                if submitted < count and sum(len(engine.waiting) for engine in self.engines) < 30:
                    self.submit()
                    submitted += 1
            if self.draw.random() < 0.2:
                self.refuse()
            if self.cases and self.draw.random() < 0.3:
                self.cancel()
            for engine in self.engines:
                engine.prompts_first = self.draw.random() < 0.7  # otherwise few texts meet: their prompts take turns
                engine.step()
                self.most = max(self.most, len(engine.rows))
                assert len(engine.rows) <= MAX_ROWS
            self.settle()
        assert not self.cases
        assert not any(engine.budget.reserved for engine in self.engines)
        assert not any(held.users for held in self.pool._held.values())
        assert self.prefixes.nbytes <= self.prefixes.max_bytes

    def state(self) -> tuple[float, float, Counter[str]]:
        """Megabytes that MLX holds and that the process has, and the number of objects of each of our classes."""
        self.prefixes.clear()
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        types = [type(one) for one in gc.get_objects()]
        objects = Counter(f"{kind.__module__}.{kind.__name__}" for kind in types if _is_ours(kind))
        resident = 0.0
        if sys.platform.startswith("linux"):
            if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
                libc.malloc_trim(0)  # what is free, but not given back
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return mx.get_active_memory() / 1e6, resident, objects


def _is_ours(kind: type) -> bool:
    return str(kind.__module__).startswith("mlx_openelm") and kind.__name__ not in HELD


def soak(folder: Path, count: int, seed: int, say: Callable[[str], object] = lambda _: None) -> None:
    one, warm = Soak(folder, seed), min(WARM, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constrained texts that were cut off, and of long ones
        one.run(warm)
        active, resident, objects = one.state()
        say(f"{warm}: {active:.2f} MB active, {resident:.1f} MB resident, {sum(objects.values())} objects")
        done = warm
        while done < count:
            part = min(1000, count - done)
            one.run(part)
            done += part
            now = one.state()
            say(f"{done}: {now[0]:.2f} MB active, {now[1]:.1f} MB resident, {sum(now[2].values())} objects")
            assert now[0] - active < 0.5, "MLX holds more"
            assert now[1] - resident < 25, "the process has grown"
            assert not now[2] - objects, "there are more objects"
    say(str(dict(one.counts)))
    assert one.most > MAX_ROWS // 2
    kinds = ("length", "stop", "cancelled", "failed", "refused", "drafted", "accepted", "from prefixes")
    assert all(one.counts[kind] for kind in kinds), one.counts


def test_some_requests(tmp_path: Path) -> None:
    soak(tmp_path, 28, seed=1)


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(line: str) -> None:
        with capsys.disabled():
            print(line, flush=True)

    soak(tmp_path, 10_000, seed=2, say=say)
