"""Fine-tuning: from a model's name and a folder of examples to an adapter (`mlx-openelm lora`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .. import backend
from ..adapters.attaching import attach, extract
from ..adapters.files import read_adapter, write_adapter
from ..chat_template import find_template
from ..config import ModelConfig
from ..errors import RequestError
from ..loading import check_dtype, load
from ..model import OpenELM
from ..tokenizer import Tokenizer
from . import run_folder, schedule
from .batches import Batch, Batches, validation_batches
from .config_file import to_dict
from .data import Splits, read_splits
from .distributed import Processes
from .examples import Examples, tokenize
from .metrics import Metrics
from .optimizers import make_optimizer
from .options import FineTuneOptions
from .run_state import Checkpoints, RunState
from .samples import Sample, continue_prompts, prompt_tokens
from .step import Evaluation, Updater, evaluate
from .trackers import make_trackers
from .trainable import check_model, count, make_trainable
from .trainer import INTERRUPTED, Listener, Result, train

_DEFAULT_FOLDER = FineTuneOptions().adapter_path


@dataclass(frozen=True)
class Loading:
    """How the model is loaded and prompts are rendered, as `load` and `tokenize` have it."""

    dtype: str | None = None
    tokenizer: str | None = None
    config_yaml: str | None = None
    revision: str | None = None
    chat_template: str | None = None


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning gave. `adapter_path` is the folder with the adapter, None where the base was tested alone."""

    model: str
    adapter_path: str | None
    trained_parameters: int
    total_parameters: int
    training: Result | None = None
    test: Evaluation | None = None
    samples: tuple[Sample, ...] = ()

    @property
    def interrupted(self) -> bool:
        return self.training is not None and self.training.stopped == INTERRUPTED


def finetune(
    model: str,
    options: FineTuneOptions,
    *,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
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
    processes = Processes()
    with processes.together(), backend.wired_limit():
        work = _Work(model, options, loading, overwrite, processes, (listener or Listener()) if processes.leads else Listener())
        return work.do()


def saved_options(adapter_path: str) -> dict[str, Any]:
    """What the run in a folder was told beyond the defaults, under the names of options and model keys.

    Raises:
        RequestError: there is no run, or it cannot be read.
    """
    processes = Processes()
    with processes.together():
        text = json.dumps(run_folder.read_run(Path(adapter_path).expanduser())) if processes.leads else None
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
        self.folder = Path(options.adapter_path).expanduser()

    def do(self) -> FineTuned:
        self.check()
        splits = self.read_data()
        self.model, self.tokenizer = self.load()
        self.tokenize(splits)
        self.processes.check_equal("data, options or models", self.identity())
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
                    self.listener.warn(f"{change}; so from here on it is another run than it was.")
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

    def read_data(self) -> Splits:
        options = self.options
        need = [name for name, wanted in (("train", options.train), ("test", options.test)) if wanted]
        assert options.data is not None  # options.check
        splits = read_splits(options.data, valid_fraction=options.valid_fraction, seed=options.seed, need=need)
        if options.train:
            for note in splits.notes:
                self.listener.say(note)
            if options.early_stop is not None and not splits.valid:
                raise RequestError("--early-stop needs validation data: a valid file, or --valid-fraction.")
        return splits

    def load(self) -> tuple[OpenELM, Tokenizer]:
        values = dataclasses.asdict(self.loading)
        del values["chat_template"]
        model, tokenizer = load(self.name, **values)
        if self.options.train:
            check_model(model, self.options)
        return model, tokenizer

    def tokenize(self, splits: Splits) -> None:
        """Make examples of the records, and show what they are."""
        self.max_seq_length = self.usable_length(self.model.config)
        self.examples: dict[str, Examples] = {}
        for split in ("train", "valid", "test"):
            records = getattr(splits, split)
            if not records or (split == "valid" and self.options.val_batches == 0):
                continue
            self.examples[split] = tokenize(
                records,
                self.tokenizer,
                max_seq_length=self.max_seq_length,
                mask_prompt=self.options.mask_prompt,
                chat_template=self.loading.chat_template,
                long_examples=self.options.long_examples,
                progress=lambda done, total, split=split: self.listener.working(f"Tokenizing {split}", done, total),
            )
            for line in _describe(split, self.examples[split], self.max_seq_length):
                self.listener.say(line)
        first = self.examples["train" if self.options.train else "test"].report
        self.listener.say("An example, with what is learned between ⟦ and ⟧:")
        self.listener.say(first.sample_text())

    def usable_length(self, config: ModelConfig) -> int:
        """`max_seq_length`, or as far as the model's positions go."""
        wanted, most = self.options.max_seq_length, config.rope_max_length
        if wanted > most:
            self.listener.say(f"--max-seq-length is {most}, not {wanted}: the model's positions end there.")
        return min(wanted, most)

    def identity(self) -> str:
        """What must be the same in all processes."""
        return json.dumps([self.name, to_dict(self.options), self.fingerprint(), self.model.config.to_dict()])

    def fingerprint(self) -> str:
        return " ".join(examples.fingerprint() for split, examples in self.examples.items() if split != "test")

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
            state = self.begin(checkpoints)
            result = self.run(batches, checkpoints, state)
            self.choose(result, checkpoints)
            if self.processes.leads:
                run_folder.place(self.folder, self.write_adapter)
            test = None if result.stopped == INTERRUPTED else self.test()
            self.to_compute_dtype()
            self.model.eval()
            prompts = options.sample_prompts if result.stopped != INTERRUPTED else ()
            after = self.continuations() if prompts else []
            samples = tuple(map(Sample, prompts, before, after))
            return FineTuned(self.name, options.adapter_path, trained, total, result, test, samples)

    def make_updater(self) -> Updater:
        options = self.options
        # Adapters cast themselves; the weights of full fine-tuning are cast for each step.
        casts = options.fine_tune_type == "full" and self.compute_dtype != mx.float32
        return Updater(
            self.model,
            make_optimizer(options),
            compute_dtype=self.compute_dtype if casts else None,
            grad_checkpoint=options.grad_checkpoint,
            max_grad_norm=options.max_grad_norm,
            z_loss=options.z_loss,
            label_smoothing=options.label_smoothing,
            seed=options.seed,
            group=self.processes.group,
        )

    def make_batches(self) -> Batches:
        options = self.options
        return Batches(
            self.examples["train"].examples,
            batch_size=options.batch_size,
            grad_accumulation_steps=options.grad_accumulation_steps,
            world_size=self.processes.size,
            packing=options.packing,
            max_seq_length=self.max_seq_length,
            seed=options.seed,
        )

    def begin(self, checkpoints: Checkpoints) -> RunState | None:
        """Write down what is about to run, or find where it stopped, and go back there."""
        options = self.options
        if self.processes.leads:
            data = {"fingerprint": self.fingerprint()} | {
                split: examples.report.num_examples for split, examples in self.examples.items()
            }
            loading = dataclasses.asdict(self.loading)
            record = run_folder.make_record(
                self.name, options, loading=loading, data=data, processes=self.processes.size
            )
            if options.resume:
                run_folder.continue_record(record, self.before)
                checkpoints.remove_leftovers()
            else:
                checkpoints.remove_all()
                run_folder.remove_run(self.folder)
            run_folder.write_record(self.folder, record)
        return self.restore(checkpoints) if options.resume else None

    def restore(self, checkpoints: Checkpoints) -> RunState | None:
        """Where the run stopped; the updater has the weights of then. None if nothing was saved yet."""
        found = checkpoints.load(self.listener.warn) if self.processes.leads else None
        state = json.loads(self.processes.share(json.dumps(dataclasses.asdict(found[0]) if found else None)))
        if state is None:
            self.listener.say("Nothing was saved before the run stopped; it starts from the beginning.")
            return None
        tensors = found[1] if found else self.updater.state()
        self.updater.restore(self.processes.share_tensors(tensors))
        self.listener.say(f"Going on after step {state['step']}.")
        return RunState(**state)

    def run(self, batches: Batches, checkpoints: Checkpoints, state: RunState | None) -> Result:
        options = self.options
        total_steps = options.iters
        if options.epochs is not None:
            total_steps = max(1, math.ceil(options.epochs * batches.steps_per_epoch))
        schedule.learning_rate(options, 0, total_steps)  # refuses what does not fit
        examples = batches.examples
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
        with Metrics(self.folder, resume_step=step, trackers=trackers) as metrics:
            yield metrics

    def validation(self) -> Callable[[Callable[[Batch], None]], Evaluation] | None:
        """Measures the validation loss; None without validation."""
        if "valid" not in self.examples:
            return None
        batches = self.held_out("valid", self.options.val_batches)

        def measure(progress: Callable[[Batch], None]) -> Evaluation:
            return self.updater.evaluate(batches, self.counting("Validating", len(batches), progress))

        return measure

    def held_out(self, split: str, num_batches: int) -> list[Batch]:
        return validation_batches(
            self.examples[split].examples,
            self.options.batch_size,
            num_batches=num_batches,
            max_seq_length=self.max_seq_length,
            world_size=self.processes.size,
            rank=self.processes.rank,
            seed=self.options.seed,
        )

    def counting(
        self, what: str, total: int, then: Callable[[Batch], None] = lambda _: None
    ) -> Callable[[Batch], None]:
        done = 0

        def progress(batch: Batch) -> None:
            nonlocal done
            done += 1
            self.listener.working(what, done, total)
            then(batch)

        return progress

    def choose(self, result: Result, checkpoints: Checkpoints) -> None:
        """With early stopping the best weights are what is left, else the last."""
        best = result.best_step
        if self.options.early_stop is None or result.stopped == INTERRUPTED or best in (None, result.steps):
            return
        if best == 0:
            self.listener.warn("No validation was better than the one before training; the last weights are kept.")
            return
        tensors = checkpoints.tensors(best) if self.processes.leads else self.updater.state()
        self.updater.restore(self.processes.share_tensors(tensors))
        self.listener.say(f"The weights of step {best}, where validation was best, are kept.")

    def write_adapter(self, folder: Path) -> None:
        adapter = extract(self.model, base_model=self.name)
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
        report = self.examples["train" if options.train else "test"].report
        prompts = [
            prompt_tokens(prompt, self.tokenizer, report, self.loading.chat_template)
            for prompt in options.sample_prompts
        ]
        return continue_prompts(self.model, self.tokenizer, prompts, options.sample_tokens)

    def test(self) -> Evaluation | None:
        if not self.options.test:
            return None
        batches = self.held_out("test", self.options.test_batches)
        progress = self.counting("Testing", len(batches))
        if self.options.train:
            return self.updater.evaluate(batches, progress)
        return evaluate(self.model, batches, group=self.processes.group, progress=progress)

    def test_alone(self) -> FineTuned:
        """Test the adapter in the folder, or the base model where there is none."""
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
    local = Path(path).expanduser()
    if local.exists() or path.startswith("corenet:"):
        return False
    owner, _, name = path.partition("/")
    return not name or "/" in name or not owner.strip(".~") or bool(local.suffix in (".safetensors", ".pt"))


def _describe(split: str, examples: Examples, max_seq_length: int) -> Iterator[str]:
    """Lines that say what the examples of a split are, and what was done to them."""
    report = examples.report
    template = "" if report.chat_template is None else f", chat template: {report.chat_template}"
    yield (
        f"{split}: {report.num_examples:,} examples ({report.kind}{template}), {report.num_tokens:,} tokens, "
        f"{report.num_targets:,} of them learned; the longest has {report.longest:,}"
    )
    if report.num_truncated:
        emptied = f", {report.num_emptied:,} of them before anything that is learned" if report.num_emptied else ""
        yield f"{split}: {report.num_truncated:,} were cut to --max-seq-length {max_seq_length}{emptied}"
    if report.num_unlearned > report.num_emptied:
        yield f"{split}: {report.num_unlearned - report.num_emptied:,} have nothing to learn"
