"""What the rows of an engine take from a `PrefixTree`, and what they leave there."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .. import backend
from ..backend import MANY_POSITIONS
from ..model import collect_parts
from .prefix_tree import PrefixTree
from .row import Row

# Fewer positions, such as BOS alone, cost more to join than to process.
_WORTH_SHARING = 8


class SharedPrefixes:
    """Keys and values of prompts, shared between rows.

    Args:
        tree: where they are held.
        exact: share only what is, bit for bit, what processing the prompt would give: no generated tokens, and where
            bits depend on where a prompt is cut, only its whole pieces.
    """

    def __init__(self, tree: PrefixTree, exact: bool):
        self._tree, self._exact = tree, exact

    def reuse(self, row: Row) -> None:
        """Give a row what its prompt begins with, unless it has been begun.

        As late as that, so that rows which came together share what the first of them processes.
        """
        if int(row.decoder.cache[0].offset):
            return
        ids, unit = row.prompt, self._unit(row)
        if self._exact:
            least = MANY_POSITIONS if usual_piece(row) >= MANY_POSITIONS else 1  # that are left to process
            ids = ids[: max(0, len(ids) - least) // unit * unit + 1]
        cache, count = self._find(row, ids)
        if count:
            row.start_after(count, cache)

    def held(self, row: Row) -> int:
        """How many tokens of a row's prompt a longer one that begins with it finds."""
        return self._find(row, [*row.request.prompt, 0])[1]

    def _find(self, row: Row, ids: list[int]) -> tuple[list[Any], int]:
        """Caches with the beginning of `ids` that a row like this may share, and its length; 0 if there is none."""
        cache, count = self._tree.fetch(ids, row.request.options, key=self._key(row))
        excess = count % self._unit(row)
        is_shared = count - excess >= _WORTH_SHARING and all(layer.trim(excess) == excess for layer in cache)
        return cache, count - excess if is_shared else 0

    def before_piece(self, row: Row) -> None:
        """Keep the whole pieces of a row's prompt, before the last one, where only these are shared."""
        if self._unit(row) > 1 and not row.tokens and next_piece(row) == len(row.prompt):
            self._keep(row)

    def after_prompt(self, row: Row) -> None:
        """Keep a row's prompt; also what was generated after it, at the row's end.

        What was generated is not exact, nor are tokens that a constraint forces later, which come after it.
        """
        is_prompt = not row.tokens and int(row.decoder.cache[0].offset) >= MANY_POSITIONS
        if not self._exact or (is_prompt and self._unit(row) == 1):
            self._keep(row)

    def _keep(self, row: Row) -> None:
        """Keep what a row has processed so far, if it is all the row's own.

        A row that another one's callback cancels may have processed a token that it was not told yet.
        """
        ids = row.processed_ids()
        if row.past == 0 and len(ids) == row.decoder.cache[0].offset > 0:
            self._tree.insert(ids, row.decoder.cache, key=self._key(row))

    def _unit(self, row: Row) -> int:
        """What is shared of a row has a multiple of this many positions."""
        return 1 if not self._exact or _is_cut_anywhere(row) else usual_piece(row)

    def _key(self, row: Row) -> str:
        """What keys and values depend on besides the ids: bit for bit on pieces, and on when they are packed, too."""
        options = row.request.options
        if not self._exact:
            return row.key
        start = 0 if options.kv_bits is None else options.quantized_kv_start
        return f"{row.key}, {options.prefill_step_size}, {start}"


def next_piece(row: Row) -> int:
    """The tokens of a row's prompt that are processed next."""
    return backend.prefill_step_size(len(row.prompt), row.request.options.prefill_step_size)


def _is_cut_anywhere(row: Row) -> bool:
    """Whether keys and values are the same bits wherever the prompt is cut: of plain layers on our CPU kernels."""
    model, options = row.decoder.model, row.request.options
    return (
        backend.has_kernels()
        and options.max_kv_size is None
        and options.kv_bits is None
        and row.handle is None
        and usual_piece(row) >= MANY_POSITIONS
        and model.transformer.norm["weight"].dtype == mx.float32
        and collect_parts(model.layers, model.config.rms_norm_eps) is not None
    )


def usual_piece(row: Row) -> int:
    """The tokens of a row's prompt that are processed at a time, where there are enough."""
    return backend.prefill_step_size(size=row.request.options.prefill_step_size)
