"""Adam with half the memory: weights in two parts, and moments in bfloat16.

A weight is its value in bfloat16, which the forward pass uses, and the low 16 bits of the float32 number: the float32
master weights take no memory of their own, and lose nothing. The moments are in bfloat16 as in DeepSeek-V3
(arXiv:2412.19437, section 3.3.3). They are rounded at random, up or down so that the mean is right: a second moment
changes by a thousandth a step, which rounding to the nearest number would lose. That makes 8 bytes for each number,
where copies in bfloat16, float32 master weights and float32 moments make 14.

An update takes a few kernels for each weight, since MLX fuses nothing across the steps that look at a number's bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ...errors import RequestError
from ..options import BFLOAT16, TrainOptions
from .optimizers import AdamW
from .strategy import here

# While a weight is updated, temporary arrays take about this many times the bytes of what is held of it.
TEMPORARY = 3

Weight = tuple[mx.array, mx.array]  # its value in bfloat16 and its low bits in uint16


def settled_bytes() -> int:
    """As `Strategy.settled_bytes`, with room for temporary arrays."""
    return here().settled_bytes // (1 + TEMPORARY)


def is_wanted(options: TrainOptions) -> bool:
    """Whether the options ask for such a state; then the model must be loaded in bfloat16."""
    return options.optimizer_dtype == BFLOAT16


def check_dtype(options: TrainOptions, dtype: str | mx.Dtype | None) -> None:
    """Refuse a type of the model that such a state cannot have; None leaves the choice to us.

    Raises:
        RequestError: the options ask for such a state, and for another type than bfloat16.
    """
    if is_wanted(options) and dtype not in (None, BFLOAT16):
        raise RequestError(f"--optimizer-dtype bfloat16 needs --dtype bfloat16, not {dtype}.")


def supports(optimizer: optim.Optimizer, compute_dtype: mx.Dtype | None) -> bool:
    """Whether an optimizer's state can be held this way: Adam's and our AdamW's, with a forward pass in bfloat16."""
    return type(optimizer) in (optim.Adam, AdamW) and compute_dtype is not None and compute_dtype == mx.bfloat16


def split(weight: mx.array) -> Weight:
    """A float32 weight as its value in bfloat16 and its low bits in uint16; half-way values are rounded away from 0."""
    bits = weight.astype(mx.float32).view(mx.uint32)
    # NaN must not become a number.
    bits = mx.where((bits & 0x7FFFFFFF) > 0x7F800000, mx.array(0x7FC00000, mx.uint32), bits)
    high = (bits + 0x8000) >> 16
    return high.astype(mx.uint16).view(mx.bfloat16), (bits & 0xFFFF).astype(mx.uint16)


def joined(high: mx.array, low: mx.array) -> mx.array:
    """The float32 weight that `split` took apart."""
    bits = high.view(mx.uint16).astype(mx.uint32) << 16
    return (bits + low.view(mx.int16).astype(mx.int32).view(mx.uint32)).view(mx.float32)


def update(
    optimizer: Any,
    state: dict[str, Any],
    names: Sequence[str],
    weights: Sequence[Weight],
    gradients: Sequence[mx.array],
    factor: mx.array,
    rate: mx.array,
    learns: mx.array | None,
) -> tuple[list[Weight], dict[str, Any]]:
    """One update of weights in two parts: new ones, and the optimizer's new state.

    Args:
        optimizer: MLX's Adam or our AdamW, whose settings count.
        state: the optimizer's, with moments in bfloat16.
        factor: the gradients are multiplied by it.
        rate: the learning rate.
        learns: a boolean; if it is false, nothing changes. None means true.
    """
    flat = dict(tree_flatten(state))
    step = flat["step"] + 1
    beta1, beta2 = optimizer.betas
    step_size, root_scale = rate, mx.array(1.0)
    if optimizer.bias_correction:
        step_size, root_scale = rate / (1 - beta1**step), mx.rsqrt(1 - beta2**step)
    updated: list[Weight] = []
    for number, (name, (high, low), gradient) in enumerate(zip(names, weights, gradients, strict=True)):
        slope = gradient.astype(mx.float32) * factor
        moments = [f"{name}.m", f"{name}.v"]
        m, v = (flat[moment].astype(mx.float32) for moment in moments)
        m = beta1 * m + (1 - beta1) * slope
        v = beta2 * v + (1 - beta2) * mx.square(slope)
        weight = joined(high, low)
        if weight.ndim > 1:  # only matrices decay, see `optimizers`
            weight = weight * (1 - rate * getattr(optimizer, "weight_decay", 0.0))
        weight = weight - step_size * m / (mx.sqrt(v) * root_scale + optimizer.eps)
        random = _random(weight.shape, step.astype(mx.uint32), number)
        new = [*split(weight), _rounded_at_random(m, random), _rounded_at_random(v, random >> 16)]
        if learns is not None:
            old = high, low, *(flat[moment] for moment in moments)
            new = [mx.where(learns, after, before) for after, before in zip(new, old, strict=True)]
        updated.append((new[0], new[1]))
        flat[moments[0]], flat[moments[1]] = new[2:]
    flat["step"] = step if learns is None else mx.where(learns, step, flat["step"])
    flat["learning_rate"] = rate
    return updated, tree_unflatten(list(flat.items()))


def _random(shape: tuple[int, ...], step: mx.array, number: int) -> mx.array:
    """32 random bits for each element of an array; they derive from its place, the step and the array's number."""
    seed = _hashed(step * 0x9E3779B9 + number)
    return _hashed(mx.arange(math.prod(shape), dtype=mx.uint32) + seed).reshape(shape)


def _hashed(x: mx.array) -> mx.array:
    """32 bits that look random, for each uint32 (Chris Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def _rounded_at_random(x: mx.array, random: mx.array) -> mx.array:
    """float32 to one of both neighbours in bfloat16, with the probabilities that make x the mean.

    Args:
        random: uint32, whose low 16 bits decide.
    """
    bits = x.view(mx.uint32)
    rounded = ((bits + (random & 0xFFFF)) >> 16).astype(mx.uint16).view(mx.bfloat16)
    return mx.where(mx.isfinite(x), rounded, x.astype(mx.bfloat16))
