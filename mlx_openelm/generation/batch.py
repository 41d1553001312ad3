"""Many prompts at once: `batch_generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from .. import backend
from ..adapters.pool import AdapterPool
from ..errors import OpenELMError, RequestError
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from .engine import MAX_ROWS, Engine
from .keywords import BatchKeywords
from .piece import Piece
from .row import Row

# The path of an adapter, or paths with their weights.
AdapterPath = str | Path | Mapping[str, float]

# Options that may be a sequence of texts for all prompts; one with a value per prompt has sequences, or None, in it.
_SEQUENCES = ("stop", "choice")


@dataclass(frozen=True)
class GenerationResult:
    """One generated text.

    `tokens` are its ids, `logprobs` their log-probabilities (natural, after penalties and before filters);
    `top_logprobs[i]` lists the most likely tokens at place i as (id, log-probability), as many as the option asks for.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"GenerationResult({self.text!r}, {len(self.tokens)} tokens, finish_reason={self.finish_reason!r})"


def batch_generate(
    model: OpenELM,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    adapter_path: AdapterPath | Sequence[AdapterPath | None] | None = None,
    max_rows: int = MAX_ROWS,
    max_bytes: int | None = None,
    draft_model: OpenELM | None = None,
    callback: Callable[[int, Piece], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[BatchKeywords],
) -> list[GenerationResult]:
    """Generate a text for each of `prompts`, together; one result per prompt, in their order.

    On the CPU kernels each result is, bit for bit, that of `generate` with the same options.

    Args:
        prompts: texts, or token ids as they are.
        adapter_path: an adapter for all prompts, or a list with one, or None, per prompt. A mixture is a mapping of
            paths to weights.
        max_rows: the number of texts that advance together; others follow as these end.
        max_bytes: the most memory for keys and values; texts wait until there is room. By default half of what is free.
        draft_model: a smaller model that drafts for all texts; it runs without adapters. Turn it off for a text with
            `num_draft_tokens=0`.
        callback: called with the number of a prompt and each `Piece` of its text.
        progress: called with the number of texts that are done, and of all.
        options: the fields of `GenerationOptions`, each one value for all prompts, or a list with a value per prompt.
            `stop` and `choice` may be lists of texts, which are for all prompts: a list per prompt has a list, or None,
            for at least one of them.

    Raises:
        RequestError: a bad value, or a prompt that is empty or too long; before anything is computed.
        OpenELMError: a text failed: logits that are not finite, or no token that fits the constraint.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise RequestError("prompts must be a list of texts or of lists of token ids; for one text use generate().")
    each = per_prompt({**options, "adapter_path": adapter_path}, len(prompts))
    adapters = AdapterPool(model) if any(chosen["adapter_path"] is not None for chosen in each) else None
    engine = Engine(
        model,
        tokenizer,
        max_rows=max_rows,
        max_bytes=max_bytes,
        draft_model=draft_model,
        adapters=adapters,
        prompts_first=True,
    )
    rows = []
    for number, (prompt, chosen) in enumerate(zip(prompts, each, strict=True)):
        on_piece = None if callback is None else _numbered(callback, number)
        adapter = chosen.pop("adapter_path")
        try:
            rows.append(engine.submit(prompt, adapter=adapter, on_piece=on_piece, **chosen))
            rows[-1].warns = False  # with the number of the prompt, below
        except RequestError as error:
            if len(prompts) == 1:
                raise
            raise RequestError(f"Prompt {number + 1}: {error}") from None
    done = 0
    with backend.wired_limit():
        while engine.is_busy:
            engine.step()
            finished = sum(row.is_done for row in rows)
            if progress is not None and finished > done:
                progress(finished, len(rows))
            done = finished
            for number, row in enumerate(rows):
                if isinstance(row.error, OpenELMError):
                    raise OpenELMError(f"Prompt {number + 1}: {row.error}") from None
                if row.error is not None:
                    raise row.error
    for number, row in enumerate(rows, 1):
        row.warn_if_cut(f"Prompt {number}" if len(rows) > 1 else "")
    return [_result(row) for row in rows]


def per_prompt(options: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The options of each prompt: a list gives each prompt its own value, anything else is for all.

    Raises:
        RequestError: a list has another length than there are prompts.
    """
    chosen: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in options.items():
        listed = isinstance(value, list | tuple)
        if listed and name in _SEQUENCES:
            listed = any(one is None or isinstance(one, list | tuple) for one in value)
        if listed and len(value) != count:
            raise RequestError(f"{name} has {len(value)} values for {count} prompts; give one, or one per prompt.")
        for number, one in enumerate(chosen):
            one[name] = value[number] if listed else value
    return chosen


def _numbered(callback: Callable[[int, Piece], object], number: int) -> Callable[[Piece], object]:
    return lambda piece: callback(number, piece)


def _result(row: Row) -> GenerationResult:
    assert row.finish_reason is not None
    return GenerationResult(
        row.text,
        row.tokens,
        row.logprobs,
        row.finish_reason,
        len(row.request.prompt),
        row.top_logprobs if row.request.options.top_logprobs else [],
    )
