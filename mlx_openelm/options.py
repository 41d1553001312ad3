"""How a field of a dataclass declares its flag: `temp: Annotated[float, Option("Sampling temperature.")] = 0.0`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """The help of a flag. The flag has the field's name: `max_tokens` is `--max-tokens`.

    Args:
        group: the heading in `--help` that lists it.
        flags: other spellings of the flag, like `-m`.
        metavar: how `--help` writes the value. `mlx|peft` lists the choices, which shells complete.
        default: what `--help` gives as the default where the field's own, such as None, says too little.
    """

    help: str
    group: str = "Common flags"
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    default: str | None = None


class Options:
    """The base of the options' dataclasses, which are declared with `repr=False`: shows what is not the default."""

    def __repr__(self) -> str:
        values: list[tuple[str, Any, Any]] = [
            (item.name, getattr(self, item.name), item.default)
            for item in fields(self)  # type: ignore[arg-type]
        ]
        changed = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({changed})"


def paths_as_text(options: Any) -> None:
    """Replace the paths among a frozen dataclass's values by their text, which is recorded and compared."""
    for item in fields(options):
        if isinstance(value := getattr(options, item.name), os.PathLike):
            object.__setattr__(options, item.name, os.fspath(value))
