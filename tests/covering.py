"""Few of the combinations of a test's parameters that still cover them: see the marker `covering` in pyproject.toml.

A defect seldom needs more than one or two particular values at once, so a product of five dtypes, four sizes, and six
layouts finds hardly more than the few of its cases in which each value, or each pair of values, occurs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations


def chosen(cases: Sequence[Mapping[int, str]], strength: int) -> list[int]:
    """Indices of few cases that together have every combination of `strength` values that occurs in any of them.

    Args:
        cases: the value of each parameter by the parameter's number.
        strength: 1 for each value, 2 for each pair of values.
    """
    parts = [set(combinations(sorted(case.items()), min(strength, len(case)))) for case in cases]
    missing: set[tuple] = set().union(*parts)
    found = []
    while missing:
        best = max(range(len(parts)), key=lambda index: len(parts[index] & missing))
        found.append(best)
        missing -= parts[best]
    return sorted(found)
