"""Prompt caches in memory beside mlx-lm's: requests that share a long beginning, and what is held of them.

Ours is the `PrefixTree` of an `Engine`; mlx-lm's is the `LRUPromptCache` of its server. The first request has filled
it; then others that begin alike come, each measured from its ids to its first token, the programs in turns.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from engine_setup import Row, Setup, at_most

REQUESTS = 8
REST = 16  # tokens of a request that no other has


def measure(setup: Setup) -> Iterator[Row]:
    model, tokenizer = setup.load()
    shared = 64 if setup.quick else 512
    draw = random.Random(0)
    prefix, *rests = (draw.choices(range(model.config.vocab_size), k=n) for n in [shared, *[REST] * (REQUESTS + 1)])
    prompts = [prefix + rest for rest in rests]
    programs = [Ours(model, tokenizer), MlxLm(setup.load_mlx_lm())]
    fresh = [[timed(lambda one=one: one.first_token(prompts[0], use=False)) for one in programs] for _ in range(2)][-1]
    for one in programs:
        one.first_token(prompts[0])
    times: list[list[float]] = [[], []]
    for n, prompt in enumerate(prompts[1:]):
        for which in (0, 1) if n % 2 else (1, 0):
            times[which].append(timed(lambda one=programs[which]: one.first_token(prompt)))  # noqa: B023 (called here)
    about = f"{shared} of {shared + REST} tokens shared, {setup.size}"
    ours, other = (1e3 * statistics.median(its) for its in times)
    yield at_most(f"first token (ms), {about}", ours, other, None if setup.quick else 1.0)
    yield at_most(f"the same beside no cache (ms), {about}", ours, 1e3 * fresh[0])
    held = [one.held_bytes / 1e6 for one in programs]
    yield at_most(f"held after {REQUESTS + 1} requests (MB), {about}", *held, 1.0)


def timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Ours:
    def __init__(self, model: Any, tokenizer: Any):
        from mlx_openelm.generation.engine import Engine
        from mlx_openelm.generation.prefix_tree import PrefixTree

        self._tree = PrefixTree(model)
        self._engine = Engine(model, tokenizer, prefixes=self._tree)
        self._without = Engine(model, tokenizer)

    def first_token(self, prompt: list[int], use: bool = True) -> None:
        engine = self._engine if use else self._without
        row = engine.submit(prompt, max_tokens=1)
        while not row.tokens:
            engine.step()

    @property
    def held_bytes(self) -> int:
        return self._tree.nbytes


class MlxLm:
    """As its server does: fetch what is nearest, process the rest, keep the whole cache."""

    def __init__(self, model: Any):
        from mlx_lm.models.cache import LRUPromptCache

        self._model, self._kept = model, LRUPromptCache(max_size=REQUESTS + 1)

    def first_token(self, prompt: list[int], use: bool = True) -> None:
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache

        cache, rest = self._kept.fetch_nearest_cache("model", prompt) if use else (None, prompt)
        cache = make_prompt_cache(self._model) if cache is None else cache
        next(generate_step(mx.array(rest), self._model, max_tokens=1, prompt_cache=cache))
        if use:
            self._kept.insert_cache("model", prompt, cache)

    @property
    def held_bytes(self) -> int:
        return self._kept.nbytes
