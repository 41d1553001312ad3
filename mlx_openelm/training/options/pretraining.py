"""The options of pretraining: the fields are the command's flags, the YAML keys and the Python arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...errors import RequestError
from ...options import Option
from ...wording import flag
from . import BFLOAT16, OPTIMIZERS, SCHEDULES, TrainOptions
from .corpus import CORENET, PACKED, DataOptions


@dataclass(frozen=True, kw_only=True, repr=False)
class PretrainOptions(TrainOptions, DataOptions):
    """The options of `mlx-openelm pretrain`, apart from the model.

    Args:
        batch_tokens: positions of a step; it sets `grad_accumulation_steps`.
        embedding_learning_rate: follows the same schedule as `learning_rate`, which is that of everything else.
        ema_decay: see `optimizers.Averaging`.
        average_last: the checkpoints, of steps that are multiples of `save_every`, whose mean is written at the end.
        skip_spikes: see `spikes.Spikes`.
        epochs, packing: not for pretraining, whose data is a stream without end, in rows that `mode` fills.

    Raises (by `check`):
        RequestError: an invalid value; the message names its flag.
    """

    batch_size: Annotated[int, Option("Rows per batch, over all processes.")] = 4
    max_seq_length: Annotated[int, Option("Tokens of a row.", group="Data")] = 2048
    batch_tokens: Annotated[
        int | None,
        Option(
            "Positions of a step: sets --grad-accumulation-steps by --batch-size and --max-seq-length.",
            group="Training",
        ),
    ] = None
    seed: Annotated[
        int, Option("Seed of the weights and of the data: the same seed gives the same model.", group="Training")
    ] = 0
    epochs: float | None = None
    packing: bool = False
    optimizer: Annotated[
        str,
        Option("Algorithm that updates the weights.", group="Optimizer", metavar="|".join(OPTIMIZERS)),
    ] = "adamw"
    learning_rate: Annotated[float, Option("Learning rate, after the warm-up if there is one.")] = 1e-3
    embedding_learning_rate: Annotated[
        float | None,
        Option("Learning rate of the embedding, on the same schedule.", group="Optimizer", default="that of the rest"),
    ] = None
    lr_schedule: Annotated[
        str, Option("How the learning rate changes after the warm-up.", group="Optimizer", metavar="|".join(SCHEDULES))
    ] = "cosine"
    max_grad_norm: Annotated[
        float | None, Option("Scale gradients with a larger norm down to this norm.", group="Optimizer")
    ] = 1.0
    z_loss: Annotated[
        float,
        Option("Add this times the squared log-sum-exp of the logits to the loss, as CoreNet does.", group="Optimizer"),
    ] = 1e-4
    ema_decay: Annotated[
        float | None,
        Option(
            "Also average the weights, keeping this share of the average in each step; written as model-ema.",
            group="Optimizer",
            default="off",
        ),
    ] = None
    average_last: Annotated[
        int | None,
        Option("Also write the mean of the last N checkpoints, as model-average.", group="Checkpoints", default="off"),
    ] = None
    skip_spikes: Annotated[
        float | None,
        Option(
            "Skip a batch whose loss or gradient norm is this many standard deviations above the last steps' mean.",
            group="Training",
            default="off",
        ),
    ] = None
    spike_window: Annotated[
        int, Option("Steps that --skip-spikes compares with; it starts when half of them are done.", group="Training")
    ] = 128
    val_batches: Annotated[
        int, Option("Batches of a validation; -1 is all, 0 turns validation off.", group="Validation and test")
    ] = -1
    early_stop: Annotated[
        int | None,
        Option(
            "Stop after N validations without a new best loss, and keep the best weights.",
            group="Validation and test",
        ),
    ] = None
    output: Annotated[
        str, Option("Folder of the run: model/, metrics.jsonl, checkpoints and plots.", metavar="FOLDER")
    ] = "pretrained"
    resume: Annotated[
        bool, Option("Continue the run in --output exactly where it stopped; its other flags need not be repeated.")
    ] = False
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
    def packs_rows(self) -> bool:
        """Whether rows of training hold several documents."""
        return self.mode == PACKED

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.batch_tokens, self.batch_size, self.max_seq_length, self.grad_accumulation_steps
        # `check` reports values of other types, and batches that do not fit.
        if all(isinstance(size, int) and size > 0 for size in sizes) and self.grad_accumulation_steps == 1:
            assert self.batch_tokens is not None
            batches = max(1, self.batch_tokens // (self.batch_size * self.max_seq_length))
            object.__setattr__(self, "grad_accumulation_steps", batches)

    def check(self) -> None:
        """Check all values, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        super().check()
        self.check_data()
        if not self.output.strip():
            raise RequestError("--output must name a folder to train into.")
        if self.epochs is not None:
            raise RequestError("--epochs is for fine-tuning; pretraining's data has no end, so give --iters.")
        if self.packing:
            raise RequestError("--packing is for fine-tuning; give --mode packed, which is the default.")
        self._check_batch()
        if self.optimizer_dtype == BFLOAT16:
            for field in ("ema_decay", "embedding_learning_rate"):
                if getattr(self, field) is not None:
                    raise RequestError(f"{flag(field)} needs --optimizer-dtype float32.")
        if self.mode == CORENET and self.label_smoothing:
            raise RequestError("--label-smoothing is for --mode packed; CoreNet's loss has none.")

    def _check_batch(self) -> None:
        positions = self.batch_size * self.max_seq_length * self.grad_accumulation_steps
        if self.batch_tokens is not None and self.batch_tokens != positions:
            raise RequestError(
                f"--batch-tokens {self.batch_tokens} is not --batch-size {self.batch_size} x --max-seq-length "
                f"{self.max_seq_length} x --grad-accumulation-steps {self.grad_accumulation_steps} = {positions}."
            )
