"""Modules that apply another adapter to each row of a batch: the base once for all rows, then each adapter to its own.

A row's values are those of a forward pass with its adapter alone: bit for bit on the CPU kernels where each row is one
position, as in a decoding step, because there no product depends on the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model import add_to
from .layers import LoRAEmbedding, LoRALinear


class Division:
    """Which rows of a batch belong to which choice of the modules below; those of a model share one, which changes.

    The rows of a choice are brought together, unless they are already: a batch sorted by adapter takes less time.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sequence: list[int] = []  # the choices in the order of their first rows
        self._ends: list[int] = []  # where the rows of each choice but the last end, in that order
        self._order: mx.array | None = None
        self._back: mx.array | None = None

    def assign(self, choices: Sequence[int]) -> None:
        """Give each row the number of its choice."""
        self.rows = len(choices)
        self._sequence = list(dict.fromkeys(choices))
        place = {choice: place for place, choice in enumerate(self._sequence)}
        order = sorted(range(self.rows), key=lambda row: place[choices[row]])
        self._ends = list(accumulate(choices.count(choice) for choice in self._sequence[:-1]))
        self._order = self._back = None
        if order != list(range(self.rows)):
            self._order = mx.array(order)
            self._back = mx.array(sorted(range(self.rows), key=order.__getitem__))

    def split(self, x: mx.array) -> list[tuple[int, mx.array]]:
        """x [rows, ...] in parts, each with the number of its choice."""
        if x.shape[0] != self.rows:
            raise ValueError(f"Adapters were given for {self.rows} rows, but the model was called with {x.shape[0]}.")
        parts = mx.split(x if self._order is None else x[self._order], self._ends)
        return list(zip(self._sequence, parts, strict=True))

    def join(self, parts: list[mx.array]) -> mx.array:
        """The inverse of `split`."""
        joined = mx.concatenate(parts)
        return joined if self._back is None else joined[self._back]


class _Mixed(nn.Module):
    """Computes each row with one of several modules that stand in for the same one, by the division."""

    def __init__(self, base: nn.Module, choices: Sequence[nn.Module], division: Division):
        super().__init__()
        self.base = base
        self._choices, self._division = tuple(choices), division

    def _each(self, x: mx.array, call: Callable[[Any, mx.array], mx.array]) -> mx.array:
        choices, division = self["_choices"], self._division
        return division.join([call(choices[number], part) for number, part in division.split(x)])


class MixedLinear(_Mixed):
    """A linear layer; choices with a low-rank change share one product with the base."""

    fuses_residual = True

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [rows, ..., in] to [rows, ..., out], plus the residual if there is one."""
        choices, base, split = self["_choices"], self["base"], self._division.split
        added = [None] * len(choices) if residual is None else [part for _, part in split(residual)]
        parts = []
        for (number, part), (_, y), rest in zip(split(x), split(base(x)), added, strict=False):
            choice = choices[number]
            if choice is base:
                parts.append(y if rest is None else rest + y)
            elif isinstance(choice, LoRALinear):
                parts.append(choice.adapt(y, part, rest))
            else:  # whole weights
                parts.append(choice(part) if rest is None else add_to(rest, choice, part))
        return self._division.join(parts)


class MixedEmbedding(_Mixed):
    """An embedding, and the output layer if it is shared."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens [rows, ...] to their embeddings [rows, ..., dims], in float32."""
        return self._each(tokens, lambda choice, part: choice(part).astype(mx.float32))

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states [rows, ..., dims] to logits [rows, ..., vocab]."""
        choices, base, split = self["_choices"], self["base"], self._division.split
        if not any(_changes_logits(choice, base) for choice in choices):
            return base.as_linear(x)
        parts = []
        for (number, part), (_, y) in zip(split(x), split(base.as_linear(x)), strict=True):
            choice = choices[number]
            if isinstance(choice, LoRAEmbedding):
                parts.append(choice.adapt_logits(y, part))
            else:
                parts.append(y if choice is base else choice.as_linear(part))
        return self._division.join(parts)


class MixedNorm(_Mixed):
    """A norm, which only whole weights change."""

    def __init__(self, base: nn.Module, choices: Sequence[nn.Module], division: Division):
        super().__init__(base, choices, division)
        self.weight = base["weight"]  # tells the model the type to compute in

    def __call__(self, x: mx.array) -> mx.array:
        """x [rows, ..., dims] to the same shape."""
        return self._each(x, lambda choice, part: choice(part))


def _changes_logits(choice: nn.Module, base: nn.Module) -> bool:
    return choice.output_side if isinstance(choice, LoRAEmbedding) else choice is not base


def mixed_modules(
    base: Mapping[str, nn.Module], adapters: Sequence[Mapping[str, nn.Module]], division: Division
) -> dict[str, nn.Module]:
    """For each module that one of the adapters replaces, by path, the one that computes every row with its adapter's.

    Args:
        base: all modules of the model by path.
        adapters: for each choice of the division the modules that replace the base's; none for the base alone.
    """
    mixed: dict[str, nn.Module] = {}
    for path in dict.fromkeys(path for modules in adapters for path in modules):
        choices = [modules.get(path, base[path]) for modules in adapters]
        kind: type[_Mixed] = MixedLinear
        if isinstance(base[path], nn.Embedding | nn.QuantizedEmbedding):
            kind = MixedEmbedding
        elif isinstance(base[path], nn.RMSNorm):
            kind = MixedNorm
        mixed[path] = kind(base[path], choices, division)
    return mixed
