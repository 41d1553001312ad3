"""How options are declared: a field of a dataclass carries the help of the flag that is made from it."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any, help: str, *, group: str = "Common flags", flags: tuple[str, ...] = (), metavar: str | None = None
) -> Any:
    """A dataclass field with a default and a help text. Its flag is its name: `max_tokens` is `--max-tokens`.

    Args:
        group: the heading of `--help` it stands under.
        flags: other spellings of the flag, like `-m`.
        metavar: how `--help` writes the value. `mlx|peft` names the choices, which shells complete.
    """
    metadata = {"help": help, "group": group, "flags": flags, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)
