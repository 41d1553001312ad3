"""Saved results side by side, what Apple published among them, and tests of two models on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..errors import RequestError
from ..hub import catalog
from ..wording import counted, one_of, size, some
from . import compare
from .results import Result
from .statistics import Paired, paired
from .suites import metric_of
from .tables import percent


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard.

    Attributes:
        scores: shares by task; `average` is their mean.
        error: the standard error of the average, if it is known.
        speed: requests per second of the run, if it computed any.
        published: whether these are Apple's numbers.
    """

    name: str
    scores: dict[str, float]
    average: float
    error: float | None
    parameters: int
    bytes: int
    speed: float | None = None
    published: bool = False


def read(files: Sequence[Path]) -> list[Result]:
    """Saved results.

    Raises:
        RequestError: a file is not one.
    """
    return [Result.read(file) for file in files]


def common_tasks(results: Sequence[Result]) -> list[str]:
    """The tasks that all results have, without the parts of groups.

    Raises:
        RequestError: there is none, or the results are of different suites.
    """
    suites = {(result.suite, result.mode) for result in results}
    if len(suites) > 1:
        names = [" in mode ".join(filter(None, pair)) or "no suite" for pair in suites]
        raise RequestError(f"The results are of different suites: {some(sorted(names))}; compare them one by one.")
    shared = [
        name
        for name, task in results[0].tasks.items()
        if not compare.is_part(name, results[0])
        and metric_of(name, task.metrics) is not None
        and all(name in result.tasks for result in results)
    ]
    if not shared:
        raise RequestError("The results have no task in common.")
    return shared


def entries(results: Sequence[Result], *, published: bool = False) -> list[Entry]:
    """The lines of the leaderboard, the best first; averages are over the tasks that all results have.

    Args:
        published: add Apple's numbers of all eight models, if they have these tasks.

    Raises:
        RequestError: as `common_tasks`; or Apple published nothing of the suite.
    """
    tasks = common_tasks(results)
    found = [_entry(result, tasks) for result in results]
    suite = results[0].suite
    if published:
        suites = list(catalog.published_scores()["scores"])
        if suite not in suites:
            what = "without a suite" if suite is None else f"of --suite {suite}"
            raise RequestError(
                f"--published is for results of --suite {one_of(suites)}; Apple has no such table for results {what}."
            )
        assert suite is not None
        for result in results:
            if others := [task for task in compare.with_other_shots(result) if task in tasks]:
                raise RequestError(
                    f"{result.name} was asked {some(others)} with other numbers of examples than Apple's models; leave "
                    "out --published, or measure it without --num-fewshot."
                )
        for release in catalog.releases():
            scores = {task: value / 100 for task, value in release.scores(suite).items() if task in tasks}
            parameters = ModelConfig.from_name(release.name).num_parameters
            average = math.fsum(scores.values()) / len(scores)
            name = f"{release.display_name} (Apple)"
            found.append(Entry(name, scores, average, None, parameters, 4 * parameters, published=True))
    return sorted(found, key=lambda entry: -entry.average)


def asked_differently(results: Sequence[Result]) -> list[str]:
    """The common tasks in which not all results asked the same questions with the same prompts, as far as is known."""
    return [name for name in common_tasks(results) if len({tuple(_answers(name, None, one)[0]) for one in results}) > 1]


def _entry(result: Result, tasks: Sequence[str]) -> Entry:
    scores, errors = {}, []
    for task in tasks:
        metrics = result.tasks[task].metrics
        metric = metric_of(task, metrics)
        assert metric is not None
        scores[task] = metrics[metric]
        errors.append(result.tasks[task].error(metric))
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(errors) if len(known) == len(errors) else None
    speed = result.speed.get("requests_per_second") if result.speed.get("requests") else None
    return Entry(
        result.name,
        scores,
        math.fsum(scores.values()) / len(scores),
        error,
        result.model["parameters"],
        result.model["bytes"],
        speed,
    )


def table(lines: Sequence[Entry]) -> list[list[str]]:
    """The leaderboard as a table, in percent."""
    tasks = list(lines[0].scores)
    head = ["model", "average", *tasks, "parameters", "bits", "size", "requests/s"]
    rows = [head]
    for entry in lines:
        scores = [percent(entry.scores[task]) if task in entry.scores else "-" for task in tasks]
        bits = f"{8 * entry.bytes / entry.parameters:.3g}"
        about = [f"{entry.parameters / 1e6:,.0f}M", bits, size(entry.bytes)]
        speed = "-" if entry.speed is None else f"{entry.speed:,.1f}"
        rows.append([entry.name, percent(entry.average, entry.error), *scores, *about, speed])
    return rows


def tests(first: Result, second: Result) -> dict[str, Paired]:
    """For each task that both results have, and its metric, how they differ question by question.

    Only where both asked the same questions with the same prompts.
    """
    found = {}
    for name in common_tasks([first, second]):
        metric = metric_of(name, first.tasks[name].metrics)
        (asked, ours), (same, theirs) = (_answers(name, metric, result) for result in (first, second))
        if asked and asked == same and ours and len(ours) == len(theirs):
            found[name] = paired(ours, theirs)
    return found


def _answers(name: str, metric: str | None, result: Result) -> tuple[list[str], list[float]]:
    """The hashes of the prompts of a task, or of all tasks of a group, and the score of each question."""
    task = result.tasks[name]
    if not task.parts:
        return ([task.prompts] if task.prompts else []), task.scores.get(metric or "", [])
    found = [_answers(part, metric, result) for part in task.parts if part in result.tasks]
    return [text for texts, _ in found for text in texts], [score for _, scores in found for score in scores]


def tests_table(first: Result, second: Result) -> list[list[str]]:
    """The tests as a table."""
    rows = [["task", "questions", "difference", "better", "worse", "p"]]
    for name, test in tests(first, second).items():
        difference = f"{100 * test.difference:+.2f} ± {100 * test.standard_error:.2f}"
        rows.append([name, f"{test.questions:,}", difference, f"{test.better}", f"{test.worse}", f"{test.p_value:.3g}"])
    return rows


def to_json(lines: Sequence[Entry]) -> list[dict[str, Any]]:
    return [vars(entry) for entry in lines]


def describe(results: Sequence[Result]) -> str:
    """What the averages are over."""
    tasks = common_tasks(results)
    return f"Averages of {counted(len(tasks), 'task')}, in percent; ± is the standard error."
