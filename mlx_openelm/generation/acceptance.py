"""Which drafted tokens stay, and the token that follows them, so that the text follows the target's distribution.

Two kinds of drafts, both checked in one forward pass of the target over the drafted tokens:

- Drafts that are certain (found in a text, or the most likely tokens of a draft model). The target's own tokens are
  drawn as in plain decoding, and a drafted token stays while it equals the target's (`Row.take`). The text is that of
  plain decoding with the same seed, whatever is drafted, and a token d is accepted with probability p(d).
- Drafts drawn from a distribution q. Token d stays with probability min(1, p(d) / q(d)); after the first one that does
  not, the token is drawn from max(p - q, 0): `accept_drawn` (Leviathan et al., 2023, algorithm 1; Chen et al., 2023).
  A token is accepted with probability sum(min(p, q)), the most that any method reaches.
"""

from __future__ import annotations

import mlx.core as mx

from ..ops.layers import log_softmax
from .sampling import TextSampler


def draft_key(sampler: TextSampler, place: int) -> mx.array:
    """The key with which a draft model draws token `place` of the text."""
    return _keys(sampler, place)[0]


def accept_drawn(
    target: mx.array, drafts: mx.array, drafted: mx.array, sampler: TextSampler, start: int
) -> tuple[mx.array, mx.array]:
    """How many of L drafted tokens stay, [], and the token after them, []; lazy.

    Token `start + n` of the text has keys of its own for the draft, the decision and the draw after a refusal, so the
    same seed and the same number of drafted tokens give the same text. The token after L accepted ones is drawn with
    the key of plain decoding.

    Args:
        target: the target's log-probabilities [L + 1, vocab], before the filters.
        drafts: the log-probabilities [L, vocab] that the drafted tokens were drawn with, after the filters.
        drafted: the drafted tokens [L].
        sampler: the one that the draft model's tokens were filtered with.
        start: the place in the text of the first drafted token.
    """
    count = drafts.shape[0]
    scores = sampler.scores(target, start)  # [L + 1, vocab]
    p = log_softmax(scores)
    keys = [_keys(sampler, start + n) for n in range(count)]
    chances = mx.concatenate([mx.random.uniform(shape=(1,), key=decision) for _, decision, _ in keys])
    ratios = mx.take_along_axis(p[:count] - drafts, drafted[:, None], axis=-1)[:, 0]  # log(p / q), [L]
    accepted = mx.cumprod(chances < mx.exp(ratios), axis=0).sum()
    # Only the row after the accepted tokens is drawn from.
    draws = mx.stack([*(draw for *_, draw in keys), sampler.key_at(start + count)])
    row = mx.take(p, accepted, axis=0)
    rest = mx.maximum(mx.exp(row) - mx.exp(mx.take(drafts, mx.minimum(accepted, count - 1), axis=0)), 0)
    # Where rounding leaves nothing of p - q, p and q are the same.
    is_plain = (accepted == count) | (rest.sum() == 0)
    rest = mx.where(is_plain, mx.take(scores, accepted, axis=0), mx.log(rest))
    return accepted, mx.random.categorical(rest[None], key=mx.take(draws, accepted, axis=0))[0]


def _keys(sampler: TextSampler, place: int) -> mx.array:
    """Keys [3, 2] of the draft's draw, of the decision, and of the draw after a refusal."""
    return mx.random.split(sampler.key_at(place), 3)
