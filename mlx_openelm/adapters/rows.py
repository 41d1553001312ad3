"""Modules that give each row of a decoding step its own adapter: one product with the base for all, then the changes.

A row's values are those of a step with its adapter alone, and on the CPU kernels the same bits, because no product
there depends on the number of rows. The changes take few operations, however many adapters there are: `lora_a` of all
is one matrix, and `lora_b` is chosen for each row within one product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model import add_to
from ..ops import layers
from .layers import DoRALinear, LoRAEmbedding, LoRALinear, chosen_products


class Division:
    """Which of several adapters each row of a step has. All mixed modules of a model share one, and it changes."""

    def __init__(self) -> None:
        self.choices: list[int] = []
        self._made: dict[Any, Any] = {}

    def assign(self, choices: Sequence[int]) -> None:
        """Give each row the number of its adapter."""
        self.choices, self._made = list(choices), {}

    def check(self, x: mx.array, dims: int) -> None:
        """Compare the number of rows with that of x [rows, ..., dims].

        Raises:
            ValueError: it differs, or there is more than one position for each row.
        """
        if x.size != len(self.choices) * dims:
            raise ValueError(
                f"Adapters were given for {len(self.choices)} rows of one position each, but the model was called with "
                f"{x.size // dims} positions."
            )

    def rows_of(self, choice: int) -> mx.array | None:
        """The rows with this adapter, or None."""
        rows = [row for row, number in enumerate(self.choices) if number == choice]
        return self._once(choice, lambda: mx.array(rows) if rows else None)

    def indices(self, numbers: tuple[int, ...]) -> mx.array:
        """numbers[choice] of each row."""
        return self._once(numbers, lambda: mx.array([numbers[choice] for choice in self.choices], mx.uint32))

    def blocks(self, numbers: tuple[int, ...], count: int) -> mx.array:
        """For each row the index of block numbers[choice] of its `count` blocks, in an array of all rows' blocks."""

        def make() -> mx.array:
            blocks = (min(numbers[choice], count - 1) for choice in self.choices)
            return mx.array([row * count + block for row, block in enumerate(blocks)], mx.uint32)

        return self._once((numbers, count), make)

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class _Stack:
    """The low-rank changes of one rank, of several adapters to one linear layer.

    Args:
        factors: `lora_a` [rank, in] and `lora_b` [rank, out] with the scale, of each adapter that has such a change.
        numbers: for each adapter its place among the factors, or their number if it has no such change.
    """

    def __init__(self, factors: Sequence[tuple[mx.array, mx.array]], numbers: Sequence[int]):
        self.rank, self.count, self.numbers = factors[0][0].shape[0], len(factors), tuple(numbers)
        nothing = mx.zeros_like(factors[0][1])
        self.a = mx.concatenate([a for a, _ in factors])  # [count * rank, in]
        self.b = mx.stack([*(b for _, b in factors), nothing])  # [count + 1, rank, out]

    def change(self, x: mx.array, division: Division) -> mx.array:
        """What the adapters add to the base's output for x [rows, ..., in]: [rows, 1, out]."""
        z = layers.linear(x, self.a).reshape(-1, self.rank)  # [rows * count, rank]
        if self.count > 1:
            z = z[division.blocks(self.numbers, self.count)]
        return chosen_products(z, self.b, division.indices(self.numbers))


class _Mixed(nn.Module):
    """Several modules that stand in for the same one, the base: row i is computed by choice division.choices[i]."""

    def __init__(self, base: nn.Module, choices: Sequence[nn.Module], division: Division):
        super().__init__()
        self.base = base
        self._division = division
        # Those that do not share a product with the base.
        self._others = {number: choice for number, choice in enumerate(choices) if choice is not base}

    def _each(self, y: mx.array, call: Callable[[Any, mx.array], mx.array]) -> mx.array:
        """y [rows, ...] of the base with the rows of other choices replaced by call(choice, rows)."""
        for number, choice in self["_others"].items():
            if (rows := self._division.rows_of(number)) is not None:
                y[rows] = call(choice, rows)
        return y


class MixedLinear(_Mixed):
    """A linear layer."""

    fuses_residual = True

    def __init__(self, base: nn.Module, choices: Sequence[nn.Module], division: Division, dtype: mx.Dtype):
        super().__init__(base, choices, division)
        low_rank = {number: choice for number, choice in enumerate(choices) if isinstance(choice, LoRALinear)}
        self._others = {number: choice for number, choice in self["_others"].items() if number not in low_rank}
        factors = {number: choice.applied(dtype) for number, choice in low_rank.items()}
        self._stacks = []
        for rank in sorted({a.shape[0] for a, *_ in factors.values()}):
            same = {number: (a, b) for number, (a, b, *_) in factors.items() if a.shape[0] == rank}
            places = {number: place for place, number in enumerate(same)}
            numbers = [places.get(number, len(same)) for number in range(len(choices))]
            self._stacks.append(_Stack(list(same.values()), numbers))
        self._excess: mx.array | None = None
        self._is_dora = tuple(int(isinstance(choice, DoRALinear)) for choice in choices)
        if any(self["_is_dora"]):
            nothing = mx.zeros_like(next(iter(factors.values()))[1][0])
            excess = [factors[number][2] if dora else nothing for number, dora in enumerate(self["_is_dora"])]
            self._excess = mx.stack(excess)  # [choices, out]
        mx.eval([(stack.a, stack.b) for stack in self["_stacks"]], self._excess)

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """x [rows, ..., in] to [rows, ..., out], plus the residual if there is one."""
        self._division.check(x, x.shape[-1])
        if self._excess is None:
            y = self["base"](x) if residual is None else add_to(residual, self["base"], x)
            y = self._add_changes(y, x)
        else:
            y = self._with_dora(self["base"](x), x, residual, self._excess)

        def call(choice: Any, rows: mx.array) -> mx.array:
            return choice(x[rows]) if residual is None else add_to(residual[rows], choice, x[rows])

        return self._each(y, call)

    def _add_changes(self, y: mx.array, x: mx.array) -> mx.array:
        for stack in self["_stacks"]:
            y = y + stack.change(x, self._division).reshape(y.shape).astype(y.dtype)
        return y

    def _with_dora(self, y: mx.array, x: mx.array, residual: mx.array | None, excess: mx.array) -> mx.array:
        """From the base's output y; DoRA adds the residual last, LoRA first."""
        shape = (len(y), *[1] * (y.ndim - 2), -1)
        excess = excess[self._division.indices(tuple(range(len(excess))))].reshape(shape)
        dora = self._add_changes(y + excess * y, x)
        if residual is None:
            return dora
        is_dora = self._division.indices(self["_is_dora"]).reshape(shape).astype(mx.bool_)
        return mx.where(is_dora, residual + dora, self._add_changes(residual + y, x))


class MixedEmbedding(_Mixed):
    """An embedding, and the output layer if it is shared."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """tokens [rows, ...] to their embeddings [rows, ..., dims], in float32."""
        self._division.check(tokens, 1)
        y = self["base"](tokens).astype(mx.float32)
        return self._each(y, lambda choice, rows: choice(tokens[rows]).astype(mx.float32))

    def as_linear(self, x: mx.array) -> mx.array:
        """Hidden states [rows, ..., dims] to logits [rows, ..., vocab]."""
        self._division.check(x, x.shape[-1])
        y = base = self["base"].as_linear(x)

        def call(choice: Any, rows: mx.array) -> mx.array:
            if isinstance(choice, LoRAEmbedding):
                return choice.adapt_logits(base[rows], x[rows])
            return choice.as_linear(x[rows])

        return self._each(y, call)


class MixedNorm(_Mixed):
    """A norm, which only whole weights change."""

    def __init__(self, base: nn.Module, choices: Sequence[nn.Module], division: Division):
        super().__init__(base, choices, division)
        self.weight = base["weight"]  # tells the model the type to compute in

    def __call__(self, x: mx.array) -> mx.array:
        """x [rows, ..., dims] to the same shape."""
        return self._each(self["base"](x), lambda choice, rows: choice(x[rows]))


def mixed_modules(
    base: Mapping[str, nn.Module], adapters: Sequence[Mapping[str, nn.Module]], division: Division, dtype: mx.Dtype
) -> dict[str, nn.Module]:
    """For each module that one of the adapters replaces, by path, the one that computes every row with its adapter's.

    Args:
        base: all modules of the model by path.
        adapters: for each choice of the division the modules that replace the base's; none for the base alone.
        dtype: the type of activations.
    """
    mixed: dict[str, nn.Module] = {}
    for path in dict.fromkeys(path for modules in adapters for path in modules):
        choices = [modules.get(path, base[path]) for modules in adapters]
        if isinstance(base[path], nn.Embedding | nn.QuantizedEmbedding):
            mixed[path] = MixedEmbedding(base[path], choices, division)
        elif isinstance(base[path], nn.RMSNorm):
            mixed[path] = MixedNorm(base[path], choices, division)
        else:
            mixed[path] = MixedLinear(base[path], choices, division, dtype)
    return mixed
