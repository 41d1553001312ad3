"""Tasks that are measured during training: `--eval-tasks`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ...text.tokenizer import Tokenizer
from ..options import TrainOptions
from .listener import Listener

if TYPE_CHECKING:
    from ..step.updater import Updater

# Measures the tasks; metrics by name.
Tasks = Callable[[], Mapping[str, float]]


def make_tasks(options: TrainOptions, updater: Updater, tokenizer: Tokenizer, listener: Listener) -> Tasks | None:
    """A function that measures the tasks on the weights of the moment; None if there are none.

    To be called before the run's folder is cleared, since it finds mistakes in `--eval-tasks`.

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
