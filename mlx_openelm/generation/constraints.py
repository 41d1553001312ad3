"""Text that must be JSON, match a regular expression or a grammar, or be one of several choices, through llguidance.

A `Constraint` follows one text. Before each token it limits the log-probabilities to the tokens that can follow; after
each token it gives those that must come next, which need no choice:

    constraint = make_constraint(options, tokenizer, vocab_size)
    logprobs = constraint.limit(decoder.prefill(mx.array([[*prompt, *constraint.opening]])))
    forced = constraint.advance(token)
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile
from typing import Any, cast

import mlx.core as mx

from ..errors import QUOTED, OpenELMError, RequestError
from ..ops.layers import log_softmax
from ..text.tokenizer import Tokenizer
from ..wording import flag, install
from .drafting import CheckedDraft, certain
from .grammars import as_grammar
from .options import GenerationOptions
from .vocabulary import llguidance_tokenizer


def make_constraint(options: GenerationOptions, tokenizer: Tokenizer, vocab_size: int) -> Constraint:
    """The constraint that `options` name, for a new text of a model with `vocab_size` tokens.

    Raises:
        RequestError: llguidance is not installed; the schema, expression, grammar or list is invalid or not supported,
            or no text or only the empty one fits it.
    """
    (name,) = options.constraints
    try:
        import llguidance
    except ImportError:
        raise RequestError(f"{flag(name)} needs the package llguidance: {install('constraints')}.") from None
    grammar = as_grammar(name, getattr(options, name))
    matcher = llguidance.LLMatcher(llguidance_tokenizer(tokenizer, vocab_size), grammar, log_level=0)
    if matcher.is_error():
        raise RequestError(f"{flag(name)} cannot be used: {_reason(matcher)}.")
    try:
        banned = {token for token, bias in (options.logit_bias or {}).items() if bias == -math.inf}
        constraint = Constraint(matcher, flag(name), vocab_size, banned)
        if not constraint.opening and constraint.allows_only(tokenizer.eos_token_ids):
            raise RequestError(f"{flag(name)} leaves no text but the empty one; change it.")
    except OpenELMError as error:
        raise RequestError(str(error)) from None
    return constraint


class Constraint:
    """What may follow in one text.

    `opening` are the tokens that it must begin with, which count as accepted; `done` says that no other token can
    follow those accepted.

    Args:
        matcher: an `LLMatcher` at the beginning of the text.
        source: what errors name: the flag.
        vocab_size: the number of the model's tokens.
        banned: tokens that are never taken without asking the model, so that a text that needs one is an error.
    """

    def __init__(self, matcher: Any, source: str, vocab_size: int, banned: Collection[int] = ()):
        self.matcher = matcher
        self.done = False
        self._source = source
        self._vocab_size = vocab_size
        self._banned = banned
        self._length = 0  # tokens accepted
        self._bits = mx.array([1 << bit for bit in range(8)], mx.uint8)
        self.opening = self._force()

    def advance(self, token: int) -> list[int]:
        """Accept a token; returns those that must follow it, which count as accepted too.

        Raises:
            OpenELMError: the token cannot follow here, which only a `sampler` of the caller's own can choose.
        """
        if not self.matcher.validate_tokens([token]):
            raise OpenELMError(f"The sampler chose token {token}, which {self._source} excludes.")
        self.matcher.consume_token(token)
        self._length += 1
        return self._force()

    def completed_by(self, count: int) -> bool:
        """Whether the first `count` tokens are the whole text, and no other token can follow."""
        return self.done and self._length == count

    def limit(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities [1, vocab] to those among the tokens that can follow; the others' are -inf.

        Raises:
            OpenELMError: no token can follow, and the text is not complete.
        """
        return self.limit_each(logprobs, [self._mask()])

    def limit_each(self, logprobs: mx.array, masks: Sequence[bytes]) -> mx.array:
        """`limit` for log-probabilities [L, vocab] of different places of the text: those of `check_draft`'s masks."""
        size = math.ceil(self._vocab_size / 8)
        packed = mx.stack([mx.array(cast(Any, memoryview(mask)[:size])) for mask in masks])  # a bit for each token
        allowed = (packed[:, :, None] & self._bits).reshape(len(masks), -1)
        if allowed.shape[1] > self._vocab_size:
            allowed = allowed[:, : self._vocab_size]
        return log_softmax(mx.where(allowed, logprobs, -mx.inf))

    def check_draft(self, tokens: Sequence[int], limit: int, many: int) -> CheckedDraft:
        """The first of these tokens that can follow, with the tokens that must come between them.

        Args:
            limit: the most tokens, in all.
            many: where so many tokens must follow a drafted one, the draft ends with it.
        """
        ahead = self.copy()
        draft = CheckedDraft([], [], [ahead._mask()])
        while len(draft.tokens) < min(limit, len(tokens)):
            token = tokens[len(draft.tokens)]
            if not ahead.matcher.validate_tokens([token]):
                break
            following, mask = [], None
            try:
                following = ahead.advance(token)
                mask = None if ahead.done else ahead._mask()
            except OpenELMError:  # raised again if the token is accepted
                pass
            if len(draft.tokens) + 1 + len(following) > limit or len(following) >= many:
                following, mask = [], None
            draft.add(token, following, mask)
            if mask is None or list(tokens[len(draft.tokens) - len(following) : len(draft.tokens)]) != following:
                break
        return draft

    def copy(self) -> Constraint:
        """A constraint in the same state, which goes its own way."""
        other = copy.copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    def allows_only(self, tokens: Iterable[int]) -> bool:
        """Whether none but these tokens can follow."""
        mask = int.from_bytes(self._mask(), "little")
        return not mask & ~sum(1 << token for token in tokens)

    def check(self, logprobs: mx.array) -> None:
        """Raise an `OpenELMError` if none of the tokens that can follow has a probability in `logprobs` [1, vocab].

        Log-probabilities that are NaN, of logits that are not finite, are not the constraint's failure.
        """
        if not mx.isnan(logprobs).any().item():
            raise OpenELMError(
                f"Every token that {self._source} allows here is banned by --logit-bias or a logits processor; allow "
                "one of them."
            )

    def _force(self) -> list[int]:
        """Accept the tokens that must come next."""
        forced: list[int] = [] if self.matcher.is_stopped() else self.matcher.compute_ff_tokens()
        forced = list(takewhile(lambda token: token not in self._banned, forced))
        forced = forced[: self.matcher.validate_tokens(forced)] if forced else []
        if forced:
            self.matcher.consume_tokens(forced)
        self._check()
        self._length += len(forced)
        self.done = self.matcher.is_stopped()
        return forced

    def _mask(self) -> bytes:
        mask: bytes = self.matcher.compute_bitmask()
        self._check()
        if not any(mask):
            raise self._stuck()
        return mask

    def _check(self) -> None:
        """Raise an `OpenELMError` unless the text is complete or can go on."""
        if not self.matcher.is_stopped() or (self.matcher.is_accepting() and not self.matcher.is_error()):
            return
        reason = _reason(self.matcher) or self.matcher.stop_reason()
        raise self._stuck() if reason.startswith("NoExtension") else OpenELMError(f"{self._source} failed: {reason}.")

    def _stuck(self) -> OpenELMError:
        return OpenELMError(f"{self._source} leaves no token of this model's vocabulary to go on with; change it.")


class DraftLimit:
    """What a constraint allows a draft model to draft: a `Limit`. Tokens that must follow are certain."""

    def __init__(self, constraint: Constraint):
        self._constraint = constraint
        self._ahead = constraint
        self._forced: list[int] = []

    def __call__(self, drafted: Sequence[int], logprobs: mx.array) -> mx.array | None:
        """Log-probabilities [1, vocab] of the token after those drafted to those allowed; None where the text ends."""
        try:
            if not drafted:
                self._ahead, self._forced = self._constraint.copy(), []
            elif self._forced:
                self._forced = self._forced[1:]
            else:
                self._forced = self._ahead.advance(drafted[-1])
            if self._forced:
                return certain(self._forced[:1], logprobs.shape[1])
            return None if self._ahead.done else self._ahead.limit(logprobs)
        except OpenELMError:  # raised again if the text comes here
            return None


def _reason(matcher: Any) -> str:
    """llguidance's reason for an error, without the grammar and the state that follow it."""
    message = re.split(r"\n +\d+ \||<state>", matcher.get_error())[0]
    lines = [line.strip() for line in message.splitlines()]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join(reasons or lines)[:QUOTED].strip().rstrip(".")
