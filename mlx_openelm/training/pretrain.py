"""Pretraining: from a model's sizes and files of text to a model (`mlx-openelm pretrain`)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..errors import RequestError
from ..evaluation.flops import measured_peak, training_flops
from ..inputs import to_path
from ..loading import dtype_for
from ..messages import warn
from ..model import OpenELM
from .config_file import to_dict
from .data.corpus.loader import PretrainingData
from .options.corpus import CORENET
from .options.pretraining import PretrainOptions
from .run import folder as run_folder
from .run import planning, pretraining, resuming
from .run.distributed import Processes
from .run.listener import Listener
from .run.metrics import Metrics
from .run.preparing import Loading
from .run.pretraining import Request
from .run.progress import RunProgress
from .run.samples import Sample
from .run.spikes import Spikes
from .run.starting import Model, Start, describe, start
from .run.state import Checkpoints, RunState
from .run.stream import DeviceStream, Stream
from .run.tasks import Tasks, make_tasks
from .run.trackers import make_trackers
from .run.trainer import INTERRUPTED, Result, TrainingRun, train
from .run.written_models import write_models
from .step import compact, schedule
from .step.corenet_loss import CoreNetCrossEntropy
from .step.objectives import CrossEntropy, Objective
from .step.optimizers import make_optimizer
from .step.updater import Updater

_DEFAULT_LOADING = Loading()


@dataclass(frozen=True)
class Pretrained:
    """The result of pretraining.

    Args:
        output: the folder of the run.
        models: the folders of models in it, by name: `model`, and `model-ema` and `model-average` if they were asked
            for.
        validation: the validation losses of these, in nats per token, those that were measured.
        training: how training ended.
        model_step: the step whose weights `model` has: the last one, or with early stopping the best.
        planned_memory: the peak memory that was estimated for training, in GB (1e9 bytes).
        flops_per_token: the operations of a step per token, see `evaluation.flops`.
        peak_flops: those per second that the device reached in a large product.
        data: what the data says about itself: files, tokens and so on.
    """

    output: str
    models: dict[str, str]
    parameters: int
    training: Result
    model_step: int
    planned_memory: float
    flops_per_token: float
    peak_flops: float
    validation: dict[str, float] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Whether the user stopped training before its end."""
        return self.training.stopped == INTERRUPTED


def pretrain(
    model: Model,
    options: PretrainOptions,
    *,
    loading: Loading = _DEFAULT_LOADING,
    overwrite: bool = False,
    listener: Listener | None = None,
    progress: bool | None = True,
) -> Pretrained:
    """Train a model on text, from random weights or from existing ones.

    The model, `run.json`, `metrics.jsonl`, a plot and checkpoints go to `options.output`. With `mlx.launch` every
    process calls this; the first one writes and calls `listener`.

    Args:
        model: as `starting.start` takes it: a name or sizes for a new model, a folder to continue from.
        loading: `tokenizer` is needed for a model of one's own sizes; `dtype` is the type to compute in.
        overwrite: replace the run that is in `options.output`.
        listener: its callbacks report the run, in place of the lines and the bar that are shown by default.
        progress: whether to show the run, if there is no `listener`.

    Raises:
        RequestError: a request that cannot work; nothing was trained.
        OpenELMError: a loss that is not finite, a full disk, or a lost process; the last checkpoint is intact.
    """
    if isinstance(model, OpenELM):  # a mapping too, as MLX's modules are
        raise RequestError("model must be a name, a path or sizes, not a loaded model.")
    if (warning := backend.slow_training_warning()) is not None:
        warn(warning)
    processes = Processes()
    with processes.together(), backend.wired_limit(), contextlib.ExitStack() as shown:
        if not processes.leads:
            listener = Listener()
        elif listener is None:
            listener = shown.enter_context(RunProgress()) if progress else Listener()
        model = Path(model) if isinstance(model, os.PathLike) else model
        request = Request(model, options, loading, overwrite, processes, listener)
        previous = pretraining.check(request)
        origin = start(model, loading, seed=options.seed, max_seq_length=options.max_seq_length)
        if origin.training is not None:
            pretraining.check_corenet(request, origin.training)
        listener.say(origin.description)
        same = [describe(model), to_dict(options), origin.model.config.to_dict()]
        processes.check_equal("options or models", json.dumps(same))
        return _train(request, origin, previous)


def saved_options(output: str) -> dict[str, Any]:
    """The options of the run in a folder that differ from the defaults, by the names of options and model keys.

    Raises:
        RequestError: there is no run, or it cannot be read.
    """
    processes = Processes()
    with processes.together():
        text = json.dumps(run_folder.read_run(to_path(output), pretraining.COMMAND)) if processes.leads else None
        record = json.loads(processes.share(text))
    defaults = json.loads(json.dumps(to_dict(PretrainOptions())))
    changed = {name: v for name, v in record["options"].items() if name in defaults and v != defaults[name]}
    for name in ("resume", "output"):
        changed.pop(name, None)
    return {"model": record["model"], **{k: v for k, v in record["loading"].items() if v is not None}, **changed}


def _train(request: Request, origin: Start, previous: dict[str, Any] | None) -> Pretrained:
    """Train; `previous` is the record of the run to continue."""
    options, model, processes, listener = request.options, origin.model, request.processes, request.listener
    with contextlib.ExitStack() as stack:
        if processes.leads:
            stack.enter_context(run_folder.locked(request.folder, "--output"))
        before = pretraining.continue_samples(request, origin)
        updater = _make_updater(request, origin)
        model.train()
        schedule.learning_rate(options, 0, options.iters)  # refuses a warm-up that does not fit
        length = pretraining.usable_length(request, origin)
        planned = planning.plan(updater, options, (max(1, options.batch_size // processes.size), length))
        updater.recompute = planned.recompute
        listener.say(f"Memory: {planned}")
        if (warning := planned.warning()) is not None:
            listener.warn(warning)
        tasks = make_tasks(options, updater, origin.tokenizer, listener)
        checkpoints = pretraining.make_checkpoints(request)
        state = resuming.restore(request, updater, checkpoints, options.iters) if options.resume else None
        data = stack.enter_context(
            PretrainingData(
                options,
                origin.tokenizer,
                batch_size=options.batch_size,
                max_seq_length=length,
                grad_accumulation_steps=options.grad_accumulation_steps,
                world_size=processes.size,
                rank=processes.rank,
                seed=options.seed,
                state=None if state is None else state.stream,
            )
        )
        validation = pretraining.Validation.read(request, origin, length)
        if state is None:
            data.wait()  # before the folder is cleared: the text may be damaged, or empty
        listener.say(pretraining.describe_data(data.record()))
        pretraining.begin(request, checkpoints, data.record(), planned.recompute, previous)
        if state is None and origin.training is not None:
            state = pretraining.continue_corenet(request, origin.training, updater, checkpoints)
        speed = pretraining.Speed(training_flops(model.config, length), measured_peak(updater.compute_dtype), data)
        result = _run(request, origin, updater, checkpoints, state, data, validation, tasks, speed)
        if (left_out := pretraining.describe_left_out(data.record())) is not None:
            listener.say(left_out)
        kept = resuming.restore_best(request, updater, checkpoints, result)
        models, losses = write_models(request, origin, updater, checkpoints, validation, result)
        pretraining.finish_record(request, data.record())
        model.set_dtype(updater.compute_dtype)
        model.eval()
        is_whole = result.stopped != INTERRUPTED
        after = pretraining.continue_samples(request, origin) if is_whole else []
        prompts = options.sample_prompts if is_whole else ()
        return Pretrained(
            output=options.output,
            models=models,
            parameters=model.config.num_parameters,
            training=result,
            model_step=kept,
            planned_memory=planned.memory.peak / 1e9,
            flops_per_token=speed.flops_per_token,
            peak_flops=speed.peak,
            validation=losses,
            samples=tuple(map(Sample, prompts, before, after)),
            data=data.record(),
        )


def _make_updater(request: Request, origin: Start) -> Updater:
    options = request.options
    default = mx.bfloat16 if compact.is_wanted(options) else backend.compute_dtype(mx.float32)
    dtype = dtype_for(request.loading.dtype, origin.model.config) or default
    objective: Objective = CrossEntropy(z_loss=options.z_loss, label_smoothing=options.label_smoothing)
    if options.mode == CORENET:
        objective = CoreNetCrossEntropy(options.z_loss)
    compute_dtype = None if dtype == mx.float32 else dtype
    return Updater(
        origin.model,
        make_optimizer(options, embedding_learning_rate=options.embedding_learning_rate, ema_decay=options.ema_decay),
        objective=objective,
        compute_dtype=compute_dtype,
        is_compact=compact.is_wanted(options),
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        group=request.processes.group,
    )


def _run(
    request: Request,
    origin: Start,
    updater: Updater,
    checkpoints: Checkpoints,
    state: RunState | None,
    data: PretrainingData,
    validation: pretraining.Validation | None,
    tasks: Tasks | None,
    speed: pretraining.Speed,
) -> Result:
    """The training itself, from `state` on."""
    options, first = request.options, 0 if state is None else state.step
    is_corenet = options.mode == CORENET
    stream = DeviceStream(data, first, request.processes.size) if is_corenet else Stream(data, first)
    with _open_metrics(request, origin, state) as metrics:
        run = TrainingRun(
            updater=updater,
            steps=stream,
            options=options,
            total_steps=options.iters,
            learning_rate=lambda step: schedule.learning_rate(options, step, options.iters),
            checkpoints=checkpoints,
            metrics=metrics,
            evaluate=None if validation is None else lambda check: validation.measure(updater, check),
            tasks=tasks,
            describe=data.describe,
            position=stream.position,
            spikes=None if options.skip_spikes is None else Spikes(options.skip_spikes, options.spike_window),
            further=speed.report,
            listener=request.listener,
            processes=request.processes,
        )
        return train(run, state)


@contextlib.contextmanager
def _open_metrics(request: Request, origin: Start, state: RunState | None) -> Iterator[Metrics | None]:
    if not request.processes.leads:
        yield None
        return
    options, folder, step = request.options, request.folder, None if state is None else state.step
    trackers = make_trackers(options.report_to, folder, options.project_name, to_dict(options), step)
    validated = None if state is None else state.validated
    title = f"Pretraining {origin.name} ({options.mode} rows)"
    with Metrics(folder, title=title, resume_step=step, validated=validated, trackers=trackers) as metrics:
        yield metrics
