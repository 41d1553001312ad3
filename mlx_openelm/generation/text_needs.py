"""How much memory the keys and values of a text need, and a piece of its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

from .. import backend
from ..cache import KVCache
from ..config import ModelConfig
from .options import CacheOptions

# On a CPU, MLX begins up to about 55 operations before the first of them is done. These are so many layers of a piece
# of a prompt, which is 9 operations; and replacements of buffers, which are two.
_LAYERS_AHEAD, _COPIES_AHEAD = 6, 20


class TextNeeds(NamedTuple):
    """The most bytes that a text takes.

    Attributes:
        held: its keys and values, from its beginning to its end.
        replaced: more while its buffers are replaced by longer or by quantized ones.
        prompt: more while a piece of its prompt is processed.
    """

    held: int
    replaced: int
    prompt: int


@dataclass(frozen=True)
class CacheKind:
    """A kind of cache: sliding if it has a window; quantized to `bits` once it holds `start` positions."""

    window: int | None = None
    bits: int | None = None
    group_size: int = 64
    start: int = 0

    @classmethod
    def of(cls, cache: Any, options: CacheOptions, head_dim: int) -> CacheKind:
        """That of a layer's cache, which the options may quantize later."""
        if hasattr(cache, "bits"):
            return cls(bits=cache.bits, group_size=cache.group_size)
        if getattr(cache, "max_size", None):
            return cls(window=cache.max_size)
        return cls(None, options.kv_bits, options.group_size(head_dim), options.quantized_kv_start)


def text_needs(
    config: ModelConfig,
    kind: CacheKind,
    past: int,
    prompt: int,
    count: int,
    piece: int,
    itemsize: int,
    drafted: int = 0,
) -> TextNeeds:
    """What a text takes, without its drawing.

    Args:
        past: positions that its caches hold before the prompt.
        prompt, count: tokens of the prompt, and of the text.
        piece: the usual number of tokens of the prompt that are processed at a time.
        itemsize: bytes of an activation.
        drafted: the most tokens that a step processes and may take back, after which buffers grow at other places.
    """
    values = 2 * sum(config.num_kv_heads) * config.head_dim  # of a position
    width = values * itemsize
    total = past + prompt + max(count - 1, 0)  # nothing is computed from the last token
    spare = _rounded(drafted + 1) if drafted else 0
    ends = [past + end for end in accumulate(_pieces(prompt, piece))]
    if kind.bits is None or total < kind.start:
        columns, grows = _columns(kind.window, past, ends, total)
        if kind.window is None and total > ends[-1]:
            columns, grows = max(columns, _stepped(ends[-1], total), total + spare), True
        taken_back = 0 if kind.window is None else drafted
        held, replaced = (columns + taken_back) * width, columns * width if grows else 0
    else:
        packed = values * kind.bits // 8 + 2 * values // kind.group_size * itemsize
        # Quantized after the first piece that ends at `start` or beyond, or after the token that reaches it.
        reached = next((end for end in ends if end >= kind.start), kind.start)
        plain, _ = _columns(None, past, [end for end in ends if end <= reached], reached)
        if reached > ends[-1]:
            plain = max(plain, _stepped(ends[-1], reached), reached + spare)
        columns, grows = _columns(None, reached, [end for end in ends if end > reached], total)
        columns = max(columns, total + spare)
        # After the first piece already, the other texts need not wait for the memory of plain ones.
        held = max(columns * packed, plain * width if reached > ends[0] else 0)
        replaced = max(columns * packed if grows else 0, plain * (width + packed))
    # Where the beginning of a prompt is held already, the rest is cut elsewhere.
    layers, longest = config.num_transformer_layers, min(prompt, piece + backend.MANY_POSITIONS - 1)
    share = 1.0 if backend.on_gpu() else min(1.0, _COPIES_AHEAD / (2 * layers))
    activations = _most_of(activations_of(config, itemsize), layers if backend.on_gpu() else _LAYERS_AHEAD) * longest
    return TextNeeds(held, int(replaced * share), activations + _masks(kind, past + prompt, longest, itemsize))


def _pieces(prompt: int, size: int) -> list[int]:
    """The lengths of the pieces in which a prompt is processed."""
    lengths = []
    while prompt:
        lengths.append(backend.prefill_step_size(prompt, size))
        prompt -= lengths[-1]
    return lengths or [0]


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


def activations_of(config: ModelConfig, itemsize: int) -> list[int]:
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


def _masks(kind: CacheKind, length: int, longest: int, itemsize: int) -> int:
    """Bytes of the masks that a sliding cache needs: booleans three times, and numbers."""
    if kind.window is None or length <= kind.window:
        return 0
    return longest * (kind.window + longest) * (3 + itemsize)
