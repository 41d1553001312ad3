"""The options of preference tuning: those of fine-tuning, and the loss's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...errors import RequestError, quote
from ...options import Option
from ...wording import did_you_mean, flag, one_of
from . import FineTuneOptions

# The losses of pairs that may be added up, those that take no reference model, and that of labeled answers.
COMBINED = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "sigmoid_norm", "sft")
REFERENCE_FREE = ("orpo", "cpo", "simpo")
LABELED = ("kto",)
LOSSES = (*COMBINED, *REFERENCE_FREE, *LABELED)

# The losses that each option is for.
_OF_LOSSES = {
    "beta": tuple(name for name in LOSSES if name != "sft"),
    "label_smoothing": ("sigmoid", "sigmoid_norm", "robust", "cpo", "simpo"),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": LABELED,
    "undesirable_weight": LABELED,
}
_DEFAULT_CPO_ALPHA, _DEFAULT_SIMPO_GAMMA, _DEFAULT_WEIGHT = 1.0, 0.5, 1.0


@dataclass(frozen=True, kw_only=True, repr=False)
class PreferenceOptions(FineTuneOptions):
    """The options of `mlx-openelm dpo`, apart from the model.

    Args:
        loss_type: some of `LOSSES`; several of `COMBINED` are added up, with `loss_weights`, by default 1 each.
        max_seq_length: the tokens of an answer with its prompt; longer ones lose their end.
        max_prompt_length: the tokens of a prompt; longer ones lose their beginning.
        ref_model: as `load` takes it; None is the model itself as it was before training, without any adapter.
        z_loss, mask_prompt: of fine-tuning; they must keep their defaults.
    """

    command = "dpo"

    batch_size: Annotated[int, Option("Pairs per batch.")] = 4
    max_seq_length: Annotated[
        int, Option("Tokens of an answer with its prompt; longer ones lose their end.", group="Data")
    ] = 1024
    max_prompt_length: Annotated[
        int | None,
        Option("Tokens of a prompt; longer ones lose their beginning.", group="Data", default="no limit of its own"),
    ] = None
    packing: Annotated[
        bool, Option("Pack several pairs into a row; the answers do not attend to each other.", group="Data")
    ] = False
    long_examples: Annotated[
        str,
        Option(
            "What to do with answers of more than --max-seq-length tokens.", group="Data", metavar="truncate|refuse"
        ),
    ] = "truncate"
    test: Annotated[
        bool,
        Option(
            "Measure loss and accuracy on the test pairs: after training, or of the adapter in --adapter-path.",
            group="Validation and test",
        ),
    ] = False
    loss_type: Annotated[
        tuple[str, ...],
        Option("What is minimized; several, with commas, are added up.", metavar="|".join(LOSSES), default="sigmoid"),
    ] = ("sigmoid",)
    loss_weights: Annotated[
        tuple[float, ...] | None,
        Option("Weights of several losses, with commas.", group="Loss", metavar="NUMBERS", default="1 each"),
    ] = None
    beta: Annotated[
        float, Option("How much a difference from the reference model counts; ipo's tau, and ORPO's lambda.")
    ] = 0.1
    label_smoothing: Annotated[
        float, Option("Share of the pairs whose answers may be the wrong way round.", group="Loss")
    ] = 0.0
    reference_free: Annotated[
        bool, Option("Compare with no reference model: take its log-probabilities as 0.", group="Loss")
    ] = False
    ref_model: Annotated[
        str | None,
        Option(
            "Reference model, with the same tokenizer.",
            group="Loss",
            metavar="MODEL",
            default="the model itself, without adapters",
        ),
    ] = None
    cpo_alpha: Annotated[
        float | None,
        Option(
            "Weight of the chosen answers' likelihood in cpo and simpo.", group="Loss", default="1 for cpo, 0 for simpo"
        ),
    ] = None
    simpo_gamma: Annotated[
        float | None,
        Option("Margin of the rewards that simpo aims at.", group="Loss", default=f"{_DEFAULT_SIMPO_GAMMA:g}"),
    ] = None
    desirable_weight: Annotated[
        float | None,
        Option("Weight of desirable answers in kto.", group="Loss", default=f"{_DEFAULT_WEIGHT:g}"),
    ] = None
    undesirable_weight: Annotated[
        float | None,
        Option("Weight of undesirable answers in kto.", group="Loss", default=f"{_DEFAULT_WEIGHT:g}"),
    ] = None
    # Without flags: they mean nothing here.
    z_loss: float = 0.0
    mask_prompt: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", tuple(name.strip() for name in self.loss_type.split(",")))
        super().__post_init__()

    @property
    def labeled(self) -> bool:
        """Whether the loss learns from labeled answers, not pairs."""
        return self.loss_type == LABELED

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs log-probabilities of a reference model."""
        return not self.reference_free and self.loss_type[0] not in REFERENCE_FREE and self.loss_type != ("sft",)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss."""
        return dict(zip(self.loss_type, self.loss_weights or (1.0,) * len(self.loss_type), strict=True))

    @property
    def alpha_of_likelihood(self) -> float:
        """`cpo_alpha`, or its default for the loss: as in SimPO's paper it has no such term."""
        default = 0.0 if self.loss_type == ("simpo",) else _DEFAULT_CPO_ALPHA
        return default if self.cpo_alpha is None else self.cpo_alpha

    @property
    def margin(self) -> float:
        """`simpo_gamma`, or its default."""
        return _DEFAULT_SIMPO_GAMMA if self.simpo_gamma is None else self.simpo_gamma

    @property
    def label_weights(self) -> tuple[float, float]:
        """The weights of desirable and undesirable answers, or their defaults."""
        given = self.desirable_weight, self.undesirable_weight
        return tuple(_DEFAULT_WEIGHT if weight is None else weight for weight in given)  # type: ignore[return-value]

    def packs(self, split: str) -> bool:
        """Whether pairs of a split share rows: those of training alone, as held-out ones are measured in batches."""
        return self.packing and split == "train"

    def check(self) -> None:
        """Check all values, before any work.

        Raises:
            RequestError: an invalid value; the message names its flag.
        """
        self._check_losses()
        super().check()
        if self.beta == 0:
            raise RequestError("--beta must be more than 0, got 0.0.")
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_seq_length:
            raise RequestError(
                f"--max-prompt-length must be less than --max-seq-length ({self.max_seq_length}), got "
                f"{self.max_prompt_length}: the completion needs room."
            )
        if not self.uses_reference and self.ref_model is not None:
            why = "--reference-free has none" if self.reference_free else f"--loss-type {self.loss_type[0]} takes none"
            raise RequestError(f"--ref-model is a reference model, and {why}; leave it out.")
        if self.packing and self.labeled:
            raise RequestError("--packing is for pairs, not for --loss-type kto.")
        if self.labeled and self.batch_size == 1:
            raise RequestError(
                "--loss-type kto estimates the distance from the reference model from a whole batch; give "
                "--batch-size 2 or more."
            )
        for name in ("z_loss", "mask_prompt"):
            if getattr(self, name):
                raise RequestError(f"{flag(name)} is for `mlx-openelm lora`; here only completions count.")

    def _check_losses(self) -> None:
        names = self.loss_type
        if not isinstance(names, tuple) or not names:
            raise RequestError(f"--loss-type must be {one_of(LOSSES)}.")
        for name in names:
            if name not in LOSSES:
                hint = did_you_mean(str(name), LOSSES)
                raise RequestError(f"--loss-type must be {one_of(LOSSES)}, got {quote(name)}{hint and f'; {hint}'}")
        if len(names) > 1 and (alone := next((name for name in names if name not in COMBINED), None)) is not None:
            raise RequestError(f"--loss-type {alone} cannot be combined with others; {one_of(COMBINED)} can.")
        if len(set(names)) < len(names):
            raise RequestError("--loss-type names a loss twice; give each once, with --loss-weights.")
        if self.loss_weights is not None and len(self.loss_weights) != len(names):
            raise RequestError(
                f"--loss-weights must have a number for each of --loss-type's {len(names)}, got "
                f"{len(self.loss_weights)}."
            )
        if self.loss_weights is not None and names == LABELED:
            raise RequestError("--loss-weights is for losses of pairs, not for --loss-type kto; leave it out.")
        if self.loss_weights is not None and not any(self.loss_weights):
            raise RequestError("--loss-weights are all 0, so nothing would be learned; give one above 0.")
        if self.reference_free and (names[0] in REFERENCE_FREE or names == ("sft",)):
            raise RequestError(f"--loss-type {names[0]} takes no reference model anyway; leave out --reference-free.")
        for option, owners in _OF_LOSSES.items():
            if getattr(self, option) != getattr(type(self), option) and not set(owners) & set(names):
                raise RequestError(f"{flag(option)} is for --loss-type {one_of(owners)}.")
        if "robust" in names and not 0 <= self.label_smoothing < 0.5:
            raise RequestError(f"--label-smoothing must be less than 0.5 for robust, got {self.label_smoothing:g}.")
