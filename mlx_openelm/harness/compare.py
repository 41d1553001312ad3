"""A result beside the numbers that Apple published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..hub import catalog
from . import commonsense
from .results import Result, TaskResult
from .suites import METRICS, OWN, metric_names, metric_of, paper_shots
from .tables import percent

# A difference of more standard errors than this is outside what chance explains, in 19 of 20 cases.
OUTSIDE = 1.96
_SHARES = ("acc", "acc_norm", "pct_stereotype", "exact_match", "f1", "verbatim")
AVERAGE = "average"


@dataclass(frozen=True)
class Row:
    """A task, with shares from 0 to 1.

    Attributes:
        published: by the name of the column.
        error: the standard error of `ours`, if it is known.
    """

    task: str
    metric: str
    ours: float
    error: float | None
    questions: int
    published: Mapping[str, float]

    def difference(self, column: str) -> float | None:
        return self.ours - self.published[column] if column in self.published else None

    def is_outside(self, column: str) -> bool | None:
        """Whether the difference is more than chance explains; None where that is not known."""
        difference = self.difference(column)
        if difference is None or not self.error:  # equal answers to a few questions have an error of 0
            return None
        return abs(difference) > OUTSIDE * self.error


def published(result: Result) -> dict[str, dict[str, float]]:
    """What was published for a result's suite, by column and task, in percent.

    The column of the model's own release; for CommonSense those of LoRA and DoRA, of the smallest model where the model
    is none that was published.
    """
    scores = catalog.published_scores()
    release = next((one for one in catalog.releases() if one.name == result.model.get("release")), None)
    if result.suite == "commonsense":
        size = "270M" if release is None else release.size
        names = {task.published: task.name for task in commonsense.TASKS}
        return {
            f"{method} {size}": {names.get(task, task): value for task, value in table.items()}
            for method, table in scores["peft_commonsense"][size].items()
        }
    if release is None or result.suite is None or result.suite not in scores["scores"]:
        return {}
    return {f"Apple {release.display_name}": release.scores(result.suite)}


def rows(result: Result) -> list[Row]:
    """The tasks of a result, and their average if nothing is missing in it.

    What was published stands beside tasks that were asked with the paper's number of examples.
    """
    columns, others = published(result), with_other_shots(result)
    found = []
    for name, task in result.tasks.items():
        if not is_part(name, result) and (metric := metric_of(name, task.metrics)) is not None:
            known = {} if name in others else columns
            beside = {column: table[name] / 100 for column, table in known.items() if name in table}
            found.append(Row(name, metric, task.metrics[metric], task.error(metric), task.questions, beside))
    if len(found) > 1 and result.suite not in OWN and not result.missing and all(is_share(row.metric) for row in found):
        found.append(average(found, columns))
    return found


def with_other_shots(result: Result) -> list[str]:
    """The tasks of a result that had other numbers of examples in their prompts than in the paper's table."""
    shots = paper_shots(result.suite).items()
    return [name for name, count in shots if name in result.tasks and result.tasks[name].num_fewshot != count]


def is_part(name: str, result: Result) -> bool:
    """Whether a task is part of a group in the result that has a score of its own."""
    return any(name in task.parts and metric_of(group, task.metrics) for group, task in result.tasks.items())


def is_share(metric: str) -> bool:
    """Whether a metric is a share, which tables give in percent."""
    return metric.partition(",")[0] in _SHARES


def average(tasks: Sequence[Row], columns: Mapping[str, Mapping[str, float]]) -> Row:
    """The mean over tasks; a published one only beside all of its tasks."""
    names = {row.task for row in tasks}
    complete = {
        column: table[AVERAGE] / 100
        for column, table in columns.items()
        if AVERAGE in table and names == table.keys() - {AVERAGE} and all(column in row.published for row in tasks)
    }
    errors = [row.error for row in tasks if row.error is not None]
    error = math.hypot(*errors) / len(tasks) if len(errors) == len(tasks) else None
    ours = math.fsum(row.ours for row in tasks) / len(tasks)
    return Row(AVERAGE, "", ours, error, sum(row.questions for row in tasks), complete)


def table(result: Result) -> list[list[str]]:
    """The comparison as a table, shares in percent: ours, and for each published column its number and the difference.

    Where nothing was published, all metrics of a task are in it.
    """
    found = rows(result)
    columns = list(published(result))
    shots = any(result.tasks[row.task].num_fewshot for row in found if row.task in result.tasks)
    head = ["task", *(["shots"] if shots else []), "metric", "questions", "ours"]
    for column in columns:
        head += [column, "difference"]
    lines = [head]
    for row in found:
        task: TaskResult | None = result.tasks.get(row.task)
        line = [row.task, *([f"{task.num_fewshot}" if task else ""] if shots else []), row.metric, f"{row.questions:,}"]
        line.append(_value(row.metric or AVERAGE, row.ours, row.error))
        for column in columns:
            line += [percent(row.published.get(column)), _difference(row, column)]
        lines.append(line)
        if task is not None and not columns:
            blank = [""] * (2 if shots else 1)
            others = [name for name in metric_names(task.metrics) if name != row.metric]
            lines += [[*blank, name, "", _value(name, task.metrics[name], task.error(name))] for name in others]
    return lines


def _value(metric: str, value: float, error: float | None) -> str:
    """A metric with its standard error, if there is one."""
    if metric == AVERAGE or is_share(metric):
        return percent(value, error)
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _difference(row: Row, column: str) -> str:
    """A difference in points, with a star if it is more than chance explains."""
    difference = row.difference(column)
    if difference is None:
        return "-"
    return f"{100 * difference:+.2f}{'*' if row.is_outside(column) else ' '}"


def note(result: Result) -> str:
    """What the columns mean."""
    columns = published(result)
    if not columns:
        return "± is the standard error."
    text = f"± is the standard error; * marks a difference of more than {OUTSIDE} of them."
    if result.suite == "commonsense" and result.model.get("release") is None:
        text += " The published numbers are of fine-tuned models of another size."
    if with_other_shots(result):
        text += " Nothing is compared where the paper's prompts had another number of examples."
    if any(name in METRICS for name in result.tasks) and result.mode == "current":
        text += " Some tasks have changed since Apple ran them; --mode paper asks as they did."
    return text


def headline(result: Result) -> list[list[str]]:
    """The paper's first table with a line for the result, if that is a whole run of the suite `openllm`."""
    is_whole = paper_shots(result.suite).keys() <= result.tasks.keys()
    if result.suite != "openllm" or not is_whole or with_other_shots(result):
        return []
    found = rows(result)
    lines = [["model", "tokens", AVERAGE]]
    for name, values in catalog.published_scores()["table1_average_openllm_suite"].items():
        lines.append([name, values["tokens"], f"{values['average']:.2f}"])
    return [*lines, [f"{result.name} (ours)", "", percent(found[-1].ours, found[-1].error)]]


def to_json(result: Result) -> list[dict[str, Any]]:
    """The comparison by task: ours with its standard error, and what was published with the difference."""
    return [
        {
            "task": row.task,
            "metric": row.metric or None,
            "questions": row.questions,
            "ours": row.ours,
            "standard_error": row.error,
            "published": {
                column: {"value": value, "difference": row.difference(column), "outside": row.is_outside(column)}
                for column, value in row.published.items()
            },
        }
        for row in rows(result)
    ]
