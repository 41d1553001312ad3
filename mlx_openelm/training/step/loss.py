"""Cross-entropy of a language model without a [tokens, vocabulary] array: logits exist for a few positions at a time.

The gradient is computed in the forward pass, while a chunk's logits exist (as in Liger Kernel, arXiv:2410.10989), so
nothing is computed twice.
"""

from __future__ import annotations

import mlx.core as mx

from ... import backend
from ...model import OpenELM
from ...modules import output_layer
from ...ops import exponentials
from ..data.batches import IGNORED
from .recompute import substituted, trainable
from .strategy import here

_HAS_FUSED = hasattr(mx.fast, "cross_entropy")  # later than MLX 0.32.0


def cross_entropy(
    model: OpenELM,
    hidden_states: mx.array,
    targets: mx.array,
    *,
    learned: mx.array | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    differentiable: bool = True,
) -> tuple[mx.array, mx.array]:
    """The summed loss of predicting `targets` [rows] from hidden states [rows, model_dim]: objective and likelihood.

    Args:
        targets: token ids; rows with `IGNORED` do not count.
        learned: booleans [rows], the rows that count, if `targets` has other ids in place of `IGNORED`.
        z_loss: this times the square of logsumexp(logits) is added for each row (arXiv:2204.02311, section 5).
        label_smoothing: this share of each target is spread over the whole vocabulary, as in PyTorch.
        differentiable: False computes no gradients.

    Returns:
        the objective to minimize, and the negative log-likelihood alone, which has no gradient: float32 scalars.
    """
    chunk = here().loss_rows
    if learned is None:
        targets, learned = split_targets(targets)
    parameters, weights = trainable([output_layer(model)])

    def logits_of(rows: mx.array, *values: mx.array) -> mx.array:
        with substituted(parameters, values):
            return model.logits(rows)

    def losses(hidden_states: mx.array, *weights: mx.array) -> list[mx.array]:
        """Objective, likelihood, and the objective's gradients for all arguments."""
        objective = likelihood = mx.array(0.0)
        by_rows: list[mx.array] = []
        # In float32: in 16 bits a sum over many chunks would lose most of its terms.
        by_weights = [mx.zeros(weight.shape) for weight in weights]
        for start in range(0, targets.size, chunk):
            part = slice(start, start + chunk)
            rows, wanted = hidden_states[part], (targets[part, None], learned[part, None])
            # One chunk after the other, so that only one chunk's logits exist at a time.
            rows = mx.depends(rows, [objective, *by_rows[-1:], *by_weights])
            logits = logits_of(rows, *weights)
            sums, slope = _chunk(logits, *wanted, z_loss, label_smoothing)
            objective, likelihood = objective + sums[0], likelihood + sums[1]
            if differentiable:
                gradients = mx.vjp(lambda *a: [logits_of(*a)], [rows, *weights], [slope])[1]
                by_rows.append(gradients[0])
                by_weights = [a + b for a, b in zip(by_weights, gradients[1:], strict=True)]
        if not differentiable:
            return [objective, likelihood]
        rounded = [sum.astype(weight.dtype) for sum, weight in zip(by_weights, weights, strict=True)]
        return [objective, likelihood, mx.concatenate(by_rows), *rounded]

    if not differentiable:
        objective, likelihood = losses(hidden_states, *weights)
        return objective, likelihood
    function = mx.custom_function(losses)

    @function.vjp
    def _(primals, cotangents, outputs):
        return [(gradient * cotangents[0]).astype(gradient.dtype) for gradient in outputs[2:]]

    objective, likelihood, *_ = function(hidden_states, *weights)  # type: ignore[misc]
    return objective, likelihood


def split_targets(targets: mx.array) -> tuple[mx.array, mx.array]:
    """Targets with 0 in place of `IGNORED`, and booleans for those that are learned."""
    learned = targets != IGNORED
    return mx.where(learned, targets, 0), learned


def _chunk(
    logits: mx.array, index: mx.array, learned: mx.array, z_loss: float, label_smoothing: float
) -> tuple[tuple[mx.array, mx.array], mx.array]:
    """Summed objective and likelihood of logits [rows, vocab], and the objective's gradient for the logits.

    Args:
        index: the ids to predict [rows, 1].
        learned: the rows that count, booleans [rows, 1].
    """
    if not (z_loss or label_smoothing) and backend.on_gpu() and _HAS_FUSED:
        return _fused_chunk(logits, index, learned)
    exact = logits.astype(mx.float32)
    shares, lse = softmax(exact)
    likelihood = lse - mx.take_along_axis(exact, index, axis=-1)
    objective = likelihood
    if label_smoothing:
        even = lse - mx.mean(exact, axis=-1, keepdims=True)
        objective = (1 - label_smoothing) * likelihood + label_smoothing * even
    if z_loss:
        objective = objective + z_loss * mx.square(lse)
    # The gradient of lse is the softmax; below, the gradients of the terms that are subtracted from it.
    if z_loss:
        shares = shares * (1 + 2 * z_loss * lse)
    hit = mx.arange(logits.shape[-1]) == index
    slope = shares - mx.where(hit, 1 - label_smoothing, 0.0) - label_smoothing / logits.shape[-1]
    slope = mx.where(learned, slope, 0.0).astype(logits.dtype)
    return (mx.sum(mx.where(learned, objective, 0.0)), mx.sum(mx.where(learned, likelihood, 0.0))), slope


def _fused_chunk(logits: mx.array, index: mx.array, learned: mx.array) -> tuple[tuple[mx.array, mx.array], mx.array]:
    """`_chunk` for the likelihood alone, in one kernel of MLX's each way: it writes no float32 logits."""
    learned = learned[:, 0]
    counts = learned.astype(mx.float32)
    (losses,), (slope,) = mx.vjp(lambda x: [mx.fast.cross_entropy(x, index[:, 0])], [logits], [counts])
    likelihood = mx.sum(mx.where(learned, losses, 0.0))
    return (likelihood, likelihood), slope


def softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The softmax of float32 logits [rows, vocab], and the logarithm of the sum it is divided by [rows, 1]."""
    if backend.on_gpu():  # one kernel reads the logits once; the exponential is fused into what uses it
        lse = mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.exp(logits - lse), lse
    top = mx.max(logits, axis=-1, keepdims=True)
    powers = exponentials.exp_below(logits, top)
    total = mx.sum(powers, axis=-1, keepdims=True)
    return powers * (1 / total), top + mx.log(total)
