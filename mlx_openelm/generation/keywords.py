"""The options of generation as keyword arguments, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


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
