"""Text for messages and reports: flags, choices, suggestions, lists of names, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The most names that `some` lists.
SOME = 8


def flag(name: str) -> str:
    """The command-line flag of an argument or a field: `--q-bits` for `q_bits`."""
    return f"--{name.replace('_', '-')}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean temp?` for `temperature`; empty if no known word is similar."""
    known = list(known)
    close = similar(word, known) or [
        other for other in known if len(other) > 3 and (word.startswith(other) or other.startswith(word))
    ]
    return f"did you mean {one_of(close[:2])}?" if close else ""


def similar(word: str, known: Iterable[str]) -> list[str]:
    """Up to three known names that `word` may be a misspelling of, the closest first; case is ignored."""
    import difflib

    names = {name.lower(): name for name in known}
    cutoff = 0.75 if len(word) < 6 else 0.8  # one wrong letter in four leaves 0.75
    return [names[close] for close in difflib.get_close_matches(word.lower(), names, n=3, cutoff=cutoff)]


def one_of(choices: Sequence[object]) -> str:
    """Choices in a sentence: `a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def install(extra: str) -> str:
    """How to install an extra of this package, for the end of a sentence."""
    return f"pip install '.[{extra}]' in your clone of mlx-openelm"


def some(names: Sequence[str], count: int | None = None, *, separator: str = ", ") -> str:
    """The first `SOME` names and the number of the others: `a, b, c and 12 more`.

    Args:
        count: the number of all names, if `names` has only the first of them.
    """
    more = (len(names) if count is None else count) - SOME
    return separator.join(names[:SOME]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """A number of things: 1 step, 2,000 steps."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def subject(count: int, noun: str, singular: str, plural: str) -> str:
    """A number of things with a verb that agrees with it: 1 pair has, 2 pairs have."""
    return f"{counted(count, noun)} {singular if count == 1 else plural}"


def duration(seconds: float) -> str:
    """A time as an estimate gives it: 40 seconds, 3 minutes, 2.5 hours; seconds to the next ten."""
    if seconds < 90:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    if seconds < 90 * 60:
        return counted(round(seconds / 60), "minute")
    return f"{seconds / 3600:.1f} hours"


def size(count: float) -> str:
    """A number of bytes in decimal units: 512 B, 3.1 MB, 12.1 GB (1 GB is 1e9 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
