"""Log-likelihoods of continuations: a question's context is processed once, and its continuations together.

On the CPU kernels a result does not depend on what else is asked, bit for bit: contexts are processed one by one, as
`Decoder.prefill` does it, and continuations as a step of several sequences, whose rows do not affect each other.
Elsewhere contexts and continuations are batches, padded to their longest row, which changes the last bits of a result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import backend, native
from ..cache import BatchKVCache, step_caches
from ..errors import RequestError
from ..finite import not_finite
from ..generation.decoding import MANY_POSITIONS, Decoder
from ..model import OpenELM
from ..ops.layers import log_softmax

DEFAULT_BATCH_SIZE = 16
# The most tokens of contexts that are processed at a time where they are a batch.
_MOST_TOKENS = 1 << 13
# Positions whose logits are in memory at once: 256 rows of 32000 float32 numbers take 33 MB.
_CHUNK = 256


@dataclass(frozen=True)
class Request:
    """A continuation of a context, both as ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation, in nats, and whether greedy decoding would give it."""

    logprob: float
    is_greedy: bool


Answered = Callable[[int, Likelihood], object]


def log_likelihoods(
    model: OpenELM,
    requests: Sequence[Request],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    answered: Answered | None = None,
) -> list[Likelihood]:
    """The likelihood of each request, in their order. They are processed sorted, the longest first.

    Args:
        batch_size: continuations that are processed together.
        answered: called with the number of a request and its likelihood, as soon as that is known.

    Raises:
        RequestError: a context or a continuation without tokens, or a bad batch size.
        OpenELMError: the logits are not finite.
    """
    if batch_size < 1:
        raise RequestError(f"--batch-size must be 1 or more, got {batch_size}.")
    if any(not request.context or not request.continuation for request in requests):
        raise RequestError("A context and its continuation need at least one token each.")
    found: list[Likelihood | None] = [None] * len(requests)
    exact = not backend.on_gpu() and native.kernels is not None
    score = _score_exactly if exact else _score_padded
    for batch in _batches(requests, batch_size):
        scores = _Scores(model)
        score(model, batch, requests, batch_size, scores)
        for index, likelihood in scores.likelihoods():
            found[index] = likelihood
            if answered is not None:
                answered(index, likelihood)
    return [likelihood for likelihood in found if likelihood is not None]


# A context and the numbers of the requests that continue it.
_Question = tuple[tuple[int, ...], list[int]]


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[_Question]]:
    """Questions in batches of similar lengths, the longest first, so that a lack of memory shows at once."""
    questions: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        questions.setdefault(request.context, []).append(index)

    def length(question: _Question) -> tuple[int, tuple[int, ...]]:
        return -len(question[0]) - max(len(requests[i].continuation) for i in question[1]), question[0]

    batch: list[_Question] = []
    for question in sorted(questions.items(), key=length):
        count = sum(len(indices) for _, indices in batch) + len(question[1])
        if batch and (count > batch_size or (len(batch) + 1) * len(batch[0][0]) > _MOST_TOKENS):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


class _Scores:
    """Sums up the log-probabilities of tokens, for each request in the order of its tokens."""

    def __init__(self, model: OpenELM):
        self._model = model
        self._sums: dict[int, float] = {}
        self._greedy: dict[int, bool] = {}

    def add(self, logprobs: mx.array, rows: Sequence[int], owners: Sequence[int], tokens: Sequence[int]) -> None:
        """Add tokens [N] of the requests `owners`, whose log-probabilities are in `rows` of `logprobs` [L, vocab]."""
        if not owners:
            return
        places, targets = mx.array(list(rows)), mx.array(list(tokens))
        chosen = mx.take_along_axis(logprobs[places], targets[:, None], axis=-1)[:, 0]
        likeliest = mx.argmax(logprobs, axis=-1)[places]
        mx.eval(chosen, likeliest)
        values: Any = chosen.tolist()
        best: Any = likeliest.tolist()
        for owner, token, value, top in zip(owners, tokens, values, best, strict=True):
            if not math.isfinite(value):
                raise not_finite("The model's logits are", self._model)
            self._sums[owner] = self._sums.get(owner, 0.0) + value
            self._greedy[owner] = self._greedy.get(owner, True) and token == top

    def likelihoods(self) -> Iterator[tuple[int, Likelihood]]:
        for owner, total in self._sums.items():
            yield owner, Likelihood(total, self._greedy[owner])


def _score_exactly(
    model: OpenELM, batch: Sequence[_Question], requests: Sequence[Request], batch_size: int, scores: _Scores
) -> None:
    """Score a batch so that no result depends on the others."""
    waiting: list[tuple[int, list[Any]]] = []  # requests whose other tokens are few, with their caches
    for context, indices in batch:
        decoder = Decoder(model)
        first = decoder.prefill(mx.array([context]))  # [1, vocab]
        scores.add(first, [0] * len(indices), indices, [requests[i].continuation[0] for i in indices])
        for index in indices:
            inputs = requests[index].continuation[:-1]
            if not inputs:
                continue
            caches = [copy.copy(cache) for cache in decoder.cache]
            if len(inputs) < MANY_POSITIONS:
                waiting.append((index, caches))
            else:
                _score_alone(model, index, requests[index].continuation, caches, scores)
            if len(waiting) == batch_size:
                _score_step(model, waiting, requests, scores)
                waiting = []
    if waiting:
        _score_step(model, waiting, requests, scores)


def _score_alone(model: OpenELM, index: int, tokens: Sequence[int], caches: list[Any], scores: _Scores) -> None:
    """Score all tokens of a continuation but the first, in the pieces of a prompt."""
    size = backend.prefill_step_size()
    for start in range(0, len(tokens) - 1, size):
        hidden = model.hidden_states(mx.array([tokens[start : len(tokens) - 1][:size]]), caches)
        for first in range(0, hidden.shape[1], _CHUNK):
            rows = hidden[:, first : first + _CHUNK]
            targets = tokens[start + first + 1 :][: rows.shape[1]]
            logprobs = _logprobs(model, rows)[0]
            scores.add(logprobs, range(len(targets)), [index] * len(targets), targets)


def _score_step(
    model: OpenELM, waiting: Sequence[tuple[int, list[Any]]], requests: Sequence[Request], scores: _Scores
) -> None:
    """Score all tokens of several continuations but their first, as one step of as many sequences."""
    continuations = [requests[index].continuation for index, _ in waiting]
    lengths = [len(tokens) - 1 for tokens in continuations]
    inputs = mx.array([token for tokens in continuations for token in tokens[:-1]])
    hidden = model.hidden_states(inputs[:, None], step_caches([caches for _, caches in waiting], lengths))
    logprobs = _logprobs(model, hidden)[:, 0]  # [N, vocab]
    owners = [index for (index, _), length in zip(waiting, lengths, strict=True) for _ in range(length)]
    scores.add(logprobs, range(len(owners)), owners, [token for tokens in continuations for token in tokens[1:]])


def _score_padded(
    model: OpenELM, batch: Sequence[_Question], requests: Sequence[Request], batch_size: int, scores: _Scores
) -> None:
    """Score a batch of contexts, padded to the longest, and then batches of their continuations."""
    contexts = [context for context, _ in batch]
    longest = max(map(len, contexts))
    caches: list[Any] = [BatchKVCache([0] * len(batch)) for _ in model.layers]
    for cache in caches:
        cache.prepare(right_padding=[longest - len(context) for context in contexts])
    hidden = model.hidden_states(_padded(contexts), caches)  # [B, L, model_dim]
    ends = mx.array([len(context) - 1 for context in contexts])[:, None, None]
    first = _logprobs(model, mx.take_along_axis(hidden, ends, axis=1))[:, 0]  # [B, vocab]
    owners = [(row, index) for row, (_, indices) in enumerate(batch) for index in indices]
    tokens = [requests[index].continuation[0] for _, index in owners]
    scores.add(first, [row for row, _ in owners], [index for _, index in owners], tokens)
    for cache in caches:
        cache.finalize()
    mx.eval([cache.state[:2] for cache in caches])
    longer = [(row, index) for row, index in owners if len(requests[index].continuation) > 1]
    for start in range(0, len(longer), batch_size):
        some = longer[start : start + batch_size]
        repeated = [copy.copy(cache) for cache in caches]
        for cache in repeated:
            cache.filter([row for row, _ in some])
        inputs = [requests[index].continuation[:-1] for _, index in some]
        hidden = model.hidden_states(_padded(inputs), repeated)
        for row, (_, index) in enumerate(some):
            targets = requests[index].continuation[1:]
            for place in range(0, len(targets), _CHUNK):
                part = targets[place : place + _CHUNK]
                logprobs = _logprobs(model, hidden[row, place : place + len(part)])
                scores.add(logprobs, range(len(part)), [index] * len(part), part)


def _padded(rows: Sequence[Sequence[int]]) -> mx.array:
    """Ids [B, L], with zeros at the ends of shorter rows."""
    longest = max(map(len, rows))
    return mx.array([[*row, *[0] * (longest - len(row))] for row in rows])


def _logprobs(model: OpenELM, hidden: mx.array) -> mx.array:
    """Log-probabilities [..., vocab] in float32 after hidden states [..., model_dim]."""
    return log_softmax(model.logits(hidden).astype(mx.float32))
