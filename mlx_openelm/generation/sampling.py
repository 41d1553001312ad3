"""From logits to the next token: penalties and bias, the filters, the draw.

The order is fixed, and the same as mlx-lm's, so that the same values mean the same distribution:

1. On logits: logit bias, repetition penalty, presence penalty, frequency penalty.
2. On log-probabilities at temperature 1: top-p, min-p, XTC, top-k. Each one sees what the one before left;
   none of them depends on the temperature.
3. The temperature, then one draw from what is left. Temperature 0 is the most likely token; no filter runs.

Everything stays lazy: nothing here waits for the device, so the next token's graph can be built while the
last one is being computed. Randomness comes from an explicit key, never from `mx.random`'s global state,
which a program that embeds us may use for itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral

import mlx.core as mx

from ..errors import RequestError, quote
from ..options import option
from .checking import check_number

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# Bounds that keep every product and sum of logits inside float32, where an overflow would end in NaN.
PENALTY_LIMIT = 1000.0
BIAS_LIMIT = 1e30
# A lower temperature is drawn as if at this one, already the most likely token; the upper end is uniform.
MIN_TEMP, MAX_TEMP = 1e-6, 1000.0


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; names and meanings as in mlx-lm, defaults mean "off" (greedy decoding).

    - `temp`: 0 takes the most likely token.
    - `top_p`: the smallest set of most likely tokens that holds this much probability; 0 and 1 mean off.
    - `top_k`: exactly this many of the most likely tokens; 0, or as many as the vocabulary has, means off.
    - `min_p`: tokens at least this likely relative to the most likely one, and never fewer than
      `min_tokens_to_keep` (which concerns `min_p` only).
    - `xtc_probability`, `xtc_threshold`: with this probability, drop all but the least likely of the tokens
      more likely than the threshold ("exclude top choices").
    - `repetition_penalty`: positive logits of tokens in the context are divided by it, negative ones
      multiplied, once each (Keskar et al., 2019, CTRL, section 4.1). `None` and 1 mean off.
    - `presence_penalty`: subtracted from the logit of every token in the context, once each.
    - `frequency_penalty`: subtracted once for every time the token is in the context. Both may be negative.
    - `*_context_size`: how many of the last tokens the penalty looks at, prompt included, and what a prompt cache
      holds where its ids are given; `None` is all of them, as in transformers (mlx-lm looks at 20). Like mlx-lm's,
      and unlike the OpenAI API's, presence and frequency penalties therefore count the prompt as well.
    - `logit_bias`: token id to a number added to its logit; `-inf` bans the token.
    """

    temp: float = option(0.0, "Sampling temperature; 0 takes the most likely token.")
    top_p: float = option(1.0, "Sample from the most likely tokens that hold this much probability; 0 or 1 is off.")
    top_k: int = option(0, "Sample from this many of the most likely tokens; 0 is off.", group="Sampling")
    min_p: float = option(
        0.0, "Sample from tokens at least this likely relative to the most likely one; 0 is off.", group="Sampling"
    )
    min_tokens_to_keep: int = option(1, "Minimum number of tokens that --min-p leaves.", group="Sampling")
    xtc_probability: float = option(0.0, "Probability of dropping the most likely tokens (XTC).", group="Sampling")
    xtc_threshold: float = option(0.1, "Probability above which XTC drops a token.", group="Sampling")
    repetition_penalty: float | None = option(
        None, "Make tokens of the context less likely; Apple suggests 1.2.", group="Penalties"
    )
    repetition_context_size: int | None = option(
        None, "Last tokens that --repetition-penalty looks at; by default all.", group="Penalties"
    )
    presence_penalty: float = option(
        0.0, "Subtract this from the logits of tokens in the context, once each.", group="Penalties"
    )
    presence_context_size: int | None = option(
        None, "Last tokens that --presence-penalty looks at; by default all.", group="Penalties"
    )
    frequency_penalty: float = option(
        0.0, "Subtract this from the logits of tokens in the context, each time they occur.", group="Penalties"
    )
    frequency_context_size: int | None = option(
        None, "Last tokens that --frequency-penalty looks at; by default all.", group="Penalties"
    )
    logit_bias: Mapping[int, float] | None = option(
        None,
        "Add to a token's logit: ID=VALUE, repeatable, or a JSON object. -inf bans the token.",
        group="Penalties",
        metavar="ID=VALUE",
    )

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise a `RequestError` that names the flag if a value cannot be right, for this vocabulary if it is told."""
        check_number("--temp", self.temp, 0, MAX_TEMP, f"between 0 and {MAX_TEMP:g}")
        check_number("--top-p", self.top_p, 0, 1, "between 0 and 1")
        check_number("--top-k", self.top_k, 0, math.inf, "a whole number, 0 or above", kind=Integral)
        check_number("--min-p", self.min_p, 0, 1, "between 0 and 1")
        at_least_1 = "a whole number, 1 or above"
        check_number("--min-tokens-to-keep", self.min_tokens_to_keep, 1, math.inf, at_least_1, kind=Integral)
        check_number("--xtc-probability", self.xtc_probability, 0, 1, "between 0 and 1")
        check_number("--xtc-threshold", self.xtc_threshold, 0, 0.5, "between 0 and 0.5")
        if self.repetition_penalty is not None:
            wanted = f"between {1 / PENALTY_LIMIT:g} and {PENALTY_LIMIT:g} (1 changes nothing)"
            check_number("--repetition-penalty", self.repetition_penalty, 1 / PENALTY_LIMIT, PENALTY_LIMIT, wanted)
        for name in ("presence", "frequency"):
            wanted = f"between {-PENALTY_LIMIT:g} and {PENALTY_LIMIT:g} (0 changes nothing)"
            value = getattr(self, f"{name}_penalty")
            check_number(f"--{name}-penalty", value, -PENALTY_LIMIT, PENALTY_LIMIT, wanted)
        for name in ("repetition", "presence", "frequency"):
            size = getattr(self, f"{name}_context_size")
            if size is not None:
                check_number(f"--{name}-context-size", size, 1, math.inf, at_least_1, kind=Integral)
        self._validate_logit_bias(vocab_size)

    def _validate_logit_bias(self, vocab_size: int | None) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"--logit-bias must map token ids to numbers, got {quote(self.logit_bias)}")
        last = math.inf if vocab_size is None else vocab_size - 1
        wanted = "token ids" if vocab_size is None else f"token ids from 0 to {last}"
        for token, bias in self.logit_bias.items():
            check_number("--logit-bias: the keys", token, 0, last, wanted, kind=Integral)
            if bias != -math.inf:
                check_number(f"--logit-bias of token {token}", bias, -BIAS_LIMIT, BIAS_LIMIT, "a number, or -inf")
        if len(self.logit_bias) == vocab_size and all(b == -math.inf for b in self.logit_bias.values()):
            raise RequestError("--logit-bias bans every token of the vocabulary; leave at least one")


def random_seed() -> int:
    """A seed from the operating system, short enough to type again."""
    return int.from_bytes(os.urandom(4), "little")


def make_key(seed: int) -> mx.array:
    """The random key of a seed from 0 to 2**64 - 1; any other seed raises `RequestError`."""
    check_number("--seed", seed, 0, 2**64 - 1, "a whole number from 0 to 2**64 - 1", kind=Integral)
    return mx.random.key(int(seed))


class KeyStream:
    """A new key at every call, all of them determined by the first one, computed lazily."""

    def __init__(self, key: mx.array):
        self._key = key

    def __call__(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key


def make_sampler(params: SamplingParams, special_ids: Collection[int] = (), key: mx.array | None = None) -> Sampler:
    """A function from log-probabilities [batch, vocab] to tokens [batch]; RequestError for params that cannot be right.

    `special_ids` (end of text, a newline) are never dropped by XTC, which would make texts endless. The same
    `key` gives the same tokens in the same calls; without one, a seed comes from the operating system. A
    sampler advances its own key at every call, so make one for every text. Rows are drawn independently.
    """
    params.validate()
    if params.temp == 0:
        return greedy
    keys = KeyStream(make_key(random_seed()) if key is None else key)
    inverse_temp = 1.0 / max(float(params.temp), MIN_TEMP)

    def sample(logprobs: mx.array) -> mx.array:
        # Free when it is float32 already; half precision would blur top-p's sum.
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
    """The most likely token of each row, [batch, vocab] -> [batch]; the first of equals. Logits will do."""
    return mx.argmax(logprobs, axis=-1)


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keep a token if those before it, most likely first, hold less than `top_p` (Holtzman et al., 2020).

    [batch, vocab] -> the same with `-inf` elsewhere. The most likely token stays whatever `top_p` is, and so
    do all tokens as likely as the last one kept.
    """
    descending = -mx.sort(-logprobs, axis=-1)
    probs = mx.exp(descending)
    mass_before = mx.cumsum(probs, axis=-1, inclusive=False)
    total = mass_before[..., -1:] + probs[..., -1:]  # a little off 1 after rounding
    kept = mx.where(mass_before < top_p * total, descending, mx.inf)
    # The first one is kept by name: a tiny top_p is 0 in float32, and then the comparison keeps nothing.
    threshold = mx.minimum(kept.min(axis=-1, keepdims=True), descending[..., :1])
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Keep tokens at least `min_p` times as likely as the most likely one (Nguyen et al., 2024).

    [batch, vocab] -> the same with `-inf` elsewhere. A token exactly at the threshold stays. At least
    `min_tokens_to_keep` stay; among equals, which ones is unspecified.
    """
    if min_tokens_to_keep >= logprobs.shape[-1]:
        return logprobs
    threshold = logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    filtered = mx.where(logprobs < threshold, -mx.inf, logprobs)
    if min_tokens_to_keep > 1:
        filtered = mx.maximum(filtered, apply_top_k(logprobs, min_tokens_to_keep))
    return filtered


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep exactly the `top_k` most likely tokens; among equals, which ones is unspecified.

    [batch, vocab] -> the same with `-inf` elsewhere, unchanged if the vocabulary is no larger. No full sort.
    """
    if top_k >= logprobs.shape[-1]:
        return logprobs
    kept = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., :top_k]
    values = mx.take_along_axis(logprobs, kept, axis=-1)
    return mx.put_along_axis(mx.full(logprobs.shape, -mx.inf), kept, values, axis=-1)


def apply_xtc(
    logprobs: mx.array, probability: float, threshold: float, special_ids: Collection[int], key: mx.array
) -> mx.array:
    """With `probability`, drop all but the least likely of the tokens above `threshold`; special ids stay.

    [batch, vocab] -> the same with `-inf` elsewhere; each row has a coin of its own. With one token above the
    threshold, or none, nothing is dropped; tokens equal to the least likely one stay with it.
    """
    probs = mx.softmax(logprobs, axis=-1)
    least = mx.where(probs > threshold, probs, mx.inf).min(axis=-1, keepdims=True)
    dropped = probs > least
    if len(special_ids) > 0:
        dropped[..., mx.array(list(special_ids))] = False
    heads = mx.random.uniform(shape=(*logprobs.shape[:-1], 1), key=key) < probability
    return mx.where(heads & dropped, -mx.inf, logprobs)


def make_logits_processors(params: SamplingParams) -> list[LogitsProcessor]:
    """The bias and the penalties that are on, in the order they apply; mlx-lm can call them too.

    Each maps (tokens [n], logits [batch, vocab]) to new logits [batch, vocab] and leaves the given ones as
    they are. `tokens` is the prompt and what was generated after it, the same for all rows (in practice one).
    The result is float32: a small penalty would be lost against a half-precision logit. Those that do not look at
    `tokens` have `reads_context` False. RequestError for params that cannot be right.
    """
    params.validate()
    processors: list[LogitsProcessor] = []
    if params.logit_bias:
        processors.append(_logit_bias(params.logit_bias))
    if params.repetition_penalty is not None and params.repetition_penalty != 1:
        processors.append(_repetition_penalty(params.repetition_penalty, params.repetition_context_size))
    if params.presence_penalty != 0:
        processors.append(_presence_penalty(params.presence_penalty, params.presence_context_size))
    if params.frequency_penalty != 0:
        processors.append(_frequency_penalty(params.frequency_penalty, params.frequency_context_size))
    return processors


def _logit_bias(logit_bias: Mapping[int, float]) -> LogitsProcessor:
    tokens_with_bias = mx.array([int(token) for token in logit_bias])
    biases = mx.array([float(bias) for bias in logit_bias.values()])

    def add_bias(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.astype(mx.float32).at[:, tokens_with_bias].add(biases)

    add_bias.reads_context = False  # type: ignore[attr-defined]
    return add_bias


def _repetition_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    def repetition(seen: mx.array) -> mx.array:
        return mx.where(seen < 0, seen * penalty, seen / penalty)

    return _once_per_token(repetition, context_size)


def _presence_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    return _once_per_token(lambda seen: seen - penalty, context_size)


def _once_per_token(change: Callable[[mx.array], mx.array], context_size: int | None) -> LogitsProcessor:
    """Apply `change` to the logits of the tokens in the context."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        context = _last(tokens, context_size)
        if context.size == 0:
            return logits
        # All reads come before all writes, so a repeated token writes the same value again.
        index = mx.broadcast_to(context, (logits.shape[0], context.size))
        return mx.put_along_axis(logits, index, change(mx.take_along_axis(logits, index, axis=-1)), axis=-1)

    return process


def _frequency_penalty(penalty: float, context_size: int | None) -> LogitsProcessor:
    def frequency(tokens: mx.array, logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        context = _last(tokens, context_size)
        if context.size == 0:
            return logits
        # Counted apart: whole numbers add up exactly, the penalty many times over would not.
        counts = mx.zeros(logits.shape[-1]).at[context].add(1.0)
        return logits - penalty * counts

    return frequency


def _last(tokens: mx.array, size: int | None) -> mx.array:
    return tokens if size is None or size >= tokens.size else tokens[-size:]
