"""From a prompt to text, piece by piece: `stream_generate` and `generate`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import mlx.core as mx

from .. import backend
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .decoding import Progress, Request, decode, make_request
from .keywords import GenerationKeywords
from .options import GenerationOptions
from .piece import Piece
from .sampling import LogitsProcessor, Sampler

if TYPE_CHECKING:
    from .draft_model import DraftModel


def generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    verbose: bool = False,
    *,
    prompt_cache: list[Any] | None = None,
    prompt_cache_tokens: Sequence[int] | mx.array | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    progress: Progress | None = None,
    draft_model: OpenELM | DraftModel | None = None,
    **options: Unpack[GenerationKeywords],
) -> str:
    """The text that follows `prompt`; other arguments and errors as in `stream_generate`.

    `verbose` prints the text as it is generated, then the speed and the peak memory, as in mlx-lm.
    """
    pieces = stream_generate(
        model,
        tokenizer,
        prompt,
        prompt_cache=prompt_cache,
        prompt_cache_tokens=prompt_cache_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        progress=progress,
        draft_model=draft_model,
        **options,
    )
    if verbose:
        from .printing import printed

        pieces = printed(pieces)
    return "".join(piece.text for piece in pieces)


def stream_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | mx.array,
    *,
    prompt_cache: list[Any] | None = None,
    prompt_cache_tokens: Sequence[int] | mx.array | None = None,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    progress: Progress | None = None,
    draft_model: OpenELM | DraftModel | None = None,
    **options: Unpack[GenerationKeywords],
) -> Iterator[Piece]:
    """Yield a `Piece` for every generated token, the last one with its `finish_reason`: "stop" or "length".

    The pieces' texts join to exactly `tokenizer.decode` of the tokens before the end of the text; with `echo`, of the
    prompt and these.

    Args:
        prompt: text, or token ids as they are. BOS is put in front of a text; one that begins with it is a rendered
            chat, in which control tokens count.
        prompt_cache: key-value caches, one per layer, that hold what precedes the prompt; extended in place.
        prompt_cache_tokens: the ids of all tokens that `prompt_cache` has seen, for the penalties; without it they
            count only the prompt and what follows, and a warning says so.
        sampler: maps log-probabilities [1, vocab] to tokens [1], in place of `temp` and the filters.
        logits_processors: each maps (the ids of the context [n], logits [1, vocab]) to new logits [1, vocab]; they come
            after the bias and the penalties.
        progress: called with the prompt tokens processed so far and in total.
        draft_model: a smaller model with the same tokens; it proposes tokens that `model` checks several at a time.
            The text follows the same distribution, and is the same if it is greedy. A `DraftModel` learns from text to
            text how long drafting takes.
        options: the fields of `GenerationOptions`; help(GenerationOptions) describes them.

    Raises:
        RequestError: an unknown option, a bad value, a prompt that is empty or too long, a cache that does not fit;
            at the call, before anything is computed.
        OpenELMError: while iterating, the model's logits are not finite, or no token fits the constraint.
    """
    given: dict[str, Any] = {
        "prompt_cache": prompt_cache,
        "prompt_cache_tokens": prompt_cache_tokens,
        "sampler": sampler,
        "logits_processors": logits_processors,
    }
    if draft_model is not None or options.get("prompt_lookup") or options.get("num_draft_tokens"):
        from .drafted import drafted_pieces

        return drafted_pieces(model, tokenizer, prompt, draft_model, progress, **given, **options)
    request = make_request(model, tokenizer, prompt, GenerationOptions(**options), **given)
    return _pieces(tokenizer, request, progress)


def _pieces(tokenizer: Tokenizer, request: Request, progress: Progress | None) -> Iterator[Piece]:
    """The pieces of one text; nothing is computed before the first one is requested."""
    steps = decode(
        request.decoder,
        request.prompt,
        request.count,
        sampler=request.sampler,
        constraint=request.constraint,
        top=int(request.options.top_logprobs),
        prefill_step_size=request.options.prefill_step_size,
        progress=progress,
    )
    started = time.perf_counter()
    output = None
    with backend.wired_limit():
        for token, logprob, top_logprobs, _ in steps:
            if output is None:
                from .output import Output

                output = Output(
                    tokenizer,
                    request.prompt,
                    request.count,
                    request.options,
                    request.constraint,
                    time.perf_counter() - started,
                )
            piece = output.add(token, logprob, top_logprobs)
            yield piece
            if piece.finish_reason is not None:
                output.warn_if_cut()
                return
