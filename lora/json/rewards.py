"""Rewards of answers in JSON, for `mlx-openelm grpo`. They are called as TRL calls them."""

from __future__ import annotations

import json
from typing import Any


def is_json(completions: list[str]) -> list[float]:
    """1 for an object with a speaker and a line, both texts; half for any other JSON."""
    return [0.5 if found is None else 1.0 if found else 0.0 for found in map(_rating, completions)]


def right_speaker(completions: list[str], speaker: list[str]) -> list[float]:
    """1 if the speaker is the one who was asked; `speaker` is a column of the data."""
    answers = map(_read, completions)
    return [
        float(isinstance(answer, dict) and answer.get("speaker") == name)
        for answer, name in zip(answers, speaker, strict=True)
    ]


def _rating(text: str) -> bool | None:
    answer = _read(text)
    if answer is _NOT_JSON:
        return False
    has_texts = isinstance(answer, dict) and all(isinstance(value, str) and value for value in answer.values())
    return True if has_texts and list(answer) == ["speaker", "line"] else None


_NOT_JSON = object()


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return _NOT_JSON
