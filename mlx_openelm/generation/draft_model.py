"""Drafts of a smaller model, for several texts at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .. import backend
from ..cache import make_cache, step_caches
from ..errors import RequestError, name_options, quote
from ..messages import warn
from ..model import OpenELM
from ..ops.layers import log_softmax
from ..text.tokenizer import Tokenizer
from .acceptance import draft_key
from .draft_length import AcceptanceRates, Plan
from .drafting import LEAST_CHANCE, Draft
from .drawing import process_logits
from .sampling import LogitsProcessor, TextSampler, greedy

# Takes the tokens drafted so far and log-probabilities [1, vocab] of the next; gives those that a constraint allows, or
# None where nothing can be drafted.
Limit = Callable[[Sequence[int], mx.array], mx.array | None]

# After so many tokens that nothing was drafted for, the draft model begins again with the text's last ones: reading
# all of them would cost more than a trial is worth.
RESTART_AFTER = 256
RESTART_WITH = 64


def check_draft_model(
    model: OpenELM, draft: OpenELM, tokenizer: Tokenizer | None = None, draft_tokenizer: Tokenizer | None = None
) -> None:
    """Raise a `RequestError` unless both models have the same tokens; warn of a draft model that is too big to help.

    The tokenizers are compared if both are given.
    """
    if not isinstance(draft, OpenELM):
        raise RequestError(f"--draft-model must be a model, from load(), got {quote(draft)}.")
    sizes = draft.config.vocab_size, model.config.vocab_size
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"--draft-model has {sizes[0]:,} tokens, and the model has {sizes[1]:,}; choose a draft model with the "
            "model's tokenizer."
        )
    if tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = (
            [one.id_to_token(token) for token in range(min(one.vocab_size, sizes[1]))]
            for one in (tokenizer, draft_tokenizer)
        )
        if ours != theirs:
            first = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
            raise RequestError(
                f"--draft-model has another tokenizer than the model, which differs at token {first}; choose a draft "
                "model with the model's tokenizer."
            )
    counts = draft.config.num_parameters, model.config.num_parameters
    if counts[0] > counts[1]:
        warn(
            name_options(
                f"--draft-model has {counts[0] / 1e6:,.0f} million parameters, more than the model's "
                f"{counts[1] / 1e6:,.0f}; drafts of a smaller model cost less."
            )
        )


class DraftModel:
    """A model that drafts for any number of texts, and the seconds that it takes, as measured.

    Args:
        keeps_text: what it has read of a text serves the next one, as far as they begin alike. Then the texts come one
            after the other, like the turns of a chat.
    """

    _FADING = 0.8

    def __init__(self, model: OpenELM, *, keeps_text: bool = False):
        self.model, self.keeps_text = model, keeps_text
        self.last: ModelDrafter | None = None  # of the last text, if it is kept
        self.read_seconds = 0.0  # for a token of a text
        self.step_seconds = 0.0  # for one drafted token of each text

    def read_piece(self, cache: list[Any], tokens: Sequence[int]) -> None:
        """Extend a text's caches by tokens that are a piece of its prompt."""
        self.model.hidden_states(mx.array([list(tokens)]), cache)
        mx.eval([layer.state[:2] for layer in cache])
        mx.clear_cache()

    def read(self, cache: list[Any], tokens: Sequence[int]) -> mx.array:
        """Extend a text's caches; returns the hidden state [1, model_dim] after the last token."""
        started, size = time.perf_counter(), backend.prefill_step_size()
        for start in range(0, len(tokens), size):
            hidden = self.model.hidden_states(mx.array([tokens[start : start + size]]), cache)
            if len(tokens) > 2:  # else the time is that of a step, and nothing waits for it
                mx.eval(hidden, [layer.state[:2] for layer in cache])
        if len(tokens) > 2:
            self.read_seconds = self._average(self.read_seconds, (time.perf_counter() - started) / len(tokens))
        return hidden[:, -1]

    def step(self, caches: Sequence[list[Any]], tokens: Sequence[mx.array]) -> mx.array:
        """Extend each text's caches by one token [1]; returns the hidden states [N, model_dim]."""
        return self.model.hidden_states(mx.concatenate(list(tokens))[:, None], step_caches(caches))[:, -1]

    def took(self, seconds: float, steps: int) -> None:
        """Learn the time of some steps."""
        self.step_seconds = self._average(self.step_seconds, seconds / steps)

    def _average(self, old: float, new: float) -> float:
        return self._FADING * old + (1 - self._FADING) * new if old else new


class ModelDrafter:
    """Proposes what a draft model would write: its most likely tokens, or tokens drawn as the target's are.

    Args:
        draft_model: shared by the drafters of all texts.
        sampler: the target's; None for the most likely tokens.
        logits_processors: the target's bias and penalties.
        limit: what the target's constraint allows.
        reads_all: read also those tokens of a long prompt that the target need not process, of which otherwise the last
            ones must do.
    """

    _EXPECTED = (0.7,)

    def __init__(
        self,
        draft_model: DraftModel,
        sampler: TextSampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        limit: Limit | None = None,
        reads_all: bool = True,
    ):
        self.draft_model, self._reads_all = draft_model, reads_all
        self._sampler, self._processors, self._limit = sampler, logits_processors, limit
        self._rates = AcceptanceRates(self._EXPECTED)
        self._text: list[int] = []
        self._input: list[int] = []  # what the draft model is given of it: all, or the first token and the last ones
        self.start_over()

    def start_over(self) -> None:
        """Forget what the draft model has read."""
        self.cache: list[Any] = make_cache(self.draft_model.model.config.num_transformer_layers)
        self._held: list[int] = []  # the tokens in the caches
        self._agreed = 0  # so many of them are known to be those of the input

    def begin(self, prompt: Sequence[int], known: int = 0) -> None:
        """Take the text's first tokens; the target need not process the first `known` of them."""
        self.extend(prompt)
        if known > RESTART_AFTER and not self._reads_all:
            self._input = [prompt[0], *prompt[known + 1 - RESTART_WITH :]]

    def prepare(self, size: int) -> bool:
        """Read at most `size` tokens of the text's first ones; False if they are all read."""
        piece = self._input[len(self._held) : len(self._held) + size]
        if piece:
            self.draft_model.read_piece(self.cache, piece)
            self.hold(piece)
            self._agreed = len(self._held)
        return bool(piece)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.nbytes for layer in self.cache)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take tokens that became part of the text."""
        is_first = not self._text
        self._text.extend(tokens)
        self._input.extend(tokens)
        if is_first and self.draft_model.keeps_text:
            self._go_on_from_last()
        elif self._held and len(self._input) - len(self._held) > RESTART_AFTER:
            self._input = [self._input[0], *self._input[1 - RESTART_WITH :]]
            self.start_over()

    def _go_on_from_last(self) -> None:
        """Take over what the draft model has read of the text before this one."""
        last, self.draft_model.last = self.draft_model.last, self
        if last is not None:
            self.cache, self._held = last.cache, last._held

    def plan(self, limit: int, least: float = LEAST_CHANCE, unread: int = 0) -> Plan:
        """At most `limit` tokens, as positions allow, their chances, and the seconds that they take."""
        draft_model = self.draft_model
        count = max(0, min(limit, draft_model.model.config.rope_max_length - len(self._input)))
        unread = max(0, len(self._input) - len(self._held) - 2)  # two take no longer than a step
        # Before the first measurement any time that is not 0 will do, since it says that drafting is not free.
        return Plan(
            self._rates.chances(0, count, least), draft_model.read_seconds * unread, draft_model.step_seconds or 1e-9
        )

    def propose(self, count: int, place: int = 0) -> Draft:
        """At most `count` tokens that may follow the text; `place` counts the tokens drawn for the text so far."""
        return propose_together([self], [count], [place])[0]

    def observe(self, accepted: int, proposed: int) -> None:
        """Learn that the first `accepted` of `proposed` tokens were accepted."""
        for place in range(min(accepted + 1, proposed)):
            self._rates.observe(place, place < accepted)

    def catch_up(self) -> mx.array:
        """Read what is new in the text and drop what is no part of it; returns the last hidden state [1, model_dim]."""
        held, given = self._held, self._input
        agreed = min(self._agreed, len(given) - 1)  # the last token is read again if nothing is new
        while agreed < min(len(held), len(given) - 1) and held[agreed] == given[agreed]:
            agreed += 1
        for layer in self.cache:
            layer.trim(len(held) - agreed)
        hidden = self.draft_model.read(self.cache, given[agreed:])
        self._held, self._agreed = list(given), len(given)
        return hidden

    def hold(self, tokens: Sequence[int]) -> None:
        """Count drafted tokens as those in the caches after the text."""
        self._held += tokens

    def choose(self, logits: mx.array, drafted: Sequence[mx.array], place: int) -> tuple[mx.array, mx.array] | None:
        """The token [1] after those drafted, and the log-probabilities [1, vocab] it is drawn with; None for none."""
        if self._processors:
            context = mx.concatenate([mx.array(self._text, mx.int32), *(token.astype(mx.int32) for token in drafted)])
            try:
                logits = process_logits(self._processors, context, logits)
            except Exception:  # raised again if the text comes here
                return None
        logprobs = log_softmax(logits.astype(mx.float32))
        if self._limit is not None:
            allowed = self._limit(_values(drafted), logprobs)
            if allowed is None:
                return None
            logprobs = allowed
        if self._sampler is None:
            return greedy(logprobs), logprobs
        logprobs = self._sampler.distributions(logprobs, place)
        return mx.random.categorical(logprobs, key=draft_key(self._sampler, place)), logprobs

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, so that their log-probabilities matter."""
        return self._sampler is not None


def propose_together(drafters: Sequence[ModelDrafter], counts: Sequence[int], places: Sequence[int]) -> list[Draft]:
    """What `propose` gives for each of the drafters, which share a draft model, computed in the same steps."""
    tokens: list[list[mx.array]] = [[] for _ in drafters]
    rows: list[list[mx.array]] = [[] for _ in drafters]
    active = [n for n, count in enumerate(counts) if count > 0]
    if not active:
        return [Draft([]) for _ in drafters]
    draft_model = drafters[active[0]].draft_model
    hidden = mx.concatenate([drafters[n].catch_up() for n in active])  # [N, model_dim]
    started, steps = time.perf_counter(), 0
    while active:
        steps += 1
        logits = draft_model.model.logits(hidden[:, None])[:, 0]  # rows, whose number changes nothing: not positions
        going = []
        for row, n in enumerate(active):
            chosen = drafters[n].choose(logits[row : row + 1], tokens[n], places[n] + len(tokens[n]))
            if chosen is None:
                continue
            tokens[n].append(chosen[0])
            rows[n].append(chosen[1])
            if len(tokens[n]) < counts[n]:
                going.append(n)
        active = going
        if active:
            hidden = draft_model.step([drafters[n].cache for n in active], [tokens[n][-1] for n in active])
    mx.eval(tokens, [each for each, drafter in zip(rows, drafters, strict=True) if drafter.draws])
    draft_model.took(time.perf_counter() - started, steps)
    drafts = []
    for drafter, ids, each, count in zip(drafters, tokens, rows, counts, strict=True):
        found = _values(ids)
        if count > 0:
            # The last one was not read, unless a constraint ended the draft after it.
            drafter.hold(found if len(found) < count else found[:-1])
        drafts.append(Draft(found, mx.concatenate(each) if drafter.draws and each else None))
    return drafts


def _values(tokens: Sequence[mx.array]) -> list[int]:
    """Token ids from arrays [1]."""
    return [int(token.item()) for token in tokens]  # type: ignore[arg-type]
