"""The paper's suites: their tasks and shots, and the metric of each task in Apple's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..hub import catalog
from . import commonsense, memorization

# The metric that stands for a task in a table: the paper's (arXiv:2404.14619, appendix).
METRICS = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "crows_pairs_english": "pct_stereotype",
    "train": "verbatim",
    "held_out": "verbatim",
}
# Suites of ours, with the examples in a prompt; those of the tables are in the catalog.
OWN = {
    "risk": {"crows_pairs_english": 0, "truthfulqa_mc1": 0, "truthfulqa_mc2": 0},
    "memorization": dict.fromkeys(memorization.SPLITS, 0),
}
_PREFERRED = ("acc", "exact_match", "f1", "word_perplexity")
# Where lm-eval has the tasks of the suites, so that not all of its 14,000 files need to be read.
FOLDERS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "boolq": "super_glue/boolq",
    "crows_pairs_english": "crows_pairs",
    "hellaswag": "hellaswag",
    "mmlu": "mmlu/default",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "race": "race",
    "sciq": "sciq",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "winogrande": "winogrande",
}


# Data sets whose licenses do not permit every use.
LICENSES = {
    "race": "for research that is not commercial",
    "sciq": "not for commercial use (CC BY-NC 3.0)",
}


@dataclass(frozen=True)
class Wanted:
    """A task to run, with its examples in a prompt; None leaves that to the task."""

    name: str
    shots: int | None = None


def wanted(suite: str, names: list[str]) -> list[Wanted]:
    """The tasks of a suite with their shots, or those of them that have these names.

    Raises:
        RequestError: a name that the suite does not have.
    """
    if suite == "commonsense":
        tasks = [commonsense.find_task(name) for name in names] if names else commonsense.TASKS
        return [Wanted(task.name, 0) for task in tasks]
    shots = OWN.get(suite) or paper_shots(suite)
    for name in names:
        if name not in shots:
            raise RequestError(f"--suite {suite} has no task {name!r}; it has {', '.join(shots)}.")
    return [Wanted(name, shots[name]) for name in names or shots]


def paper_shots(suite: str | None) -> dict[str, int]:
    """The examples in a prompt by task of one of the paper's tables; empty if a suite is none of them."""
    return catalog.published_scores()["shots"].get(suite, {})


def metric_of(task: str, metrics: dict[str, Any]) -> str | None:
    """The metric that stands for a task in a table; None if it has none."""
    names = metric_names(metrics)
    for wanted_name in (METRICS.get(task), *_PREFERRED):
        for name in names:
            if name.partition(",")[0] == wanted_name:  # whatever the filter
                return name
    return names[0] if names else None


def metric_names(metrics: dict[str, Any]) -> list[str]:
    """The metrics without their standard errors."""
    return [name for name in metrics if "_stderr" not in name]
