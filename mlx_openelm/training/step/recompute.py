"""Recomputing values in the backward pass instead of keeping them, and calling modules with other parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

Parameters = list[tuple[nn.Module, str]]


def trainable(modules: Sequence[nn.Module]) -> tuple[Parameters, list[mx.array]]:
    """The trainable parameters of `modules`, each as its owner and its name there, and their values."""
    parameters: Parameters = []
    for root in modules:
        for module in root.modules():
            own = module.trainable_parameters()
            parameters += [(module, name) for name, value in own.items() if isinstance(value, mx.array)]
    return parameters, [module[name] for module, name in parameters]


@contextmanager
def substituted(parameters: Parameters, values: Sequence[mx.array]) -> Iterator[None]:
    """Give parameters these values while the block runs."""
    previous = [module[name] for module, name in parameters]
    _set(parameters, values)
    try:
        yield
    finally:
        _set(parameters, previous)


def _set(parameters: Parameters, values: Sequence[mx.array]) -> None:
    for (module, name), value in zip(parameters, values, strict=True):
        module[name] = value


def recomputed(modules: Sequence[nn.Module], function: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """function(*inputs); the backward pass recomputes everything from the inputs, and nothing else is kept.

    What the gradients do not need, such as the result of the last matrix product, is not recomputed.

    Args:
        modules: those whose trainable parameters `function` uses; gradients reach these and the inputs.
    """
    parameters, values = trainable(modules)
    count = len(inputs)

    def call(*arrays: mx.array) -> mx.array:
        with substituted(parameters, arrays[count:]):
            return function(*arrays[:count])

    kept = mx.custom_function(call)

    @kept.vjp
    def _(primals, cotangent, _):
        primals = primals if isinstance(primals, tuple | list) else [primals]
        # Wait for the incoming gradient: otherwise MLX could recompute every layer at once.
        primals = mx.depends(list(primals), [cotangent])
        gradients = mx.vjp(lambda *arrays: [call(*arrays)], primals, [cotangent])[1]
        # Compute the parameters' gradients first: left for the end, they would keep their inputs alive.
        return [*mx.depends(gradients[:count], gradients[count:]), *gradients[count:]] if values else gradients

    return kept(*inputs, *values)  # type: ignore[return-value]
