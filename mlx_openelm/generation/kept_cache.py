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

    A sliding cache that has dropped positions cannot go back, so copies from the last turn are kept beside it: from
    before its prompt, for a turn that is repeated, and from before its answer, for one that is not seen as it was
    generated, such as without its last token.
    """

    def __init__(self, num_layers: int):
        self._num_layers = num_layers
        self._now: _Held | None = None
        self._copies: list[_Held] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(layer.nbytes for held in self._candidates() for layer in held.caches)

    def begin(self, ids: Sequence[int], options: CacheOptions) -> tuple[list[Any], int]:
        """Caches that hold as many of the first `ids` as possible, to be extended in place, and that number.

        At least one id is left to process.
        """
        fits = [(held, self._fit(held, ids)) for held in self._candidates()]
        held, length = max(fits, key=lambda fit: fit[1], default=(None, 0))
        if held is None or not length:
            self.forget()
            caches = make_cache(self._num_layers, options.max_kv_size)
            self._now = _Held(caches, [])
            return caches, 0
        for layer in held.caches:
            layer.trim(len(held.seen) - length)
        self._now = _Held(held.caches, list(ids[:length]))
        self._copies.clear()
        self.mark(ids)
        return held.caches, length

    def mark(self, ids: Sequence[int]) -> None:
        """Keep a copy of caches that cannot go back, which have seen some of the first `ids`."""
        if self._now is not None and hasattr(self._now.caches[0], "max_size"):
            copies = [copy(layer) for layer in self._now.caches]
            if (offset := int(copies[0].offset)) <= len(ids):
                self._copies.append(_Held(copies, list(ids[:offset])))

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
        self._now = None
        self._copies.clear()

    def _candidates(self) -> list[_Held]:
        return ([] if self._now is None else [self._now]) + self._copies

    @staticmethod
    def _fit(held: _Held, ids: Sequence[int]) -> int:
        """How many of the first `ids` the caches can be made to hold; not the last one."""
        pairs = zip(held.seen, ids[:-1], strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        can_go_back = all(layer.is_trimmable() for layer in held.caches)
        return length if can_go_back or length == len(held.seen) else 0
