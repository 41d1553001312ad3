"""Text from a model: `generate` all at once, `stream_generate` piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import backend
from ..errors import RequestError
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .decoding import Decoder, decode, make_decoder, token_limit
from .options import GenerationOptions
from .sampling import Sampler, greedy, make_key, make_logits_processors, make_sampler
from .stopping import StopStrings


@dataclass(frozen=True)
class Piece:
    """One token of generated text.

    `text` holds whole characters only, so it may be empty; `logprob` is natural, after penalties and
    before filters; speeds are in tokens per second, `peak_memory` is in GB (1e9 bytes).
    """

    text: str
    token: int
    logprob: float
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None


def generate(model: OpenELM, tokenizer: Tokenizer, prompt: str | Sequence[int] | mx.array, **options: Any) -> str:
    """The text that follows `prompt`; arguments and errors as in `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    *,
    prompt_cache: list[Any] | None = None,
    prompt_cache_tokens: Sequence[int] | mx.array | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Yield a `Piece` for every generated token, the last one with its `finish_reason`: "stop" or "length".

    The pieces' texts join to exactly `tokenizer.decode` of the tokens before the end of the text.

    Args:
        prompt: text (BOS is put first), or token ids as they are.
        prompt_cache: key-value caches, one per layer, that hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `prompt_cache` has seen, for the penalties; without it they
            count only the prompt and what follows, and a warning says so.
        progress: called with the prompt tokens processed so far and in all.
        options: the fields of `GenerationOptions`.

    Raises:
        RequestError: an unknown option, a bad value, a prompt that is empty or too long, a cache that does not fit;
            at the call, before anything is computed.
        OpenELMError: while iterating, the model's logits are not finite.
    """
    unknown = options.keys() - GenerationOptions.__dataclass_fields__.keys()
    if unknown:
        raise RequestError(f"generate has no option {', '.join(sorted(unknown))}.")
    chosen = GenerationOptions(**options)
    chosen.validate(model.config.vocab_size, model.config.head_dim)
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("The prompt is empty; give some text with --prompt.")
        prompt = tokenizer.encode(prompt)
    sampler: Sampler = greedy
    if chosen.temp > 0:
        key = None if chosen.seed is None else make_key(chosen.seed)
        sampler = make_sampler(chosen, {tokenizer.bos_token_id, *tokenizer.eos_token_ids}, key)
    decoder, ids = make_decoder(
        model,
        prompt,
        chosen,
        cache=prompt_cache,
        prompt_cache_tokens=prompt_cache_tokens,
        logits_processors=make_logits_processors(chosen) if chosen.changes_logits else (),
    )
    return _pieces(tokenizer, decoder, ids, sampler, chosen, progress)


def _pieces(
    tokenizer: Tokenizer,
    decoder: Decoder,
    prompt: list[int],
    sampler: Sampler,
    options: GenerationOptions,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Piece]:
    stops = StopStrings(options.stop) if options.stop else None
    limit = token_limit(decoder.model, decoder.cache, len(prompt), options.max_tokens)
    steps = decode(
        decoder, prompt, limit, sampler=sampler, prefill_step_size=options.prefill_step_size, progress=progress
    )
    started = time.perf_counter()
    prompt_seconds = 0.0
    with backend.wired_limit():
        for n, (token, logprob, _) in enumerate(steps, 1):
            now = time.perf_counter()
            if n == 1:
                prompt_seconds, started = now - started, now
                text_decoder = tokenizer.streaming_decoder()
            text, stopped = "", token in tokenizer.eos_token_ids
            if not stopped:
                text = text_decoder.add(token)
                if stops is not None:
                    text, stopped = stops.add(text)
            finish_reason = "stop" if stopped else "length" if n == limit else None
            if finish_reason is not None:
                rest = text_decoder.finish()
                text += rest if stops is None else stops.add(rest)[0] + stops.finish()
            yield Piece(
                text,
                token,
                logprob,
                prompt_tokens=len(prompt),
                prompt_tps=len(prompt) / max(prompt_seconds, 1e-9),
                generation_tokens=n,
                # The first token belongs to the prompt's time, so speed counts from the second.
                generation_tps=(n - 1) / (now - started) if n > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                return
