"""The decoding loop: prompt in pieces, then a token at a time, the next one computed while the last is delivered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import backend
from ..cache import SMALLEST_WINDOW, make_cache
from ..config import ModelConfig
from ..errors import RequestError, quote
from ..finite import not_finite
from ..model import OpenELM
from ..ops.layers import log_softmax
from ..options import option
from .checking import cache_offset, cached_ids, check_lengths, check_number, prompt_ids, warn
from .sampling import LogitsProcessor, Sampler, greedy

# Free MLX's buffers now and then, as lengths change with every token.
_CLEAR_EVERY = 256


@dataclass(frozen=True)
class CacheOptions:
    """How the past is kept.

    - `max_kv_size`: hold at most this many positions, the first 4 and the latest; None holds all.
    - `kv_bits`, `kv_group_size`: keep keys and values in fewer bits, from position `quantized_kv_start` on;
      the group size is head_dim up to 64 unless told.
    """

    max_kv_size: int | None = option(
        None, "Keep at most this many positions, the first 4 and the latest.", group="Key-value cache"
    )
    kv_bits: int | None = option(
        None, "Quantize keys and values to this many bits.", group="Key-value cache", metavar="2|3|4|5|6|8"
    )
    kv_group_size: int | None = option(
        None, "Elements that share a scale.", group="Key-value cache", metavar="32|64|128"
    )
    quantized_kv_start: int = option(0, "First position that is quantized.", group="Key-value cache")

    def check(self, config: ModelConfig) -> None:
        """Raise a `RequestError` that names the flag if a value cannot be right for this model."""
        check_number("--quantized-kv-start", self.quantized_kv_start, 0, math.inf, "0 or more", kind=int)
        if self.max_kv_size is not None:
            wanted = f"{SMALLEST_WINDOW} or more"
            check_number("--max-kv-size", self.max_kv_size, SMALLEST_WINDOW, math.inf, wanted, kind=int)
        if self.kv_bits is None:
            if self.kv_group_size is not None:
                raise RequestError("--kv-group-size needs --kv-bits.")
            return
        if self.max_kv_size is not None:
            raise RequestError("--kv-bits cannot be combined with --max-kv-size.")
        if type(self.kv_bits) is not int or self.kv_bits not in (2, 3, 4, 5, 6, 8):
            raise RequestError(f"--kv-bits must be 2, 3, 4, 5, 6 or 8, got {self.kv_bits}.")
        group_size = self.group_size(config.head_dim)
        if type(group_size) is not int or group_size not in (32, 64, 128) or config.head_dim % group_size:
            raise RequestError(
                f"--kv-group-size must be 32, 64 or 128 and divide head_dim, {config.head_dim}; got {group_size}."
            )

    def check_cache(self, cache: Sequence[Any]) -> None:
        """Raise a `RequestError` if caches that are given are not kept as these options ask for."""
        for layer in cache:
            kind = type(layer).__name__
            if self.max_kv_size is not None and getattr(layer, "max_size", None) != self.max_kv_size:
                raise RequestError(
                    f"--max-kv-size {self.max_kv_size} is for new caches, and the prompt cache, a {kind}, was not made "
                    "with it; leave it out."
                )
            if self.kv_bits is None:
                continue
            if hasattr(layer, "bits"):
                if (layer.bits, layer.group_size) != (self.kv_bits, self.kv_group_size or layer.group_size):
                    raise RequestError(
                        f"The prompt cache has {layer.bits} bits in groups of {layer.group_size}, other than --kv-bits "
                        "and --kv-group-size ask for; leave them out."
                    )
            elif hasattr(layer, "max_size") or not hasattr(layer, "to_quantized"):
                raise RequestError(f"--kv-bits cannot quantize the prompt cache, a {kind}; leave it out.")

    def group_size(self, head_dim: int) -> int:
        return min(64, head_dim) if self.kv_group_size is None else self.kv_group_size


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
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, float]]:
    """Tokens after `prompt` with their log-probabilities (natural; after penalties and bias, before the filters).

    Args:
        prompt: token ids, at least one.
        max_tokens: how many at most; -1 goes on to the end of the context.
        logits_processors: each maps (the ids of the context [n], logits [1, vocab]) to new logits.
        cache: key-value caches, one a layer, that may already hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `cache` has seen, for `logits_processors` that look at them,
            such as penalties; without it they see only the prompt and what follows, which a warning tells.
        options: how the past is kept; a cache that is given must suit them.
        prefill_step_size: prompt tokens processed at a time; by default what suits the device.
        progress: called with the prompt tokens processed so far and in all.

    Raises:
        RequestError: a value that cannot be right, a prompt that is empty or too long, a cache that does not fit;
            at the call, before anything is computed.
        OpenELMError: while iterating, the logits are not finite.
    """
    options = CacheOptions() if options is None else options
    if not isinstance(options, CacheOptions):
        raise RequestError(f"options must be CacheOptions or GenerationOptions, got {quote(options)}.")
    options.check(model.config)
    check_lengths(max_tokens, prefill_step_size)
    past = 0
    if cache is None:
        cache = make_cache(len(model.layers), options.max_kv_size)
    else:
        past = cache_offset(cache, len(model.layers))
        options.check_cache(cache)
    ids = prompt_ids(prompt, past, model.config)
    held = [] if prompt_cache_tokens is None else cached_ids(prompt_cache_tokens, past, model.config)
    if past > len(held) and any(getattr(process, "reads_context", True) for process in logits_processors):
        warn(
            f"Penalties see only new tokens, not the {past} in the prompt cache; pass their ids as prompt_cache_tokens."
        )
    step_size = prefill_step_size or backend.prefill_step_size()
    return _decode(model, ids, held, max_tokens, sampler, logits_processors, cache, options, step_size, progress)


def _decode(
    model: OpenELM,
    prompt: list[int],
    held: list[int],
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor],
    cache: list[Any],
    options: CacheOptions,
    step_size: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, float]]:
    """`generate_step` once its arguments are checked; `held` are the ids of what the cache holds, as far as known."""
    count = token_limit(model, cache, len(prompt), max_tokens)
    pending = mx.array(prompt)
    context = mx.array(held + prompt) if held else pending

    def step(tokens: mx.array) -> tuple[mx.array, mx.array]:
        """The next token [1] and its log-probability [1], unevaluated."""
        hidden_states = model.hidden_states(tokens[None], cache)
        _quantize(cache, options, model.config.head_dim)
        logits = model.logits(hidden_states[:, -1]).astype(mx.float32)
        for processor in logits_processors:
            logits = processor(context, logits)
        logprobs = log_softmax(logits)
        token = sampler(logprobs)
        return token, mx.take_along_axis(logprobs, token[:, None], axis=-1)

    done = 0
    if progress is not None:
        progress(0, len(prompt))
    while len(prompt) - done > step_size:
        # Only the cache is evaluated: nothing computes logits that nobody reads.
        model.hidden_states(pending[None, done : done + step_size], cache)
        _quantize(cache, options, model.config.head_dim)
        mx.eval([c.state[:2] for c in cache])
        mx.clear_cache()
        done += step_size
        if progress is not None:
            progress(done, len(prompt))

    upcoming = step(pending[done:])
    mx.async_eval(*upcoming)
    for n in range(1, count + 1):
        token, logprob = upcoming
        if n < count:
            if logits_processors:
                context = mx.concatenate([context, token])
            upcoming = step(token)
            mx.async_eval(*upcoming)
        value, likelihood = int(token.item()), float(logprob.item())  # type: ignore[arg-type]
        if not math.isfinite(likelihood):  # one logit that is NaN or +inf makes that of every token so
            raise not_finite(f"The logits for token {n} are", model, processed=bool(logits_processors))
        if n == 1 and progress is not None:
            progress(len(prompt), len(prompt))
        yield value, likelihood
        if n % _CLEAR_EVERY == 0:
            mx.clear_cache()


def token_limit(model: OpenELM, cache: Sequence[Any] | None, prompt_tokens: int, max_tokens: int) -> int:
    """How many tokens can follow: `max_tokens` (-1 for no limit), as far as the model's positions reach.

    The last token needs no position of its own, since nothing is computed from it.
    """
    past = int(cache[0].offset) if cache else 0
    room = model.config.rope_max_length - past - prompt_tokens + 1
    return room if max_tokens < 0 else min(max_tokens, room)


def _quantize(cache: list[Any], options: CacheOptions, head_dim: int) -> None:
    """Turn caches that have reached `quantized_kv_start` into quantized ones, in place."""
    if options.kv_bits is None:
        return
    for i, layer in enumerate(cache):
        if hasattr(layer, "to_quantized") and layer.offset >= options.quantized_kv_start:
            cache[i] = layer.to_quantized(group_size=options.group_size(head_dim), bits=options.kv_bits)
