"""Fine-tuning: from a model's name and a folder of examples to an adapter (`mlx-openelm lora`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..adapters.attaching import attach, extract
from ..adapters.files import find_local, read_adapter, write_adapter
from ..cuda.compiling import notice
from ..errors import OpenELMError, RequestError
from ..hub import catalog
from ..inputs import to_path
from ..loading import check_dtype
from ..text.chat_template import find_template
from .config_file import to_dict
from .data.batches import Batch, Batches
from .data.read import whole_file_note
from .options import FineTuneOptions
from .run import folder as run_folder
from .run import planning
from .run.distributed import Processes
from .run.metrics import Metrics
from .run.preparing import Loading, prepare
from .run.samples import Sample, continue_prompts, prompt_tokens
from .run.state import Checkpoints, RunState
from .run.trackers import make_trackers
from .run.trainer import INTERRUPTED, Listener, Result, train
from .step import schedule
from .step.optimizers import make_optimizer
from .step.trainable import count, make_trainable
from .step.updater import Evaluation, Updater, evaluate

_DEFAULT_FOLDER = FineTuneOptions().adapter_path
_AS_USUAL = Loading()


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning gave.

    `adapter_path` is the folder with the adapter, None where the base was tested alone. `planned_memory` is what
    training was expected to take at most, in GB (1e9 bytes).
    """

    model: str
    adapter_path: str | None
    trained_parameters: int
    total_parameters: int
    training: Result | None = None
    test: Evaluation | None = None
    samples: tuple[Sample, ...] = ()
    planned_memory: float | None = None

    @property
    def interrupted(self) -> bool:
        return self.training is not None and self.training.stopped == INTERRUPTED


def finetune(
    model: str,
    options: FineTuneOptions,
    *,
    loading: Loading = _AS_USUAL,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> FineTuned:
    """Train an adapter, or the weights themselves, on a set of examples, test it, or both.

    The adapter, `run.json`, `metrics.jsonl`, a picture and checkpoints go to `options.adapter_path`. With `mlx.launch`
    every process calls this; the first of them writes, and tells `listener`.

    Args:
        model: as `load` takes it.
        overwrite: replace the run that is in `options.adapter_path`.

    Raises:
        RequestError: a request that cannot be right; nothing was trained.
        OpenELMError: a loss that is not finite, a full disk, a process that is gone: the last checkpoint is intact.
    """
    if (warning := backend.slow_training_warning()) is not None:
        warnings.warn(warning, stacklevel=2)
    processes = Processes()
    with processes.together(), backend.wired_limit():
        told = listener if listener is not None and processes.leads else Listener()
        return _Work(model, options, loading, overwrite, processes, told).do()


def saved_options(adapter_path: str) -> dict[str, Any]:
    """What the run in a folder was told beyond the defaults, under the names of options and model keys.

    Raises:
        RequestError: there is no run, or it cannot be read.
    """
    processes = Processes()
    with processes.together():
        text = json.dumps(run_folder.read_run(to_path(adapter_path))) if processes.leads else None
        record = json.loads(processes.share(text))
    usual = to_dict(FineTuneOptions())
    told = {name: value for name, value in record["options"].items() if name in usual and value != usual[name]}
    for name in ("resume", "resume_adapter_file", "adapter_path"):
        told.pop(name, None)
    return {"model": record["model"], **{k: v for k, v in record["loading"].items() if v is not None}, **told}


class _Work:
    """One call of `finetune`, in its order."""

    def __init__(
        self,
        name: str,
        options: FineTuneOptions,
        loading: Loading,
        overwrite: bool,
        processes: Processes,
        listener: Listener,
    ):
        self.name, self.options, self.loading, self.overwrite = name, options, loading, overwrite
        self.processes, self.listener = processes, listener
        self.folder = to_path(options.adapter_path)

    def do(self) -> FineTuned:
        self.check()
        self.ready = prepare(self.name, self.options, self.loading, self.listener)
        self.model = self.ready.model
        told = [self.name, to_dict(self.options), self.ready.fingerprint(), self.model.config.to_dict()]
        self.processes.check_equal("data, options or models", json.dumps(told))
        return self.train() if self.options.train else self.test_alone()

    # Before anything is loaded.

    def check(self) -> None:
        """Refuse all that can be known to be wrong already."""
        options = self.options
        options.check()
        self.processes.check_batch(options.batch_size)
        check_dtype(self.name, self.loading.dtype)
        if self.loading.chat_template is not None:
            find_template(self.loading.chat_template)
        if options.train and self.processes.leads:
            run_folder.check_folder(self.folder, resume=options.resume, overwrite=self.overwrite)
            if options.resume:
                self.before = run_folder.read_run(self.folder)
                loading = dataclasses.asdict(self.loading)
                for change in run_folder.compare(self.name, options, loading, self.before):
                    self.listener.warn(f"{change}; from here on the run differs from one that never stopped.")
        if options.resume_adapter_file is not None and _is_missing(options.resume_adapter_file):
            raise RequestError(f"--resume-adapter-file {options.resume_adapter_file} does not exist.")
        if self.overwrite and not options.train:
            raise RequestError("--overwrite replaces a run by another one; it needs --train.")
        if not options.train and self.tests_adapter() and _is_missing(options.adapter_path):
            raise RequestError(
                f"There is no adapter in {options.adapter_path}; give --adapter-path the folder that holds one, "
                "or '' to test the base model."
            )

    def tests_adapter(self) -> bool:
        """Whether there is an adapter to test: one that is named, or the default folder where it is there."""
        path = self.options.adapter_path
        return path != "" and (path != _DEFAULT_FOLDER or self.folder.exists())

    # Training.

    def train(self) -> FineTuned:
        options = self.options
        with contextlib.ExitStack() as stack:
            if self.processes.leads:
                stack.enter_context(run_folder.locked(self.folder))
            make_trainable(self.model, options)
            trained, total = count(self.model)
            self.listener.say(
                f"Trainable parameters: {trained * 100 / total:.3f}% ({trained / 1e6:.3f}M/{total / 1e6:.3f}M)"
            )
            before = self.continuations()
            self.compute_dtype = self.model.transformer.norm["weight"].dtype
            self.updater = self.make_updater()
            self.model.train()
            batches = self.make_batches()
            checkpoints = Checkpoints(
                self.folder / run_folder.CHECKPOINTS,
                keep_last=options.keep_last,
                keep_every=options.keep_every,
                # An adapter is small beside the state of the run; all weights once more would not be.
                export=None if options.fine_tune_type == "full" else self.write_adapter,
            )
            total_steps = self.total_steps(batches)
            self.check_format()
            planned = self.plan(batches)
            state = self.begin(checkpoints, total_steps)
            result = self.run(batches, total_steps, checkpoints, state)
            self.choose(result, checkpoints)
            if self.processes.leads:
                run_folder.place(self.folder, self.write_adapter)
            test = None if result.stopped == INTERRUPTED else self.test()
            self.to_compute_dtype()
            self.model.eval()
            prompts = options.sample_prompts if result.stopped != INTERRUPTED else ()
            after = self.continuations() if prompts else []
            samples = tuple(map(Sample, prompts, before, after))
            peak = planned.memory.peak / 1e9
            return FineTuned(self.name, options.adapter_path, trained, total, result, test, samples, peak)

    def plan(self, batches: Batches) -> planning.Plan:
        """Choose what is recomputed; tell the memory the run will need, and what to turn on if that is too much."""
        planned = planning.plan(self.updater, self.options, batches.largest_shape())
        self.updater.recompute = self.recompute = planned.recompute
        self.listener.say(f"Memory: {planned}")
        if (warning := planned.warning()) is not None:
            self.listener.warn(warning)
        return planned

    def make_updater(self) -> Updater:
        options = self.options
        # Adapters cast themselves; the weights of full fine-tuning are cast for each step.
        casts = options.fine_tune_type == "full" and self.compute_dtype != mx.float32
        return Updater(
            self.model,
            make_optimizer(options),
            compute_dtype=self.compute_dtype if casts else None,
            max_grad_norm=options.max_grad_norm,
            z_loss=options.z_loss,
            label_smoothing=options.label_smoothing,
            seed=options.seed,
            group=self.processes.group,
        )

    def make_batches(self) -> Batches:
        options = self.options
        return Batches(
            self.ready.examples["train"].examples,
            batch_size=options.batch_size,
            grad_accumulation_steps=options.grad_accumulation_steps,
            world_size=self.processes.size,
            packing=options.packing,
            max_seq_length=self.ready.max_seq_length,
            seed=options.seed,
        )

    def begin(self, checkpoints: Checkpoints, total_steps: int) -> RunState | None:
        """Go back to where the run stopped, or make room for a new one; and write down what runs now."""
        options, examples = self.options, self.ready.examples
        data: dict[str, Any] = {"fingerprint": self.ready.fingerprint()}
        data |= {split: len(examples[split].examples) for split in examples}
        loading = dataclasses.asdict(self.loading)
        record = run_folder.make_record(self.name, options, loading=loading, data=data, processes=self.processes.size,
                                        recompute=self.recompute)  # fmt: skip
        state = None
        if options.resume:
            if self.processes.leads:
                run_folder.continue_record(record, self.before)
                checkpoints.remove_leftovers()
            state = self.restore(checkpoints, total_steps)
            if state is not None and state.step > total_steps:
                raise RequestError(
                    f"The run stopped after step {state.step} already; --iters must be at least that, or --epochs "
                    "as much."
                )
        elif self.processes.leads:
            checkpoints.remove_all()
            run_folder.remove_run(self.folder)
        if self.processes.leads:
            if options.resume_adapter_file is not None:
                # What a run starts from is part of it: before anything else is saved, --resume goes on from here.
                checkpoints.save(RunState(), self.updater.state())
            run_folder.write_record(self.folder, record)
        return state

    def restore(self, checkpoints: Checkpoints, total_steps: int) -> RunState | None:
        """Where the run stopped; the updater has the weights of then. None if nothing was saved yet."""
        found = checkpoints.load(self.listener.warn) if self.processes.leads else None
        state = json.loads(self.processes.share(json.dumps(dataclasses.asdict(found[0]) if found else None)))
        if state is None:
            self.listener.say("Nothing was saved before the run stopped; it starts from the beginning.")
            return None
        self.updater.restore(self.processes.share_tensors(found[1] if found else self.updater.state()))
        step = state["step"]
        if step == total_steps:
            longer = "--iters" if self.options.epochs is None else "--epochs"
            self.listener.say(f"The run is complete, after {step} steps; raise {longer} to go on.")
        elif step < total_steps:
            self.listener.say(f"Going on after step {step}.")
        return RunState(**state)

    def total_steps(self, batches: Batches) -> int:
        options, total = self.options, self.options.iters
        if options.epochs is not None:
            total = max(1, math.ceil(options.epochs * batches.steps_per_epoch))
        schedule.learning_rate(options, 0, total)  # refuses a warm-up that does not fit
        return total

    def check_format(self) -> None:
        """Refuse now what could not be written in the end, and warn of what a format cannot carry."""
        if self.options.fine_tune_type != "full":
            with tempfile.TemporaryDirectory() as folder:
                self.write_adapter(Path(folder), warn=True)

    def run(self, batches: Batches, total_steps: int, checkpoints: Checkpoints, state: RunState | None) -> Result:
        options, examples = self.options, batches.examples
        with self.open_metrics(state) as metrics:
            return train(
                self.updater,
                batches,
                options,
                total_steps=total_steps,
                learning_rate=lambda step: schedule.learning_rate(options, step, total_steps),
                checkpoints=checkpoints,
                metrics=metrics,
                state=state,
                evaluate=self.validation(),
                describe=lambda index: examples[index].source,
                listener=self.listener,
                processes=self.processes,
            )

    @contextlib.contextmanager
    def open_metrics(self, state: RunState | None) -> Iterator[Metrics | None]:
        if not self.processes.leads:
            yield None
            return
        options, step = self.options, None if state is None else state.step
        trackers = make_trackers(options.report_to, self.folder, options.project_name, to_dict(options), step)
        validated = None if state is None else state.validated
        with Metrics(self.folder, resume_step=step, validated=validated, trackers=trackers) as metrics:
            yield metrics

    def validation(self) -> Callable[[Callable[[], None]], Evaluation] | None:
        """Measures the validation loss; None without validation."""
        if "valid" not in self.ready.examples:
            return None
        batches = self.ready.held_out("valid", self.options.val_batches, self.options, self.processes)
        most = self.processes.largest(len(batches))

        def checked(check: Callable[[], None]) -> Iterator[Batch]:
            for index in range(most):
                self.listener.working("Validating", index, most)
                check()
                with notice("Validating", self.listener.say):
                    yield from batches[index : index + 1]

        return lambda check: self.updater.evaluate(checked(check))

    def counting(self, what: str, batches: list[Batch]) -> Iterator[Batch]:
        for index, batch in enumerate(batches):
            self.listener.working(what, index, len(batches))
            with notice(what, self.listener.say):
                yield batch
        self.listener.working(what, len(batches), len(batches))

    def choose(self, result: Result, checkpoints: Checkpoints) -> None:
        """With early stopping the best weights are what is left, else the last."""
        best = result.best_step
        if self.options.early_stop is None or result.stopped == INTERRUPTED or best in (None, result.steps):
            return
        if best == 0:
            self.listener.warn("No validation was better than the one before training; the last weights are kept.")
            return
        tensors, kept = self.updater.state(), f"The weights of step {best}, where validation was best, are kept."
        if self.processes.leads:
            try:
                tensors = checkpoints.tensors(best)
            except OpenELMError as error:  # what was trained is not to be lost by that
                kept = f"{error} The last weights are kept in place of the best."
        self.updater.restore(self.processes.share_tensors(tensors))
        self.listener.say(kept)

    def write_adapter(self, folder: Path, warn: bool = False) -> None:
        adapter = extract(self.model, base_model=self.name)
        with warnings.catch_warnings():
            if not warn:  # it was said once
                warnings.simplefilter("ignore")
            write_adapter(adapter, folder, self.model.config, format=self.options.adapter_format)

    def to_compute_dtype(self) -> None:
        """Weights that were trained in float32 compute as the others again."""
        if self.options.fine_tune_type == "full":
            self.model.set_dtype(self.compute_dtype)

    # Knowing.

    def continuations(self) -> list[str]:
        """What the model says to the sample prompts; only where something is shown."""
        options = self.options
        if not (options.sample_prompts and self.processes.leads):
            return []
        tokenizer, report, template = self.ready.tokenizer, self.ready.shown.report, self.loading.chat_template
        prompts = [prompt_tokens(prompt, tokenizer, report, template) for prompt in options.sample_prompts]
        return continue_prompts(self.model, tokenizer, prompts, options.sample_tokens)

    def test(self) -> Evaluation | None:
        if not self.options.test:
            return None
        held_out = self.ready.held_out("test", self.options.test_batches, self.options, self.processes)
        batches = self.counting("Testing", held_out)
        if self.options.train:
            return self.updater.evaluate(batches)
        return evaluate(self.model, batches, group=self.processes.group)

    def test_alone(self) -> FineTuned:
        """Test the adapter in the folder, or the base model where there is none."""
        assert self.options.data is not None  # FineTuneOptions.check
        if (note := whole_file_note(self.options.data)) is not None:
            self.listener.say(note)
        before = self.continuations()
        path = self.options.adapter_path if self.tests_adapter() else None
        if path is not None:
            attach(self.model, read_adapter(path, self.model.config))
            trained, total = count(self.model)
        else:
            self.listener.say("There is no adapter: this tests the base model.")
            trained, total = 0, self.model.config.num_parameters
        test = self.test()
        after = before if path is None else self.continuations()
        samples = tuple(map(Sample, self.options.sample_prompts, before, after))
        return FineTuned(self.name, path, trained, total, None, test, samples)


def _is_missing(path: str) -> bool:
    """Whether a path names no adapter here and could be no repository's name on the hub either."""
    if find_local(path) is not None or catalog.corenet_name(path) is not None:
        return False
    owner, _, name = path.partition("/")
    return not name or "/" in name or not owner.strip(".~") or Path(path).suffix in (".safetensors", ".pt")
