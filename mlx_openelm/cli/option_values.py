"""The values of flags that are written in several ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..errors import RequestError, quote


def parse_logit_bias(given: tuple[str, ...]) -> dict[int, float] | None:
    """One mapping from any number of `ID=VALUE` and JSON objects; None if they are empty."""
    biases: dict[int, float] = {}
    for text in given:
        try:
            pairs = json.loads(text).items() if text.lstrip().startswith("{") else [text.split("=", 1)]
            biases.update({int(token): float(value) for token, value in pairs})
        except (ValueError, TypeError, OverflowError, RecursionError):
            raise RequestError(
                f"--logit-bias must be ID=VALUE or a JSON object of token ids and numbers, got {quote(text)}."
            ) from None
    return biases or None


def split_choices(given: tuple[str, ...]) -> list[str]:
    """The texts in any number of lists, separated by commas or in JSON."""
    choices: list[str] = []
    for text in given:
        try:
            choices += json.loads(text) if text.lstrip().startswith("[") else text.split(",")
        except (ValueError, RecursionError):
            raise RequestError(f"--choice must be a,b,c or a JSON list of texts, got {quote(text)}.") from None
    return choices


# What becomes of the values of such flags.
PARSERS: dict[str, Callable[[tuple[str, ...]], Any]] = {"logit_bias": parse_logit_bias, "choice": split_choices}
