"""Perplexity and KL divergence over windows of text; only a few positions' logits are in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import console
from ..config import ModelConfig
from ..errors import RequestError, command_or_call, name_options
from ..finite import not_finite
from ..inputs import read_text_source
from ..messages import warn
from ..model import OpenELM
from ..ops import distributions
from ..publishing.command_line import command_line
from ..text.tokenizer import Tokenizer

# Positions whose logits are in memory at once: 256 rows of 32000 float32 numbers take 33 MB.
_CHUNK = 256

# The keys of the examples that `lora` reads, apart from plain text (see `training.data.kinds`).
EXAMPLE_KEYS = ("prompt", "completion", "messages", "instruction", "output", "conversations")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class NLL:
    """The mean negative log-likelihood over `tokens` tokens, in nats per token, and its standard error."""

    nll: float
    tokens: int
    standard_error: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(
    model: OpenELM,
    tokenizer: Tokenizer,
    data: str | Path | Sequence[str],
    *,
    sequence_length: int | None = None,
    batch_size: int = 4,
    progress: Progress | bool | None = True,
) -> NLL:
    """How well a model predicts a text, which is cut into windows; its `perplexity` and the loss behind it.

    Args:
        data: the path of a text file, or of a `.jsonl` file with one object with `text` per line; or a list of texts.
        sequence_length: the tokens in a window; by default 512, or the model's context if that is shorter.
        batch_size: windows that are read together.
        progress: called with the windows done so far and in all; by default a bar shows them, None or False shows none.

    Raises:
        RequestError: the file cannot be read, the text is shorter than a window, or a bad value.
        OpenELMError: the logits are not finite.
    """
    documents = load_documents(data) if isinstance(data, str | Path) else data
    windows = make_windows(tokenizer, documents, window_length(sequence_length, model.config))
    bar = console.Progress("Measuring", unit="windows") if progress is True else nullcontext(progress or None)
    with bar as show:
        return mean_nll(model, windows, batch_size=batch_size, progress=show)


def window_length(length: int | None, config: ModelConfig) -> int:
    """The tokens in a window: the default, or the number given; warns beyond the context the model was trained on.

    Raises:
        RequestError: the model's positions do not reach that far.
    """
    if length is None:
        return min(512, config.max_context_length)
    if not 1 <= length <= config.rope_max_length:
        raise RequestError(f"--sequence-length must be from 1 to {config.rope_max_length}, got {length}.")
    if length > config.max_context_length:
        warning = (
            f"--sequence-length {length} is more than the {config.max_context_length} tokens "
            "the model was trained on; expect a higher perplexity."
        )
        warn(name_options(warning))
    return length


def load_documents(path: str | Path, loading: Mapping[str, Any] | None = None) -> list[str]:
    """The documents of a `.jsonl` file, one object with `text` per line, or a text file as one document.

    A pipe opened by the shell, as in `--data <(zcat play.txt.gz)`, is read as a text file.

    Raises:
        RequestError: the file is unreadable or empty, or a line (named by its number) is not such an object.
    """
    path = Path(path)
    try:
        content = re.sub("\r\n?", "\n", read_text_source(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise RequestError(f"{path} cannot be read: not UTF-8 text.") from None
    if path.suffix != ".jsonl":
        documents = [content]
    else:
        lines = enumerate(content.split("\n"), 1)
        documents = [_document(path, number, line, loading or {}) for number, line in lines if line.strip()]
    if not any(documents):
        raise RequestError(f"{path} contains no text.")
    return documents


def _document(path: Path, number: int, line: str, loading: Mapping[str, Any]) -> str:
    try:
        record = json.loads(line)
        text = record.get("text")
    except (ValueError, AttributeError, RecursionError):
        record, text = {}, None
    if not isinstance(text, str):
        wrong = f"{path}, line {number}: expected a JSON object with the string 'text'"
        if keys := [key for key in EXAMPLE_KEYS if key in record]:
            wrong += f", but this is an example for fine-tuning ({', '.join(keys)})"
            command = command_line("lora", {"test": True, **loading, "data": path}, whole_paths=True)
            call = f"`finetune(name, FineTuneOptions(test=True, data={json.dumps(str(path), ensure_ascii=False)}))`"
            wrong += f"; their perplexity is measured by: {command_or_call(f'`{command}`', call)}"
        raise RequestError(f"{wrong}.")
    return text


def make_windows(tokenizer: Tokenizer, documents: Sequence[str], length: int) -> list[list[int]]:
    """Windows of BOS and `length` tokens, cut from the documents joined as BOS, ids, EOS; the remainder is dropped.

    Raises:
        RequestError: the text is shorter than one window.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    joined = [token for document in documents for token in (*tokenizer.encode(document), eos)]
    starts = range(0, len(joined) - length + 1, length)
    if length < 1 or not starts:
        raise RequestError(
            f"The text has {len(joined)} tokens, fewer than a window of {length}; give a shorter --sequence-length."
        )
    return [[bos, *joined[start : start + length]] for start in starts]


def mean_nll(
    model: OpenELM,
    windows: Sequence[Sequence[int]],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> NLL:
    """The mean loss over all tokens of `windows` (of equal length) except the first of each.

    Args:
        progress: called with the windows done so far and in all.

    Raises:
        OpenELMError: the logits are not finite.
    """
    total, squares, count = 0.0, 0.0, 0
    for inputs, targets in _batches(windows, batch_size, progress):
        hidden_states = model.hidden_states(inputs)
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
    """Inputs and targets [batch, length]: each window without its last token, and without its first."""
    if not windows or len(windows[0]) < 2:
        raise RequestError("There is nothing to measure: give at least one window of two tokens.")
    if batch_size < 1:
        raise RequestError(f"--batch-size must be 1 or more, got {batch_size}.")
    for start in range(0, len(windows), batch_size):
        batch = mx.array([list(window) for window in windows[start : start + batch_size]])
        yield batch[:, :-1], batch[:, 1:]
        if progress is not None:
            progress(min(start + batch_size, len(windows)), len(windows))


def _chunks(hidden_states: mx.array, targets: mx.array) -> Iterator[tuple[mx.array, mx.array]]:
    """Hidden states [rows, model_dim] with their targets [rows], a few rows at a time."""
    rows, targets = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.reshape(-1)
    for start in range(0, targets.size, _CHUNK):
        yield rows[start : start + _CHUNK], targets[start : start + _CHUNK]


def _number(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]
