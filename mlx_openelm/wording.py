"""How messages and reports write flags, choices and sizes."""

from __future__ import annotations

from collections.abc import Sequence


def flag(name: str) -> str:
    """The flag that sets an argument or a field: `q_bits` is `--q-bits`."""
    return f"--{name.replace('_', '-')}"


def one_of(choices: Sequence[object]) -> str:
    """Choices for a sentence: a, b or c."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def size(count: float) -> str:
    """Bytes as people read them: 512 B, 3.1 MB, 12.1 GB (1 GB is 1e9 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
