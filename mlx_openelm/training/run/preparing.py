"""Preparing a run: read the data, load the model, tokenize the examples, and show one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from ... import backend
from ...adapters.attaching import target_paths
from ...config import ModelConfig
from ...errors import RequestError, name_options
from ...hub import catalog
from ...loading import dtype_name, load
from ...model import OpenELM
from ...options import paths_as_text
from ...text.chat_template import CORENET_TEMPLATE
from ...text.tokenizer import Tokenizer
from ..data import examples as supervised
from ..data.answers import Preferences
from ..data.batches import Make, validation_batches
from ..data.examples import Examples
from ..data.kinds import KINDS, Kind, Record
from ..data.prompts import Prompts
from ..data.read import Splits, read_splits
from ..options import FineTuneOptions, TrainOptions
from ..step import compact
from .distributed import Processes
from .listener import Listener

AnyExamples = Examples | Preferences | Prompts


@dataclass(frozen=True)
class Loading:
    """How the model is loaded and prompts are rendered: arguments of `load` and `tokenize`."""

    dtype: str | mx.Dtype | None = None
    tokenizer: str | None = None
    config_yaml: str | None = None
    revision: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        paths_as_text(self)
        # By its full name, which can be recorded, and compared when a run is resumed.
        object.__setattr__(self, "dtype", dtype_name(self.dtype))


@dataclass(frozen=True)
class Prepared:
    """A model, and the examples of those of `train`, `valid` and `test` that exist and are needed.

    `max_seq_length` is that of the options, or less if the model has fewer positions. `makers` make the batches of a
    split, where they are other than those of fine-tuning.
    """

    model: OpenELM
    tokenizer: Tokenizer
    examples: dict[str, AnyExamples]
    max_seq_length: int
    makers: dict[str, Make] = field(default_factory=dict)

    @property
    def main_examples(self) -> AnyExamples:
        """The examples that represent the data: those of training, else of the test."""
        return self.examples["train" if "train" in self.examples else "test"]

    def fingerprint(self) -> str:
        """A hash of the training and validation examples."""
        return " ".join(examples.fingerprint() for split, examples in self.examples.items() if split != "test")

    def held_out(self, split: str, num_batches: int, options: FineTuneOptions, processes: Processes) -> list[Any]:
        """This process's batches of a split, to measure the loss on; always the same ones."""
        rows = -(-options.held_out_rows // processes.size) * processes.size
        if num_batches > 0:  # as many examples, in fewer batches
            num_batches = -(-num_batches * options.held_out_rows // rows)
        return validation_batches(
            self.examples[split].examples,
            rows,
            num_batches=num_batches,
            max_seq_length=self.max_seq_length,
            world_size=processes.size,
            rank=processes.rank,
            seed=options.seed,
            make=self.makers.get(split),
        )


# Turns records into examples: their split, the records, the tokenizer, and the tokens of an example at most.
Tokenize = Callable[[str, Sequence[Record], Tokenizer, int], AnyExamples]


def prepare(
    name: str,
    options: FineTuneOptions,
    loading: Loading,
    listener: Listener,
    *,
    kinds: Sequence[Kind] = KINDS,
    tokenize: Tokenize | None = None,
) -> Prepared:
    """Read the data, load the model, and tokenize the examples, in this order: errors in the data show up first.

    Args:
        kinds: those that the records may be of.
        tokenize: turns them into examples; by default those of fine-tuning.

    Raises:
        RequestError: data or a model that is invalid, or data that does not suit the model.
        OpenELMError: a download that failed.
    """
    splits = _read(options, listener, kinds)
    values = dataclasses.asdict(loading)
    del values["chat_template"]
    trains_weights = options.train and options.fine_tune_type == "full"
    if trains_weights and values.get("dtype") is None:
        if compact.is_wanted(options):
            values["dtype"] = "bfloat16"
        elif backend.has_kernels():
            values["dtype"] = "float32"  # the kernels can multiply in half precision, but it is too coarse for updates
    model, tokenizer = load(name, expand=True if trains_weights else None, exact_activations=True, **values)
    was_given_template = loading.chat_template is None and _give_template(name, tokenizer)
    target_paths(model.config, options.target_modules, options.num_layers)  # refuses layers that do not exist
    if trains_weights and model.quantization:
        listener.say(
            "The model's weights are quantized; those that are trained become full precision. mlx-lm cannot load such "
            "weights into the quantized model: fuse them."
        )
    elif model.quantization and model.expanded:
        listener.say("The model's packed weights were unpacked at load, which is faster on a CPU.")
    length = _usable_length(options.max_seq_length, model.config, listener)
    tokenize = tokenize or _tokenizing(options, loading, listener)
    examples: dict[str, AnyExamples] = {}
    for split in ("train", "valid", "test"):
        records = getattr(splits, split)
        if not records or (split == "valid" and options.val_batches == 0):
            continue
        examples[split] = tokenize(split, records, tokenizer, length)
        for line in examples[split].report.lines(split, length):
            listener.say(line)
    _check_templates(examples)
    prepared = Prepared(model, tokenizer, examples, length)
    if was_given_template and prepared.main_examples.report.chat_template is not None:
        listener.say(
            name_options(
                f"The tokenizer of {name} has no chat template, so it was given CoreNet's, which the model was tuned "
                "with; prompt the result with --chat-template corenet too."
            )
        )
    listener.say(prepared.main_examples.report.sample_title)
    listener.say(prepared.main_examples.report.sample_text())
    return prepared


def _check_templates(examples: dict[str, AnyExamples]) -> None:
    """Refuse splits that are read in different ways: what is measured on one would not be what the other learns."""
    templates = {split: found.report.chat_template for split, found in examples.items()}
    if len(set(templates.values())) > 1:
        each = ", ".join(f"{split} with {template or 'none'}" for split, template in templates.items())
        raise RequestError(
            f"Some splits are rendered with a chat template and others without ({each}); make all examples of one kind."
        )


def _read(options: FineTuneOptions, listener: Listener, kinds: Sequence[Kind]) -> Splits:
    need = [split for split, wanted in (("train", options.train), ("test", options.test)) if wanted]
    assert options.data is not None  # FineTuneOptions.check
    fraction = options.valid_fraction if options.val_batches else 0.0  # without validation nothing is held out
    splits = read_splits(options.data, valid_fraction=fraction, seed=options.seed, need=need, kinds=kinds)
    if options.train:
        for note in splits.notes:
            listener.say(note)
        if options.early_stop is not None and not splits.valid:
            raise RequestError("--early-stop needs validation data: a valid file, or --valid-fraction.")
    return splits


def _give_template(name: str, tokenizer: Tokenizer) -> bool:
    """Give the tokenizer of an instruction-tuned release CoreNet's template if it has none; returns whether it did.

    Apple's repositories have no tokenizer, and the one used with them may have no template.
    """
    release = catalog.find(name)
    if release is None or not release.instruct or tokenizer.chat_template is not None:
        return False
    tokenizer.chat_template = CORENET_TEMPLATE
    return True


def _usable_length(wanted: int, config: ModelConfig, listener: Listener) -> int:
    most = config.rope_max_length
    if wanted > most and wanted != TrainOptions.max_seq_length:
        listener.say(name_options(f"--max-seq-length is {most}, not {wanted}: the model's positions end there."))
    return min(wanted, most)


def _tokenizing(options: FineTuneOptions, loading: Loading, listener: Listener) -> Tokenize:
    def tokenize(split: str, records: Sequence[Record], tokenizer: Tokenizer, max_seq_length: int) -> Examples:
        return supervised.tokenize(
            records,
            tokenizer,
            max_seq_length=max_seq_length,
            mask_prompt=options.mask_prompt,
            chat_template=loading.chat_template,
            long_examples=options.long_examples,
            progress=partial(listener.working, f"Tokenizing {split}"),
        )

    return tokenize
