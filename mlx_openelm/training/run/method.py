"""What a kind of tuning has of its own; everything else is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from ..data.batches import Batches
from ..options import FineTuneOptions
from ..step.evaluation import Evaluation, evaluate
from ..step.objectives import CrossEntropy, Objective
from ..step.updater import Updater
from .preparing import Prepared, prepare
from .request import Request

# Measures the loss of held-out batches.
Measure = Callable[[Iterable[Any]], Evaluation]


class Method:
    """Supervised fine-tuning; other kinds derive from it.

    Attributes:
        options: the dataclass of its options, whose `command` a run's record names.
        batches_type: makes its batches.
    """

    options: type[FineTuneOptions] = FineTuneOptions
    batches_type: type[Batches] = Batches

    def prepare(self, request: Request) -> Prepared:
        """Load the model and the data."""
        return prepare(request.model, request.options, request.loading, request.listener)

    def complete(self, request: Request, prepared: Prepared, *, keep: bool) -> None:
        """Work that takes time, before the model is made trainable.

        Args:
            keep: whether the run's folder may be written to.
        """

    def batches(self, request: Request, prepared: Prepared, updater: Updater) -> Batches:
        """The data of each update."""
        options = request.options
        return self.batches_type(
            prepared.examples["train"].examples,
            batch_size=options.batch_size,
            grad_accumulation_steps=options.grad_accumulation_steps,
            world_size=request.processes.size,
            packing=options.packing,
            max_seq_length=prepared.max_seq_length,
            seed=options.seed,
            make=prepared.makers.get("train"),
        )

    def further_memory(self, request: Request, prepared: Prepared) -> tuple[int, int]:
        """Bytes that are held beside what an update needs, and that are needed between updates."""
        return 0, 0

    def measure(self, request: Request, prepared: Prepared, updater: Updater | None) -> Measure:
        """Measures the loss of held-out batches.

        Args:
            updater: has the weights; None for those of the model.
        """
        if updater is not None:
            return updater.evaluate
        return partial(evaluate, prepared.model, objective=self.objective(request), group=request.processes.group)

    def record(self) -> dict[str, Any]:
        """What the run's record has of this method alone; it must be the same when the run is continued."""
        return {}

    def objective(self, request: Request) -> Objective:
        """What is minimized."""
        return CrossEntropy(z_loss=request.options.z_loss, label_smoothing=request.options.label_smoothing)

    def counts(self, request: Request) -> str:
        """What a step counts, in the names of logged numbers."""
        return "tokens"

    def title(self, request: Request) -> str:
        """The beginning of the plot's title."""
        return "Fine-tuning"
