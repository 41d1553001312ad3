"""Log-probabilities of answers in the reference model: computed once, before training, and kept in the run's folder.

The reference is the model itself before training, so that no second copy is needed, or another model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ...adapters.switching import without_adapters
from ...errors import OpenELMError
from ...formats import atomic
from ...model import OpenELM
from ..data.answers import Answers, Preferences
from ..data.pairs import PreferenceMaker
from ..step.objectives import Forward
from ..step.preferences import answer_arrays, answered
from .distributed import Processes

FILE = "reference.safetensors"

# Called with the split, and the preferences done and to do.
Progress = Callable[[str, int, int], None]
# For each preference, the log-probabilities of its two answers.
Likelihoods = list[tuple[float, float]]


def zeros(splits: dict[str, Preferences]) -> dict[str, Likelihoods]:
    """The log-probabilities of a loss that compares with no reference."""
    return {split: [(0.0, 0.0)] * len(preferences.examples) for split, preferences in splits.items()}


def reference_likelihoods(
    load_model: Callable[[], OpenELM],
    splits: dict[str, Preferences],
    *,
    folder: Path | None,
    name: str,
    keep: bool,
    batch_size: int,
    max_seq_length: int,
    processes: Processes,
    progress: Progress,
) -> dict[str, Likelihoods]:
    """The log-probabilities of the answers of each split, from the run's folder or computed; adapters are switched off.

    Args:
        load_model: gives the reference model; it is always called, since what is kept is for one model alone.
        folder: where they are kept; None keeps and reads nothing.
        name: of the model, for errors.
        keep: whether to write them into the folder.
        batch_size: the preferences computed together, over all processes.

    Raises:
        OpenELMError: a log-probability is not finite, or the file cannot be written.
    """
    model = load_model()
    path = folder / FILE if processes.leads and folder is not None else None
    keys = {} if path is None else _keys(model, splits)
    kept = {} if path is None else _read(path, keys, splits)
    found = {split: kept.get(split) for split in json.loads(processes.share(json.dumps(list(kept))))}
    values: dict[str, mx.array] = {}
    for split, preferences in splits.items():
        examples = preferences.examples
        if split in found:
            own = found[split]
            own = mx.zeros((len(examples), 2)) if own is None else own
            values |= processes.share_tensors({split: own})
        else:
            report = partial(progress, split)
            values[split] = _compute(model, examples, batch_size, max_seq_length, processes, report)
            if not mx.all(mx.isfinite(values[split])).item():
                raise OpenELMError(
                    f"{name} gives an answer a log-probability that is not finite; its weights are damaged, or "
                    "--dtype float16 is too small for them: use bfloat16 or float32."
                )
    if keep and path is not None and values.keys() - found.keys():
        _write(path, values, keys)
    return {split: _rows(value) for split, value in values.items()}


def _rows(values: mx.array) -> Likelihoods:
    """The numbers of an array [rows, 2]."""
    return [(float(one), float(other)) for one, other in values.tolist()]  # type: ignore


def _compute(
    model: OpenELM,
    examples: Sequence[Answers],
    batch_size: int,
    max_seq_length: int,
    processes: Processes,
    progress: Callable[[int, int], None],
) -> mx.array:
    """Log-probabilities [preferences, 2]; each process computes some, and all get them all."""
    order = sorted(range(len(examples)), key=lambda index: examples[index].num_positions)
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # In rows of their own, whatever the training does.
    make = PreferenceMaker(examples, [(0.0, 0.0)] * len(examples), max_seq_length)
    rows = [(0.0, 0.0)] * len(examples)
    training = model.training
    model.eval()
    forward = Forward(model, differentiable=False)
    with without_adapters(model):
        for number, chunk in enumerate(chunks[processes.rank :: processes.size]):
            progress(min(number * processes.size * batch_size, len(examples)), len(examples))
            batch = make([(index,) for index in chunk], 0, 1)
            totals = answered(forward, answer_arrays(batch)).totals
            if batch.others is None:
                pairs = totals.reshape(-1, 2)
            else:
                pairs = mx.stack([totals, answered(forward, answer_arrays(batch.others)).totals], axis=1)
            for index, pair in zip(chunk, _rows(pairs), strict=True):
                rows[index] = pair
    progress(len(examples), len(examples))
    model.train(training)
    values = mx.array(rows)
    if processes.size > 1:
        values = mx.distributed.all_sum(values, group=processes.group, stream=mx.cpu)
    mx.eval(values)
    return values


def _keys(model: OpenELM, splits: dict[str, Preferences]) -> dict[str, str]:
    """A fingerprint of the model and of each split's answers."""
    weights = hashlib.blake2b()
    with without_adapters(model):
        parameters: list[tuple[str, mx.array]] = sorted(tree_flatten(model.parameters()))  # type: ignore[arg-type, call-overload]
    for name, value in parameters:
        weights.update(f"{name} {value.shape} {value.dtype}".encode())
        weights.update(memoryview(mx.contiguous(value.reshape(-1)).view(mx.uint8)))  # type: ignore[arg-type]
    weights.update(str(model.config.to_dict()).encode())
    digest = weights.hexdigest()
    return {
        split: hashlib.blake2b(f"{digest} {preferences.fingerprint()}".encode()).hexdigest()
        for split, preferences in splits.items()
    }


def _read(path: Path, keys: dict[str, str], splits: dict[str, Preferences]) -> dict[str, mx.array]:
    """What the file has for these models and answers; a damaged file has nothing."""
    with contextlib.suppress(OSError, ValueError, RuntimeError, TypeError, KeyError):
        loaded: Any = mx.load(str(path), return_metadata=True)
        arrays, metadata = loaded
        kept: dict[str, mx.array] = {split: arrays[split] for split, key in keys.items() if metadata.get(split) == key}
        mx.eval(kept)  # a file that was cut off fails only when it is read
        if all(value.shape == (len(splits[split].examples), 2) for split, value in kept.items()):
            return kept
    return {}


def _write(path: Path, values: dict[str, mx.array], keys: dict[str, str]) -> None:
    try:
        with atomic.new_file(path) as partial, partial.open("wb") as file:
            mx.save_safetensors(file, values, keys)  # type: ignore[arg-type]
    except OSError as error:
        raise OpenELMError(f"Writing {path} failed: {error.strerror or error}.") from None
