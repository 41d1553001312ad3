"""Regular expressions from files, matched against the names of modules in bounded time.

Python's `re` backtracks: `(.*)*X` could run forever. Here all positions that a match can reach are tracked at once, as
the bits of an integer, so that no path is explored twice; expressions that would still take long are refused. `re`
itself parses the syntax. Names are ASCII without line breaks, so flags about those have no effect.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# For all expressions of a file: ten times what long patterns need on the 3B model's names; about a second.
_MAX_STEPS = 100_000
_MAX_LENGTH = 10_000
# Patterns of only these characters are plain names, or nearly; `re` matches them in linear time.
_PLAIN = re.compile(rf"[\w.^$-]{{0,{_MAX_LENGTH}}}")
_CATEGORIES = {
    op.CATEGORY_DIGIT: re.compile(r"\d"),
    op.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    op.CATEGORY_SPACE: re.compile(r"\s"),
    op.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    op.CATEGORY_WORD: re.compile(r"\w"),
    op.CATEGORY_NOT_WORD: re.compile(r"\W"),
}


class PatternError(ValueError):
    """Why an expression cannot be used; the message continues a sentence that begins with the expression."""


class Matcher:
    """Matches names against expressions, with one step budget for all of them."""

    def __init__(self) -> None:
        self._steps_left = _MAX_STEPS
        self._plain: dict[str, re.Pattern[str]] = {}
        self._parsed: dict[str, Any] = {}

    def fullmatch(self, pattern: str, name: str) -> bool:
        """Whether `re.fullmatch` would match.

        Raises:
            PatternError: not a regular expression, one that needs backtracking, or one that takes too long.
        """
        return bool(self._ends(pattern, name, 1) >> len(name))

    def matches_end(self, pattern: str, name: str) -> bool:
        """Whether `(.*\\.)?(pattern)` would match the whole name; errors as `fullmatch`."""
        if _PLAIN.fullmatch(pattern):
            if pattern not in self._plain:
                self._plain[pattern] = re.compile(rf"(?:.*\.)?(?:{pattern})")
            return self._plain[pattern].fullmatch(name) is not None
        return self.matches_parts(pattern, name, [len(name)])

    def matches_parts(self, pattern: str, name: str, ends: Iterable[int]) -> bool:
        """Whether a match begins at the start of the name or after a dot, and ends at one of these positions."""
        starts = 1 | _union(2 << n for n, char in enumerate(name) if char == ".")
        return bool(self._ends(pattern, name, starts) & _union(1 << n for n in ends))

    def _ends(self, pattern: str, name: str, starts: int) -> int:
        """The positions at which matches from `starts` can end; both are sets as in `_NameMatcher`."""
        try:
            if pattern not in self._parsed:
                self._parsed[pattern] = _parse(pattern)
            return _NameMatcher(name, self._step).sequence(self._parsed[pattern], starts)
        except RecursionError:
            raise PatternError("is nested too deeply") from None

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise PatternError("takes too long to match")


def _parse(pattern: str) -> Any:
    if len(pattern) > _MAX_LENGTH:
        raise PatternError(f"has more than {_MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about syntax that later versions of Python may read differently
            parsed = _parser.parse(pattern)
    except (re.error, OverflowError):
        raise PatternError("is not a regular expression") from None
    if parsed.state.flags & re.IGNORECASE:
        raise PatternError("has the flag i, which is not supported")
    return parsed


class _NameMatcher:
    """Matches one name. A set of positions (0 to the name's length, between its characters) is a bit mask."""

    def __init__(self, name: str, step: Callable[[], None]) -> None:
        self._length, self._step = len(name), step
        self._before = {char: 0 for char in name}  # the positions before each character
        for n, char in enumerate(name):
            self._before[char] |= 1 << n
        self._fitting: dict[tuple[Any, int], int] = {}  # the positions before each character of a class

    def sequence(self, items: Iterable[tuple[Any, Any]], starts: int) -> int:
        """The positions where matches of all items in order can end, if they begin at one of `starts`."""
        self._step()  # also without items: empty branches and repetitions take time too
        positions = starts
        for code, value in items:
            if not positions:
                break
            self._step()
            positions = self._item(code, value, positions)
        return positions

    def _item(self, code: Any, value: Any, positions: int) -> int:
        """The positions where matches of one item, as `re._parser` describes it, can end."""
        if code is op.LITERAL:
            return (positions & self._before.get(chr(value), 0)) << 1
        if code in (op.IN, op.NOT_LITERAL, op.ANY):
            key = code, id(value)
            if key not in self._fitting:
                self._fitting[key] = self._where(code, value)
            return (positions & self._fitting[key]) << 1
        if code is op.AT:
            return positions & self._at(value)
        if code is op.BRANCH:
            return _union(self.sequence(items, positions) for items in value[1])
        if code is op.SUBPATTERN and not value[1] & re.IGNORECASE:
            return self.sequence(value[3], positions)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, items = value
            return self._repeat(low, high, items, positions)
        if code in (op.ASSERT, op.ASSERT_NOT):
            direction, items = value
            found = self._followed_by(items, positions) if direction > 0 else self._preceded_by(items)
            return positions & (found if code is op.ASSERT else ~found)
        if code is op.FAILURE:
            return 0
        raise PatternError(f"has {_words(code)}, which is not supported")

    def _repeat(self, low: int, high: int, items: Any, positions: int) -> int:
        # More repetitions than characters make no difference: some of them would be empty.
        limit = self._length + 1
        for _ in range(min(low, limit)):
            positions = self.sequence(items, positions)
        found = new = positions
        for _ in range(min(high - low, limit)):
            new = self.sequence(items, new) & ~found
            if not new:
                break
            found |= new
        return found

    def _followed_by(self, items: Any, positions: int) -> int:
        each = (1 << n for n in range(self._length + 1) if positions >> n & 1)
        return _union(position for position in each if self.sequence(items, position))

    def _preceded_by(self, items: Any) -> int:
        return self.sequence(items, (2 << self._length) - 1)

    def _at(self, where: Any) -> int:
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return 1
        if where in (op.AT_END, op.AT_END_STRING):
            return 1 << self._length
        words = self._where(op.CATEGORY, op.CATEGORY_WORD)
        boundaries = words ^ words << 1
        return boundaries if where is op.AT_BOUNDARY else ~boundaries

    def _where(self, code: Any, value: Any) -> int:
        return _union(positions for char, positions in self._before.items() if _fits(code, value, char))


def _union(sets: Iterable[int]) -> int:
    union = 0
    for positions in sets:
        union |= positions
    return union


def _fits(code: Any, value: Any, char: str) -> bool:
    """Whether a character matches an item for a single character."""
    if code is op.LITERAL:
        return ord(char) == value
    if code is op.NOT_LITERAL:
        return ord(char) != value
    if code is op.RANGE:
        return value[0] <= ord(char) <= value[1]
    if code is op.CATEGORY:
        return _CATEGORIES[value].match(char) is not None
    if code is op.IN:
        negated = value[0][0] is op.NEGATE
        return negated != any(_fits(kind, part, char) for kind, part in value[negated:])
    return True  # any character


def _words(code: Any) -> str:
    return str(code).lower().replace("_", " ").replace("groupref", "back reference").replace("subpattern", "a flag")
