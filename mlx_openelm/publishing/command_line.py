"""The command line that a model card shows: how to make the model again, safe to publish. And the call in Python."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..wording import flag


def command_line(command: str, flags: Mapping[str, Any], *, whole_paths: bool = False) -> str:
    """`mlx-openelm COMMAND` with its flags as a person types them.

    None, False and empty lists are left out. Paths are cut to their last part, whether they are `Path`s or text, unless
    `whole_paths` is set, for a command that is not published.
    """
    words = ["mlx-openelm", command]
    for key, value in flags.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if item is True:
                words.append(flag(key))
            elif item is not None and item is not False:
                words += [flag(key), shlex.quote(str(item) if whole_paths else without_folders(item))]
    return " ".join(words)


def python_call(function: str, arguments: Mapping[str, Any]) -> str:
    """The call of `function` with these arguments, `model` and `mlx_path` by place; None and False are left out."""
    given = {key: value for key, value in arguments.items() if value is not None and value is not False}
    texts = {
        key: repr(value) if isinstance(value, bool | int | float) else json.dumps(str(value), ensure_ascii=False)
        for key, value in given.items()
    }
    places = [texts.pop(key) for key in ("model", "mlx_path") if key in texts]
    return f"{function}({', '.join([*places, *(f'{key}={text}' for key, text in texts.items())])})"


def source_flags(
    tokenizer: str | Path | None, config_yaml: str | Path | None, revision: str | None = None
) -> dict[str, Any]:
    """The flags of `sources.open_source`, for `command_line`; the first two are files, so their folders are hidden."""
    return {
        "tokenizer": None if tokenizer is None else Path(tokenizer),
        "config_yaml": None if config_yaml is None else Path(config_yaml),
        "revision": revision,
    }


def without_folders(value: object) -> str:
    """The last part of a path, and other text unchanged: cards must not reveal where a person keeps their files."""
    text = str(value)
    path = text.strip()  # as the loaders read it
    is_path = isinstance(value, Path) or path.startswith((".", "~", "/")) or Path(path).is_absolute()
    is_path = is_path or os.path.exists(path)  # `clients/acme`, which looks like a hub repository
    return Path(path).name or "." if is_path else text
