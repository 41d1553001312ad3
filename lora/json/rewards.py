"""Rewards of answers in JSON, for `mlx-openelm grpo`. They are called as TRL calls them."""

from __future__ import annotations

import json
import re

# The form of an answer, piece by piece.
FORM = (r"\{", r'"speaker"', r": ", r'"\w+"', r", ", r'"topic"', r": ", r'"\w+"', r"\}$")


def form(completions: list[str]) -> list[float]:
    """How much of the form the beginning of a completion has, from 0 to 1."""
    return [_pieces(text) / len(FORM) for text in completions]


def is_json(completions: list[str]) -> list[float]:
    """1 for an object with a speaker and a topic, both texts, and nothing else."""
    return [float(_answer(text) is not None) for text in completions]


def is_right(completions: list[str], speaker: list[str], topic: list[str]) -> list[float]:
    """Half for each of speaker and topic that is the one asked for; `speaker` and `topic` are columns of the data."""
    wanted = zip(completions, speaker, topic, strict=True)
    return [_share(_answer(text), {"speaker": name, "topic": what}) for text, name, what in wanted]


def _pieces(text: str) -> int:
    """The number of pieces of the form that a text begins with."""
    place = 0
    for number, piece in enumerate(FORM):
        found = re.compile(piece).match(text, place)
        if found is None:
            return number
        place = found.end()
    return len(FORM)


def _answer(text: str) -> dict[str, str] | None:
    """The object that a completion is; None if it is not what was asked for."""
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    is_asked = isinstance(answer, dict) and list(answer) == ["speaker", "topic"]
    return answer if is_asked and all(isinstance(value, str) and value for value in answer.values()) else None


def _share(answer: dict[str, str] | None, wanted: dict[str, str]) -> float:
    return 0.0 if answer is None else sum(answer[key] == value for key, value in wanted.items()) / len(wanted)
