"""What generation yields, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .drafting import DraftCounts


@dataclass(frozen=True)
class Piece:
    """One token of generated text.

    `text` holds whole characters only, so it may be empty; `logprob` is natural, after penalties and before filters;
    `top_logprobs` lists the most likely tokens as (id, log-probability), the most likely first, as many as the option
    asks for and have a probability; speeds are in tokens per second, `peak_memory` is in GB (1e9 bytes).
    `from_draft` says that the token was drafted; `drafts` are the numbers of the text so far, if it has drafts.
    """

    text: str
    token: int
    logprob: float
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    top_logprobs: list[tuple[int, float]] = field(default_factory=list, hash=False)
    from_draft: bool = False
    drafts: DraftCounts | None = field(default=None, hash=False, compare=False)

    def __repr__(self) -> str:
        end = f", finish_reason={self.finish_reason!r}" if self.finish_reason else ""
        return f"Piece({self.text!r}, token={self.token}, logprob={self.logprob:.3f}{end})"
