"""Log-probabilities of tokens without a [tokens, vocabulary] array: logits exist for a few positions at a time.

A loss of whole answers weighs each token's gradient by a number that is known only when all tokens are. So the gradient
of each position's own log-probability is kept, which is multiplied by that number in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...model import OpenELM
from ...modules import output_layer
from .loss import softmax
from .recompute import substituted, trainable
from .strategy import here


def log_likelihoods(
    model: OpenELM,
    hidden_states: mx.array,
    targets: mx.array,
    *,
    differentiable: bool = True,
    entropies: bool = False,
) -> tuple[mx.array, mx.array]:
    """The log-probability of each target [rows], and the mean of its position's logits [rows], in float32.

    Args:
        hidden_states: [rows, model_dim].
        targets: token ids [rows].
        differentiable: False computes no gradients; the second result never has any.
        entropies: give the entropy of each position in place of its mean logit.
    """
    chunk = here().loss_rows
    parameters, weights = trainable([output_layer(model)])

    def logits_of(rows: mx.array, *values: mx.array) -> mx.array:
        with substituted(parameters, values):
            return model.logits(rows)

    def chunks(hidden_states: mx.array, *weights: mx.array, slopes: bool) -> list[mx.array]:
        """What `log_likelihoods` gives, and with `slopes` each log-probability's gradient for its hidden state."""
        found: list[list[mx.array]] = []
        for start in range(0, targets.size, chunk):
            part = slice(start, start + chunk)
            # One chunk after the other, so that only one chunk's logits exist at a time.
            rows = mx.depends(hidden_states[part], found[-1]) if found else hidden_states[part]
            logits = logits_of(rows, *weights)
            likelihood, second, slope = _chunk(logits, targets[part, None], entropies)
            found.append([likelihood, second])
            if slopes:
                found[-1] += mx.vjp(lambda rows: [logits_of(rows, *weights)], [rows], [slope])[1]
        return [mx.concatenate(list(parts)) for parts in zip(*found, strict=True)]

    if not differentiable:
        likelihoods, others = chunks(hidden_states, *weights, slopes=False)
        return likelihoods, others
    function = mx.custom_function(lambda *arrays: chunks(*arrays, slopes=not weights))

    @function.vjp
    def _(primals, cotangents, outputs):
        share = cotangents[0]
        if not weights:
            return [(outputs[2] * share[:, None]).astype(outputs[2].dtype)]
        return _gradients(logits_of, list(primals), targets, share, chunk)

    likelihoods, others, *_ = function(hidden_states, *weights)  # type: ignore[misc]
    return likelihoods, mx.stop_gradient(others)


def _gradients(
    logits_of: Callable[..., mx.array], primals: list[mx.array], targets: mx.array, share: mx.array, chunk: int
) -> list[mx.array]:
    """The gradients for hidden states and trained weights of the output layer, for which logits are computed again."""
    hidden_states, *weights = primals
    by_rows: list[mx.array] = []
    # In float32: in 16 bits a sum over many chunks would lose most of its terms.
    by_weights = [mx.zeros(weight.shape) for weight in weights]
    for start in range(0, targets.size, chunk):
        part = slice(start, start + chunk)
        rows = mx.depends(hidden_states[part], [share, *by_rows[-1:], *by_weights])
        logits = logits_of(rows, *weights)
        slope = _chunk(logits, targets[part, None])[2] * share[part, None].astype(logits.dtype)
        gradients = mx.vjp(lambda *arrays: [logits_of(*arrays)], [rows, *weights], [slope])[1]
        by_rows.append(gradients[0])
        by_weights = [a + b for a, b in zip(by_weights, gradients[1:], strict=True)]
    rounded = [total.astype(weight.dtype) for total, weight in zip(by_weights, weights, strict=True)]
    return [mx.concatenate(by_rows), *rounded]


def _chunk(logits: mx.array, index: mx.array, entropies: bool = False) -> tuple[mx.array, mx.array, mx.array]:
    """For logits [rows, vocab] and ids [rows, 1]: log-probabilities [rows], mean logits or entropies [rows], and the
    gradients of the log-probabilities for the logits [rows, vocab]."""
    exact = logits.astype(mx.float32)
    shares, lse = softmax(exact)
    likelihood = mx.take_along_axis(exact, index, axis=-1) - lse
    slope = mx.where(mx.arange(logits.shape[-1]) == index, 1 - shares, -shares)
    second = lse[:, 0] - mx.sum(shares * exact, axis=-1) if entropies else mx.mean(exact, axis=-1)
    return likelihood[:, 0], second, slope.astype(logits.dtype)
