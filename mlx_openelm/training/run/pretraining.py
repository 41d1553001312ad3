"""The parts of a pretraining run: its request, folder, checkpoints, validation and speed."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import mlx.core as mx

from ...cuda.compiling import notice
from ...errors import RequestError, name_options
from ...formats.corenet_training import TrainingState
from ...inputs import to_path
from ...loading import check_dtype
from ...wording import counted, size
from ..data.batches import Batch
from ..data.corpus.encoding import LEFT_OUT
from ..data.corpus.files import find_files
from ..data.corpus.validation import read_validation
from ..options import TrainOptions
from ..options.pretraining import PretrainOptions
from ..step import compact
from ..step.evaluation import Evaluation
from ..step.updater import Updater
from . import folder as run_folder
from .distributed import Processes
from .listener import Listener
from .preparing import Loading
from .samples import continue_prompts
from .starting import Model, Start, describe
from .state import Checkpoints, RunState

# The folders of models in the run's folder.
MODEL, MODEL_EMA, MODEL_AVERAGE = "model", "model-ema", "model-average"
COMMAND = "pretrain"
_FLAG = "--output"


@dataclass(frozen=True)
class Request:
    """The arguments of `pretrain`, and the processes that serve it."""

    model: Model
    options: PretrainOptions
    loading: Loading
    overwrite: bool
    processes: Processes
    listener: Listener

    @property
    def folder(self) -> Path:
        return to_path(self.options.output)


def check(request: Request) -> dict[str, Any] | None:
    """Refuse a request that cannot work, as far as that can be known before loading.

    Returns:
        the record of the run to continue, in the process that leads; None for a new run.

    Raises:
        RequestError: it names the flag.
    """
    options = request.options
    options.check()
    request.processes.check_batch(options.batch_size)
    if isinstance(request.model, str | Path):
        check_dtype(request.model, request.loading.dtype)
    compact.check_dtype(options, request.loading.dtype)
    if not request.processes.leads:
        return None
    run_folder.check_folder(request.folder, resume=options.resume, overwrite=request.overwrite, folder_flag=_FLAG)
    for split, sources in (("train", options.data), ("valid", options.valid)):
        for source in sources:
            find_files(source, split, options.text_key)
    if not options.resume:
        return None
    previous, file = run_folder.read_run(request.folder, COMMAND), request.folder / run_folder.RUN
    loading = dataclasses.asdict(request.loading)
    changes = run_folder.compare(describe(request.model), options, loading, previous, file, folder_flag=_FLAG)
    for change in changes:
        request.listener.warn(name_options(f"{change}; from here on the run differs from one that never stopped."))
    return previous


def usable_length(request: Request, start: Start, *, quiet: bool = False) -> int:
    """The length of rows: what the options say, or the model's positions if they are fewer."""
    wanted, most = request.options.max_seq_length, start.model.config.rope_max_length
    if wanted > most and wanted != TrainOptions.max_seq_length and not quiet:
        request.listener.say(
            name_options(f"--max-seq-length is {most}, not {wanted}: the model's positions end there.")
        )
    return min(wanted, most)


def make_checkpoints(request: Request) -> Checkpoints:
    """The checkpoints of the run; those that `average_last` needs are kept."""
    options = request.options
    regular = None if options.average_last is None else (options.average_last, options.save_every)
    return Checkpoints(
        request.folder / run_folder.CHECKPOINTS,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep_regular=regular,
        folder_flag=_FLAG,
    )


def begin(
    request: Request,
    checkpoints: Checkpoints,
    data: Mapping[str, Any],
    recompute: str,
    previous: dict[str, Any] | None,
) -> None:
    """Write `run.json`, after clearing the folder for a new run.

    Args:
        data: what the data says about itself.
        previous: the record of the run that is continued.
    """
    if not request.processes.leads:
        return
    record = run_folder.make_record(
        describe(request.model),
        request.options,
        kind=COMMAND,
        loading=dataclasses.asdict(request.loading),
        data={"fingerprint": None} | dict(data),  # whether it is the same as before, the stream checks itself
        processes=request.processes.size,
        recompute=recompute,
    )
    if previous is not None:
        run_folder.continue_record(record, previous)
        checkpoints.remove_leftovers()
    else:
        checkpoints.remove_all()
        run_folder.remove_run(request.folder)
        for name in (MODEL, MODEL_EMA, MODEL_AVERAGE):
            if (request.folder / name / "config.json").is_file():
                shutil.rmtree(request.folder / name)
    run_folder.write_record(request.folder, record)


def describe_data(record: Mapping[str, Any]) -> str:
    """A line about the training text, from what the data says about itself."""
    sources = record["sources"]
    files, size_in_bytes = (sum(source[key] for source in sources) for key in ("files", "bytes"))
    workers = counted(record["workers"], "worker") if record["workers"] else "no workers"
    return f"train: {counted(files, 'file')}, {size(size_in_bytes)}; {record['mode']} rows, {workers}"


def describe_left_out(record: Mapping[str, Any]) -> str | None:
    """A line about what was left out of the training text, from what the data says about itself; None for nothing."""
    counts = {name: count for name, count in record["documents"].items() if name in LEFT_OUT}
    if not counts:
        return None
    return "Left out of the text: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + "."


def finish_record(request: Request, data: Mapping[str, Any]) -> None:
    """Add to `run.json` what the data says about itself at the end of the run."""
    if request.processes.leads:
        record = run_folder.read_run(request.folder)
        run_folder.write_record(request.folder, record | {"data": record["data"] | dict(data)})


def check_corenet(request: Request, training: TrainingState) -> None:
    """Refuse to continue a CoreNet run with other settings than its own.

    Raises:
        RequestError: the optimizer is not a single AdamW, or the run has no step left.
    """
    options = request.options
    if options.optimizer not in ("adam", "adamw") or options.embedding_learning_rate is not None:
        raise RequestError(
            "A CoreNet run has the state of one AdamW: continue it with --optimizer adamw and no "
            "--embedding-learning-rate."
        )
    if training.iteration >= options.iters:
        raise RequestError(
            f"The CoreNet run has {training.iteration} iterations behind it; --iters must be more than that."
        )


def continue_corenet(request: Request, training: TrainingState, updater: Updater, checkpoints: Checkpoints) -> RunState:
    """Take over the optimizer's state of a CoreNet run, and save a first checkpoint."""
    options, state = request.options, updater.state()
    prefix = "optimizer." if options.ema_decay is None else "optimizer.optimizer."
    for name, (mean, square) in training.moments.items():
        for part, tensor in (("m", mean), ("v", square)):
            key = f"{prefix}{name}.{part}"
            state[key] = tensor.read().astype(mx.float32)
            mx.eval(state[key])
    state[f"{prefix}step"] = mx.array(training.updates, dtype=mx.uint64)
    updater.restore(state)
    run_state = RunState(step=training.iteration)
    request.listener.warn(
        "The text begins from its start: CoreNet's checkpoints do not say where they stopped exactly."
    )
    if request.processes.leads:
        checkpoints.save(run_state, updater.state())  # if the run stops before its first checkpoint, --resume needs it
    return run_state


@dataclass(frozen=True)
class Validation:
    """The text to validate on, as batches of this process.

    Args:
        tokens, characters, utf8_bytes: of the text; every token is predicted once.
        most: batches of the process that has most of them.
    """

    batches: list[Batch]
    most: int
    tokens: int
    characters: int
    utf8_bytes: int
    listener: Listener

    @classmethod
    def read(cls, request: Request, start: Start, length: int) -> Self | None:
        """Read and tokenize the validation text; None if there is none, or validation is turned off.

        Raises:
            RequestError: text that cannot be read, or --early-stop without any.
        """
        options, processes = request.options, request.processes
        text = None
        if options.val_batches:
            most = None if options.val_batches < 0 else options.val_batches * options.batch_size
            text = read_validation(options, start.tokenizer, max_seq_length=length, max_windows=most, seed=options.seed)
        if text is None:
            if options.early_stop is not None:
                raise RequestError("--early-stop needs validation text; give --valid.")
            return None
        batches = text.batches(options.batch_size, world_size=processes.size, rank=processes.rank)
        request.listener.say(
            f"valid: {counted(text.num_documents, 'document')}, {text.num_tokens:,} tokens, "
            f"{text.num_characters:,} characters"
        )
        most_batches = processes.largest(len(batches))
        return cls(batches, most_batches, text.num_tokens, text.num_characters, text.num_bytes, request.listener)

    def measure(self, updater: Updater, check: Callable[[], None] = lambda: None) -> Evaluation:
        """The loss per token; its metrics are the loss per character and the bits per byte."""
        found = updater.evaluate(self._checked(check))
        per_character, per_byte = self.tokens / self.characters, self.tokens / self.utf8_bytes
        figures = {
            "loss_per_character": found.loss * per_character,
            "bits_per_byte": found.loss * per_byte / math.log(2),
        }
        return dataclasses.replace(found, metrics=found.metrics | figures)

    def _checked(self, check: Callable[[], None]) -> Iterator[Batch]:
        for index in range(self.most):
            self.listener.working("Validating", index, self.most)
            check()
            with notice("Validating", self.listener.say):
                yield from self.batches[index : index + 1]


class _Waits(Protocol):
    @property
    def waited(self) -> float: ...


@dataclass
class Speed:
    """The arithmetic of the run in numbers.

    Args:
        flops_per_token: the operations of a step per token.
        peak: the operations per second that the device reached in a large product.
        data: knows how long it was waited for.
    """

    flops_per_token: float
    peak: float
    data: _Waits
    _waited: float = 0.0

    def report(self, tokens_per_second: float) -> dict[str, float]:
        """What is logged with the loss: operations per second, their share of the peak, seconds of waiting for data."""
        flops = self.flops_per_token * tokens_per_second
        waited, self._waited = self.data.waited - self._waited, self.data.waited
        return {"flops_per_second": flops, "flops_utilization": flops / self.peak, "data_seconds": waited}


def continue_samples(request: Request, start: Start) -> list[str]:
    """The model's continuations of the sample prompts; an empty list in processes that do not lead."""
    options = request.options
    if not (options.sample_prompts and request.processes.leads):
        return []
    prompts = [start.tokenizer.encode(prompt) for prompt in options.sample_prompts]
    return continue_prompts(start.model, start.tokenizer, prompts, options.sample_tokens)
