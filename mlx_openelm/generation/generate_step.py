"""Token by token from ids, with the arguments of mlx-lm's function of the same name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..errors import RequestError, quote
from ..model import OpenELM
from .decoding import Progress, decode, make_decoder
from .options import CacheOptions, GenerationOptions
from .sampling import LogitsProcessor, Sampler, check_functions, greedy


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
        max_tokens: the maximum number of tokens; -1 continues to the end of the context.
        logits_processors: each maps (the ids of the context [n], logits [1, vocab]) to new logits.
        cache: key-value caches, one per layer, which may already hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `cache` has seen, for `logits_processors` that read them, such
            as penalties; without it they see only the prompt and what follows, and a warning says so.
        options: how keys and values are cached; a given cache must match them.
        prefill_step_size: prompt tokens processed at a time; by default what suits the device.
        progress: called with the prompt tokens processed so far and in total.

    Raises:
        RequestError: a bad value, a prompt that is empty or too long, a cache that does not fit; at the call, before
            anything is computed.
        OpenELMError: while iterating, the logits are not finite.
    """
    options = CacheOptions() if options is None else options
    if not isinstance(options, CacheOptions):
        raise RequestError(f"options must be CacheOptions or GenerationOptions, got {quote(options)}.")
    options.validate(model.config.vocab_size, model.config.head_dim)
    GenerationOptions(max_tokens=max_tokens, prefill_step_size=prefill_step_size).validate()
    sampler = check_functions(sampler, logits_processors) or greedy
    decoder, ids, count = make_decoder(
        model,
        prompt,
        max_tokens,
        options,
        cache=cache,
        prompt_cache_tokens=prompt_cache_tokens,
        logits_processors=logits_processors,
    )
    steps = decode(decoder, ids, count, sampler=sampler, prefill_step_size=prefill_step_size, progress=progress)
    return ((token, logprob) for token, logprob, *_ in steps)
