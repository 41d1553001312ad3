"""The options of a run: the fields are the command's flags, the YAML keys and the Python arguments."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Annotated

from ...errors import RequestError, quote
from ...formats.adapter import TARGET_MODULES
from ...formats.mlx_adapter import FINE_TUNE_TYPES
from ...options import Option, Options, paths_as_text
from ...wording import did_you_mean, flag, one_of
from ..data.examples import LONG_EXAMPLES
from . import trackers
from .values import check_range, conform, field_types

OPTIMIZERS = ("adam", "adamw", "sgd", "lion", "adafactor", "muon")
# The types of Adam's moments; with BFLOAT16 the whole state of training is smaller, see `compact`.
FLOAT32, BFLOAT16 = OPTIMIZER_DTYPES = ("float32", "bfloat16")
_WITH_BFLOAT16 = ("adam", "adamw")
SCHEDULES = ("constant", "cosine", "linear")
ADAPTER_FORMATS = ("mlx", "peft")
# What the backward pass computes again: nothing; norms, SwiGLU and other parts that take little time; whole layers.
NOTHING, PARTS, LAYERS = "nothing", "parts", "layers"
# AUTO chooses one of them by the free memory.
AUTO = "auto"
RECOMPUTE = (AUTO, NOTHING, PARTS, LAYERS)

# What `--help` gives as the default of a setting that each optimizer has its own for.
OPTIMIZERS_OWN = "the optimizer's"

# mlx-lm's scale, when neither scale nor alpha is given.
DEFAULT_SCALE = 20.0

# The optimizers that each flag applies to.
_OPTIMIZERS_WITH = {
    "weight_decay": ("adamw", "sgd", "lion", "adafactor", "muon"),
    "beta1": ("adam", "adamw", "lion", "adafactor", "muon"),
    "beta2": ("adam", "adamw", "lion", "muon"),
    "eps": ("adam", "adamw", "muon"),
    "momentum": ("sgd", "muon"),
}
_WITH_BIAS_CORRECTION = ("adam", "adamw", "muon")
_CHOICES = {
    "optimizer": OPTIMIZERS,
    "optimizer_dtype": OPTIMIZER_DTYPES,
    "lr_schedule": SCHEDULES,
    "fine_tune_type": FINE_TUNE_TYPES,
    "long_examples": LONG_EXAMPLES,
    "recompute": RECOMPUTE,
    "adapter_format": ADAPTER_FORMATS,
}


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainOptions(Options):
    """The options that every kind of training has. A step, or iteration, is one update of the weights.

    Args:
        epochs: passes over the data, instead of `iters`.
        decay_steps: the steps from the end of the warm-up to `min_learning_rate`; None means all that are left.
        weight_decay, beta1, beta2, eps, momentum: None is the optimizer's default; see `optimizers`.
        optimizer_dtype: the type of Adam's moments in full training; bfloat16 takes less memory, see `compact`.
        val_batches: -1 is all, 0 turns validation off.
        recompute: the activations that the backward pass computes again: nothing, parts (those that take little time)
            or layers. auto chooses by the free memory on CUDA, and is parts elsewhere.
        grad_checkpoint: the same as `recompute="layers"`, under mlx-lm's name.
        early_stop: stop after this many validations without a new best.
        keep_last: keep this many of the last checkpoints.
        keep_every: also keep every N-th step's checkpoint.

    Raises (by `check`):
        RequestError: an invalid value; the message names its flag.
    """

    # The command that takes them, and the option that makes rows shorter.
    command = "lora"
    length_option = "max_seq_length"

    batch_size: Annotated[int, Option("Examples per batch.")] = 4
    grad_accumulation_steps: Annotated[
        int, Option("Batches to average the gradient over, for each update of the weights.", group="Training")
    ] = 1
    max_seq_length: Annotated[
        int, Option("Tokens of an example at most; --long-examples says what happens to longer ones.", group="Data")
    ] = 2048
    packing: Annotated[
        bool, Option("Pack several examples into a row; they do not attend to each other.", group="Data")
    ] = False
    seed: Annotated[int, Option("Seed of the run: the same seed gives the same adapter.", group="Training")] = 0

    iters: Annotated[int, Option("Steps of training; each updates the weights once.")] = 1000
    epochs: Annotated[float | None, Option("Passes over the training data, instead of --iters.", group="Training")] = (
        None
    )
    optimizer: Annotated[
        str, Option("Algorithm that updates the weights.", group="Optimizer", metavar="|".join(OPTIMIZERS))
    ] = "adam"
    learning_rate: Annotated[float, Option("Learning rate, after the warm-up if there is one.")] = 1e-5
    lr_schedule: Annotated[
        str, Option("How the learning rate changes after the warm-up.", group="Optimizer", metavar="|".join(SCHEDULES))
    ] = "constant"
    min_learning_rate: Annotated[
        float, Option("Learning rate at the end of a cosine or linear schedule.", group="Optimizer")
    ] = 0.0
    decay_steps: Annotated[
        int | None,
        Option(
            "Steps from the end of the warm-up to --min-learning-rate.", group="Optimizer", default="all that are left"
        ),
    ] = None
    warmup: Annotated[int, Option("First steps, in which the learning rate rises.", group="Optimizer")] = 0
    warmup_init: Annotated[float, Option("Learning rate at the start of the warm-up.", group="Optimizer")] = 0.0
    weight_decay: Annotated[
        float | None,
        Option("Weight decay, of matrices only; not for adam.", group="Optimizer", default=OPTIMIZERS_OWN),
    ] = None
    beta1: Annotated[
        float | None,
        Option("Decay rate of the mean of past gradients.", group="Optimizer", default=OPTIMIZERS_OWN),
    ] = None
    beta2: Annotated[
        float | None,
        Option("Decay rate of the mean of past squared gradients.", group="Optimizer", default=OPTIMIZERS_OWN),
    ] = None
    eps: Annotated[
        float | None,
        Option(
            "Number added to the denominator of Adam's update, against division by zero.",
            group="Optimizer",
            default=OPTIMIZERS_OWN,
        ),
    ] = None
    momentum: Annotated[
        float | None, Option("Momentum of sgd and muon.", group="Optimizer", default=OPTIMIZERS_OWN)
    ] = None
    bias_correction: Annotated[
        bool, Option("Correct Adam's means of gradients for their start at zero.", group="Optimizer")
    ] = True
    optimizer_dtype: Annotated[
        str,
        Option(
            "Type of Adam's moments: with bfloat16, full training needs 8 bytes for each weight instead of 14.",
            group="Memory",
            metavar="|".join(OPTIMIZER_DTYPES),
        ),
    ] = FLOAT32
    max_grad_norm: Annotated[
        float | None, Option("Scale gradients with a larger norm down to this norm.", group="Optimizer", default="off")
    ] = None
    z_loss: Annotated[
        float,
        Option(
            "Add this times the squared log-sum-exp of the logits to the loss; CoreNet uses 1e-4.", group="Optimizer"
        ),
    ] = 0.0
    label_smoothing: Annotated[
        float, Option("Share of the target probability that is spread over the other tokens.", group="Optimizer")
    ] = 0.0
    recompute: Annotated[
        str,
        Option(
            "Activations that the backward pass computes again to save memory; auto is parts, on CUDA what fits.",
            group="Memory",
            metavar="|".join(RECOMPUTE),
        ),
    ] = AUTO
    grad_checkpoint: Annotated[
        bool, Option("Save memory: the same as --recompute layers, under mlx-lm's name.", group="Memory")
    ] = False

    steps_per_report: Annotated[int, Option("Steps between two reports of the loss.", group="Reports")] = 10
    steps_per_eval: Annotated[int, Option("Steps between two validations.", group="Validation and test")] = 200
    val_batches: Annotated[
        int, Option("Batches of a validation; -1 is all, 0 turns validation off.", group="Validation and test")
    ] = 25
    eval_tasks: Annotated[
        str | None,
        Option(
            "Tasks to measure during training: lm-eval's, or CoreNet's as commonsense/openbookqa. Several with commas.",
            group="Validation and test",
            metavar="LIST",
            default="none",
        ),
    ] = None
    eval_tasks_every: Annotated[
        int, Option("Steps between two measurements of --eval-tasks; also at the end.", group="Validation and test")
    ] = 500
    eval_tasks_data: Annotated[
        str | None,
        Option(
            "Folder with the data of --eval-tasks, as for `evaluate`.",
            group="Validation and test",
            metavar="FOLDER",
            default="the hub",
        ),
    ] = None
    eval_tasks_limit: Annotated[
        int, Option("Questions of each of --eval-tasks, the first ones.", group="Validation and test")
    ] = 100
    early_stop: Annotated[
        int | None,
        Option(
            "Stop after N validations without a new best loss, and keep the best adapter.", group="Validation and test"
        ),
    ] = None
    save_every: Annotated[int, Option("Steps between two checkpoints.", group="Checkpoints")] = 100
    keep_last: Annotated[int, Option("Keep the last N checkpoints, and the best.", group="Checkpoints")] = 2
    keep_every: Annotated[int | None, Option("Also keep the checkpoint of every N-th step.", group="Checkpoints")] = (
        None
    )
    report_to: Annotated[
        str | None,
        Option(
            "Also report the losses to TensorBoard or Weights & Biases; with a comma, to both.",
            group="Reports",
            metavar="tensorboard|wandb",
        ),
    ] = None
    project_name: Annotated[str | None, Option("Name of the project at Weights & Biases.", group="Reports")] = None

    @property
    def recomputed(self) -> str:
        """What is recomputed, whichever option set it."""
        return LAYERS if self.grad_checkpoint else self.recompute

    @property
    def packs_rows(self) -> bool:
        """Whether rows of training hold several examples."""
        return self.packing

    def __post_init__(self) -> None:
        paths_as_text(self)
        for field, kind in field_types(type(self)).items():
            with contextlib.suppress(ValueError):  # `check` reports it
                object.__setattr__(self, field, conform(kind, getattr(self, field)))

    def check(self) -> None:
        """Check all values, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        self._check_values()
        self._check_optimizer()
        self._check_schedule()
        if self.early_stop is not None and self.val_batches == 0:
            raise RequestError("--early-stop needs validation, which --val-batches 0 turns off.")
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise RequestError(
                f"--keep-every must be a multiple of --save-every ({self.save_every}), got {self.keep_every}."
            )
        if self.grad_checkpoint and self.recompute not in (AUTO, LAYERS):
            raise RequestError(f"--grad-checkpoint is --recompute layers, not {self.recompute}; give one of them.")
        trackers.check(self.report_to)
        if self.project_name is not None and "wandb" not in (self.report_to or ""):
            raise RequestError("--project-name is a project at Weights & Biases; it needs --report-to wandb.")

    def _check_values(self) -> None:
        for field, kind in field_types(type(self)).items():
            value = getattr(self, field)
            try:
                conform(kind, value)
            except ValueError as expected:
                raise RequestError(f"{flag(field)} must be {expected}, got {quote(value)}.") from None
            if value is None:
                continue
            check_range(field, value)
            if field in _CHOICES and value not in _CHOICES[field]:
                raise RequestError(f"{flag(field)} must be {one_of(_CHOICES[field])}, got {quote(value)}.")

    def _check_optimizer(self) -> None:
        for field, owners in _OPTIMIZERS_WITH.items():
            if getattr(self, field) is not None and self.optimizer not in owners:
                hint = "use adamw" if field == "weight_decay" else f"it is for {one_of(owners)}"
                raise RequestError(f"--optimizer {self.optimizer} has no {flag(field)}; {hint}.")
        if self.optimizer_dtype == BFLOAT16 and self.optimizer not in _WITH_BFLOAT16:
            raise RequestError(f"--optimizer-dtype bfloat16 is for --optimizer {one_of(_WITH_BFLOAT16)}.")
        if not self.bias_correction and self.optimizer not in _WITH_BIAS_CORRECTION:
            raise RequestError(f"--no-bias-correction is for --optimizer {one_of(_WITH_BIAS_CORRECTION)}.")

    def _check_schedule(self) -> None:
        if self.min_learning_rate > self.learning_rate:
            raise RequestError(
                f"--min-learning-rate {self.min_learning_rate:g} is more than --learning-rate {self.learning_rate:g}."
            )
        if self.warmup_init > self.learning_rate:
            raise RequestError(
                f"--warmup-init {self.warmup_init:g} is more than --learning-rate {self.learning_rate:g}."
            )
        if self.warmup_init and not self.warmup:
            raise RequestError("--warmup-init needs --warmup, the steps from there to --learning-rate.")
        for field in ("min_learning_rate", "decay_steps"):
            if getattr(self, field) and self.lr_schedule == "constant":
                raise RequestError(f"{flag(field)} needs --lr-schedule cosine or linear.")
        # With --decay-steps the schedule has a length of its own, of which a run may do the beginning.
        if self.epochs is None and self.decay_steps is None and self.warmup >= self.iters:
            raise RequestError(f"--warmup must be less than --iters ({self.iters}), got {self.warmup}.")


@dataclass(frozen=True, kw_only=True, repr=False)
class FineTuneOptions(TrainOptions):
    """The options of `mlx-openelm lora`, apart from the model.

    Args:
        valid_fraction: the share of the training examples to hold out when there is no validation file; 0 is none.
        long_examples: truncate or refuse examples longer than `max_seq_length`.
        num_layers: train this many layers, counted from the last; -1 is all.
        target_modules: some of `TARGET_MODULES`; None means the four matrices of a layer, with full everything.
        alpha, scale: the factor of the low-rank product, see `lora_scale`; give at most one of them.
    """

    data: Annotated[
        str | None,
        Option(
            "Examples: a folder with train, valid and test files, one file, or a data set on the hub.", metavar="PATH"
        ),
    ] = None
    train: Annotated[bool, Option("Train on the examples.")] = False
    test: Annotated[
        bool,
        Option(
            "Measure the perplexity of the test examples: after training, or of the adapter in --adapter-path.",
            group="Validation and test",
        ),
    ] = False
    test_batches: Annotated[int, Option("Batches of the test at most; -1 is all.", group="Validation and test")] = 500
    valid_fraction: Annotated[
        float,
        Option("Share of the training examples to validate on if there is no valid file; 0 is none.", group="Data"),
    ] = 0.1
    mask_prompt: Annotated[bool, Option("Learn only the completions and the assistant's turns, not the prompts.")] = (
        False
    )
    long_examples: Annotated[
        str,
        Option(
            "What to do with examples of more than --max-seq-length tokens.",
            group="Data",
            metavar="|".join(LONG_EXAMPLES),
        ),
    ] = "truncate"

    fine_tune_type: Annotated[
        str,
        Option("Train LoRA or DoRA adapters, or the full weights.", group="Adapter", metavar="|".join(FINE_TUNE_TYPES)),
    ] = "lora"
    num_layers: Annotated[int, Option("Train only the last N layers; -1 is all.")] = -1
    target_modules: Annotated[
        tuple[str, ...] | None,
        Option(
            "Matrices to train; repeatable, or with commas.",
            group="Adapter",
            metavar="|".join(TARGET_MODULES),
            default="those of the layers; for full, all weights",
        ),
    ] = None
    rank: Annotated[int, Option("Rank of the adapter's matrices.", group="Adapter")] = 8
    alpha: Annotated[float | None, Option("Multiply the adapter's output by NUMBER / rank.", group="Adapter")] = None
    scale: Annotated[
        float | None,
        Option("Multiply the adapter's output by NUMBER; instead of --alpha.", group="Adapter", default="20"),
    ] = None
    use_rslora: Annotated[
        bool, Option("Divide --alpha by the square root of the rank, not by the rank (rsLoRA).", group="Adapter")
    ] = False
    dropout: Annotated[
        float, Option("Share of the adapter's inputs to drop at random in training.", group="Adapter")
    ] = 0.0

    adapter_path: Annotated[str, Option("Folder of the run: its adapter, checkpoints and plots.", metavar="FOLDER")] = (
        "adapters"
    )
    adapter_format: Annotated[
        str,
        Option(
            "Format of the adapter's files: mlx is mlx-lm's, peft is for transformers. Both are read here.",
            group="Adapter",
            metavar="|".join(ADAPTER_FORMATS),
        ),
    ] = "mlx"
    resume: Annotated[
        bool,
        Option("Continue the run in --adapter-path exactly where it stopped; its other flags need not be repeated."),
    ] = False
    resume_adapter_file: Annotated[
        str | None, Option("Start training from the weights of this adapter.", group="Training", metavar="PATH")
    ] = None
    sample_prompts: Annotated[
        tuple[str, ...],
        Option(
            "Show the model's continuation of this prompt before and after training; repeatable.",
            group="Reports",
            flags=("--sample-prompt",),
        ),
    ] = ()
    sample_tokens: Annotated[int, Option("Tokens of each continuation.", group="Reports")] = 64

    @property
    def held_out_rows(self) -> int:
        """The examples of a batch of a validation or a test."""
        return self.batch_size

    @property
    def lora_scale(self) -> float:
        """`scale`; or alpha / rank, with `use_rslora` alpha / sqrt(rank) (arXiv:2312.03732); or mlx-lm's 20."""
        if self.scale is not None:
            return float(self.scale)
        if self.alpha is None:
            return DEFAULT_SCALE
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def check(self) -> None:
        """Check all values, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        super().check()
        if not (self.train or self.test):
            raise RequestError("There is nothing to do; give --train, --test or both.")
        if self.data is None:
            raise RequestError("--data is needed: a folder, a file, or the name of a data set.")
        for field in ("test_batches", "num_layers"):
            if getattr(self, field) == 0:
                raise RequestError(f"{flag(field)} must be 1 or more, or -1 for all, got 0.")
        if self.train and not self.adapter_path:
            raise RequestError("--adapter-path must name a folder to train into.")
        self._check_adapter()
        self._check_continuing()

    def _check_adapter(self) -> None:
        for name in self.target_modules or ():
            if name not in TARGET_MODULES:
                raise RequestError(f"--target-modules must be among {', '.join(TARGET_MODULES)}{_instead_of(name)}")
        if self.target_modules == ():
            raise RequestError(f"--target-modules must name at least one of {', '.join(TARGET_MODULES)}.")
        if self.alpha is not None and self.scale is not None:
            raise RequestError("--alpha and --scale set the same thing; give one of them.")
        if self.use_rslora and self.alpha is None:
            raise RequestError("--use-rslora divides --alpha by the root of the rank; give --alpha.")
        if self.fine_tune_type != "full":
            if self.optimizer_dtype == BFLOAT16:
                raise RequestError("--optimizer-dtype bfloat16 is for --fine-tune-type full; adapters are small.")
            return
        for field in ("alpha", "scale", "dropout"):
            if getattr(self, field):
                raise RequestError(f"{flag(field)} is for LoRA and DoRA, not for --fine-tune-type full.")
        if self.adapter_format == "peft":
            raise RequestError("--adapter-format peft holds LoRA and DoRA; --fine-tune-type full needs mlx.")

    def _check_continuing(self) -> None:
        if self.resume and self.resume_adapter_file is not None:
            raise RequestError(
                "--resume continues a run and --resume-adapter-file starts one from an adapter; give one of them."
            )
        for field in ("resume", "resume_adapter_file"):
            if getattr(self, field) and not self.train:
                raise RequestError(f"{flag(field)} needs --train; to test an adapter, give --adapter-path.")


def _instead_of(name: str) -> str:
    """The end of a message about an unknown module: the name, and similar ones that exist."""
    hint = did_you_mean(name, TARGET_MODULES)
    return f", not {quote(name)}; {hint}" if hint else f", not {quote(name)}."
