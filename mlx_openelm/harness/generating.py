"""lm-eval's arguments of generation as the options of our engine."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import RequestError, quote

# The names that programs have for the number of new tokens; the first that is given counts.
_COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OPTIONS = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
# What changes nothing at these values.
_NEUTRAL = {"num_beams": 1, "early_stopping": False, "length_penalty": 1.0, "num_return_sequences": 1}


def options_of(arguments: Mapping[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """The options of a request.

    Args:
        arguments: `until` (a text or several), a number of new tokens under one of its names, `do_sample`,
            `temperature`, and options of ours. Without `do_sample` a temperature above 0 samples.
        max_gen_toks: the number of new tokens where none is given.

    Raises:
        RequestError: an argument that is not known, or has a wrong value.
    """
    rest = dict(arguments)
    until = rest.pop("until", None) or []
    counts = [rest.pop(name, None) for name in _COUNTS]
    count = next((_number("max_gen_toks", value, int) for value in counts if value is not None), max_gen_toks)
    samples, temp = rest.pop("do_sample", None), rest.pop("temperature", None)
    if samples is False or (samples is None and temp is None):
        temp = 0.0
    options: dict[str, Any] = {"max_tokens": count, "temp": 1.0}
    if temp is not None:
        options["temp"] = _number("temperature", temp, float)
    texts = [until] if isinstance(until, str) else until
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise RequestError(f"--gen-kwargs needs a text, or a list of texts, for until, got {quote(until)}.")
    options["stop"] = [text for text in texts if text]
    for name in _OPTIONS:
        if (value := rest.pop(name, None)) is not None:
            options[name] = value
    unknown = [name for name, value in rest.items() if name not in _NEUTRAL or value not in (None, _NEUTRAL[name])]
    if unknown:
        known = ", ".join(["until", _COUNTS[0], "do_sample", "temperature", *_OPTIONS])
        raise RequestError(f"--gen-kwargs has no argument {unknown[0]} that this model knows; known: {known}.")
    return options


def seeded_requests(
    requests: Iterable[tuple[str, Mapping[str, Any]]], seed: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Requests with a seed for each text that is sampled: independent of one another, and of the requests' order.

    A task that takes several samples for a question repeats its request. Where requests have a seed of their own, the
    first takes it, and the next ones those that follow.
    """
    seen: Counter[str] = Counter()
    for prompt, arguments in requests:
        if options_of(arguments, 1)["temp"] == 0:
            yield prompt, arguments
            continue
        request = json.dumps([prompt, arguments], sort_keys=True, default=str)
        repeat = seen[request]
        seen[request] += 1
        own = arguments.get("seed")
        if own is None:
            text = json.dumps([seed, request, repeat])
            own = int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=4).digest())
        elif isinstance(own, int):
            own += repeat
        yield prompt, {**arguments, "seed": own}


def _number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise RequestError(f"--gen-kwargs needs a number for {name}, got {quote(value)}.") from None
