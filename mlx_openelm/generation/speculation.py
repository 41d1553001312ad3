"""What the rows of an engine draft: who drafts how much before a step, and what the steps teach.

Drafting needs to know the last token, so the engine must read it before the next step begins; otherwise it builds the
next step while the device computes the last one. `wants` says which way is faster, from what is known one token
earlier.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..model import OpenELM
from .decoding import Request
from .draft_length import MAX_DRAFT_TOKENS, DraftLengths, Plan
from .draft_model import DraftModel, ModelDrafter, propose_together
from .drafting import Draft, Drafter, EitherDrafter, LookupDrafter
from .lookup import EarlierTexts
from .options import GenerationOptions
from .row import Row
from .sampling import TextSampler


@dataclass
class Step:
    """A step on the device: its rows, its positions, how many of them are drafts, and what drafting took.

    `is_fixed` says that the number of some drafted tokens was not chosen here, `is_late` that the tokens before it had
    to be read first.
    """

    rows: list[Row]
    positions: int
    drafted: int
    draft_seconds: float
    is_fixed: bool
    is_late: bool


class Speculation:
    """The drafts of an engine.

    Args:
        draft_model: what rows draft with, unless their number of drafted tokens is 0.
        earlier: texts that `prompt_lookup` finds besides a row's own, and to which finished ones are added.
    """

    def __init__(self, draft_model: OpenELM | None = None, earlier: EarlierTexts | None = None):
        self.draft_model = None if draft_model is None else DraftModel(draft_model)
        self.earlier = EarlierTexts() if earlier is None else earlier
        self.lengths = DraftLengths()
        self._step: Step | None = None
        self._draft_seconds = 0.0  # since the last step began
        self._is_late = False  # whether the next step must know the tokens before it
        self._read = 0.0  # when tokens were read last
        self._idle = 0.0  # seconds since then outside of the engine
        self._left = 0.0  # when the engine was left

    def check(self, options: GenerationOptions) -> None:
        """Raise a `RequestError` for a number of tokens that nothing can draft."""
        options.check_drafts(self.draft_model is not None)

    def drafter(self, request: Request) -> Drafter | None:
        """What drafts for a request; None if nothing does."""
        options = request.options
        if options.num_draft_tokens == 0:
            return None
        lookup = LookupDrafter(self.earlier) if options.prompt_lookup else None
        if self.draft_model is None:
            return lookup
        limit = None
        if request.constraint is not None:
            from .constraints import DraftLimit

            limit = DraftLimit(request.constraint)
        reads_all = options.num_draft_tokens is not None  # so that drafts do not depend on what others have left
        sampler = request.sampler if isinstance(request.sampler, TextSampler) else None
        model = ModelDrafter(self.draft_model, sampler, request.decoder.logits_processors, limit, reads_all)
        return model if lookup is None else EitherDrafter(lookup, model)

    def wants(self, rows: Sequence[Row], unread: int) -> bool:
        """Whether drafting would pay if the next `unread` tokens of the rows were known."""
        if not any(row.drafter is not None for row in rows):
            return False
        plans = self._plans(rows, unread)
        return any(plan.chances for plan in plans) and any(self.lengths.choose(plans, is_late=False))

    def draft(self, rows: Sequence[Row]) -> None:
        """Give the rows of the next step, whose tokens are all known, their drafts."""
        started = time.perf_counter()
        self._is_late = True
        plans = self._plans(rows, 0)
        lengths = self.lengths.choose(plans)
        drafts: list[tuple[Row, Draft]] = []
        models: list[tuple[Row, ModelDrafter, int]] = []
        for row, length in zip(rows, lengths, strict=True):
            drafter = row.drafter
            if not length or drafter is None:
                continue
            chosen = drafter.chosen if isinstance(drafter, EitherDrafter) else drafter
            if isinstance(chosen, ModelDrafter):
                models.append((row, chosen, length))
            else:
                drafts.append((row, chosen.propose(length, row.place)))
        if models:
            drafters, counts = [drafter for _, drafter, _ in models], [count for *_, count in models]
            found = propose_together(drafters, counts, [row.place for row, *_ in models])
            drafts += [(row, draft) for (row, *_), draft in zip(models, found, strict=True)]
        for row, draft in drafts:
            try:
                row.set_draft(draft)
            except Exception as error:
                row.error = error
        self._draft_seconds = time.perf_counter() - started if models else 0.0

    def began(self, rows: list[Row], positions: int) -> None:
        """Note that a step of these rows and positions was begun."""
        drafting = [row for row in rows if row.draft is not None]
        drafted = sum(len(row.draft.tokens) for row in drafting if row.draft is not None)
        is_fixed = any(_fixed(row) is not None for row in drafting)
        self._step = Step(rows, positions, drafted, self._draft_seconds, is_fixed, self._is_late)
        self._draft_seconds, self._is_late = 0.0, False
        for row in rows:
            row.kept = 0

    def disturbed(self) -> None:
        """Note that the device does something else beside the step."""
        self._read = 0.0

    def entered(self) -> None:
        """Note that the engine goes on; the time that its caller took does not count."""
        self._idle += time.perf_counter() - self._left

    def left(self) -> None:
        """Note that the engine returns to its caller."""
        self._left = time.perf_counter()

    def ended(self, step: Step | None, gained: Counter[Row]) -> None:
        """Learn from a step whose tokens have been read: so many of each row."""
        now = time.perf_counter()
        seconds = now - self._read - self._idle if self._read else None
        self._read, self._idle = now, 0.0
        if step is None:
            return
        spent = None
        if seconds is not None:
            base = step.positions - step.drafted
            tokens = base + sum(row.kept for row in step.rows)
            seconds -= step.draft_seconds
            spent = self.lengths.observe(
                base, step.positions, tokens, seconds, step.draft_seconds, step.is_fixed, step.is_late
            )
        for row in step.rows:
            if row.drafts is not None:
                row.drafts.count(gained[row], row.kept, spent)

    def take_step(self) -> Step | None:
        """The step that was begun last, once."""
        step, self._step = self._step, None
        self._is_late = False  # no step may have followed the tokens that were read
        return step

    def _plans(self, rows: Sequence[Row], unread: int) -> list[Plan]:
        plans = []
        for row in rows:
            if row.drafter is None or row.is_done or row.prompt:
                plans.append(Plan(()))
                continue
            row.tell_drafter()
            fixed = _fixed(row)
            ahead = 0 if row.pending else unread
            room = row.room_for_draft(ahead)
            if fixed is None:
                plans.append(row.drafter.plan(min(room, MAX_DRAFT_TOKENS), unread=ahead))
            else:
                plans.append(row.drafter.plan(min(room, fixed), 0.0)._replace(fixed=fixed))
        return plans


def _fixed(row: Row) -> int | None:
    return row.request.options.num_draft_tokens
