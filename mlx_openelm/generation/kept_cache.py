"""The key-value caches of a chat, which each turn goes on from: how far they fit its ids, and what they have seen."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import takewhile
from typing import Any, NamedTuple

from ..cache import make_cache
from .options import CacheOptions


class _Held(NamedTuple):
    """Caches, one per layer, and the ids that they have seen."""

    caches: list[Any]
    seen: list[int]


class KeptCache:
    """Caches from one turn to the next.

    A sliding cache that has dropped positions cannot go back, so a copy from before the last turn is kept beside it: a
    turn that is repeated, or that does not end as it was generated, goes on from there.
    """

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._now: _Held | None = None
        self._before: _Held | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        held = [one for one in (self._now, self._before) if one is not None]
        return sum(layer.nbytes for one in held for layer in one.caches)

    def begin(self, ids: Sequence[int], options: CacheOptions) -> tuple[list[Any], int]:
        """Caches that hold as many of the first `ids` as possible, to be extended in place, and that number.

        At least one id is left to process.
        """
        fits = [(held, self._fit(held, ids)) for held in (self._now, self._before) if held is not None]
        held, length = max(fits, key=lambda fit: fit[1], default=(None, 0))
        if held is None or not length:
            self.forget()
            caches = make_cache(self._num_layers, options.max_kv_size)
            self._now = _Held(caches, [])
            return caches, 0
        for layer in held.caches:
            layer.trim(len(held.seen) - length)
        is_sliding = hasattr(held.caches[0], "max_size")
        seen = list(ids[:length])
        self._before = _Held([copy(layer) for layer in held.caches], seen) if is_sliding else None
        self._now = _Held(held.caches, seen)
        return held.caches, length

    def end(self, ids: Sequence[int]) -> None:
        """Note what the caches have seen: the first of `ids`. What they have beyond these is taken back."""
        if self._now is None:
            return
        caches = self._now.caches
        offset = int(caches[0].offset)
        excess = max(0, offset - len(ids))  # tokens that a constraint forced, of an answer that was stopped
        if excess and not all(layer.is_trimmable() for layer in caches):
            self._now = None
            return
        for layer in caches:
            layer.trim(excess)
        self._now = _Held(caches, list(ids[:offset]))

    def forget(self) -> None:
        """Drop everything, such as after a change of the model or its adapter."""
        self._now = self._before = None

    @staticmethod
    def _fit(held: _Held, ids: Sequence[int]) -> int:
        """How many of the first `ids` the caches can be made to hold; not the last one."""
        pairs = zip(held.seen, ids[:-1], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        can_go_back = all(layer.is_trimmable() for layer in held.caches)
        return length if can_go_back or length == len(held.seen) else 0
