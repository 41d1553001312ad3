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
    prompt_lookup: bool
    num_draft_tokens: int | None
    json_schema: str | Mapping[str, Any] | None
    json_object: bool
    regex: str | None
    grammar: str | None
    choice: str | Sequence[str] | None


class BatchKeywords(TypedDict, total=False):
    """The same for `batch_generate`: one value for all prompts, or a list with a value per prompt."""

    temp: float | Sequence[float]
    top_p: float | Sequence[float]
    top_k: int | Sequence[int]
    min_p: float | Sequence[float]
    min_tokens_to_keep: int | Sequence[int]
    xtc_probability: float | Sequence[float]
    xtc_threshold: float | Sequence[float]
    repetition_penalty: float | Sequence[float | None] | None
    repetition_context_size: int | Sequence[int | None] | None
    presence_penalty: float | Sequence[float]
    presence_context_size: int | Sequence[int | None] | None
    frequency_penalty: float | Sequence[float]
    frequency_context_size: int | Sequence[int | None] | None
    logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None
    max_kv_size: int | Sequence[int | None] | None
    kv_bits: int | Sequence[int | None] | None
    kv_group_size: int | Sequence[int | None] | None
    quantized_kv_start: int | Sequence[int]
    max_tokens: int | Sequence[int]
    seed: int | Sequence[int | None] | None
    stop: str | Sequence[str] | Sequence[str | Sequence[str] | None] | None
    echo: bool | Sequence[bool]
    prefill_step_size: int | Sequence[int | None] | None
    top_logprobs: int | Sequence[int]
    prompt_lookup: bool | Sequence[bool]
    num_draft_tokens: int | Sequence[int | None] | None
    json_schema: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any] | None] | None
    json_object: bool | Sequence[bool]
    regex: str | Sequence[str | None] | None
    grammar: str | Sequence[str | None] | None
    choice: str | Sequence[str] | Sequence[str | Sequence[str] | None] | None
