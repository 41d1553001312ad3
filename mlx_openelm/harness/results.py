"""The results of an evaluation, and the file that holds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.atomic import new_file
from ..inputs import MAX_BYTES, read_bytes
from .statistics import mean, standard_error

PROGRAM, KIND = "mlx-openelm", "evaluation"
# More than the scores of all of MMLU's questions take.
_MAX_BYTES = 16 * MAX_BYTES


def prompts_hash(asked: Any) -> str:
    """A hash of all prompts and choices of a task, so that equal ones can be recognized."""
    text = json.dumps(asked, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


@dataclass
class TaskResult:
    """What a task found.

    Attributes:
        metrics: by name, with the standard error as `NAME_stderr`; behind a comma the filter of lm-eval that answers
            went through, as in `exact_match,strict-match` and `exact_match_stderr,strict-match`.
        questions: how many were asked.
        scores: for each metric the score of each question, in order.
        prompts: their `prompts_hash`.
        num_fewshot, version, data: examples in a prompt, the task's version in lm-eval, and where questions are from.
        parts: of a group, the tasks and groups in it.
    """

    metrics: dict[str, float]
    questions: int
    scores: dict[str, list[float]] = field(default_factory=dict)
    prompts: str = ""
    num_fewshot: int = 0
    version: str | None = None
    data: str | None = None
    parts: list[str] = field(default_factory=list)

    def error(self, metric: str) -> float | None:
        """The standard error of a metric, if it is known."""
        name, comma, its_filter = metric.partition(",")
        return self.metrics.get(f"{name}_stderr{comma}{its_filter}")

    @classmethod
    def of(cls, scores: Mapping[str, Sequence[float]], **about: Any) -> TaskResult:
        """The means of scores, with their standard errors."""
        metrics: dict[str, float] = {}
        for name, values in scores.items():
            metrics |= {name: mean(values), f"{name}_stderr": standard_error(values)}
        count = len(next(iter(scores.values())))
        return cls(metrics, count, {name: list(values) for name, values in scores.items()}, **about)


@dataclass
class Result:
    """The result of an evaluation.

    Attributes:
        model: name, revision, adapter, type, bits, parameters, bytes, and a fingerprint of the weights.
        tasks: by name; those of a group, such as MMLU's subjects, too.
        missing: tasks that could not run, with the reason.
        settings: the options that change answers.
        versions: of this package and of what computes.
        speed: requests, seconds, requests per second; only of requests that were not answered before.
    """

    model: dict[str, Any]
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    suite: str | None = None
    mode: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    date: str = ""

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Each task's metrics."""
        return {name: task.metrics for name, task in self.tasks.items()}

    @property
    def name(self) -> str:
        """A short name for tables: the model, its adapter, its bits."""
        adapter = self.model.get("adapter")
        return f"{self.model['name']} + {adapter}" if adapter else str(self.model["name"])

    def to_json(self) -> dict[str, Any]:
        """As it is saved: `results` by task and metric, and everything else beside them."""
        values = asdict(self)
        tasks = values.pop("tasks")
        for task in tasks.values():
            task.pop("metrics")
        return {"program": PROGRAM, "kind": KIND, "results": self.results, **values, "tasks": tasks}

    def save(self, path: Path) -> None:
        """Write the result; the file appears complete or not at all."""
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
        with new_file(path) as partial:
            partial.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Result:
        """Read a saved result.

        Raises:
            RequestError: the file cannot be read, or is not a result.
        """
        try:
            values = json.loads(read_bytes(path, max_bytes=_MAX_BYTES))
            if (values.pop("program"), values.pop("kind")) != (PROGRAM, KIND):
                raise ValueError
            results, tasks = values.pop("results"), values.pop("tasks")
            found = {name: TaskResult(metrics=results[name], **tasks[name]) for name in results}
            return cls(tasks=found, **values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{path} is not a result of `mlx-openelm evaluate`.") from None
