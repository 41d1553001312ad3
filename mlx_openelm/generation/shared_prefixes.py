"""What the rows of an engine take from a `PrefixTree`, and what they leave there."""

from __future__ import annotations

from .. import backend
from .prefix_tree import PrefixTree
from .row import Row


class SharedPrefixes:
    """Keys and values of prompts, shared between rows.

    Args:
        tree: where they are held.
        exact: share only what is, bit for bit, what processing the prompt would give: whole pieces of prompts.
    """

    def __init__(self, tree: PrefixTree, exact: bool):
        self._tree, self._exact = tree, exact

    def reuse(self, row: Row) -> None:
        """Give a new row what its prompt begins with."""
        if row.past:
            return
        ids, size = row.prompt, piece_size(row)
        if self._exact:
            ids = ids[: (len(ids) - 1) // size * size + 1]
        cache, count = self._tree.fetch(ids, row.request.options, key=self._key(row))
        excess = count % size if self._exact else 0
        if count > excess and all(layer.trim(excess) == excess for layer in cache):
            row.start_after(count - excess, cache)

    def before_piece(self, row: Row) -> None:
        """Keep the whole pieces of a row's prompt, before the last one.

        Nothing is kept later, when tokens that a constraint forces are processed like a prompt: the tokens before them
        were processed one by one.
        """
        if self._exact and not row.tokens and len(row.prompt) <= piece_size(row):
            self._keep(row)

    def after_prompt(self, row: Row) -> None:
        """Keep a row's prompt; also what was generated after it, at the row's end."""
        if not self._exact:
            self._keep(row)

    def _keep(self, row: Row) -> None:
        """Keep what a row has processed so far, if it is all the row's own.

        A row that another one's callback cancels may have processed a token that it was not told yet.
        """
        ids = row.processed_ids()
        if row.past == 0 and len(ids) == row.decoder.cache[0].offset > 0:
            self._tree.insert(ids, row.decoder.cache, key=self._key(row))

    def _key(self, row: Row) -> str:
        """What keys and values depend on besides the ids: bit for bit on pieces, and on when they are packed, too."""
        options = row.request.options
        if not self._exact:
            return row.key
        start = 0 if options.kv_bits is None else options.quantized_kv_start
        return f"{row.key}, {options.prefill_step_size}, {start}"


def piece_size(row: Row) -> int:
    """The most tokens of a row's prompt that are processed at a time."""
    return row.request.options.prefill_step_size or backend.prefill_step_size()
