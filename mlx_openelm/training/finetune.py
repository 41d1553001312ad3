"""Fine-tuning: from a model's name and a folder of examples to an adapter (`mlx-openelm lora`)."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..adapters.attaching import attach, extract
from ..adapters.files import read_adapter, write_adapter
from ..inputs import to_path
from ..messages import warn
from ..model import OpenELM
from .config_file import to_dict
from .data.batches import Batches
from .data.read import whole_file_note
from .options import FineTuneOptions
from .run import folder as run_folder
from .run import planning, resuming
from .run.distributed import Processes
from .run.listener import Listener
from .run.measuring import continue_samples, make_validation, measure_test_loss
from .run.method import Method
from .run.metrics import Metrics
from .run.preparing import Loading, Prepared
from .run.progress import RunProgress
from .run.request import Request, check
from .run.samples import Sample
from .run.state import Checkpoints, RunState
from .run.tasks import Tasks, make_tasks
from .run.trackers import make_trackers
from .run.trainer import INTERRUPTED, Result, TrainingRun, train
from .step import compact, schedule
from .step.evaluation import Evaluation
from .step.objectives import Objective, reported
from .step.optimizers import make_optimizer
from .step.trainable import count, make_trainable
from .step.updater import Updater

_DEFAULT_LOADING = Loading()
_FINE_TUNING = Method()


@dataclass(frozen=True)
class FineTuned:
    """The result of fine-tuning.

    Args:
        adapter_path: the folder with the adapter; None if the base model alone was tested.
        training: how training ended; None if there was none.
        adapter_step: the step whose weights the folder has: the last one, or with early stopping the best; None if
            there was no training.
        best_checkpoint: the checkpoint with the lowest validation loss, if the folder has later weights; else None.
        test: the loss on the test examples; None if it was not asked for.
        counts: what the losses are means of: tokens, or pairs or answers.
        planned_memory: the peak memory that was estimated for training, in GB (1e9 bytes).
    """

    model: str
    adapter_path: str | None
    trained_parameters: int
    total_parameters: int
    training: Result | None = None
    test: Evaluation | None = None
    samples: tuple[Sample, ...] = ()
    planned_memory: float | None = None
    adapter_step: int | None = None
    best_checkpoint: str | None = None
    counts: str = "tokens"

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped training before its end."""
        return self.training is not None and self.training.stopped == INTERRUPTED


def finetune(
    model: str | Path,
    options: FineTuneOptions,
    *,
    loading: Loading = _DEFAULT_LOADING,
    overwrite: bool = False,
    listener: Listener | None = None,
    progress: bool | None = True,
) -> FineTuned:
    """Train an adapter, or the weights themselves, on a set of examples; test it; or both.

    The adapter, `run.json`, `metrics.jsonl`, a plot and checkpoints go to `options.adapter_path`. With `mlx.launch`
    every process calls this; the first one writes and calls `listener`.

    Args:
        model: as `load` takes it.
        overwrite: replace the run that is in `options.adapter_path`.
        listener: its callbacks report the run, in place of the lines and the bar that are shown by default.
        progress: whether to show the run, if there is no `listener`.

    Raises:
        RequestError: a request that cannot work; nothing was trained.
        OpenELMError: a loss that is not finite, a full disk, or a lost process; the last checkpoint is intact.
    """
    return tune(_FINE_TUNING, model, options, loading, overwrite, listener, progress)


def tune(
    method: Method,
    model: str | Path,
    options: FineTuneOptions,
    loading: Loading,
    overwrite: bool,
    listener: Listener | None,
    progress: bool | None,
) -> FineTuned:
    """Train, test or both, by this method; everything else is as in `finetune`."""
    if (warning := backend.slow_training_warning()) is not None:
        warn(warning)
    processes = Processes()
    with processes.together(), backend.wired_limit(), contextlib.ExitStack() as shown:
        if not processes.leads:
            listener = Listener()
        elif listener is None:
            listener = shown.enter_context(RunProgress()) if progress else Listener()
        request = Request(str(model), options, loading, overwrite, processes, listener)
        previous = check(request)
        prepared = method.prepare(request)
        same = [request.model, to_dict(options), prepared.fingerprint(), prepared.model.config.to_dict()]
        processes.check_equal("data, options or models", json.dumps(same))
        return _train(method, request, prepared, previous) if options.train else _test(method, request, prepared)


def saved_options(adapter_path: str, method: Method = _FINE_TUNING) -> dict[str, Any]:
    """The options of the run in a folder that differ from the defaults, by the names of options and model keys.

    Raises:
        RequestError: there is no run, or it cannot be read.
    """
    processes = Processes()
    with processes.together():
        text = (
            json.dumps(run_folder.read_run(to_path(adapter_path), method.options.command)) if processes.leads else None
        )
        record = json.loads(processes.share(text))
    defaults = to_dict(method.options())
    changed = {name: v for name, v in record["options"].items() if name in defaults and v != defaults[name]}
    for name in ("resume", "resume_adapter_file", "adapter_path"):
        changed.pop(name, None)
    return {"model": record["model"], **{k: v for k, v in record["loading"].items() if v is not None}, **changed}


def _train(method: Method, request: Request, prepared: Prepared, previous: dict[str, Any] | None) -> FineTuned:
    """Train, then test and sample if that was asked for; `previous` is the record of the run to continue."""
    options, model = request.options, prepared.model
    with contextlib.ExitStack() as stack:
        if request.processes.leads:
            stack.enter_context(run_folder.locked(request.folder))
        method.complete(request, prepared, keep=True)
        make_trainable(model, options)
        trained, total = count(model)
        request.listener.say(
            f"Trainable parameters: {trained * 100 / total:.3f}% ({trained / 1e6:.3f}M/{total / 1e6:.3f}M)"
        )
        before = continue_samples(request, prepared)
        setup = _set_up(method, request, prepared)
        record = resuming.make_record(request, prepared, setup.updater.recompute) | {"method": method.record()}
        state = resuming.begin(request, setup.updater, setup.checkpoints, record=record, previous=previous,
                               total_steps=setup.total_steps)  # fmt: skip
        result = _run(method, request, prepared, setup, state)
        kept = resuming.restore_best(request, setup.updater, setup.checkpoints, result)
        if request.processes.leads:
            with setup.updater.exact():
                run_folder.publish(request.folder, partial(_write_adapter, request, model))
        is_whole = result.stopped != INTERRUPTED
        measure = method.measure(request, prepared, setup.updater)
        test = measure_test_loss(request, prepared, measure) if is_whole else None
        if options.fine_tune_type == "full":
            model.set_dtype(setup.updater.compute_dtype)  # the master weights were float32
        model.eval()
        after = continue_samples(request, prepared) if is_whole else []
        prompts = options.sample_prompts if is_whole else ()
        samples = tuple(map(Sample, prompts, before, after))
        return FineTuned(
            request.model,
            options.adapter_path,
            trained,
            total,
            result,
            test,
            samples,
            planned_memory=setup.planned_memory / 1e9,
            adapter_step=kept,
            best_checkpoint=_best_checkpoint(setup.checkpoints, result, kept),
            counts=method.counts(request),
        )


@dataclass(frozen=True)
class _Setup:
    """The parts of a run; `planned_memory` is in bytes."""

    updater: Updater
    batches: Batches
    checkpoints: Checkpoints
    total_steps: int
    tasks: Tasks | None
    planned_memory: int


def _set_up(method: Method, request: Request, prepared: Prepared) -> _Setup:
    """Make the parts of a run, and refuse now what would fail later; nothing is written yet."""
    options, model = request.options, prepared.model
    updater = _make_updater(request, model, method.objective(request))
    model.train()
    batches = method.batches(request, prepared, updater)
    checkpoints = Checkpoints(
        request.folder / run_folder.CHECKPOINTS,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        # An adapter is small, so each checkpoint has a copy that can be used directly. All weights would be too large.
        export=None if options.fine_tune_type == "full" else partial(_write_adapter, request, model),
    )
    total_steps = _total_steps(options, batches)
    if options.fine_tune_type != "full":
        with tempfile.TemporaryDirectory() as folder:  # fails if the format cannot hold the adapter
            _write_adapter(request, model, Path(folder), warn=True)
    planned = planning.plan(updater, options, batches.largest_shape(), method.further_memory(request, prepared))
    updater.recompute = planned.recompute
    request.listener.say(f"Memory: {planned}")
    if (warning := planned.warning()) is not None:
        request.listener.warn(warning)
    tasks = make_tasks(options, updater, prepared.tokenizer, request.listener)
    return _Setup(updater, batches, checkpoints, total_steps, tasks, planned.memory.peak)


def _best_checkpoint(checkpoints: Checkpoints, result: Result, kept: int) -> str | None:
    best = result.best_step
    if best is None or best == kept or best not in checkpoints.steps():
        return None
    return str(checkpoints.path(best))


def _make_updater(request: Request, model: OpenELM, objective: Objective) -> Updater:
    options = request.options
    dtype = model.transformer.norm["weight"].dtype
    # Adapters cast themselves; the weights of full fine-tuning are cast for each step.
    compute_dtype = dtype if options.fine_tune_type == "full" and dtype != mx.float32 else None
    return Updater(
        model,
        make_optimizer(options),
        objective=objective,
        compute_dtype=compute_dtype,
        is_compact=compact.is_wanted(options),
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        group=request.processes.group,
    )


def _total_steps(options: FineTuneOptions, batches: Batches) -> int:
    total = options.iters
    if options.epochs is not None:
        total = max(1, math.ceil(options.epochs * batches.steps_per_epoch))
    schedule.learning_rate(options, 0, total)  # refuses a warm-up that does not fit
    return total


def _write_adapter(request: Request, model: OpenELM, folder: Path, warn: bool = False) -> None:
    """Write the trained parameters; `warn` shows warnings about what the format cannot store."""
    adapter = extract(model, base_model=request.model)
    with warnings.catch_warnings():
        if not warn:
            warnings.simplefilter("ignore")
        write_adapter(adapter, folder, model.config, format=request.options.adapter_format)


def _run(method: Method, request: Request, prepared: Prepared, setup: _Setup, state: RunState | None) -> Result:
    """The training itself, from `state` on."""
    options, examples = request.options, setup.batches.examples
    measure = method.measure(request, prepared, setup.updater)
    if state is not None:
        setup.batches.restore(state.stream)
    with _open_metrics(method, request, state) as metrics:
        run = TrainingRun(
            updater=setup.updater,
            steps=setup.batches,
            options=options,
            total_steps=setup.total_steps,
            learning_rate=lambda step: schedule.learning_rate(options, step, setup.total_steps),
            checkpoints=setup.checkpoints,
            metrics=metrics,
            position=setup.batches.position,
            evaluate=make_validation(request, prepared, measure),
            tasks=setup.tasks,
            describe=lambda index: examples[index].source,
            counts=method.counts(request),
            report=partial(reported, setup.updater.objective),
            listener=request.listener,
            processes=request.processes,
        )
        return train(run, state)


@contextlib.contextmanager
def _open_metrics(method: Method, request: Request, state: RunState | None) -> Iterator[Metrics | None]:
    if not request.processes.leads:
        yield None
        return
    options, folder, step = request.options, request.folder, None if state is None else state.step
    trackers = make_trackers(options.report_to, folder, options.project_name, to_dict(options), step)
    validated = None if state is None else state.validated
    title = _title(method, request)
    with Metrics(folder, title=title, resume_step=step, validated=validated, trackers=trackers) as metrics:
        yield metrics


def _title(method: Method, request: Request) -> str:
    """What the plot of a run shows."""
    options, kinds = request.options, {"lora": "LoRA", "dora": "DoRA"}
    kind = kinds.get(options.fine_tune_type)
    how = "full weights" if kind is None else f"{kind}, rank {options.rank}"
    return f"{method.title(request)} {_end(request.model)} on {_end(str(options.data))} ({how})"


def _end(name: str, length: int = 24) -> str:
    """A name for a title: as many whole parts of a long path, from its end, as fit into `length`; at least the last."""
    parts = Path(name).parts
    kept = next((index for index in range(len(parts)) if len(str(Path(*parts[index:]))) <= length), len(parts) - 1)
    return str(Path("…", *parts[kept:])) if kept > 0 else name


def _test(method: Method, request: Request, prepared: Prepared) -> FineTuned:
    """Test the adapter in the folder, or the base model if there is none."""
    options, model = request.options, prepared.model
    assert options.data is not None  # FineTuneOptions.check
    if (note := whole_file_note(options.data)) is not None:
        request.listener.say(note)
    method.complete(request, prepared, keep=False)
    before = continue_samples(request, prepared)
    path = options.adapter_path if request.tests_adapter else None
    if path is not None:
        attach(model, read_adapter(path, model.config))
        trained, total = count(model)
    else:
        request.listener.say("There is no adapter: this tests the base model.")
        trained, total = 0, model.config.num_parameters
    test = measure_test_loss(request, prepared, method.measure(request, prepared, None))
    after = before if path is None else continue_samples(request, prepared)
    samples = tuple(map(Sample, options.sample_prompts, before, after))
    counts = method.counts(request)
    return FineTuned(request.model, path, trained, total, None, test, samples, counts=counts)
