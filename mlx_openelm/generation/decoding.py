"""Decoding, from a prompt to tokens: `Decoder`, requests, and the loop `decode`.

`Decoder.prefill` processes the prompt, `Decoder.step` one token; `decode` is the loop around them. Both methods give
the log-probabilities [1, vocab] of the next token, so greedy decoding by hand is:

    decoder = Decoder(model)
    logprobs = decoder.prefill(mx.array([ids]))
    while True:
        token = greedy(logprobs)
        logprobs = decoder.step(token)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from .. import backend, threads
from ..cache import make_cache, step_caches
from ..errors import RequestError, quote
from ..messages import warn
from ..model import OpenELM
from ..ops.layers import log_softmax
from ..text.tokenizer import Tokenizer
from .drawing import Step, draw, failed_draw, forced_step, listed, process_logits, warn_past_context
from .options import CONSTRAINTS, EMPTY_PROMPT, NOT_UTF8, PENALTIES, CacheOptions, GenerationOptions, token_ids
from .prompt_cache import cache_offset, check_cache, check_sizes
from .sampling import LogitsProcessor, Sampler, check_functions, greedy, make_key, make_logits_processors, make_sampler

if TYPE_CHECKING:
    from .constraints import Constraint

# Free MLX's buffers now and then: lengths change with every token, so few are reused.
CLEAR_EVERY = 256

Progress = Callable[[int, int], None]


@dataclass
class Request:
    """One text to generate, checked.

    `prompt` are its ids, `count` the number of tokens that can follow; the decoder's caches hold what precedes it.
    """

    decoder: Decoder
    prompt: list[int]
    count: int
    sampler: Sampler
    constraint: Constraint | None
    options: GenerationOptions


def make_request(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    options: GenerationOptions,
    *,
    prompt_cache: list[Any] | None = None,
    prompt_cache_tokens: Sequence[int] | mx.array | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    constraint: Constraint | None = None,
) -> Request:
    """A request from the arguments of `stream_generate`, which describes them and the errors.

    Args:
        constraint: what `make_constraint` makes of `options`; by default it is made here.
    """
    if threads.forked:
        raise RequestError(threads.FORKED)
    options.validate(model.config.vocab_size, model.config.head_dim)
    if prompt is None or isinstance(prompt, bytes | int | float):
        raise RequestError(f"The prompt must be text or a list of token ids, got {quote(prompt)}.")
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError(EMPTY_PROMPT)
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError(NOT_UTF8) from None
        is_rendered = prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer.encode(prompt, add_special_tokens=False) if is_rendered else tokenizer.encode(prompt)
    if sampler is not None or logits_processors is not None:
        sampler = check_functions(sampler, logits_processors)
    if sampler is not None:
        options.check_sampler()
    elif options.temp > 0:
        key = None if options.seed is None else make_key(options.seed)
        sampler = make_sampler(options, {tokenizer.bos_token_id, *tokenizer.eos_token_ids}, key)
    processors = list(logits_processors or ())
    if any(getattr(options, name) for name in PENALTIES):
        processors = [*make_logits_processors(options), *processors]
    decoder, ids, count = make_decoder(
        model,
        prompt,
        options.max_tokens,
        options,
        cache=prompt_cache,
        prompt_cache_tokens=prompt_cache_tokens,
        logits_processors=processors,
    )
    if constraint is None and any(getattr(options, name) not in (None, False) for name in CONSTRAINTS):
        from .constraints import make_constraint

        constraint = make_constraint(options, tokenizer, model.config.vocab_size)
    return Request(decoder, ids, count, sampler or greedy, constraint, options)


class Decoder:
    """A model and the key-value caches of the tokens that it has seen, one cache per layer.

    Nothing here checks its arguments; `make_decoder` makes a checked decoder for one sequence.

    Args:
        cache: the caches to extend; by default empty ones, as `options` ask for.
        logits_processors: each maps (the context's ids [n], logits [1, vocab]) to new logits. They need a batch of one.
        context: the ids of the tokens in `cache`, for the processors.
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
        self.model, self.logits_processors = model, logits_processors
        self.options = CacheOptions() if options is None else options
        count, window = model.config.num_transformer_layers, self.options.max_kv_size
        self.cache = make_cache(count, window) if cache is None else cache
        self.context = mx.array(list(context), mx.int32)

    def prefill(self, prompt: mx.array, step_size: int | None = None, progress: Progress | None = None) -> mx.array:
        """Extend the caches by a prompt [B, L]; returns the next token's log-probabilities [B, vocab].

        The prompt is processed in pieces, as `backend.prefill_step_size` cuts it. The caches are evaluated after each
        piece but the last, which is left lazy, as in `step`.

        Args:
            step_size: tokens of a row in a piece; by default what suits the device.
            progress: called before each piece with the tokens of a row processed so far and in total.
        """
        start, total = 0, prompt.shape[1]
        while True:
            if progress is not None:
                progress(start, total)
            end = start + backend.prefill_step_size(total - start, step_size)
            hidden_states = self.extend(prompt[:, start:end])
            if end == total:
                return self.logprobs(hidden_states)
            mx.eval([layer.state[:2] for layer in self.cache])
            mx.clear_cache()
            start = end

    def step(self, tokens: mx.array) -> mx.array:
        """Extend the caches by one token per row, [B]; returns the next token's log-probabilities [B, vocab], lazy."""
        return self.logprobs(self.extend(tokens[:, None]))

    def steps(self, tokens: mx.array) -> mx.array:
        """`step` by several tokens [L] of one sequence at once; returns the log-probabilities [1, vocab] after them."""
        return self.logprobs(self.extend(tokens[:, None], step_caches([self.cache], [tokens.size]))[-1:])

    def extend(self, tokens: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
        """Extend the caches by tokens [B, L]; returns their hidden states [B, L, model_dim], lazy.

        Args:
            cache: the caches as the model is given them, if not one sequence at a time.
        """
        if self.logits_processors:
            self.context = mx.concatenate([self.context, tokens.reshape(-1)])
        hidden_states = self.model.hidden_states(tokens, cache or self.cache)
        if self.options.kv_bits is not None:
            self.quantize_cache()
        return hidden_states

    def logprobs(self, hidden_states: mx.array) -> mx.array:
        """The log-probabilities [B, vocab] after the last of the hidden states [B, L, model_dim].

        They are natural logarithms, after the logits processors.
        """
        logits = self.model.logits(hidden_states[:, -1]).astype(mx.float32)  # [B, vocab]
        return log_softmax(process_logits(self.logits_processors, self.context, logits))

    def quantize_cache(self) -> None:
        """Replace caches that have reached `quantized_kv_start` with quantized ones, if the options ask for it."""
        group_size, bits = self.options.group_size(self.model.config.head_dim), self.options.kv_bits
        for i, layer in enumerate(self.cache):
            if hasattr(layer, "to_quantized") and layer.offset >= self.options.quantized_kv_start:
                self.cache[i] = layer.to_quantized(group_size=group_size, bits=bits)


def make_decoder(
    model: OpenELM,
    prompt: Any,
    max_tokens: int,
    options: CacheOptions,
    *,
    cache: list[Any] | None = None,
    prompt_cache_tokens: Any = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> tuple[Decoder, list[int], int]:
    """A decoder for one sequence, the prompt's ids, and the number of tokens that can follow; warns of long prompts.

    `max_tokens` and `options` are valid; the other arguments, and the errors, are those of `generate_step`.
    """
    config, past, context = model.config, 0, []
    if cache is not None:
        past = cache_offset(cache, len(model.layers))
        check_sizes(config, cache)
        check_cache(options, cache)
    ids = token_ids(prompt, config.vocab_size)
    if not ids:
        raise RequestError(EMPTY_PROMPT)
    total = past + len(ids)
    if total > config.rope_max_length:
        raise RequestError(
            f"The prompt is too long: {total} tokens, where the model's positions end at "
            f"{config.rope_max_length}; shorten it."
        )
    if total > config.max_context_length:
        warn(
            f"The prompt has {total} tokens, more than the {config.max_context_length} "
            "the model was trained on; expect worse text."
        )
    if prompt_cache_tokens is not None:
        context = token_ids(prompt_cache_tokens, config.vocab_size, "prompt_cache_tokens")
        if len(context) != past:
            raise RequestError(
                f"prompt_cache_tokens has {len(context)} ids, but the prompt cache has seen {past} tokens."
            )
    if past > len(context) and logits_processors:
        _warn_of_unseen(logits_processors, past, len(ids))
    # The last token needs no position, since nothing is computed from it.
    room = config.rope_max_length - total + 1
    decoder = Decoder(model, cache, options, logits_processors=logits_processors, context=context)
    return decoder, ids, room if max_tokens < 0 else min(max_tokens, room)


def _warn_of_unseen(logits_processors: Sequence[LogitsProcessor], past: int, count: int) -> None:
    """Warn that processors miss the ids of the `past` tokens in a cache; a prompt of `count` follows them."""
    unknown = [process for process in logits_processors if not hasattr(process, "context_size")]
    if any(process.context_size > count for process in logits_processors if process not in unknown):  # type: ignore[attr-defined]
        seen = "Penalties see"
    elif unknown:
        seen = "Logits processors are given"
    else:
        return
    warn(
        f"{seen} only new tokens, not the {past} in the prompt cache; pass their ids as prompt_cache_tokens "
        "(files of `mlx-openelm cache-prompt` have them)."
    )


def decode(
    decoder: Decoder,
    prompt: Sequence[int],
    count: int,
    *,
    sampler: Sampler = greedy,
    constraint: Constraint | None = None,
    top: int = 0,
    prefill_step_size: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """At most `count` tokens after `prompt`, with the log-probabilities of each, of the `top` likeliest, and of all.

    The device computes the next token while the caller has the last one. A constraint leaves tokens out and ends the
    text; tokens that it forces have a log-probability of 0 and no others, and a run of them is processed at once. The
    first token computed from more positions than the model was trained on brings a warning.

    Raises:
        OpenELMError: while iterating, the logits are not finite, or no token fits the constraint.
    """
    total = int(decoder.cache[0].offset) + len(prompt)
    forced = [] if constraint is None else constraint.opening[:count]
    prompt = [*prompt, *forced]
    following = decoder.prefill(mx.array([prompt]), prefill_step_size, progress)
    upcoming = None
    if constraint is None:
        upcoming = draw(following, sampler, top)
    elif len(forced) < count and not constraint.done:
        upcoming = draw(constraint.limit(following), sampler, top)
    ready = [forced_step(token, top) for token in forced]
    n = 0
    while True:
        for step in ready:
            n += 1
            if n == 1 and progress is not None:
                progress(len(prompt), len(prompt))
            if n > 1:
                warn_past_context(decoder.model, total + n - 2)
            yield step
            if n % CLEAR_EVERY == 0:
                mx.clear_cache()
        if upcoming is None:
            return
        before, (token, logprob, likeliest, logprobs), upcoming = following, upcoming, None
        if n + 1 < count:
            following = decoder.step(token)
            if constraint is None:
                upcoming = draw(following, sampler, top)
            else:
                mx.async_eval(following)  # the mask is found while the device works
        value, likelihood = int(token.item()), float(logprob.item())  # type: ignore[arg-type]
        if not math.isfinite(likelihood):
            raise failed_draw(decoder.model, n + 1, before, constraint, bool(decoder.logits_processors))
        ready = [(value, likelihood, listed(likeliest), logprobs[0])]
        if constraint is not None:
            forced = constraint.advance(value)[: count - n - 1]
            ready += [forced_step(token, top) for token in forced]
            if n + len(ready) < count and not constraint.done:
                if len(forced) >= backend.MANY_POSITIONS:
                    following = decoder.prefill(mx.array([forced]), prefill_step_size)
                elif forced:
                    following = decoder.steps(mx.array(forced))
                upcoming = draw(constraint.limit(following), sampler, top)
