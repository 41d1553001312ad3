"""Text that goes round in a loop, as greedy decoding without a penalty often does."""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST_LOOP = 64  # tokens
_LEAST_ROUNDS = 3
_LEAST_TOKENS = 24  # fewer may be meant: a list of numbers, a row of dashes


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are one block, of at most 64, at least three times and for 24 tokens or more."""
    for block in range(1, _LONGEST_LOOP + 1):
        length = max(_LEAST_ROUNDS * block, _LEAST_TOKENS)
        if length > len(tokens):
            return False
        tail = tokens[-length:]
        if tail[block:] == tail[:-block]:
            return True
    return False
