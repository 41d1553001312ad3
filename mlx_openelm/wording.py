"""Text for messages and reports: flags, choices, suggestions, lists of names, sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# The most names that `some` lists.
SOME = 8


def flag(name: str) -> str:
    """The command-line flag of an argument or a field: `--q-bits` for `q_bits`."""
    return f"--{name.replace('_', '-')}"


def one_of(choices: Sequence[object]) -> str:
    """Choices in a sentence: `a, b or c`."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean --temp?` for `--temperature`; empty if no known word is similar, whatever the case."""
    import difflib  # only errors need it

    word = word.strip().lower()
    spellings = {other.lower(): other for other in known}
    close = difflib.get_close_matches(word, spellings, n=2, cutoff=0.7)
    # Similar words that differ in length: one begins with the other.
    close = close or [s for s in spellings if len(s) > 3 and (word.startswith(s) or s.startswith(word))][:2]
    return f"did you mean {one_of([spellings[s] for s in close])}?" if close else ""


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


def size(count: float) -> str:
    """A number of bytes in decimal units: 512 B, 3.1 MB, 12.1 GB (1 GB is 1e9 bytes)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
