"""How much memory texts need, so that they wait for it instead of failing.

A text's keys and values are counted as at its end. What a step, a piece of a prompt and the replacement of buffers need
for a moment is counted once for all texts: MLX works one operation after the other, and begins operations before those
before them are done, so that the results of a limited number exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import backend
from ..errors import RequestError
from ..model import OpenELM
from ..wording import size
from .options import check_number
from .shared_prefixes import usual_piece
from .text_needs import CacheKind, activations_of, text_needs

if TYPE_CHECKING:
    from .row import Row

# The part of the free memory that rows may fill by default.
FREE_SHARE = 0.5

# Rows whose samplers are at work at a time on a CPU, where MLX begins operations before those before them are done.
_SAMPLERS_AHEAD = 4
# Arrays [vocab] in float32 that exist at a time: for each position of a step its logits, twice, and its
# log-probabilities in this and the last step; for one that is sampled, what is sorted, summed and filtered; for a token
# of a draft model, what it was drawn from, alone and joined with the others'.
_LOGITS_OF_A_ROW, _LOGITS_OF_A_SAMPLER, _LOGITS_OF_A_DRAFT = 4, 12, 2


@dataclass(frozen=True)
class Needs:
    """The most bytes that a row takes.

    Attributes:
        held: its keys and values and those of the draft model, from its beginning to its end.
        replaced: more while buffers are replaced by longer or by quantized ones.
        prompt: more while a piece of its prompt is processed.
        step: more during a step.
        sampling: more in a step while tokens are drawn from sorted or changed log-probabilities; 0 if they are not.
    """

    held: int
    replaced: int
    prompt: int
    step: int
    sampling: int


class Budget:
    """Memory for the rows of an engine: each row's own from its beginning to its end, and what steps need beside it.

    Args:
        max_bytes: the most there may be; by default a share of what is free now (`FREE_SHARE`).
        draft_model: a model whose keys and values of every text are held too.

    Raises:
        RequestError: `max_bytes` is not a positive whole number.
    """

    def __init__(self, model: OpenELM, max_bytes: int | None = None, draft_model: OpenELM | None = None):
        if max_bytes is None:
            max_bytes = max(1, int(FREE_SHARE * backend.free_memory()))
        expected = "a whole number of bytes, 1 or above"
        check_number("--max-bytes", max_bytes, 1, float("inf"), expected, kind=Integral)
        self.model, self.max_bytes, self.draft_model = model, max_bytes, draft_model
        self.reserved = 0  # the most bytes that the rows which have their memory will take together
        self._rows: list[Row] = []
        self._itemsize = _itemsize(model)

    def needs(self, row: Row) -> Needs:
        """The most bytes that a row takes."""
        if row.needs is None:
            row.needs = self._needs(row)
        needs: Needs = row.needs
        return needs

    def _needs(self, row: Row) -> Needs:
        request, cache, config = row.request, row.decoder.cache, self.model.config
        options, prompt, count = request.options, len(row.prompt), request.count
        piece = usual_piece(row)
        kind = CacheKind.of(cache[0], options, config.head_dim)
        held, replaced, activations = text_needs(
            config, kind, row.past, prompt, count, piece, self._itemsize, row.most_drafted
        )
        held = max(held, sum(layer.nbytes for layer in cache))
        if row.constraint is not None and count > prompt:  # what it forces is processed like a prompt
            activations = text_needs(config, kind, row.past, count, 0, piece, self._itemsize).prompt
        # A step has a position for the next token and for each drafted one.
        positions, logits = 1 + row.most_drafted, 4 * config.vocab_size
        samples = not row.is_plain or bool(row.decoder.logits_processors) or row.constraint is not None
        step = positions * (sum(activations_of(config, self._itemsize)) + _LOGITS_OF_A_ROW * logits)
        if self.draft_model is not None and row.drafter is not None:
            size = _itemsize(self.draft_model)
            draft = text_needs(
                self.draft_model.config, CacheKind(), 0, row.past + prompt, count, piece, size, row.most_drafted
            )
            held, replaced = held + draft.held, max(replaced, draft.replaced)
            activations = max(activations, draft.prompt)
            step += row.most_drafted * _LOGITS_OF_A_DRAFT * logits
        sampling = positions * _LOGITS_OF_A_SAMPLER * logits if samples else 0
        return Needs(held, replaced, activations, step, sampling)

    def total(self, rows: Sequence[Row]) -> int:
        """The most bytes that these rows take together."""
        return self._sum([self.needs(row) for row in rows], len(rows))

    def most(self, rows: Sequence[Row], count: int) -> int:
        """The most bytes that any `count` of these rows take together, where others wait; never over `max_bytes`."""
        return min(self._sum([self.needs(row) for row in rows], count), self.max_bytes)

    def _sum(self, needs: Sequence[Needs], count: int) -> int:
        if not needs:
            return 0

        def largest(values: Iterable[int], number: int) -> int:
            return sum(sorted(values, reverse=True)[:number])

        samplers = count if backend.on_gpu() else min(count, _SAMPLERS_AHEAD)
        return (
            largest((one.held for one in needs), count)
            + max(one.replaced for one in needs)
            + max(one.prompt for one in needs)
            + largest((one.step for one in needs), count)
            + largest((one.sampling for one in needs), samplers)
        )

    def check(self, row: Row) -> None:
        """Raise a `RequestError` if a row alone needs more than there is for all."""
        if (needed := self.total([row])) > self.max_bytes:
            raise RequestError(
                f"The text needs up to {size(needed)} for keys and values and for a step, where "
                f"{size(self.max_bytes)} may be used; lower --max-tokens, shorten the prompt, or set --max-kv-size or "
                "--kv-bits."
            )

    def has_room(self, row: Row) -> bool:
        """Whether a row's bytes are free."""
        return self.total([*self._rows, row]) <= self.max_bytes

    def take(self, row: Row) -> None:
        """Reserve a row's bytes."""
        self._rows.append(row)
        self.reserved = self.total(self._rows)

    def release(self, row: Row) -> None:
        """Free a row's bytes for others."""
        self._rows.remove(row)
        self.reserved = self.total(self._rows)

    def clear_unused(self) -> None:
        """Free the buffers that MLX keeps for reuse, if with the rows they would take more than there may be."""
        if (unused := mx.get_cache_memory()) and self.reserved + unused > self.max_bytes:
            mx.clear_cache()


def _itemsize(model: OpenELM) -> int:
    return model.transformer.norm.weight.dtype.size


def model_bytes(model: OpenELM) -> int:
    """Bytes of a model's weights."""
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def held_bytes(rows: Iterable[Row]) -> int:
    """Bytes that the caches of rows have now."""
    return sum(row.nbytes for row in rows)
