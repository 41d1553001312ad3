"""A source of training text, as options name it: a path, or a path with a weight and the key of the text."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_EXPECTED = "a path, or a list of paths and of {path, weight, text_key}"


@dataclass(frozen=True)
class Source:
    """Text to train on.

    Args:
        path: a file, a folder, a pattern like `part-{000..127}.jsonl.zst`, or a data set on the hub.
        weight: the share of tokens from it, relative to the other sources' weights.
        text_key: the key, or the column, that holds the text; None is the run's.
    """

    path: str
    weight: float = 1.0
    text_key: str | None = None


def to_sources(value: Any) -> tuple[Source, ...]:
    """Sources from what a flag, a YAML file or a Python caller gives.

    Raises:
        ValueError: it is something else; the message says what was expected.
    """
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(map(_to_source, values))


def _to_source(value: Any) -> Source:
    if isinstance(value, Source):
        return value
    if isinstance(value, str | os.PathLike):
        return Source(os.fspath(value))
    if not isinstance(value, Mapping) or not {"path"} <= set(value) <= {"path", "weight", "text_key"}:
        raise ValueError(_EXPECTED)
    path, weight, text_key = value["path"], value.get("weight", 1.0), value.get("text_key")
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not isinstance(path, str | os.PathLike) or not isinstance(text_key, str | None):
        raise ValueError(_EXPECTED)
    if not is_number or not 0 < weight <= sys.float_info.max:
        raise ValueError(f"{_EXPECTED}, with a weight of more than 0")
    return Source(os.fspath(path), float(weight), text_key)
