"""What decoding is asked for, checked before anything is computed; errors name the command's flags."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import mlx.core as mx

from ..config import ModelConfig
from ..errors import RequestError, quote

_PACKAGE = __name__.partition(".")[0]


def check_number(flag: str, value: object, low: float, high: float, wanted: str, kind: type = Real) -> None:
    """Refuse bools, types other than `kind`, what is not in [low, high], and NaN (no comparison holds)."""
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{flag} must be {wanted}, got {value}")


def check_lengths(max_tokens: Any, prefill_step_size: Any) -> None:
    """Raise a `RequestError` if `max_tokens` is not -1 or 1 and more, or `prefill_step_size` not None or 1 and more."""
    wanted = "1 or more, or -1 for no limit"
    check_number("--max-tokens", max_tokens, -1, math.inf, wanted, kind=Integral)
    if max_tokens == 0:
        raise RequestError(f"--max-tokens must be {wanted}, got 0")
    if prefill_step_size is not None:
        check_number("--prefill-step-size", prefill_step_size, 1, math.inf, "1 or more", kind=Integral)


def token_ids(ids: Any, vocab_size: int, name: str = "The prompt") -> list[int]:
    """Token ids, given as a sequence or an array of one dimension, as a list.

    Raises:
        RequestError: they are anything else, or not in the vocabulary.
    """
    values: Any = ids.tolist() if isinstance(ids, mx.array) else ids
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise RequestError(f"{name} must be a list of token ids, got {quote(values)}.")
    values = list(values)
    for token in values:
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise RequestError(
                f"{name} must be a flat list of token ids, whole numbers; got {quote(token)} among them."
            )
        if not 0 <= int(token) < vocab_size:
            raise RequestError(f"{name} has the token id {quote(token)}; the vocabulary ends at {vocab_size - 1}.")
    return [int(token) for token in values]


def prompt_ids(prompt: Any, past: int, config: ModelConfig) -> list[int]:
    """The token ids of a prompt that follows `past` others, checked; beyond the trained length with a warning.

    Raises:
        RequestError: they are no ids, none at all, or more than the model has positions for.
    """
    ids = token_ids(prompt, config.vocab_size)
    if not ids:
        raise RequestError("The prompt is empty; give at least one token.")
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
    return ids


def cached_ids(ids: Any, past: int, config: ModelConfig) -> list[int]:
    """The ids of the `past` tokens that a cache has seen, checked.

    Raises:
        RequestError: they are no ids, or not as many as the cache has seen.
    """
    known = token_ids(ids, config.vocab_size, "prompt_cache_tokens")
    if len(known) != past:
        raise RequestError(f"prompt_cache_tokens has {len(known)} ids, and the prompt cache has seen {past} tokens.")
    return known


def cache_offset(cache: Sequence[Any], num_layers: int) -> int:
    """How many tokens the caches of one sequence have seen.

    Raises:
        RequestError: they are not one for each layer, no key-value caches, not of one sequence, or disagree.
    """
    if len(cache) != num_layers:
        raise RequestError(f"The prompt cache is for {len(cache)} layers, and the model has {num_layers}.")
    for layer in cache:
        if not hasattr(layer, "update_and_fetch") or not hasattr(layer, "offset"):
            raise RequestError(f"The prompt cache has a {type(layer).__name__}, which holds no keys and values.")
        if isinstance(layer.offset, mx.array) and layer.offset.size != 1:
            raise RequestError(f"The prompt cache holds {layer.offset.size} sequences; one can be continued at a time.")
    offsets = {int(layer.offset) for layer in cache}
    if len(offsets) > 1:
        raise RequestError(f"The layers of the prompt cache have seen {min(offsets)} to {max(offsets)} tokens.")
    return max(0, offsets.pop())  # below 0 while a row of a batch is still padding


def warn(message: str) -> None:
    """A warning that points at the line outside this package that asked for it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
