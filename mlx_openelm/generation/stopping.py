"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from .options import check_stop


class StopStrings:
    """Cuts a stream of text before the first stop string, wherever the pieces begin and end.

    The stop string that is complete first wins, so generation ends as early as possible. If several are complete at
    the same character, the longest wins. If one stop string is inside another ("c" in "bcd"), the outer one is never
    reached.

    Text is held back only while it may be the beginning of a stop string that would win. The cost of a character is
    a few steps per stop string, whatever the length of the text.

    Raises `RequestError` for a stop string that is empty or not a string.
    """

    def __init__(self, stops: str | Sequence[str] | None):
        if isinstance(stops, str):  # also a sequence, but its characters are not meant
            stops = [stops]
        stops = stops or []
        for stop in stops:
            check_stop(stop)
        # A stop string that contains another before its last character is never complete first: drop it.
        self._stops = [s for s in dict.fromkeys(stops) if not any(other in s[:-1] for other in stops)]
        self._fallbacks = [_prefix_function(stop) for stop in self._stops]
        self._stopped = False
        self._held = ""
        self._matched = [0] * len(
            self._stops
        )  # for each stop string, the number of its first characters that the text ends with

    def add(self, text: str) -> tuple[str, bool]:
        """Take the next piece; return the text safe to print now, and whether a stop string is complete.

        The stop string and what follows it are dropped; after one, every further call returns `("", True)`.
        """
        if self._stopped:
            return "", True
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = self._step(char)
            if found:
                self._start_over()
                self._stopped = True
                return pending[: end - found], True
        safe = len(pending) - max(self._matched, default=0)
        self._held = pending[safe:]
        return pending[:safe], False

    def finish(self) -> str:
        """The text held back when generation ended for another reason; empty after a stop string."""
        held = self._held
        self._start_over()
        return held

    def _start_over(self) -> None:
        self._held = ""
        self._matched = [0] * len(self._stops)

    def _step(self, char: str) -> int:
        """Read one character; return the length of the longest stop string complete with it, or 0."""
        found = 0
        for i, (stop, fallback) in enumerate(zip(self._stops, self._fallbacks, strict=True)):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = fallback[matched - 1]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _prefix_function(pattern: str) -> list[int]:
    """The length of the longest proper suffix of every prefix that begins `pattern` (Knuth-Morris-Pratt)."""
    lengths = [0] * len(pattern)
    for i in range(1, len(pattern)):
        length = lengths[i - 1]
        while length and pattern[length] != pattern[i]:
            length = lengths[length - 1]
        lengths[i] = length + (pattern[length] == pattern[i])
    return lengths
