"""Perplexity and KL divergence over windows of text; only a few positions' logits are in memory at a time."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import mlx.core as mx

from .. import console
from ..errors import RequestError, quote
from ..finite import not_finite
from ..generation.options import check_number
from ..model import OpenELM
from ..ops import distributions
from ..ops.distributions import LOGIT_ROWS
from ..text.tokenizer import Tokenizer
from .windows import Window, cut, load_documents, reading_note, window_length

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NLL:
    """The mean negative log-likelihood over `tokens` tokens, in nats per token, and its standard error.

    `bytes` and `characters` are those of the text that the tokens stand for; 0 where they were not counted.
    """

    nll: float
    tokens: int
    standard_error: float
    bytes: int = 0
    characters: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def bits_per(self, unit: str) -> tuple[float, float]:
        """The loss in bits for each of the `bytes` or `characters`, and its standard error; NaN without any.

        Unlike the loss per token it can be compared between models with different tokenizers.
        """
        count = getattr(self, unit)
        scale = self.tokens / count / math.log(2) if count else math.nan
        return self.nll * scale, self.standard_error * scale


def perplexity(
    model: OpenELM,
    tokenizer: Tokenizer,
    data: str | Path | Sequence[str],
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Progress | bool | None = True,
) -> NLL:
    """How well a model predicts a text, which is cut into windows; its `perplexity` and the loss behind it.

    Args:
        data: the path of a text file, or of a `.jsonl` or `.parquet` file with `text` in each record; or a list of
            texts.
        sequence_length: the tokens in a window; by default 512, or the model's context if that is shorter.
        stride: how far each window begins behind the one before it, as for `cut`.
        batch_size: windows that are read together.
        progress: called with the windows done so far and in all; by default a bar shows them, None or False shows none.

    Raises:
        RequestError: the file cannot be read, the text is shorter than a window, or a bad value.
        OpenELMError: the logits are not finite.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if progress is True and (note := reading_note(path)) is not None:
            console.say(note)
        documents = load_documents(path)
    elif isinstance(data, Sequence) and all(isinstance(document, str) for document in data):
        documents = list(data)
    else:
        raise RequestError(f"data must be the path of a text, or a list of texts, got {quote(data)}.")
    windows = cut(tokenizer, documents, window_length(sequence_length, model.config), stride)
    bar = console.Progress("Measuring", unit="windows") if progress is True else nullcontext(progress or None)
    with bar as show:
        return measure(model, windows, batch_size=batch_size, progress=show)


def measure(model: OpenELM, windows: Sequence[Window], *, batch_size: int = 4, progress: Progress | None = None) -> NLL:
    """The mean loss over the scored tokens of `windows`, with their bytes and characters.

    Args:
        progress: called with the windows done so far and in all.

    Raises:
        RequestError: there are no windows.
        OpenELMError: the logits are not finite.
    """
    tokens = [window.tokens for window in windows]
    scored = [window.scored for window in windows]
    found = mean_nll(model, tokens, scored=scored, batch_size=batch_size, progress=progress)
    sizes = {unit: sum(getattr(window, unit) for window in windows) for unit in ("bytes", "characters")}
    return replace(found, **sizes)


def mean_nll(
    model: OpenELM,
    windows: Sequence[Sequence[int]],
    *,
    scored: Sequence[int] | None = None,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> NLL:
    """The mean loss over all tokens of `windows` except the first of each.

    Args:
        scored: for each window how many of its tokens count, from the end; by default all but the first.
        progress: called with the windows done so far and in all.

    Raises:
        OpenELMError: the logits are not finite.
    """
    total, squares, count, done = 0.0, 0.0, 0, 0
    for inputs, targets in _batches(windows, batch_size, progress):
        hidden_states = model.hidden_states(inputs)
        if scored is not None:
            hidden_states, targets = _last(hidden_states, targets, scored[done : done + inputs.shape[0]])
            done += inputs.shape[0]
        for rows, expected in _chunks(hidden_states, targets):
            losses = distributions.cross_entropy(model.logits(rows), expected)  # [rows]
            total += _number(losses.sum())
            squares += _number(mx.square(losses).sum())
            if not math.isfinite(total):
                raise not_finite("The model's logits are", model)
            count += expected.size
    mean = total / count
    variance = max(0.0, squares / count - mean * mean)
    return NLL(mean, count, math.sqrt(variance / count))


def kl_divergence(
    reference: OpenELM,
    model: OpenELM,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> float:
    """The mean over positions of KL(reference || model), in nats: the cost of replacing `reference` by `model`.

    Raises:
        RequestError: the two vocabularies differ in size.
        OpenELMError: the logits of one of them are not finite.
    """
    if reference.config.vocab_size != model.config.vocab_size:
        raise RequestError("The two models have vocabularies of different sizes, so they cannot be compared.")
    total, count = 0.0, 0
    for inputs, targets in _batches(windows, batch_size, progress):
        pairs = zip(
            _chunks(reference.hidden_states(inputs), targets),
            _chunks(model.hidden_states(inputs), targets),
            strict=True,
        )
        for (reference_rows, _), (rows, row_targets) in pairs:
            expected = reference.logits(reference_rows)
            divergence = distributions.kl_divergence(expected, model.logits(rows))  # [rows]
            total, count = total + _number(divergence.sum()), count + row_targets.size
            if not math.isfinite(total):
                is_reference = not mx.all(mx.isfinite(expected)).item()
                raise not_finite("The model's logits are", reference if is_reference else model)
    return total / count


def _batches(
    windows: Sequence[Sequence[int]], batch_size: int, progress: Progress | None
) -> Iterator[tuple[mx.array, mx.array]]:
    """Inputs and targets [batch, length] of windows of one length: each without its last token, and its first."""
    if not windows or min(map(len, windows)) < 2:
        raise RequestError("There is nothing to measure: give at least one window of two tokens.")
    check_number("--batch-size", batch_size, 1, math.inf, "1 or more", kind=Integral)
    done = 0
    for _, group in itertools.groupby(windows, key=len):  # strided windows end with a shorter one
        equal = list(group)
        for start in range(0, len(equal), batch_size):
            batch = mx.array([list(window) for window in equal[start : start + batch_size]])
            yield batch[:, :-1], batch[:, 1:]
            done += batch.shape[0]
            if progress is not None:
                progress(done, len(windows))


def _last(hidden_states: mx.array, targets: mx.array, counts: Sequence[int]) -> tuple[mx.array, mx.array]:
    """The last `counts` positions of each row, as rows [sum(counts), model_dim], with their targets."""
    length = targets.shape[1]
    if all(count == length for count in counts):
        return hidden_states, targets
    places = [row * length + place for row, count in enumerate(counts) for place in range(length - count, length)]
    return hidden_states.reshape(-1, hidden_states.shape[-1])[mx.array(places)], targets.reshape(-1)[mx.array(places)]


def _chunks(hidden_states: mx.array, targets: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """Hidden states [rows, model_dim] with their targets [rows], a few rows at a time."""
    rows, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    for start in range(0, targets.size, LOGIT_ROWS):
        yield rows[start : start + LOGIT_ROWS], targets[start : start + LOGIT_ROWS]


def _number(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]
