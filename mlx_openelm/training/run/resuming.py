"""Resuming a run from its last checkpoint, or clearing the folder for a new one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ...errors import OpenELMError, RequestError, name_options
from ..step.updater import Updater
from . import folder as run_folder
from .preparing import Prepared
from .request import Request, RunRequest
from .state import Checkpoints, RunState
from .trainer import INTERRUPTED, Result


def begin(
    request: Request,
    updater: Updater,
    checkpoints: Checkpoints,
    *,
    record: dict[str, Any],
    previous: dict[str, Any] | None,
    total_steps: int,
) -> RunState | None:
    """Restore the state in which the run stopped, or clear the folder for a new one; then write `run.json`.

    Args:
        record: this run's, as `make_record` returns it.
        previous: the record of the run to continue, in the process that leads.

    Returns:
        the state to continue from; None if the run starts from the beginning.

    Raises:
        RequestError: the data is not the same, or the run already has more steps than requested.
        OpenELMError: all checkpoints are damaged.
    """
    leads, state = request.processes.leads, None
    if request.options.resume:
        if leads:
            assert previous is not None  # request.check
            run_folder.continue_record(record, previous)
            checkpoints.remove_leftovers()
        state = restore(request, updater, checkpoints, total_steps)
    elif leads:
        checkpoints.remove_all()
        run_folder.remove_run(request.folder)
    if leads:
        if request.options.resume_adapter_file is not None:
            # The adapter it starts from is part of the run: if it stops before its first checkpoint, --resume needs it.
            checkpoints.save(RunState(), updater.state())
        run_folder.write_record(request.folder, record)
    return state


def make_record(request: Request, prepared: Prepared, recompute: str) -> dict[str, Any]:
    """The content of `run.json`."""
    data: dict[str, Any] = {"fingerprint": prepared.fingerprint()}
    data |= {split: len(examples.examples) for split, examples in prepared.examples.items()}
    return run_folder.make_record(
        request.model,
        request.options,
        kind=request.options.command,
        loading=dataclasses.asdict(request.loading),
        data=data,
        processes=request.processes.size,
        recompute=recompute,
    )


def restore(request: RunRequest, updater: Updater, checkpoints: Checkpoints, total_steps: int) -> RunState | None:
    """Restore the updater from the last checkpoint. Returns the run's state, None if nothing was saved yet."""
    processes, listener = request.processes, request.listener
    found = checkpoints.load(listener.warn) if processes.leads else None
    values = json.loads(processes.share(json.dumps(dataclasses.asdict(found[0]) if found else None)))
    if values is None:
        listener.say("Nothing was saved before the run stopped; it starts from the beginning.")
        return None
    updater.restore(processes.share_tensors(found[1] if found else updater.state()))
    state = RunState(**values)
    if state.step > total_steps:
        raise RequestError(
            f"The run stopped after step {state.step} already; --iters must be at least that, or --epochs as much."
        )
    if state.step == total_steps:
        longer = "--iters" if request.options.epochs is None else "--epochs"
        listener.say(name_options(f"The run is complete, after {state.step} steps; raise {longer} to go on."))
    else:
        listener.say(f"Resuming after step {state.step}.")
    return state


def restore_best(request: RunRequest, updater: Updater, checkpoints: Checkpoints, result: Result) -> int:
    """With early stopping, go back to the weights with the lowest validation loss; otherwise keep the last ones.

    Returns:
        the step of the weights that the model has now.
    """
    best, listener = result.best_step, request.listener
    if request.options.early_stop is None or result.stopped == INTERRUPTED or best in (None, result.steps):
        return result.steps
    if best == 0:
        listener.warn("No validation was better than the one before training; the last weights are kept.")
        return result.steps
    tensors, kept, problem = updater.state(), best, ""
    if request.processes.leads:
        try:
            tensors = checkpoints.tensors(best)
        except OpenELMError as error:  # the last weights are better than an error at the end of a long run
            kept, problem = result.steps, f"{error} The last weights are kept in place of the best."
    updater.restore(request.processes.share_tensors(tensors))
    if problem:
        listener.warn(problem)
    return kept
