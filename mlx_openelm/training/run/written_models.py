"""The models that a pretraining run writes: its last weights, their moving average, the mean of its checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ...config import EMBEDDING, HEAD, ModelConfig
from ...formats.mlx import Checkpoint
from ...formats.safetensors import Weights
from ...jobs.writing import write_folder
from ...publishing.origin import Origin
from ...sources import Source
from ..step.updater import Updater
from . import averages
from .pretraining import MODEL, MODEL_AVERAGE, MODEL_EMA, Request, Validation
from .starting import Start
from .state import Checkpoints
from .trainer import INTERRUPTED, Result


def write_models(
    request: Request,
    start: Start,
    updater: Updater,
    checkpoints: Checkpoints,
    validation: Validation | None,
    result: Result,
) -> tuple[dict[str, str], dict[str, float]]:
    """Write the weights that the updater has, and the averages that were asked for, as folders that load.

    Returns:
        the folders by name, and the validation losses of the averages.
    """
    paths: dict[str, str] = {}
    losses: dict[str, float] = {}
    for name, weights in _models(request, updater, checkpoints):
        if request.processes.leads:
            _write(start, request.folder / name, weights, result)
        paths[name] = str(Path(request.options.output) / name)
        if name != MODEL and validation is not None and result.stopped != INTERRUPTED:
            state = updater.state()
            updater.restore(averages.with_weights(state, weights))
            losses[name] = validation.measure(updater).loss
            updater.restore(state)
    if result.val_loss is not None and result.val_step == result.steps:
        losses[MODEL] = result.val_loss
    return paths, losses


def _models(request: Request, updater: Updater, checkpoints: Checkpoints) -> Iterator[tuple[str, dict[str, mx.array]]]:
    """The models to write, by the name of their folder."""
    options, state = request.options, updater.state()
    yield MODEL, averages.weights_of(state)
    if options.ema_decay is not None:
        yield MODEL_EMA, averages.moving_average(state)
    if options.average_last is None:
        return
    steps = averages.regular_steps(checkpoints, options.average_last, options.save_every)
    if request.processes.any(len(steps) < options.average_last and request.processes.leads):
        request.listener.say(f"There are no {options.average_last} checkpoints yet, so no mean of them was written.")
        return
    means = averages.mean_of_checkpoints(checkpoints, steps) if request.processes.leads else averages.weights_of(state)
    yield MODEL_AVERAGE, request.processes.share_tensors(means)


def _write(start: Start, path: Path, weights: Mapping[str, mx.array], result: Result) -> None:
    """Write one model; rows of the vocabulary that belong to no token are dropped."""
    config, arrays = _without_padding(start.model.config, weights, start.tokenizer.vocab_size)
    checkpoint = Checkpoint(config, Weights.of_arrays(arrays))
    source = Source(str(path), path, checkpoint, start.tokenizer, None, config)
    origin = start.origin or Origin(start.name)
    write_folder(source, path, origin=origin, overwrite=True, card={"trained_tokens": result.trained_tokens})


def _without_padding(
    config: ModelConfig, weights: Mapping[str, mx.array], size: int
) -> tuple[ModelConfig, dict[str, mx.array]]:
    padded = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
    # In the configuration's order, not in that of the optimizer's state, which depends on whether it was restored.
    ordered = {name: weights[name] for name in config.tensor_shapes()}
    return replace(config, vocab_size=size), {n: w[:size] if n in padded else w for n, w in ordered.items()}
