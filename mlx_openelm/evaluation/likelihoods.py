"""Log-likelihoods of continuations: what those of a question have in common is processed once, the rest together.

On the CPU kernels a result does not depend on other questions or on the size of batches, bit for bit: questions are
processed one by one, and the ends of continuations as a step of several sequences, whose rows do not affect each other.
Elsewhere both are batches, padded to their longest row, which changes the last bits of a result.
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
from ..generation.decoding import Decoder
from ..model import OpenELM
from ..ops.distributions import LOGIT_ROWS
from ..ops.layers import log_softmax

DEFAULT_BATCH_SIZE = 16
# The most tokens of contexts that are processed at a time where they are a batch.
_MOST_TOKENS = 1 << 13
# Bytes of the caches that continuations processed together have copies of. Fewer continuations at a time cost reading
# the weights more often, which is little beside processing a context of that size.
_MOST_COPIED = 20 << 20


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


# Called with the likelihoods of a batch of questions, by the number of the request.
Answered = Callable[[dict[int, Likelihood]], object]


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
        answered: called with the likelihoods of each batch, as soon as they are known.

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
        score(model, batch, batch_size, scores)
        scores.read()
        for index, likelihood in scores.likelihoods.items():
            found[index] = likelihood
        if answered is not None:
            answered(scores.likelihoods)
    return [likelihood for likelihood in found if likelihood is not None]


class _Question:
    """The continuations of one context, by the numbers of their requests.

    `prefix` is what the model reads for all of them: the context, and the tokens with which all continuations begin. At
    its last positions, from `start` on, the tokens `shared` come next, and after them the first token that differs.
    """

    def __init__(self, context: tuple[int, ...], continuations: dict[int, tuple[int, ...]]):
        self.context, self.continuations = context, continuations
        first, last = min(continuations.values()), max(continuations.values())  # they differ earliest
        count = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
        if first == last:  # a single continuation, whose last token is not read
            count -= 1
        self.shared = first[:count]
        self.prefix, self.start = context + self.shared, len(context) - 1

    @property
    def ends(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The tokens of each continuation after the shared ones, the first of which the prefix predicts."""
        for index, tokens in self.continuations.items():
            if len(tokens) > len(self.shared):
                yield index, tokens[len(self.shared) :]


def _batches(requests: Sequence[Request], batch_size: int) -> Iterator[list[_Question]]:
    """Questions in batches of similar lengths, the longest first, so that a lack of memory shows at once."""
    by_context: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(request.context, {})[index] = request.continuation
    questions = [_Question(*pair) for pair in by_context.items()]
    batch: list[_Question] = []
    for question in sorted(questions, key=lambda one: (-len(one.prefix), one.prefix)):
        count = sum(len(one.continuations) for one in batch) + len(question.continuations)
        if batch and (count > batch_size or (len(batch) + 1) * len(batch[0].prefix) > _MOST_TOKENS):
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
        self._waiting: list[tuple[Sequence[int], Sequence[int], mx.array, mx.array]] = []  # for the device

    def add(self, logprobs: mx.array, rows: Sequence[int], owners: Sequence[int], tokens: Sequence[int]) -> None:
        """Add tokens [N] of the requests `owners`, whose log-probabilities are in `rows` of `logprobs` [L, vocab]."""
        if not owners:
            return
        places, targets = mx.array(list(rows)), mx.array(list(tokens))
        chosen = mx.take_along_axis(logprobs[places], targets[:, None], axis=-1)[:, 0]
        likeliest = mx.argmax(logprobs, axis=-1)[places]
        mx.async_eval(chosen, likeliest)
        self._waiting.append((owners, tokens, chosen, likeliest))

    def read(self) -> None:
        """Sum up what was added; waits for the device."""
        for owners, tokens, chosen, likeliest in self._waiting:
            values: Any = chosen.tolist()
            best: Any = likeliest.tolist()
            for owner, token, value, top in zip(owners, tokens, values, best, strict=True):
                if not math.isfinite(value):
                    raise not_finite("The model's logits are", self._model)
                self._sums[owner] = self._sums.get(owner, 0.0) + value
                self._greedy[owner] = self._greedy.get(owner, True) and token == top
        self._waiting = []

    @property
    def likelihoods(self) -> dict[int, Likelihood]:
        return {owner: Likelihood(total, self._greedy[owner]) for owner, total in self._sums.items()}

    def add_prefix(self, question: _Question, hidden: mx.array) -> None:
        """Add the shared tokens, and the next one of each continuation, which hidden states [S + 1, dim] predict."""
        for first in range(0, len(question.shared), LOGIT_ROWS):
            tokens = question.shared[first : first + LOGIT_ROWS]
            logprobs = _logprobs(self._model, hidden[first : first + len(tokens)])
            for index in question.continuations:
                self.add(logprobs, range(len(tokens)), [index] * len(tokens), tokens)
        ends = list(question.ends)
        owners, following = [index for index, _ in ends], [tokens[0] for _, tokens in ends]
        self.add(_logprobs(self._model, hidden[-1:]), [0] * len(ends), owners, following)


# A request's tokens after the shared ones, with caches for those that follow the first of them.
_End = tuple[int, tuple[int, ...], list[Any]]


def _score_exactly(model: OpenELM, batch: Sequence[_Question], batch_size: int, scores: _Scores) -> None:
    """Score a batch so that no question depends on the others."""
    for question in batch:
        waiting: list[_End] = []
        decoder, rows = Decoder(model), []
        size = backend.prefill_step_size()
        for first in range(0, len(question.prefix), size):
            hidden = decoder.extend(mx.array([question.prefix[first : first + size]]))
            rows.append(hidden[0, max(0, question.start - first) :])
            if first + size < len(question.prefix):
                mx.eval(rows[-1], [layer.state[:2] for layer in decoder.cache])
        scores.add_prefix(question, mx.concatenate([row for row in rows if row.shape[0]]))
        together = max(1, min(batch_size, _MOST_COPIED // sum(layer.nbytes for layer in decoder.cache)))
        for index, tokens in question.ends:
            if len(tokens) == 1:
                continue
            end = index, tokens, _copies(decoder.cache, len(tokens))
            if len(tokens) > backend.MANY_POSITIONS:
                _score_alone(model, end, scores)
                continue
            waiting.append(end)
            if len(waiting) == together:
                _score_step(model, waiting, scores)
                waiting = []
        if waiting:
            _score_step(model, waiting, scores)


def _copies(caches: Sequence[Any], room: int) -> list[Any]:
    """Copies of caches that grow by no more than `room` positions, since there is one for each continuation."""
    copies = [copy.copy(cache) for cache in caches]
    for cache in copies:
        cache.step = room
    return copies


def _score_alone(model: OpenELM, end: _End, scores: _Scores) -> None:
    """Score the tokens of one continuation that follow the first of its end, in the pieces of a prompt."""
    index, tokens, caches = end
    size = backend.prefill_step_size()
    for start in range(0, len(tokens) - 1, size):
        hidden = model.hidden_states(mx.array([tokens[start : len(tokens) - 1][:size]]), caches)[0]
        _add_rows(model, index, tokens[start + 1 :], hidden, scores)


def _add_rows(model: OpenELM, index: int, tokens: Sequence[int], hidden: mx.array, scores: _Scores) -> None:
    """Add the tokens of a request that hidden states [L, model_dim] predict, of which there are L or more."""
    for first in range(0, hidden.shape[0], LOGIT_ROWS):
        rows = hidden[first : first + LOGIT_ROWS]
        targets = tokens[first : first + rows.shape[0]]
        scores.add(_logprobs(model, rows), range(len(targets)), [index] * len(targets), targets)


def _score_step(model: OpenELM, waiting: Sequence[_End], scores: _Scores) -> None:
    """Score the tokens of several continuations that follow the first of their ends, as one step of sequences."""
    lengths = [len(tokens) - 1 for _, tokens, _ in waiting]
    inputs = mx.array([token for _, tokens, _ in waiting for token in tokens[:-1]])
    hidden = model.hidden_states(inputs[:, None], step_caches([caches for _, _, caches in waiting], lengths))
    logprobs = _logprobs(model, hidden)[:, 0]  # [N, vocab]
    owners = [index for (index, _, _), length in zip(waiting, lengths, strict=True) for _ in range(length)]
    scores.add(logprobs, range(len(owners)), owners, [token for _, tokens, _ in waiting for token in tokens[1:]])


def _score_padded(model: OpenELM, batch: Sequence[_Question], batch_size: int, scores: _Scores) -> None:
    """Score a batch of questions, padded to the longest prefix, and then batches of the ends of continuations."""
    longest = max(len(question.prefix) for question in batch)
    caches: list[Any] = [BatchKVCache([0] * len(batch)) for _ in model.layers]
    for cache in caches:
        cache.prepare(right_padding=[longest - len(question.prefix) for question in batch])
    hidden = model.hidden_states(_padded([question.prefix for question in batch]), caches)  # [B, L, model_dim]
    for row, question in enumerate(batch):
        scores.add_prefix(question, hidden[row, question.start : len(question.prefix)])
    ends = [(row, *end) for row, question in enumerate(batch) for end in question.ends if len(end[1]) > 1]
    for cache in caches:
        cache.finalize()
    for start in range(0, len(ends), batch_size):
        some = ends[start : start + batch_size]
        own = [copy.copy(cache) for cache in caches]
        for cache in own:
            cache.filter([row for row, _, _ in some])
        hidden = model.hidden_states(_padded([tokens[:-1] for _, _, tokens in some]), own)
        for row, (_, index, tokens) in enumerate(some):
            _add_rows(model, index, tokens[1:], hidden[row, : len(tokens) - 1], scores)


def _padded(rows: Sequence[Sequence[int]]) -> mx.array:
    """Ids [B, L], with zeros at the ends of shorter rows."""
    longest = max(map(len, rows))
    return mx.array([[*row, *[0] * (longest - len(row))] for row in rows])


def _logprobs(model: OpenELM, hidden: mx.array) -> mx.array:
    """Log-probabilities [..., vocab] in float32 after hidden states [..., model_dim]."""
    return log_softmax(model.logits(hidden).astype(mx.float32))
