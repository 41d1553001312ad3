"""The cases that the marker `covering` keeps."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from covering import chosen


@pytest.mark.parametrize(("strength", "most"), [(1, 4), (2, 16)])
def test_few_cases_have_every_value_or_pair(strength: int, most: int) -> None:
    cases = [dict(enumerate(case)) for case in product("abcd", "ab", "abc")]
    kept = [cases[index] for index in chosen(cases, strength)]
    assert len(kept) <= most < len(cases)
    for some in combinations(range(3), strength):
        found, wanted = ({tuple(case[n] for n in some) for case in part} for part in (kept, cases))
        assert found == wanted


def test_a_list_of_cases_is_kept_as_it_is() -> None:
    cases = [{0: "a"}, {0: "b"}, {0: "c"}]
    assert chosen(cases, 1) == chosen(cases, 2) == [0, 1, 2]
