"""The options of a run: the fields are the command's flags, the YAML keys and the Python arguments."""

from __future__ import annotations

import contextlib
import difflib
import math
from dataclasses import dataclass

from ..errors import RequestError, quote
from ..formats.adapter import TARGET_MODULES
from ..formats.mlx_adapter import FINE_TUNE_TYPES
from ..wording import flag, one_of
from .data.examples import LONG_EXAMPLES
from .run import trackers
from .step.strategy import AUTO, LAYERS, RECOMPUTE
from .values import conform, field_types

OPTIMIZERS = ("adam", "adamw", "sgd", "lion", "adafactor", "muon")
SCHEDULES = ("constant", "cosine", "linear")
ADAPTER_FORMATS = ("mlx", "peft")

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
    "lr_schedule": SCHEDULES,
    "fine_tune_type": FINE_TUNE_TYPES,
    "long_examples": LONG_EXAMPLES,
    "recompute": RECOMPUTE,
    "adapter_format": ADAPTER_FORMATS,
}
# The smallest value allowed.
_LEAST = {
    "batch_size": 1,
    "grad_accumulation_steps": 1,
    "max_seq_length": 2,  # a token and the one it predicts
    "seed": 0,
    "iters": 1,
    "decay_steps": 1,
    "min_learning_rate": 0,
    "warmup": 0,
    "warmup_init": 0,
    "weight_decay": 0,
    "beta1": 0,
    "beta2": 0,
    "momentum": 0,
    "z_loss": 0,
    "label_smoothing": 0,
    "steps_per_report": 1,
    "steps_per_eval": 1,
    "val_batches": -1,
    "early_stop": 1,
    "save_every": 1,
    "keep_last": 1,
    "keep_every": 1,
    "test_batches": -1,
    "valid_fraction": 0,
    "num_layers": -1,
    "rank": 1,
    "dropout": 0,
    "sample_tokens": 1,
}
_POSITIVE = ("epochs", "learning_rate", "eps", "max_grad_norm", "alpha", "scale")
_BELOW_ONE = ("beta1", "beta2", "momentum", "label_smoothing", "valid_fraction", "dropout")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options that every kind of training has. A step, or iteration, is one update of the weights.

    Args:
        epochs: passes over the data, instead of `iters`.
        decay_steps: the steps from the end of the warm-up to `min_learning_rate`; None means all that are left.
        weight_decay, beta1, beta2, eps, momentum: None is the optimizer's default; see `optimizers`.
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

    batch_size: int = 4
    grad_accumulation_steps: int = 1
    max_seq_length: int = 2048
    packing: bool = False
    seed: int = 0

    iters: int = 1000
    epochs: float | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-5
    lr_schedule: str = "constant"
    min_learning_rate: float = 0.0
    decay_steps: int | None = None
    warmup: int = 0
    warmup_init: float = 0.0
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    bias_correction: bool = True
    max_grad_norm: float | None = None
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    recompute: str = AUTO
    grad_checkpoint: bool = False

    steps_per_report: int = 10
    steps_per_eval: int = 200
    val_batches: int = 25
    early_stop: int | None = None
    save_every: int = 100
    keep_last: int = 2
    keep_every: int | None = None
    report_to: str | None = None
    project_name: str | None = None

    @property
    def recomputed(self) -> str:
        """What is recomputed, whichever option set it."""
        return LAYERS if self.grad_checkpoint else self.recompute

    def __post_init__(self) -> None:
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
            if field in _LEAST and value < _LEAST[field]:
                raise RequestError(f"{flag(field)} must be {_LEAST[field]} or more, got {value}.")
            if field in _POSITIVE and value <= 0:
                raise RequestError(f"{flag(field)} must be more than 0, got {value}.")
            if field in _BELOW_ONE and value >= 1:
                raise RequestError(f"{flag(field)} must be less than 1, got {value}.")
            if field in _CHOICES and value not in _CHOICES[field]:
                raise RequestError(f"{flag(field)} must be {one_of(_CHOICES[field])}, got {quote(value)}.")

    def _check_optimizer(self) -> None:
        for field, owners in _OPTIMIZERS_WITH.items():
            if getattr(self, field) is not None and self.optimizer not in owners:
                hint = "use adamw" if field == "weight_decay" else f"it is for {one_of(owners)}"
                raise RequestError(f"--optimizer {self.optimizer} has no {flag(field)}; {hint}.")
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
        if self.epochs is None and self.warmup >= self.iters:
            raise RequestError(f"--warmup must be less than --iters ({self.iters}), got {self.warmup}.")


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(TrainOptions):
    """The options of `mlx-openelm lora`, apart from the model.

    Args:
        valid_fraction: the share of the training examples to hold out when there is no validation file; 0 is none.
        long_examples: truncate or refuse examples longer than `max_seq_length`.
        num_layers: train this many layers, counted from the last; -1 is all.
        target_modules: some of `TARGET_MODULES`; None means the four matrices of a layer, with full everything.
        alpha, scale: the factor of the low-rank product, see `lora_scale`; give at most one of them.
    """

    data: str | None = None
    train: bool = False
    test: bool = False
    test_batches: int = 500
    valid_fraction: float = 0.1
    mask_prompt: bool = False
    long_examples: str = "truncate"

    fine_tune_type: str = "lora"
    num_layers: int = -1
    target_modules: tuple[str, ...] | None = None
    rank: int = 8
    alpha: float | None = None
    scale: float | None = None
    use_rslora: bool = False
    dropout: float = 0.0

    adapter_path: str = "adapters"
    adapter_format: str = "mlx"
    resume: bool = False
    resume_adapter_file: str | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64

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
    close = difflib.get_close_matches(name, TARGET_MODULES, n=2)
    return f", not {quote(name)}; did you mean {' or '.join(close)}?" if close else f", not {quote(name)}."
