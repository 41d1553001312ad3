"""Rewards of answers in JSON, for `mlx-openelm grpo`. They are called as TRL calls them."""

from __future__ import annotations

import json
import re
from typing import Any

# The form of an answer, piece by piece.
FORM = (r"\{", r'"speaker"', r": ", r'"\w+"', r", ", r'"line"', r": ", r'"[^"]+"', r"\}$")


def form(completions: list[str]) -> list[float]:
    """How much of the form the beginning of a completion has, from 0 to 1."""
    return [_pieces(text) / len(FORM) for text in completions]


def is_json(completions: list[str]) -> list[float]:
    """1 for an object with a speaker and a line, both texts, and nothing else."""
    return [float(_answer(text) is not None) for text in completions]


def right_speaker(completions: list[str], speaker: list[str]) -> list[float]:
    """1 if the speaker is the one who was asked; `speaker` is a column of the data."""
    answers = map(_answer, completions)
    return [
        float(answer is not None and answer["speaker"] == name) for answer, name in zip(answers, speaker, strict=True)
    ]


def _pieces(text: str) -> int:
    """The number of pieces of the form that a text begins with."""
    place = 0
    for number, piece in enumerate(FORM):
        found = re.compile(piece).match(text, place)
        if found is None:
            return number
        place = found.end()
    return len(FORM)


def _answer(text: str) -> dict[str, Any] | None:
    """The object that a completion is; None if it is not what was asked for."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    is_right = isinstance(answer, dict) and list(answer) == ["speaker", "line"]
    return answer if is_right and all(isinstance(value, str) and value for value in answer.values()) else None
