"""Drafts of `mlx-openelm generate`: the draft model, and what is said of the drafts at the end."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..generation.draft_model import check_draft_model
from ..generation.drafting import DraftCounts
from ..loading import draft_name, load
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from ..wording import counted


def load_draft_model(args: Namespace, model: OpenELM, tokenizer: Tokenizer) -> OpenELM:
    """The model that `--draft-model` names; RequestError if it has other tokens, or `auto` knows none."""
    name = draft_name(args.draft_model, args.model, model.config)
    loaded, its_tokenizer = load(name, dtype=args.dtype, expand=args.expand, exact_activations=args.exact_activations)
    check_draft_model(model, loaded, tokenizer, its_tokenizer)
    return loaded


def as_json(drafts: DraftCounts) -> dict[str, Any]:
    """The numbers of `--json`."""
    names = ("drafted", "accepted", "acceptance", "steps", "tokens_per_step", "speedup")
    return {name: getattr(drafts, name) for name in names}


def as_text(drafts: DraftCounts) -> str:
    """The same for people: `12 of 20 tokens accepted (60%), 2.1 tokens a step, about 1.6 times as fast as without`."""
    if not drafts.drafted:
        return "none"
    share = f" ({drafts.acceptance:.0%})"
    text = f"{drafts.accepted:,} of {counted(drafts.drafted, 'token')} accepted{share}"
    if drafts.tokens_per_step is not None:
        text += f", {drafts.tokens_per_step:.2f} tokens a step"
    if drafts.speedup is not None:
        text += f", about {drafts.speedup:.2f} times as fast as without"
    return text
