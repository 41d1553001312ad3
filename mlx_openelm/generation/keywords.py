"""The options of generation as keyword arguments: for type checkers, editors, `help`, and people who mistype them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

from ..errors import RequestError
from ..wording import did_you_mean
from .options import GenerationOptions


class GenerationKeywords(TypedDict, total=False):
    """The names and types in `GenerationOptions`, for type checkers and editors; a test compares the two."""

    temp: float
    top_p: float
    top_k: int
    min_p: float
    min_tokens_to_keep: int
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float | None
    repetition_context_size: int | None
    presence_penalty: float
    presence_context_size: int | None
    frequency_penalty: float
    frequency_context_size: int | None
    logit_bias: Mapping[int, float] | None
    max_kv_size: int | None
    kv_bits: int | None
    kv_group_size: int | None
    quantized_kv_start: int
    max_tokens: int
    seed: int | None
    stop: str | Sequence[str] | None
    echo: bool
    prefill_step_size: int | None
    top_logprobs: int
    json_schema: str | Mapping[str, Any] | None
    json_object: bool
    regex: str | None
    grammar: str | None
    choice: str | Sequence[str] | None


def list_options(function: Callable[..., Any]) -> None:
    """Let the signature of a function list the options in place of `**options`, with types and defaults."""
    signature = inspect.signature(function)
    types = {name: getattr(kind, "__forward_arg__", kind) for name, kind in GenerationKeywords.__annotations__.items()}
    keyword = inspect.Parameter.KEYWORD_ONLY
    options = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=types[field.name])
        for field in fields(GenerationOptions)
    ]
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]


def unknown_option(name: str, function: Callable[..., Any]) -> RequestError:
    """The error for a keyword argument that a function does not have; it suggests similar names."""
    hint = did_you_mean(name, inspect.signature(function).parameters) or f"help({function.__name__}) lists the options."
    return RequestError(f"{function.__name__} has no option {name}; {hint}")
