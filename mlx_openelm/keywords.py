"""Keyword arguments of the public functions and classes: wrong names get a suggestion, and signatures list options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from . import suggestions
from .errors import RequestError


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

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if not known.issuperset(keywords):
            wrong = next(word for word in keywords if word not in known)
            raise KeywordError(suggestions.unknown_keyword(name, wrong, {"": known, **_options_of(function)}))
        return function(*args, **keywords)

    return call


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
