"""One step of decoding: the token drawn from a row of log-probabilities, what comes before it, and what is reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..errors import OpenELMError, RequestError, quote
from ..finite import not_finite
from ..messages import warn
from ..model import OpenELM
from .sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from .constraints import Constraint

# A token, its log-probability, the likeliest tokens with theirs, and the log-probabilities of all tokens, [vocab].
Step = tuple[int, float, list[tuple[int, float]], mx.array | None]
# The same of N rows on the device: tokens [N], their log-probabilities [N], the likeliest tokens and theirs, each
# [N, top], and those of all tokens, [N, vocab].
Draw = tuple[mx.array, mx.array, tuple[mx.array, mx.array] | None, mx.array]


def process_logits(processors: Sequence[LogitsProcessor], context: mx.array, logits: mx.array) -> mx.array:
    """The logits [1, vocab] after the ids `context` [n], after each of the processors.

    Raises:
        RequestError: a processor returned something of another shape.
    """
    shape = logits.shape
    for process in processors:
        logits = process(context, logits)
        if not isinstance(logits, mx.array):
            raise RequestError(f"A logits processor must return the new logits, got {quote(logits)}.")
    if logits.shape != shape:
        raise RequestError(f"A logits processor returned {logits.shape} for logits {shape}.")
    return logits


def draw(logprobs: mx.array, sampler: Sampler, top: int) -> Draw:
    """What is drawn from log-probabilities [N, vocab], with the `top` likeliest tokens.

    Starts computing all of it. What is read must be exactly these arrays: the device would compute anything made from
    them, even a view, only after all that was started meanwhile, such as the next step.
    """
    tokens = sampler(logprobs)
    chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    if not top:
        mx.async_eval(tokens, chosen)
        return tokens, chosen, None, logprobs
    top = min(top, logprobs.shape[-1])
    likeliest = mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
    likelihoods = mx.take_along_axis(logprobs, likeliest, axis=-1)
    mx.async_eval(tokens, chosen, likeliest, likelihoods)
    return tokens, chosen, (likeliest, likelihoods), logprobs


def listed(likeliest: tuple[mx.array, mx.array] | None, row: int = 0) -> list[tuple[int, float]]:
    """Pairs of tokens and their log-probabilities, the most likely first; tokens without a probability are left out."""
    if likeliest is None:
        return []
    tokens, logprobs = (cast(Any, values.tolist())[row] for values in likeliest)
    pairs = [pair for pair in zip(tokens, logprobs, strict=True) if pair[1] > -math.inf]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def forced_step(token: int, top: int) -> Step:
    """The step of a token that a constraint leaves no choice about."""
    return token, 0.0, [(token, 0.0)] if top else [], None


def warn_past_context(model: OpenELM, position: int) -> None:
    """Warn of the first token that is computed from more positions than the model was trained on."""
    trained = model.config.max_context_length
    if position == trained:
        warn(f"The text is now longer than the {trained} tokens the model was trained on; expect it to get worse.")


def failed_draw(
    model: OpenELM, number: int, logprobs: mx.array, constraint: Constraint | None, is_processed: bool
) -> OpenELMError:
    """The error of a token, counted from 1, whose log-probability is not finite.

    One logit that is NaN or +inf makes every token's log-probability so. Otherwise the constraint allows only tokens
    without a probability in `logprobs` [1, vocab].

    Args:
        is_processed: whether logits processors are at work.
    """
    if constraint is not None:
        constraint.check(logprobs)
    return not_finite(f"The logits for token {number} are", model, processed=is_processed)
