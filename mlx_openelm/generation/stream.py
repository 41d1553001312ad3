"""Text from a model: `generate` all at once, `stream_generate` piece by piece."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import mlx.core as mx

from .. import backend
from ..errors import RequestError
from ..model import OpenELM
from ..tokenizer import Tokenizer
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

    max_tokens: int = 256
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    prefill_step_size: int | None = None


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
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[Piece]:
    """Yield a `Piece` for every generated token, the last one with its `finish_reason`: "stop" or "length".

    The pieces' texts join to exactly `tokenizer.decode` of the tokens before the end of the text.

    Args:
        prompt: text (BOS is put first), or token ids as they are.
        prompt_cache: key-value caches, one a layer, that hold what precedes the prompt; extended in place.
        progress: called with the prompt tokens processed so far and in all.
        options: the fields of `GenerationOptions`.

    Raises:
        RequestError: an unknown option, a value that cannot be right, an empty prompt, one that is too long.
        OpenELMError: while iterating, the model's logits are not finite.
    """
    chosen = make_options(model, options)
    ids = _prompt_ids(model, tokenizer, prompt, sum(int(c.offset) for c in (prompt_cache or [])[:1]))
    return _pieces(model, tokenizer, ids, chosen, prompt_cache, progress)


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
    SamplingParams.validate(chosen, model.config.vocab_size)
    CacheOptions.validate(chosen, model.config.head_dim)
    if type(chosen.max_tokens) is not int or chosen.max_tokens < -1 or chosen.max_tokens == 0:
        raise RequestError(f"--max-tokens must be 1 or more, or -1 for no limit, got {chosen.max_tokens}.")
    if chosen.prefill_step_size is not None and (
        type(chosen.prefill_step_size) is not int or chosen.prefill_step_size < 1
    ):
        raise RequestError(f"--prefill-step-size must be 1 or more, got {chosen.prefill_step_size}.")
    if chosen.seed is not None:
        make_key(chosen.seed)
    StopStrings(chosen.stop)
    return chosen


def _prompt_ids(model: OpenELM, tokenizer: Tokenizer, prompt: str | Sequence[int] | mx.array, past: int) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise RequestError("The prompt is empty; give some text with --prompt.")
        ids = tokenizer.encode(prompt)
    else:
        values = prompt.tolist() if isinstance(prompt, mx.array) else prompt
        if not isinstance(values, Iterable) or not all(map(_is_whole, values)):
            raise RequestError("The prompt must be text or a list of token ids.")
        ids = [int(token) for token in values]  # type: ignore[arg-type]
    if not ids:
        raise RequestError("The prompt is empty; give at least one token.")
    config = model.config
    if not all(0 <= token < config.vocab_size for token in ids):
        raise RequestError(f"The prompt has token ids outside the vocabulary of {config.vocab_size}.")
    if past + len(ids) > config.rope_max_length:
        raise RequestError(
            f"The prompt is too long: {past + len(ids)} tokens, where the model's positions end at "
            f"{config.rope_max_length}; shorten it."
        )
    if past + len(ids) > config.max_context_length:
        warnings.warn(
            f"The prompt has {past + len(ids)} tokens, more than the {config.max_context_length} "
            "the model was trained on; expect worse text.",
            stacklevel=4,
        )
    return ids


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pieces(
    model: OpenELM,
    tokenizer: Tokenizer,
    ids: list[int],
    options: GenerationOptions,
    cache: list[Any] | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Piece]:
    seed = random_seed() if options.seed is None else options.seed
    special = {tokenizer.bos_token_id, *tokenizer.eos_token_ids}
    sampler = make_sampler(options, special, make_key(seed))
    decoder, stops = tokenizer.streaming_decoder(), StopStrings(options.stop)
    limit = token_limit(model, cache, len(ids), options.max_tokens)
    started = time.perf_counter()
    prompt_seconds = 0.0
    with backend.wired_limit():
        tokens = generate_step(
            model,
            ids,
            max_tokens=options.max_tokens,
            sampler=sampler,
            logits_processors=make_logits_processors(options),
            cache=cache,
            options=options,
            prefill_step_size=options.prefill_step_size,
            progress=progress,
        )
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
                prompt_tokens=len(ids),
                prompt_tps=len(ids) / max(prompt_seconds, 1e-9),
                generation_tokens=n,
                # The first token belongs to the prompt's time, so speed counts from the second.
                generation_tps=(n - 1) / (now - started) if n > 1 else 0.0,
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                return
