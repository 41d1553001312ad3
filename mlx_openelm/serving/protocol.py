"""Requests: reading JSON, checking every key, and options for the engine.

Nothing is ignored: a key that is not known, or a value that is not supported, is an error that names it. A null, and a
value that asks for what happens anyway, are accepted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..errors import quote
from ..generation.grammars import is_grammar
from ..generation.options import BIAS_LIMIT
from ..inputs import kind_of
from .checks import (
    Check,
    boolean,
    choice,
    integer,
    mapping,
    max_tokens,
    number,
    only,
    read_fields,
    short_text,
    text,
    texts,
    wrong,
)
from .failures import APIError
from .options import ServeOptions

MAX_DEPTH = 64  # of nested JSON
MAX_N = 128


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body."""
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # UTF-8 that is not valid too
        raise APIError(f"The body is not valid JSON: {_short(error)}.") from None
    if not isinstance(values, dict):
        raise APIError(f"The body must be a JSON object, got {kind_of(values)}.")
    _check_depth(values)
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _short(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    if not isinstance(error, json.JSONDecodeError) and "digits" in str(error):  # Python's advice is not for clients
        return "a number has too many digits"
    return str(error)[:200]


def _too_deep() -> APIError:
    return APIError(f"The body is nested too deeply: more than {MAX_DEPTH} levels.")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _seed(name: str, value: Any) -> int:
    """Any 64 bits; negative numbers too, as other servers take them."""
    return int(integer(-(2**63), 2**64 - 1)(name, value)) % 2**64


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    biases = {}
    for key, bias in mapping(name, value).items():
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise APIError(f"{name} has the key {quote(key)}, which is not a token id.", param=name)
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= min(100.0, BIAS_LIMIT):
            raise wrong(f"{name} of token {key}", "a number from -100 to 100", bias, param=name)
        biases[int(key)] = float(bias)
    return biases


def _grammar(name: str, value: Any) -> str:
    """The text of a grammar, which never names a file."""
    if not isinstance(value, str) or not is_grammar(value):
        raise wrong(name, "a grammar in Lark, with a rule `start:`, or in GBNF, with a rule `root ::=`", value)
    return value


_FORMAT: dict[str, Check] = {
    "type": choice("text", "json_object", "json_schema"),
    "json_schema": mapping,
}
_SCHEMA: dict[str, Check] = {
    "name": short_text,
    "description": short_text,
    "schema": mapping,
    "strict": boolean,
}


def response_format(name: str, value: Any) -> dict[str, Any]:
    """What the text must be, as options of the engine."""
    given = read_fields(mapping(name, value), _FORMAT, f"{name}.")
    kind = given.get("type")
    if kind is None:
        raise APIError(f"{name}.type is missing: text, json_object or json_schema.", param=f"{name}.type")
    if kind == "json_schema":
        if "json_schema" not in given:
            raise APIError(f"{name}.json_schema is missing.", param=f"{name}.json_schema")
        return schema_options(f"{name}.json_schema", given["json_schema"])
    if "json_schema" in given:
        raise APIError(f"{name}.json_schema needs the type json_schema.", param=f"{name}.json_schema")
    return {"json_object": True} if kind == "json_object" else {}


def schema_options(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `{"name": ..., "schema": ...}`."""
    given = read_fields(value, _SCHEMA, f"{name}.")
    if "schema" not in given:
        raise APIError(f"{name}.schema is missing.", param=f"{name}.schema")
    return {"json_schema": given["schema"]}


# Keys that change the answer, with the option of the engine that each becomes.
SAMPLING: dict[str, tuple[str, Check]] = {
    "temperature": ("temp", number(0, 2)),
    "top_p": ("top_p", number(0, 1)),
    "presence_penalty": ("presence_penalty", number(-2, 2)),
    "frequency_penalty": ("frequency_penalty", number(-2, 2)),
    "logit_bias": ("logit_bias", _logit_bias),
    "seed": ("seed", _seed),
    "stop": ("stop", texts(16, 1000)),
    "response_format": ("response_format", response_format),
    # Beyond OpenAI's, under the names of mlx-lm and of this package.
    "top_k": ("top_k", integer(0)),
    "min_p": ("min_p", number(0, 1)),
    "min_tokens_to_keep": ("min_tokens_to_keep", integer(1)),
    "xtc_probability": ("xtc_probability", number(0, 1)),
    "xtc_threshold": ("xtc_threshold", number(0, 0.5)),
    "repetition_penalty": ("repetition_penalty", number(0.001, 1000)),
    "repetition_context_size": ("repetition_context_size", integer(1)),
    "presence_context_size": ("presence_context_size", integer(1)),
    "frequency_context_size": ("frequency_context_size", integer(1)),
    "regex": ("regex", text),
    "grammar": ("grammar", _grammar),
    "choice": ("choice", texts(1000)),
    "num_draft_tokens": ("num_draft_tokens", integer(0, 64)),
    "kv_bits": ("kv_bits", integer(2, 8)),
    "kv_group_size": ("kv_group_size", integer(32, 128)),
    "max_kv_size": ("max_kv_size", integer(1)),
}
# Keys that clients send about themselves, which change nothing here.
ABOUT: dict[str, Check] = {
    "user": short_text,
    "metadata": mapping,
    "store": boolean,
    "service_tier": short_text,
    "safety_identifier": short_text,
    "prompt_cache_key": short_text,
    "prompt_cache_retention": short_text,
}
STREAM_OPTIONS: dict[str, Check] = {"include_usage": boolean, "include_obfuscation": only(False)}


def stream_options(name: str, value: Any) -> dict[str, Any]:
    return read_fields(mapping(name, value), STREAM_OPTIONS, f"{name}.")


# What every request for texts may have.
COMMON: dict[str, Check] = {
    "model": short_text,
    "stream": boolean,
    "n": integer(1, MAX_N),
    "max_tokens": max_tokens(1),
    "stream_options": stream_options,
    **{key: check for key, (_, check) in SAMPLING.items()},
    **ABOUT,
}


def options_of(given: Mapping[str, Any], defaults: ServeOptions) -> dict[str, Any]:
    """The engine's options for the checked keys of a request."""
    options = defaults.for_requests()
    for key in ("max_tokens", "max_completion_tokens"):
        options["max_tokens"] = given.get(key, options["max_tokens"])
    for key, (name, _) in SAMPLING.items():
        if key in given:
            if key == "response_format":
                options |= given[key]
            else:
                options[name] = given[key]
    if not options.get("stop", True):
        del options["stop"]
    return options


def seeded(options: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The options of one of several texts: each has a seed of its own."""
    if options.get("seed") is None or not index:
        return dict(options)
    return {**options, "seed": (options["seed"] + index) % 2**64}


def finite(value: float) -> float:
    """A log-probability as JSON can have it."""
    return value if math.isfinite(value) else -9999.0
