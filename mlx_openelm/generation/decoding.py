"""Decoding: `Decoder.prefill` takes the prompt in pieces, `Decoder.step` one token, `decode` is the loop around them.

Each gives the log-probabilities [1, vocab] of the token that follows, so greedy decoding by hand is:

    decoder = Decoder(model)
    logprobs = decoder.prefill(mx.array([ids]))
    while True:
        token = greedy(logprobs)
        logprobs = decoder.step(token)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from .. import backend
from ..cache import make_cache
from ..errors import RequestError, quote
from ..finite import not_finite
from ..model import OpenELM
from ..ops.layers import log_softmax
from .options import CacheOptions, cache_offset, cached_ids, check_lengths, prompt_ids, warn
from .sampling import LogitsProcessor, Sampler, greedy

# Free MLX's buffers now and then: lengths change with every token, so few are reused.
_CLEAR_EVERY = 256

Progress = Callable[[int, int], None]


class Decoder:
    """A model and the key-value caches of the tokens that it has seen, one cache per layer.

    Nothing here checks its arguments; `make_decoder` makes a checked decoder for one sequence.

    Args:
        cache: the caches to extend; by default empty ones, as `options` ask for.
        logits_processors: each maps (the context's ids [n], logits [1, vocab]) to new logits. They need a batch of one.
        context: the ids of what `cache` has seen, for the processors.
    """

    def __init__(
        self,
        model: OpenELM,
        cache: list[Any] | None = None,
        options: CacheOptions | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        context: Sequence[int] = (),
    ):
        self.model = model
        self.options = CacheOptions() if options is None else options
        self.cache = make_cache(len(model.layers), self.options.max_kv_size) if cache is None else cache
        self.logits_processors = logits_processors
        self.context = mx.array(list(context), mx.int32)

    def prefill(self, prompt: mx.array, step_size: int | None = None, progress: Progress | None = None) -> mx.array:
        """Extend the caches by a prompt [B, L]; returns the next token's log-probabilities [B, vocab].

        Only the caches are evaluated, piece by piece, except for the last piece: that one is left lazy, as in `step`.

        Args:
            step_size: tokens of a row in a piece; by default what suits the device.
            progress: called before each piece with the tokens of a row processed so far and in all.
        """
        step_size = step_size or backend.prefill_step_size()
        last = (prompt.shape[1] - 1) // step_size * step_size  # where the last piece begins
        for start in range(0, last + 1, step_size):
            if progress is not None:
                progress(start, prompt.shape[1])
            hidden_states = self.extend(prompt[:, start : start + step_size])
            if start < last:
                mx.eval([layer.state[:2] for layer in self.cache])
                mx.clear_cache()
        return self.logprobs(hidden_states)

    def step(self, tokens: mx.array) -> mx.array:
        """Extend the caches by one token per row, [B]; returns the next token's log-probabilities [B, vocab], lazy."""
        return self.logprobs(self.extend(tokens[:, None]))

    def extend(self, tokens: mx.array) -> mx.array:
        """Extend the caches by tokens [B, L]; returns their hidden states [B, L, model_dim], lazy."""
        if self.logits_processors:
            self.context = mx.concatenate([self.context, tokens[0]])
        hidden_states = self.model.hidden_states(tokens, self.cache)
        if self.options.kv_bits is not None:
            self._quantize_cache()
        return hidden_states

    def logprobs(self, hidden_states: mx.array) -> mx.array:
        """The log-probabilities [B, vocab] after the last of the hidden states [B, L, model_dim].

        They are natural logarithms, after the logits processors.
        """
        logits = self.model.logits(hidden_states[:, -1]).astype(mx.float32)  # [B, vocab]
        for process in self.logits_processors:
            logits = process(self.context, logits)
        return log_softmax(logits)

    def _quantize_cache(self) -> None:
        """Replace caches that have reached `quantized_kv_start` by quantized ones."""
        group_size, bits = self.options.group_size(self.model.config.head_dim), self.options.kv_bits
        for i, layer in enumerate(self.cache):
            if hasattr(layer, "to_quantized") and layer.offset >= self.options.quantized_kv_start:
                self.cache[i] = layer.to_quantized(group_size=group_size, bits=bits)


def generate_step(
    model: OpenELM,
    prompt: Sequence[int] | mx.array,
    *,
    max_tokens: int = 256,
    sampler: Sampler = greedy,
    logits_processors: Sequence[LogitsProcessor] = (),
    cache: list[Any] | None = None,
    prompt_cache_tokens: Sequence[int] | mx.array | None = None,
    options: CacheOptions | None = None,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, float]]:
    """Tokens after `prompt` with their log-probabilities (natural; after penalties and bias, before the filters).

    Args:
        prompt: token ids, at least one.
        max_tokens: how many at most; -1 goes on to the end of the context.
        logits_processors: each maps (the ids of the context [n], logits [1, vocab]) to new logits.
        cache: key-value caches, one per layer, which may already hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `cache` has seen, for `logits_processors` that look at them,
            such as penalties; without it they see only the prompt and what follows, and a warning says so.
        options: how keys and values are cached; a given cache must match them.
        prefill_step_size: prompt tokens processed at a time; by default what suits the device.
        progress: called with the prompt tokens processed so far and in all.

    Raises:
        RequestError: a bad value, a prompt that is empty or too long, a cache that does not fit; at the call, before
            anything is computed.
        OpenELMError: while iterating, the logits are not finite.
    """
    options = CacheOptions() if options is None else options
    if not isinstance(options, CacheOptions):
        raise RequestError(f"options must be CacheOptions or GenerationOptions, got {quote(options)}.")
    options.validate(model.config.vocab_size, model.config.head_dim)
    check_lengths(max_tokens, prefill_step_size)
    decoder, ids = make_decoder(
        model,
        prompt,
        options,
        cache=cache,
        prompt_cache_tokens=prompt_cache_tokens,
        logits_processors=logits_processors,
    )
    count = token_limit(model, decoder.cache, len(ids), max_tokens)
    steps = decode(decoder, ids, count, sampler=sampler, prefill_step_size=prefill_step_size, progress=progress)
    return ((token, logprob) for token, logprob, _ in steps)


def make_decoder(
    model: OpenELM,
    prompt: Any,
    options: CacheOptions,
    *,
    cache: list[Any] | None = None,
    prompt_cache_tokens: Any = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> tuple[Decoder, list[int]]:
    """A decoder for one sequence and the prompt's ids, both checked; arguments and errors as in `generate_step`."""
    past, context = 0, []
    if cache is not None:
        past = cache_offset(cache, len(model.layers))
        options.check_cache(cache)
    ids = prompt_ids(prompt, past, model.config)
    if prompt_cache_tokens is not None:
        context = cached_ids(prompt_cache_tokens, past, model.config)
    if past > len(context) and any(getattr(process, "reads_context", True) for process in logits_processors):
        warn(
            f"Penalties see only new tokens, not the {past} in the prompt cache; pass their ids as prompt_cache_tokens."
        )
    return Decoder(model, cache, options, logits_processors=logits_processors, context=context), ids


def token_limit(model: OpenELM, cache: Sequence[Any] | None, prompt_tokens: int, max_tokens: int) -> int:
    """How many tokens can follow: `max_tokens` (-1 for no limit), or fewer where the model's positions end.

    The last token needs no position of its own, since nothing is computed from it.
    """
    past = int(cache[0].offset) if cache else 0
    room = model.config.rope_max_length - past - prompt_tokens + 1
    return room if max_tokens < 0 else min(max_tokens, room)


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    count: int,
    *,
    sampler: Sampler = greedy,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, float, mx.array]]:
    """`count` tokens after `prompt`, each with its log-probability and those of all tokens, [vocab].

    The device computes the next token while the caller has the last one.

    Raises:
        OpenELMError: while iterating, the logits are not finite.
    """
    upcoming = _draw(decoder.prefill(mx.array([list(prompt)]), prefill_step_size, progress), sampler)
    for n in range(1, count + 1):
        token, logprob, logprobs = upcoming
        if n < count:
            upcoming = _draw(decoder.step(token), sampler)
        value, likelihood = int(token.item()), float(logprob.item())  # type: ignore[arg-type]
        if not math.isfinite(likelihood):  # one logit that is NaN or +inf makes every token's log-probability so
            raise not_finite(f"The logits for token {n} are", decoder.model, processed=bool(decoder.logits_processors))
        if n == 1 and progress is not None:
            progress(len(prompt), len(prompt))
        yield value, likelihood, logprobs[0]
        if n % _CLEAR_EVERY == 0:
            mx.clear_cache()


def _draw(logprobs: mx.array, sampler: Sampler) -> tuple[mx.array, mx.array, mx.array]:
    """A token [1], its log-probability [1, 1] and `logprobs` [1, vocab], which the device starts to compute."""
    token = sampler(logprobs)
    logprob = mx.take_along_axis(logprobs, token[:, None], axis=-1)
    mx.async_eval(token, logprob)
    return token, logprob, logprobs
