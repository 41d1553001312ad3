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
from ..cache import KVCache
from ..config import ModelConfig
from ..errors import RequestError
from ..model import OpenELM
from ..wording import size
from .options import CacheOptions, check_number

if TYPE_CHECKING:
    from .row import Row

# The part of the free memory that rows may fill by default, and what they may where that is not known.
FREE_SHARE = 0.5
_UNKNOWN_FREE = 4 << 30

# On a CPU, MLX begins up to about 55 operations before the first of them is done. These are so many layers of a piece
# of a prompt, which is 9 operations; replacements of buffers, which are two; and rows whose samplers are at work.
_LAYERS_AHEAD, _COPIES_AHEAD, _SAMPLERS_AHEAD = 6, 20, 4
# Arrays [vocab] in float32 that exist at a time: for each row its logits, twice, and its log-probabilities in this and
# the last step; for a sampler at work, what it sorts, sums and filters.
_LOGITS_OF_A_ROW, _LOGITS_OF_A_SAMPLER = 4, 12


@dataclass(frozen=True)
class Needs:
    """The most bytes that a text takes.

    Attributes:
        held: its keys and values, from its beginning to its end.
        replaced: more while its buffers are replaced by longer or by quantized ones.
        prompt: more while a piece of its prompt is processed.
        samples: whether its next token is drawn from sorted or changed log-probabilities.
    """

    held: int
    replaced: int
    prompt: int
    samples: bool = False


@dataclass(frozen=True)
class _Kind:
    """A kind of cache: sliding if it has a window; quantized to `bits` once it holds `start` positions."""

    window: int | None = None
    bits: int | None = None
    group_size: int = 64
    start: int = 0

    @classmethod
    def of(cls, cache: Any, options: CacheOptions, head_dim: int) -> _Kind:
        """That of a layer's cache, which the options may quantize later."""
        if hasattr(cache, "bits"):
            return cls(bits=cache.bits, group_size=cache.group_size)
        if getattr(cache, "max_size", None):
            return cls(window=cache.max_size)
        return cls(None, options.kv_bits, options.group_size(head_dim), options.quantized_kv_start)


def text_needs(
    config: ModelConfig, kind: _Kind, past: int, prompt: int, count: int, piece: int, itemsize: int
) -> Needs:
    """What a text takes, without its drawing.

    Args:
        past: positions that its caches hold before the prompt.
        prompt, count: tokens of the prompt, and of the text.
        piece: tokens of the prompt that are processed at a time.
        itemsize: bytes of an activation.
    """
    values = 2 * sum(config.num_kv_heads) * config.head_dim  # of a position
    width = values * itemsize
    total = past + prompt + max(count - 1, 0)  # nothing is computed from the last token
    ends = [past + min(end, prompt) for end in range(piece, prompt + piece, piece)]
    if kind.bits is None or total < kind.start:
        columns, grows = _columns(kind.window, past, ends, total)
        if kind.window is None and total > ends[-1]:
            columns, grows = max(columns, _stepped(ends[-1], total)), True
        held, replaced = columns * width, columns * width if grows else 0
    else:
        packed = values * kind.bits // 8 + 2 * values // kind.group_size * itemsize
        # Quantized after the first piece that ends at `start` or beyond, or after the token that reaches it.
        reached = next((end for end in ends if end >= kind.start), kind.start)
        plain, _ = _columns(None, past, [end for end in ends if end <= reached], reached)
        if reached > ends[-1]:
            plain = max(plain, _stepped(ends[-1], reached))
        columns, grows = _columns(None, reached, [end for end in ends if end > reached], total)
        # After the first piece already, the other texts need not wait for the memory of plain ones.
        held = max(columns * packed, plain * width if reached > ends[0] else 0)
        replaced = max(columns * packed if grows else 0, plain * (width + packed))
    layers, longest = config.num_transformer_layers, min(piece, prompt)
    share = 1.0 if backend.on_gpu() else min(1.0, _COPIES_AHEAD / (2 * layers))
    activations = _most_of(_activations(config, itemsize), layers if backend.on_gpu() else _LAYERS_AHEAD) * longest
    return Needs(held, int(replaced * share), activations + _masks(kind, past + prompt, longest, itemsize))


def _columns(window: int | None, past: int, ends: Sequence[int], total: int) -> tuple[int, bool]:
    """The most positions that buffers have room for, and whether buffers that hold something are replaced.

    Pieces that end at `ends` and then single positions up to `total` come after `past`, for which there is just room.
    """
    room = used = most = past
    replaced = False
    for end in ends:
        length = end - used
        if window is not None and length > 1:
            room, replaced = min(room, used, window - 1) + length, replaced or used > 0
        elif window is None and end > room:
            room, replaced = used + _rounded(length), replaced or used > 0
        used, most = end, max(most, room)
    goal = total if window is None else min(total, window)
    if goal > room:
        room, replaced = room + _rounded(goal - room), replaced or used > 0
        most = max(most, room if window is None else min(room, window))
    return most, replaced


def _stepped(start: int, total: int) -> int:
    """Positions that a growing cache has room for at the end of steps: kernels take new buffers at the first one."""
    return start + _rounded(total - start)


def _rounded(count: int) -> int:
    """Positions that a growing cache makes room for."""
    return -(-count // KVCache.step) * KVCache.step


def _activations(config: ModelConfig, itemsize: int) -> list[int]:
    """The bytes of all results of each layer for one position."""
    layers = zip(config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True)
    inner = 3 if config.ffn_with_glu else 2
    return [
        itemsize * (4 * config.model_dim + (3 * heads + 2 * kv_heads) * config.head_dim + inner * dims)
        for heads, kv_heads, dims in layers
    ]


def _most_of(layers: Sequence[int], count: int) -> int:
    """The largest sum of `count` consecutive layers."""
    return max(sum(layers[i : i + count]) for i in range(max(1, len(layers) - count + 1)))


def _masks(kind: _Kind, length: int, longest: int, itemsize: int) -> int:
    """Bytes of the masks that a sliding cache needs: booleans three times, and numbers."""
    if kind.window is None or length <= kind.window:
        return 0
    return longest * (kind.window + longest) * (3 + itemsize)


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
            free = backend.available_memory()
            max_bytes = _UNKNOWN_FREE if free is None else max(1, int(FREE_SHARE * free))
        expected = "a whole number of bytes, 1 or above"
        check_number("--max-bytes", max_bytes, 1, float("inf"), expected, kind=Integral)
        self.model, self.max_bytes, self.draft_model = model, max_bytes, draft_model
        self._rows: list[Row] = []
        self._itemsize = _itemsize(model)
        logits = 4 * model.config.vocab_size
        self._row_step = sum(_activations(model.config, self._itemsize)) + _LOGITS_OF_A_ROW * logits
        self._sampler_step = _LOGITS_OF_A_SAMPLER * logits

    @property
    def reserved(self) -> int:
        """The most bytes that the rows which have their memory will take together; 0 without rows."""
        return self.total(self._rows)

    def needs(self, row: Row) -> Needs:
        """The most bytes that a row takes."""
        if row.needs is None:
            row.needs = self._needs(row)
        needs: Needs = row.needs
        return needs

    def _needs(self, row: Row) -> Needs:
        request, cache = row.request, row.decoder.cache
        options, prompt, count = request.options, len(row.prompt), request.count
        piece = options.prefill_step_size or backend.prefill_step_size()
        kind = _Kind.of(cache[0], options, self.model.config.head_dim)
        needs = text_needs(self.model.config, kind, row.past, prompt, count, piece, self._itemsize)
        activations = needs.prompt
        if row.constraint is not None and count > prompt:  # what it forces is processed like a prompt
            activations = text_needs(self.model.config, kind, row.past, count, 0, piece, self._itemsize).prompt
        held, replaced = max(needs.held, _nbytes(cache)), needs.replaced
        if self.draft_model is not None:
            size = _itemsize(self.draft_model)
            draft = text_needs(self.draft_model.config, _Kind(), 0, row.past + prompt, count, piece, size)
            held, replaced = held + draft.held, max(replaced, draft.replaced)
            activations = max(activations, draft.prompt)
        samples = not row.is_plain or bool(row.decoder.logits_processors) or row.constraint is not None
        return Needs(held, replaced, activations, samples)

    def total(self, rows: Sequence[Row]) -> int:
        """The most bytes that these rows take together."""
        return self._sum([self.needs(row) for row in rows])

    def _sum(self, needs: Sequence[Needs]) -> int:
        if not needs:
            return 0
        samplers = sum(one.samples for one in needs)
        if not backend.on_gpu():
            samplers = min(samplers, _SAMPLERS_AHEAD)
        held = sum(one.held for one in needs)
        once = max(one.replaced for one in needs) + max(one.prompt for one in needs)
        return held + once + len(needs) * self._row_step + samplers * self._sampler_step

    def most(self, rows: Sequence[Row], count: int) -> int:
        """The most bytes that any `count` of these rows take together, where others wait; never over `max_bytes`."""
        needs = [self.needs(row) for row in rows]
        if not needs:
            return 0
        largest = sorted((one.held for one in needs), reverse=True)[:count]
        replaced, prompt = max(one.replaced for one in needs), max(one.prompt for one in needs)
        samplers = sum(one.samples for one in needs)
        bound = self._sum([Needs(held, replaced, prompt, n < samplers) for n, held in enumerate(largest)])
        return min(bound, self.max_bytes)

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

    def release(self, row: Row) -> None:
        self._rows.remove(row)

    def clear_unused(self) -> None:
        """Free the buffers that MLX keeps for reuse, if with the rows they would take more than there may be."""
        if (unused := mx.get_cache_memory()) and self.reserved + unused > self.max_bytes:
            mx.clear_cache()


def _itemsize(model: OpenELM) -> int:
    return model.transformer.norm.weight.dtype.size


def _nbytes(cache: Sequence[Any]) -> int:
    """Bytes of a text's caches, ours or mlx-lm's."""
    return sum(layer.nbytes for layer in cache)


def model_bytes(model: OpenELM) -> int:
    """Bytes of a model's weights."""
    arrays: Any = tree_flatten(model.parameters())
    return sum(array.nbytes for _, array in arrays)


def held_bytes(rows: Iterable[Row]) -> int:
    """Bytes that the caches of rows have now."""
    return sum(_nbytes(row.decoder.cache) for row in rows)
