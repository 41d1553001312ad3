"""What a kind of tuning has of its own; everything else is the same for all of them."""

from __future__ import annotations

from ..data.batches import Batches
from ..options import FineTuneOptions
from ..step.objectives import CrossEntropy, Objective
from .preparing import Prepared, prepare
from .request import Request


class Method:
    """Supervised fine-tuning; other kinds derive from it.

    Attributes:
        options: the dataclass of its options, whose `command` a run's record names.
        batches: makes its batches.
    """

    options: type[FineTuneOptions] = FineTuneOptions
    batches: type[Batches] = Batches

    def prepare(self, request: Request) -> Prepared:
        """Load the model and the data."""
        return prepare(request.model, request.options, request.loading, request.listener)

    def complete(self, request: Request, prepared: Prepared, *, keep: bool) -> None:
        """Work that takes time, before the model is made trainable.

        Args:
            keep: whether the run's folder may be written to.
        """

    def objective(self, request: Request) -> Objective:
        """What is minimized."""
        return CrossEntropy(z_loss=request.options.z_loss, label_smoothing=request.options.label_smoothing)

    def counts(self, request: Request) -> str:
        """What a step counts, in the names of logged numbers."""
        return "tokens"

    def title(self, request: Request) -> str:
        """The beginning of the plot's title."""
        return "Fine-tuning"
