"""From logits to the next token: penalties and bias, the filters, the draw.

The order is fixed, and the same as mlx-lm's, so that the same values mean the same distribution:

1. On logits: logit bias, repetition penalty, presence penalty, frequency penalty.
2. On log-probabilities at temperature 1: top-p, min-p, XTC, top-k. Each filter sees what the one before it left;
   none depends on the temperature.
3. The temperature, then one draw from what is left. Temperature 0 takes the most likely token; no filter runs.

Everything is lazy: nothing here waits for the device, so the next token's graph can be built while the last token is
being computed. Randomness comes from an explicit key, never from `mx.random`'s global state, which belongs to the
program that embeds us.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping

import mlx.core as mx

from .options import SamplingParams, check_seed

Sampler = Callable[[mx.array], mx.array]  # log-probabilities [B, vocab] -> tokens [B]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens [n], logits [B, vocab] -> logits [B, vocab]

# A lower temperature is drawn as if at this one, where the most likely token is already certain.
MIN_TEMP = 1e-6


def random_seed() -> int:
    """A seed from the operating system, short enough to be typed."""
    return int.from_bytes(os.urandom(4), "little")


def make_key(seed: int) -> mx.array:
    """The random key of a seed from 0 to 2**64 - 1; any other seed raises `RequestError`."""
    check_seed(seed)
    return mx.random.key(int(seed))


class KeyStream:
    """Gives a new random key at every call, computed lazily; the first key determines all of them."""

    def __init__(self, key: mx.array):
        self._key = key

    def __call__(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key


def make_sampler(params: SamplingParams, special_ids: Collection[int] = (), key: mx.array | None = None) -> Sampler:
    """A function from log-probabilities [B, vocab] to tokens [B]; RequestError for a bad value.

    XTC never drops `special_ids` (end of text, a newline), since texts might then never end. The same `key` gives the
    same tokens in the same calls; without one, the seed comes from the operating system. A sampler advances its own
    key at every call, so make a new one for every text. Rows are drawn independently.
    """
    params.validate()
    if params.temp == 0:
        return greedy
    keys = KeyStream(make_key(random_seed()) if key is None else key)
    inverse_temp = 1.0 / max(float(params.temp), MIN_TEMP)

    def sample(logprobs: mx.array) -> mx.array:
        """Log-probabilities [B, vocab] to tokens [B]."""
        # Costs nothing if it is float32 already; half precision would blur top-p's sum.
        logprobs = logprobs.astype(mx.float32)
        if 0 < params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p, params.min_tokens_to_keep)
        if params.xtc_probability > 0:
            logprobs = apply_xtc(logprobs, params.xtc_probability, params.xtc_threshold, special_ids, keys())
        if params.top_k > 0:
            logprobs = apply_top_k(logprobs, params.top_k)
        return mx.random.categorical(logprobs * inverse_temp, key=keys())

    return sample


def greedy(logprobs: mx.array) -> mx.array:
    """The most likely token of each row, [B, vocab] -> [B]; the first of equals. Logits work too."""
    return mx.argmax(logprobs, axis=-1)


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep a token if those before it, most likely first, hold less than `top_p` (Holtzman et al., 2020).

    [B, vocab] -> the same with `-inf` elsewhere. The most likely token always stays, and so
    do all tokens as likely as the last one kept.
    """
    descending = -mx.sort(-logprobs, axis=-1)  # [B, vocab]
    probs = mx.exp(descending)
    mass_before = mx.cumsum(probs, axis=-1, inclusive=False)
    total = mass_before[..., -1:] + probs[..., -1:]  # [B, 1], a little off 1 after rounding
    kept = mx.where(mass_before < top_p * total, descending, mx.inf)
    # The first is kept explicitly: a tiny top_p is 0 in float32, and then the comparison keeps nothing.
    threshold = mx.minimum(kept.min(axis=-1, keepdims=True), descending[..., :1])
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Keep tokens at least `min_p` times as likely as the most likely one (Nguyen et al., 2024).

    [B, vocab] -> the same with `-inf` elsewhere. A token exactly at the threshold stays. At least
    `min_tokens_to_keep` stay; among equals, which ones is unspecified.
    """
    if min_tokens_to_keep >= logprobs.shape[-1]:
        return logprobs
    threshold = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)  # [B, 1]
    filtered = mx.where(logprobs < threshold, -mx.inf, logprobs)
    if min_tokens_to_keep > 1:
        filtered = mx.maximum(filtered, apply_top_k(logprobs, min_tokens_to_keep))
    return filtered


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep exactly the `top_k` most likely tokens; among equals, which ones is unspecified.

    [B, vocab] -> the same with `-inf` elsewhere, unchanged if the vocabulary is not larger. Nothing is fully sorted.
    """
    if top_k >= logprobs.shape[-1]:
        return logprobs
    kept = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., :top_k]  # [B, top_k]
    values = mx.take_along_axis(logprobs, kept, axis=-1)
    return mx.put_along_axis(mx.full(logprobs.shape, -mx.inf), kept, values, axis=-1)


def apply_xtc(
    logprobs: mx.array, probability: float, threshold: float, special_ids: Collection[int], key: mx.array
) -> mx.array:
    """With `probability`, drop all but the least likely of the tokens above `threshold`; special ids stay.

    [B, vocab] -> the same with `-inf` elsewhere; each row tosses its own coin. With one token above the
    threshold, or none, nothing is dropped; tokens as likely as the least likely one stay too.
    """
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)  # [B, 1]
    dropped = probs > least
    if len(special_ids) > 0:
        dropped[..., mx.array(list(special_ids))] = False
    heads = mx.random.uniform(shape=(*logprobs.shape[:-1], 1), key=key) < probability
    return mx.where(heads & dropped, -mx.inf, logprobs)


def make_logits_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """The bias and the penalties that are on, in the order in which they apply; mlx-lm can call them too.

    Each maps (tokens [n], logits [B, vocab]) to new logits [B, vocab], in a new array. `tokens` is the
    prompt and what was generated after it, the same for all rows (usually one). The result is float32: a small
    penalty would be lost against a half-precision logit. Processors that do not read `tokens` have the attribute
    `reads_context` set to False. RequestError for a bad value.
    """
    params.validate()
    processors: list[LogitsProcessor] = []
    if params.logit_bias:
        processors.append(_logit_bias(params.logit_bias))
    if params.repetition_penalty not in (None, 1):
        processors.append(_repetition_penalty(params.repetition_penalty, params.repetition_context_size))
    if params.presence_penalty:
        processors.append(_presence_penalty(params.presence_penalty, params.presence_context_size))
    if params.frequency_penalty:
        processors.append(_frequency_penalty(params.frequency_penalty, params.frequency_context_size))
    return processors


def _logit_bias(logit_bias: Mapping[int, float]) -> LogitsProcessor:
    tokens_with_bias = mx.array([int(token) for token in logit_bias])
    biases = mx.array([float(bias) for bias in logit_bias.values()])

    def add_bias(tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [B, vocab] to new logits [B, vocab]."""
        return logits.astype(mx.float32).at[:, tokens_with_bias].add(biases)

    add_bias.reads_context = False  # type: ignore[attr-defined]
    return add_bias


def _repetition_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    def penalize(logits: mx.array) -> mx.array:
        return mx.where(logits < 0, logits * penalty, logits / penalty)

    return _once_per_token(penalize, context_size)


def _presence_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    return _once_per_token(lambda logits: logits - penalty, context_size)


def _once_per_token(change: Callable[[mx.array], mx.array], context_size: int | None) -> LogitsProcessor:
    """A processor that applies `change` to the logits of the tokens in the context."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens [n] and logits [B, vocab] to new logits [B, vocab]."""
        logits = logits.astype(mx.float32)
        context = _last(tokens, context_size)
        if context.size == 0:
            return logits
        # All reads come before all writes, so a repeated token writes the same value again.
        index = mx.broadcast_to(context, (logits.shape[0], context.size))  # [B, n]
        return mx.put_along_axis(logits, index, change(mx.take_along_axis(logits, index, axis=-1)), axis=-1)

    return process


def _frequency_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens [n] and logits [B, vocab] to new logits [B, vocab]."""
        logits = logits.astype(mx.float32)
        context = _last(tokens, context_size)
        if context.size == 0:
            return logits
        # Count first: whole numbers add up exactly, repeated penalties would not.
        counts = mx.zeros(logits.shape[-1]).at[context].add(1.0)  # [vocab]
        return logits - penalty * counts

    return process


def _last(tokens: mx.array, size: int | None) -> mx.array:
    """The last `size` tokens, or all of them."""
    return tokens if size is None or size >= tokens.size else tokens[-size:]
