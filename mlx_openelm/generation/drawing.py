"""One step of decoding: the token drawn from a row of log-probabilities, and what is reported of the row."""

from __future__ import annotations

import math
from typing import Any, cast

import mlx.core as mx

from .sampling import Sampler

# A token, its log-probability, the likeliest tokens with theirs, and the log-probabilities of all tokens, [vocab].
Step = tuple[int, float, list[tuple[int, float]], mx.array | None]
# The same on the device: a token [1], its log-probability [1, 1], the likeliest tokens and theirs, each [1, top], and
# those of all tokens, [1, vocab].
Drawn = tuple[mx.array, mx.array, tuple[mx.array, mx.array] | None, mx.array]


def draw(logprobs: mx.array, sampler: Sampler, top: int) -> Drawn:
    """A token [1], its log-probability [1, 1], the `top` likeliest tokens and theirs, each [1, top], and `logprobs`.

    Starts computing all but the last.
    """
    token = sampler(logprobs)
    logprob = mx.take_along_axis(logprobs, token[:, None], axis=-1)
    if not top:
        mx.async_eval(token, logprob)
        return token, logprob, None, logprobs
    top = min(top, logprobs.shape[-1])
    likeliest = mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
    likelihoods = mx.take_along_axis(logprobs, likeliest, axis=-1)
    mx.async_eval(token, logprob, likeliest, likelihoods)
    return token, logprob, (likeliest, likelihoods), logprobs


def listed(likeliest: tuple[mx.array, mx.array] | None, row: int = 0) -> list[tuple[int, float]]:
    """Pairs of tokens and their log-probabilities, the most likely first; tokens without a probability are left out."""
    if likeliest is None:
        return []
    tokens, logprobs = (cast(Any, values[row].tolist()) for values in likeliest)
    pairs = [pair for pair in zip(tokens, logprobs, strict=True) if pair[1] > -math.inf]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def forced_step(token: int, top: int) -> Step:
    """The step of a token that a constraint leaves no choice about."""
    return token, 0.0, [(token, 0.0)] if top else [], None
