"""Text from a model: `generate` all at once, `stream_generate` piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from .. import backend
from ..config import ModelConfig
from ..errors import RequestError
from ..model import OpenELM
from ..options import option
from ..text.tokenizer import Tokenizer
from .checking import check_lengths, token_ids
from .decoding import CacheOptions, generate_step, token_limit
from .sampling import SamplingParams, make_key, make_logits_processors, make_sampler, random_seed
from .stopping import StopStrings


@dataclass(frozen=True)
class GenerationOptions(SamplingParams, CacheOptions):
    """Everything `generate` can be told, once for Python and for the command line.

    - `max_tokens`: how many tokens at most; -1 goes on to the end of the context.
    - `seed`: the same seed gives the same text; None draws one.
    - `stop`: strings that end the text; they are not part of it.
    - `prefill_step_size`: prompt tokens processed at a time; None takes what suits the device.
    """

    max_tokens: int = option(256, "Maximum number of tokens; -1 continues to the end of the context.", flags=("-m",))
    seed: int | None = option(None, "The same seed gives the same text; by default a random one is drawn.")
    stop: str | Sequence[str] | None = option((), "End before this text; repeatable.")
    prefill_step_size: int | None = option(
        None, "Prompt tokens processed at a time; by default what suits the device.", group="Key-value cache"
    )

    def check(self, config: ModelConfig) -> None:
        """Raise a `RequestError` that names the flag if a value cannot be right for this model."""
        self.validate(config.vocab_size)
        super().check(config)
        check_lengths(self.max_tokens, self.prefill_step_size)
        if self.seed is not None:
            make_key(self.seed)
        StopStrings(self.stop)


@dataclass(frozen=True)
class Piece:
    """One token of generated text.

    `text` holds whole characters only, so it may be empty; `logprob` is natural, after penalties and
    before filters; speeds are tokens a second, `peak_memory` is in GB (1e9 bytes).
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
        prompt_cache: key-value caches, one a layer, that hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `prompt_cache` has seen, for the penalties; without it they
            count only the prompt and what follows, which a warning tells.
        progress: called with the prompt tokens processed so far and in all.
        options: the fields of `GenerationOptions`.

    Raises:
        RequestError: an unknown option, a value that cannot be right, an empty prompt, one that is too long, a cache
            that does not fit.
        OpenELMError: while iterating, the model's logits are not finite.
    """
    chosen = make_options(model, options)
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("The prompt is empty; give some text with --prompt.")
        prompt = tokenizer.encode(prompt)
    ids = token_ids(prompt, model.config.vocab_size)
    seed = random_seed() if chosen.seed is None else chosen.seed
    tokens = generate_step(
        model,
        ids,
        max_tokens=chosen.max_tokens,
        sampler=make_sampler(chosen, {tokenizer.bos_token_id, *tokenizer.eos_token_ids}, make_key(seed)),
        logits_processors=make_logits_processors(chosen),
        cache=prompt_cache,
        prompt_cache_tokens=prompt_cache_tokens,
        options=chosen,
        prefill_step_size=chosen.prefill_step_size,
        progress=progress,
    )
    return _pieces(model, tokenizer, tokens, len(ids), chosen, prompt_cache)


def generate(model: OpenELM, tokenizer: Tokenizer, prompt: str | Sequence[int] | mx.array, **options: Any) -> str:
    """The text that follows `prompt`; arguments and errors as `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(model, tokenizer, prompt, **options))


def make_options(model: OpenELM, options: dict[str, Any]) -> GenerationOptions:
    """Checked options for this model.

    Raises:
        RequestError: an unknown option, or a value that cannot be right.
    """
    unknown = options.keys() - GenerationOptions.__dataclass_fields__.keys()
    if unknown:
        raise RequestError(f"generate has no option {', '.join(sorted(unknown))}.")
    chosen = GenerationOptions(**options)
    chosen.check(model.config)
    return chosen


def _pieces(
    model: OpenELM,
    tokenizer: Tokenizer,
    tokens: Iterator[tuple[int, float]],
    prompt_tokens: int,
    options: GenerationOptions,
    cache: list[Any] | None,
) -> Iterator[Piece]:
    decoder, stops = tokenizer.streaming_decoder(), StopStrings(options.stop)
    limit = token_limit(model, cache, prompt_tokens, options.max_tokens)
    started = time.perf_counter()
    prompt_seconds = 0.0
    with backend.wired_limit():
        for n, (token, logprob) in enumerate(tokens, 1):
            now = time.perf_counter()
            if n == 1:
                prompt_seconds, started = now - started, now
            text, finish_reason = "", None
            if token in tokenizer.eos_token_ids:
                finish_reason = "stop"
            else:
                text, stopped = stops.add(decoder.add(token))
                finish_reason = "stop" if stopped else "length" if n == limit else None
            if finish_reason is not None:
                rest, _ = stops.add(decoder.finish())
                text += rest + stops.finish()
            yield Piece(
                text,
                token,
                logprob,
                prompt_tokens=prompt_tokens,
                prompt_tps=prompt_tokens / max(prompt_seconds, 1e-9),
                generation_tokens=n,
                # The first token belongs to the prompt's time, so speed counts from the second.
                generation_tps=(n - 1) / (now - started) if n > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                return
