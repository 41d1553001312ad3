"""The types and ranges of option values, shared by flags, YAML files and Python arguments."""

from __future__ import annotations

import sys
import types
import typing
from dataclasses import fields
from typing import Any

from ...errors import RequestError, quote
from ...wording import flag
from .source import Source, to_sources

# The ranges of options, by field: the smallest value, the largest, those that must be more than 0, those that must be
# less than 1.
_LEAST = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "max_seq_length": 2,  # a token and the one it predicts
    "seed": 0,
    "iters": 1,
    "decay_steps": 1,
    "min_learning_rate": 0,
    "warmup": 0,
    "warmup_init": 0,
    "weight_decay": 0,
    "beta1": 0,
    "beta2": 0,
    "momentum": 0,
    "z_loss": 0,
    "label_smoothing": 0,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "val_batches": -1,
    "early_stop": 1,
    "eval_tasks_every": 1,
    "eval_tasks_limit": 1,
    "save_every": 1,
    "keep_last": 1,
    "keep_every": 1,
    "test_batches": -1,
    "valid_fraction": 0,
    "num_layers": -1,
    "rank": 1,
    "dropout": 0,
    "sample_tokens": 1,
    "shuffle_buffer": 0,
    "num_workers": 0,
    "piece_words": 1,
    "min_characters": 0,
    "min_tokens": 0,
    "corenet_processes": 1,
    "batch_tokens": 1,
    "average_last": 2,
    "spike_window": 4,
    "max_prompt_length": 1,
    "cpo_alpha": 0,
    "simpo_gamma": 0,
    "desirable_weight": 0,
    "undesirable_weight": 0,
    "num_generations": 2,  # a single one has nothing to be compared with
    "num_generations_eval": 1,
    "max_completion_length": 1,
    "top_k": 0,
    "epsilon_high": 0,
    "num_iterations": 1,
    "beta": 0,
}
_MOST = {"rank": 1 << 20}  # more than any matrix has
_POSITIVE = (
    "epochs",
    "learning_rate",
    "eps",
    "max_grad_norm",
    "alpha",
    "scale",
    "embedding_learning_rate",
    "ema_decay",
    "skip_spikes",
    "delta",
)
_BELOW_ONE = ("beta1", "beta2", "momentum", "label_smoothing", "valid_fraction", "dropout", "ema_decay")


# By class: evaluating a hundred annotations takes milliseconds, each time that options are made or checked.
_field_types: dict[type, dict[str, Any]] = {}


def field_types(options: type) -> dict[str, Any]:
    """The type of every field, by name."""
    if options not in _field_types:
        hints = typing.get_type_hints(options)
        _field_types[options] = {field.name: hints[field.name] for field in fields(options)}
    return _field_types[options]


def conform(kind: Any, value: Any) -> Any:
    """`value` converted to the type of a field: 1e3 becomes a whole number, a list a tuple.

    Raises:
        ValueError: it has another type; the message says what was expected.
    """
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not types.NoneType)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        _expect(isinstance(value, bool), "true or false")
        return value
    if kind is int:
        _expect(number and value == value // 1, "a whole number")
        _expect(abs(value) < 1 << 64, "a whole number below 2**64")
        return int(value)
    if kind is float:
        _expect(number and abs(value) <= sys.float_info.max, "a number")
        return float(value)
    if kind is str:
        _expect(isinstance(value, str), "text")
        return value
    if kind == tuple[Source, ...]:
        return to_sources(value)
    (entry_kind, _) = typing.get_args(kind)
    expected = "texts" if entry_kind is str else "numbers"
    _expect(isinstance(value, list | tuple), f"a list of {expected}")
    try:
        return tuple(conform(entry_kind, entry) for entry in value)
    except ValueError:
        raise ValueError(f"a list of {expected}") from None


def check_range(field: str, value: Any) -> None:
    """Refuse a value outside the range of its option.

    Raises:
        RequestError: the message names the flag.
    """
    if field in _LEAST and value < _LEAST[field]:
        raise RequestError(f"{flag(field)} must be {_LEAST[field]} or more, got {value}.")
    if field in _MOST and value > _MOST[field]:
        raise RequestError(f"{flag(field)} must be {_MOST[field]} or less, got {quote(value)}.")
    if field in _POSITIVE and value <= 0:
        raise RequestError(f"{flag(field)} must be more than 0, got {value}.")
    if field in _BELOW_ONE and value >= 1:
        raise RequestError(f"{flag(field)} must be less than 1, got {value}.")


def _expect(fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(expected)
