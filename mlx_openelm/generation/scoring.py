"""What a model says of a text that is there: the log-probabilities of its tokens, and one vector for all of it.

These are generators, so that a server can do other work after each piece; what they return is the result.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx

from .. import backend
from ..finite import not_finite
from ..model import OpenELM
from ..ops.distributions import LOGIT_ROWS
from ..ops.layers import log_softmax
from .decoding import Decoder
from .drawing import listed


def prompt_logprobs(
    model: OpenELM, ids: Sequence[int], top: int
) -> Generator[None, None, list[tuple[float, list[tuple[int, float]]]]]:
    """For each token from the second on its log-probability, and the `top` likeliest in its place with theirs.

    Raises:
        OpenELMError: the logits are not finite.
    """
    decoder, size = Decoder(model), min(LOGIT_ROWS, backend.prefill_step_size())
    found: list[tuple[float, list[tuple[int, float]]]] = []
    for start in range(0, len(ids) - 1, size):
        following = list(ids[start + 1 : start + size + 1])
        hidden_states = decoder.extend(mx.array([ids[start : start + len(following)]]))
        logprobs = log_softmax(model.logits(hidden_states)[0].astype(mx.float32))  # [L, vocab]
        own = mx.take_along_axis(logprobs, mx.array(following)[:, None], axis=-1)[:, 0]
        likeliest = None
        if top:
            places = mx.argpartition(-logprobs, kth=min(top, logprobs.shape[1]) - 1, axis=-1)[:, :top]
            likeliest = places, mx.take_along_axis(logprobs, places, axis=-1)
        mx.eval(own, *(likeliest or ()), [layer.state[:2] for layer in decoder.cache])
        values: Any = own.tolist()
        if not all(map(math.isfinite, values)):
            raise not_finite("The model's logits are", model)
        found += [(value, listed(likeliest, row)) for row, value in enumerate(values)]
        yield
    return found


def embedding(model: OpenELM, ids: Sequence[int]) -> Generator[None, None, list[float]]:
    """The mean of the last hidden states of all tokens, [model_dim], in float32.

    Raises:
        OpenELMError: they are not finite.
    """
    decoder, size = Decoder(model), backend.prefill_step_size()
    total = mx.zeros(model.config.model_dim)
    for start in range(0, len(ids), size):
        hidden_states = decoder.extend(mx.array([ids[start : start + size]]))
        total = total + hidden_states[0].astype(mx.float32).sum(axis=0)
        mx.eval(total, [layer.state[:2] for layer in decoder.cache])
        yield
    mean: Any = (total / len(ids)).tolist()
    if not all(map(math.isfinite, mean)):
        raise not_finite("The model's hidden states are", model)
    return mean  # type: ignore[no-any-return]
