"""Values that the backward pass makes again rather than keeps, and modules called with other parameters than theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

Parameters = list[tuple[nn.Module, str]]


def trainable(modules: Sequence[nn.Module]) -> tuple[Parameters, list[mx.array]]:
    """Where the trainable parameters of `modules` are: the module that owns each, its name there. And their values."""
    places: Parameters = []
    for root in modules:
        for module in root.modules():
            own = module.trainable_parameters()
            places += [(module, name) for name, value in own.items() if isinstance(value, mx.array)]
    return places, [module[name] for module, name in places]


@contextmanager
def substituted(places: Parameters, values: Sequence[mx.array]) -> Iterator[None]:
    """Let parameters have these values while the block runs."""
    previous = [module[name] for module, name in places]
    _set(places, values)
    try:
        yield
    finally:
        _set(places, previous)


def _set(places: Parameters, values: Sequence[mx.array]) -> None:
    for (module, name), value in zip(places, values, strict=True):
        module[name] = value


def recomputed(modules: Sequence[nn.Module], function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """function(*inputs), of which only the inputs are kept for the backward pass; the rest is computed again there.

    What the gradients do not need is not computed again: of a last matrix product in `function`, nothing is.
    `modules` are those whose trainable parameters `function` uses; gradients reach these and the inputs.
    """
    places, values = trainable(modules)
    count = len(inputs)

    def call(*arrays: mx.array) -> mx.array:
        with substituted(places, arrays[count:]):
            return function(*arrays[:count])

    kept = mx.custom_function(call)

    @kept.vjp
    def _(primals, cotangent, _):
        primals = primals if isinstance(primals, tuple | list) else [primals]
        # Not before its gradient is asked for: else every layer could be computed again at once.
        primals = mx.depends(list(primals), [cotangent])
        gradients = mx.vjp(lambda *arrays: [call(*arrays)], primals, [cotangent])[1]
        # Those of parameters first: left for the end, they would keep alive what they are made of.
        return [*mx.depends(gradients[:count], gradients[count:]), *gradients[count:]] if values else gradients

    return kept(*inputs, *values)  # type: ignore[return-value]
