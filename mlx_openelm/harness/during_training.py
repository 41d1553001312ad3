"""Tasks on a model that is being trained."""

from __future__ import annotations

from typing import Any

from ..errors import RequestError
from ..inputs import to_path
from ..model import OpenELM
from ..text.tokenizer import Tokenizer
from . import commonsense
from .evaluating import Progress, measure
from .options import EvaluateOptions

# In front of the names of CoreNet's fine-tuning tasks, some of which lm-eval has too.
_OURS = "commonsense/"


class TrainingTasks:
    """Tasks by name: lm-eval's, or CoreNet's as `commonsense/openbookqa`.

    Args:
        names: the tasks, with commas.
        data: the folder with their data; by default they are downloaded.
        limit: how many questions of each are asked.

    Raises:
        RequestError: an unknown task, one without data, or lm-eval is missing.
        OpenELMError: a download that failed.
    """

    def __init__(self, names: str, data: str | None, limit: int):
        listed = [name.strip() for name in names.split(",") if name.strip()]
        ours = [name.removeprefix(_OURS) for name in listed if name.startswith(_OURS)]
        others = [name for name in listed if not name.startswith(_OURS)]
        folder = None if data is None else to_path(data)
        if folder is not None and not folder.is_dir():
            raise RequestError(f"--eval-tasks-data must be a folder; {data} is none.")
        common: dict[str, Any] = {"data": data, "limit": limit}
        self._options = []
        if both := {commonsense.find_task(name).name for name in ours} & set(others):
            raise RequestError(
                f"--eval-tasks names {min(both)} of lm-eval and of CoreNet, whose metrics have one name; take one."
            )
        if ours:
            self._options.append(EvaluateOptions(suite="commonsense", tasks=tuple(ours), **common))
            for name in ours:  # before a long run, not in it
                commonsense.questions(commonsense.find_task(name), folder)
        if others:
            from . import lm_tasks

            lm_tasks.prepare()
            lm_tasks.check(others, folder, "--eval-tasks-data")
            self._options.append(EvaluateOptions(tasks=tuple(others), **common))
        if not self._options:
            raise RequestError("--eval-tasks names no task.")

    def measure(self, model: OpenELM, tokenizer: Tokenizer, *, progress: Progress | None = None) -> dict[str, float]:
        """The tasks' metrics as `TASK_METRIC`.

        Raises:
            OpenELMError: no task could run.
        """
        values: dict[str, float] = {}
        for options in self._options:
            result = measure(model, tokenizer, options, {"name": "training"}, progress=progress)
            for task, metrics in result.results.items():
                values |= {f"{task}_{name}": value for name, value in metrics.items()}
        return values
