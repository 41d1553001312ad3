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
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import mlx.core as mx

from ..errors import RequestError, quote
from ..ops.layers import log_softmax
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
    """The random keys of one text, computed lazily; the first key determines all of them.

    A call gives the next one. `key_at(n)` gives key n whatever was asked for before: at once if it is among the last
    `KEPT`, else by computing the chain again from its beginning.
    """

    KEPT = 256

    def __init__(self, key: mx.array):
        self.next = 0  # the number of the key that the next call gives; assign to it to go back
        self._first = key
        self._known = 0  # keys computed so far; the last of them are kept
        self._chain = key
        self._keys: deque[mx.array] = deque(maxlen=self.KEPT)

    def __call__(self) -> mx.array:
        key = self.key_at(self.next)
        self.next += 1
        return key

    def key_at(self, n: int) -> mx.array:
        """Key `n`, counted from 0."""
        if n < self._known - len(self._keys):
            self._known, self._chain = 0, self._first
            self._keys.clear()
        while self._known <= n:
            self._chain, key = mx.random.split(self._chain)
            self._keys.append(key)
            self._known += 1
        return self._keys[n - self._known]


class TextSampler:
    """Draws the tokens of one text from log-probabilities, in order or again from any place.

    A call takes log-probabilities [B, vocab] to the next token of each row, [B], for which all rows share a key. The
    other methods take those of consecutive tokens of the text, [L, vocab], the first of which is token `start` counted
    from 0; each token has keys of its own, which follow from the first key and its place alone.

    Args:
        params: valid ones whose temperature is not 0.
        special_ids: tokens that XTC never drops.
        key: the first key.
    """

    def __init__(self, params: SamplingParams, special_ids: Collection[int], key: mx.array):
        self._params = params
        self._special_ids = special_ids
        self._keys = KeyStream(key)
        self._tosses = params.xtc_probability > 0  # then a token's first key is that of XTC's coin
        self._inverse_temp = 1.0 / max(float(params.temp), MIN_TEMP)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [B, vocab] to the next tokens [B]."""
        coins = toss(self._keys(), logprobs.shape[0], self._params.xtc_probability) if self._tosses else None
        return mx.random.categorical(self._scores(logprobs, coins), key=self._keys())

    def key_at(self, place: int) -> mx.array:
        """The key that token `place` of the text is drawn with."""
        return self._keys.key_at(2 * place + 1 if self._tosses else place)

    def scores(self, logprobs: mx.array, start: int) -> mx.array:
        """Log-probabilities [L, vocab] after the filters, divided by the temperature; their sum is not 1."""
        coins = None
        if self._tosses:
            keys = [self._keys.key_at(2 * place) for place in range(start, start + logprobs.shape[0])]
            coins = mx.concatenate([toss(key, 1, self._params.xtc_probability) for key in keys])
        return self._scores(logprobs, coins)

    def distributions(self, logprobs: mx.array, start: int) -> mx.array:
        """The log-probabilities [L, vocab] with which tokens are drawn: after the filters and the temperature."""
        return log_softmax(self.scores(logprobs, start))

    def tokens(self, logprobs: mx.array, start: int) -> mx.array:
        """The tokens [L] that calls would draw one by one, given these log-probabilities [L, vocab]."""
        scores = self.scores(logprobs, start)
        if len(scores) == 1:
            return mx.random.categorical(scores, key=self.key_at(start))
        # Row by row: a draw from several rows with one key, or with mapped keys, is not the draw from each alone.
        rows = [mx.random.categorical(scores[i : i + 1], key=self.key_at(start + i)) for i in range(scores.shape[0])]
        return mx.concatenate(rows)

    def _scores(self, logprobs: mx.array, coins: mx.array | None) -> mx.array:
        params = self._params
        # Costs nothing if it is float32 already; half precision would blur top-p's sum.
        logprobs = logprobs.astype(mx.float32)
        if 0 < params.top_p < 1:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0:
            logprobs = apply_min_p(logprobs, params.min_p, params.min_tokens_to_keep)
        if coins is not None:
            logprobs = exclude_top_choices(logprobs, params.xtc_threshold, self._special_ids, coins)
        if params.top_k > 0:
            logprobs = apply_top_k(logprobs, params.top_k)
        return logprobs * self._inverse_temp


def make_sampler(params: SamplingParams, special_ids: Collection[int] = (), key: mx.array | None = None) -> Sampler:
    """A function from log-probabilities [B, vocab] to tokens [B]; RequestError for a bad value.

    XTC never drops `special_ids` (end of text, a newline), since texts might then never end. The same `key` gives the
    same tokens in the same calls; without one, the seed comes from the operating system. A sampler advances its own
    key at every call, so make a new one for every text. Rows are drawn independently. It is `greedy` at temperature 0,
    else a `TextSampler`.
    """
    params.validate()
    if params.temp == 0:
        return greedy
    return TextSampler(params, special_ids, make_key(random_seed()) if key is None else key)


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
    return exclude_top_choices(logprobs, threshold, special_ids, toss(key, logprobs.shape[0], probability))


def exclude_top_choices(
    logprobs: mx.array, threshold: float, special_ids: Collection[int], coins: mx.array
) -> mx.array:
    """`apply_xtc` in the rows of [B, vocab] whose coin, one of booleans [B, 1], is True."""
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)  # [B, 1]
    dropped = probs > least
    if len(special_ids) > 0:
        dropped[..., mx.array(list(special_ids))] = False
    return mx.where(coins & dropped, -mx.inf, logprobs)


def toss(key: mx.array, rows: int, probability: float) -> mx.array:
    """Booleans [rows, 1], each True with this probability."""
    return mx.random.uniform(shape=(rows, 1), key=key) < probability


def check_functions(sampler: Any, logits_processors: Any) -> Sampler | None:
    """A sampler of the caller's own, whose results will be checked too; `logits_processors` are the caller's as well.

    Raises:
        RequestError: the sampler is no function, or the processors are no list of functions.
    """
    if logits_processors is not None:
        is_list = isinstance(logits_processors, Sequence) and all(map(callable, logits_processors))
        if not is_list:
            raise RequestError(f"logits_processors must be a list of functions, got {quote(logits_processors)}.")
    if sampler is None or sampler is greedy or isinstance(sampler, TextSampler):
        return sampler
    if not callable(sampler):
        raise RequestError(f"sampler must be a function, got {quote(sampler)}.")

    def sample(logprobs: mx.array) -> mx.array:
        """Log-probabilities [B, vocab] to tokens [B]."""
        tokens = sampler(logprobs)
        if not isinstance(tokens, mx.array):
            raise RequestError(f"The sampler must return an array of tokens, got {quote(tokens)}.")
        if tokens.shape != logprobs.shape[:1] or not mx.issubdtype(tokens.dtype, mx.integer):
            raise RequestError(
                f"The sampler must return whole numbers of shape {logprobs.shape[:1]}, got {tokens.dtype} of shape "
                f"{tokens.shape}."
            )
        return tokens

    return sample


def make_logits_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """The bias and the penalties that are on, in the order in which they apply; mlx-lm can call them too.

    Each maps (tokens [n], logits [B, vocab]) to new logits [B, vocab], in a new array. `tokens` is the
    prompt and what was generated after it, the same for all rows (usually one). The result is float32: a small
    penalty would be lost against a half-precision logit. Their attribute `context_size` is how many of the last
    `tokens` they read. RequestError for a bad value.
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

    add_bias.context_size = 0  # type: ignore[attr-defined]
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

    process.context_size = math.inf if context_size is None else context_size  # type: ignore[attr-defined]
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

    process.context_size = math.inf if context_size is None else context_size  # type: ignore[attr-defined]
    return process


def _last(tokens: mx.array, size: int | None) -> mx.array:
    """The last `size` tokens, or all of them."""
    return tokens if size is None or size >= tokens.size else tokens[-size:]
