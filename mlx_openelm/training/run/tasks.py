"""Tasks that are measured during training: `--eval-tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...text.tokenizer import Tokenizer
from ..options import TrainOptions
from .listener import Listener

if TYPE_CHECKING:
    from ..step.updater import Updater


def make_tasks(
    options: TrainOptions, updater: Updater, tokenizer: Tokenizer, listener: Listener
) -> Callable[[], Mapping[str, float]] | None:
    """A function that measures the tasks on the weights of the moment; None if there are none.

    Raises:
        RequestError: an unknown task, or one without data.
    """
    if not options.eval_tasks:
        return None
    from ...harness.during_training import TrainingTasks

    tasks = TrainingTasks(options.eval_tasks, options.eval_tasks_data, options.eval_tasks_limit)

    def measure() -> Mapping[str, float]:
        with updater.computing() as model:
            return tasks.measure(model, tokenizer, progress=listener.working)

    return measure
