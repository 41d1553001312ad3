"""The arguments of the public functions and classes.

Wrong names get a suggestion, and things of another kind than a model, options or a path a reason; signatures list
options.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from . import suggestions, threads
from .errors import RequestError, quote

# The types of what `load` gives, which this module must not import.
_LOADED = ("OpenELM", "Tokenizer")
# The type of arguments that are a path or a name, and the end of the type of those that may be left out.
_PATH, _OPTIONAL = "str | Path", " | None"

Check = Callable[[Any], Any]


class KeywordError(RequestError, TypeError):
    """A keyword argument that a function does not have; a `TypeError` too, as Python raises for it."""


def checked(value: Any, options: type | None = None) -> Any:
    """A public function or class that answers an unknown keyword argument with a `KeywordError`, before any work.

    Args:
        options: the dataclass whose fields the function takes as `**options`; the signature lists them, for `help`
            and editors.
    """
    if not isinstance(value, type):
        signature = _signature(value, options)
        call = _checked(value, value.__name__, signature)
        call.__module__ = __package__ or ""  # where it is public, and where pickle finds it
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call
    if "__init__" in vars(value):  # wrapped in place, since a class is compared, subclassed and pickled
        value.__init__ = _checked(value.__init__, value.__name__, inspect.signature(value))  # type: ignore[misc]
    return value


def _checked(function: Callable[..., Any], name: str, signature: inspect.Signature) -> Callable[..., Any]:
    known = frozenset(signature.parameters)
    own = inspect.signature(function).parameters.values()
    positional = [item.name for item in own if item.kind is not inspect.Parameter.KEYWORD_ONLY]
    checks = _checks(function)

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if not known.issuperset(keywords):
            keywords = {
                word: value
                for word, value in keywords.items()
                if word in known or not suggestions.asks_for_nothing(word, value)
            }
            if (wrong := next((word for word in keywords if word not in known), None)) is not None:
                raise KeywordError(suggestions.unknown_keyword(name, wrong, {"": known, **_options_of(function)}))
        threads.note()
        if checks:
            rest = args[len(positional) :]  # too many, as Python will say
            args = *(checks.get(word, _any)(value) for word, value in zip(positional, args, strict=False)), *rest
            keywords = {word: checks.get(word, _any)(value) for word, value in keywords.items()}
        return function(*args, **keywords)

    return call


def _checks(function: Callable[..., Any]) -> dict[str, Check]:
    """The checks of arguments, by name: each returns the argument, or raises a `RequestError`."""
    found: dict[str, Check] = {}
    for name, annotation in function.__annotations__.items():
        required = str(annotation).removesuffix(_OPTIONAL)
        is_optional = required != annotation
        kind = function.__globals__.get(required)
        if required == _PATH:
            found[name] = functools.partial(_path, name, is_optional)
        elif isinstance(kind, type) and (is_dataclass(kind) or not is_optional):
            found[name] = functools.partial(_instance, name, is_optional, kind)
    return found


def _any(value: Any) -> Any:
    return value


def _path(name: str, is_optional: bool, value: Any) -> str | Path | None:
    """A name, or a path, of any class, as a `Path`."""
    if isinstance(value, str) or (is_optional and value is None):
        return value
    if isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
        return Path(path)
    raise RequestError(f"{name} must be a name or a path, got {quote(value)}.")


def _instance(name: str, is_optional: bool, kind: type, value: Any) -> Any:
    """An instance of a class."""
    if isinstance(value, kind) or (is_optional and value is None):
        return value
    if kind.__name__ not in _LOADED:
        raise RequestError(f"{name} must be {kind.__name__}, got {quote(value)}.")
    given, source = "its name", repr(str(value))
    if not isinstance(value, str | Path):
        given, source = _type_name(value), "name"
    raise RequestError(f"{name} must be a loaded {name}, not {given}: model, tokenizer = load({source}).")


def _type_name(value: Any) -> str:
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _signature(function: Callable[..., Any], options: type | None) -> inspect.Signature:
    """The signature, with the fields of `options`, their types and defaults in place of `**options`."""
    signature = inspect.signature(function)
    if options is None:
        return signature
    types = get_type_hints(options)  # without the help of the flags
    keyword = inspect.Parameter.KEYWORD_ONLY
    listed = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=types[field.name])
        for field in fields(options)
    ]
    own = [item for item in signature.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    return signature.replace(parameters=[*own, *listed])


def _options_of(function: Callable[..., Any]) -> dict[str, list[str]]:
    """The fields of the dataclasses that a function takes, by the class: those of `FineTuneOptions` for `finetune`."""
    named = (str(annotation).partition(" ")[0] for annotation in function.__annotations__.values())
    kinds = [function.__globals__.get(name) for name in named]
    options = (kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind))
    return {kind.__name__: [field.name for field in fields(kind)] for kind in options}
