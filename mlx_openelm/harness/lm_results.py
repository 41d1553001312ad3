"""What lm-eval found, as results of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .results import TaskResult, prompts_hash


def results(found: Mapping[str, Any]) -> dict[str, TaskResult]:
    """lm-eval's results by task and group, with one number for each metric."""
    parts: Mapping[str, list[str]] = found.get("group_subtasks", {})
    made: dict[str, TaskResult] = {}
    for name, values in found["results"].items():
        samples = found["samples"].get(name, [])
        version = found["versions"].get(name)
        tasks = _leaves(name, parts)
        made[name] = TaskResult(
            metrics=_metrics(values),
            questions=sum(found["n-samples"].get(task, {}).get("effective", 0) for task in tasks),
            scores=_scores(samples),
            prompts=prompts_hash([sample["arguments"] for sample in samples]) if samples else "",
            num_fewshot=max(int(found["n-shot"].get(task) or 0) for task in tasks),
            version=None if version is None else str(version),
            data=found["configs"].get(name, {}).get("dataset_path"),
            parts=list(parts.get(name, [])),
        )
    return made


def _leaves(name: str, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group, those of groups in it too; of a task itself."""
    return [leaf for part in parts[name] for leaf in _leaves(part, parts)] if name in parts else [name]


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Metrics by name; of a filter other than `none`, with the filter's name behind a comma."""
    metrics: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in key:
            metrics[key.removesuffix(",none")] = float(value)
    return metrics


def _scores(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """For each metric that is a number for each question, the scores in the questions' order."""
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            value = sample.get(metric)
            if isinstance(value, int | float):
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                scores.setdefault(name, []).append(float(value))
    return scores


def records(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions of all tasks, with their prompts, answers and scores."""
    records = []
    for task, samples in found["samples"].items():
        for sample in samples:
            metrics = {name: sample[name] for name in sample["metrics"] if name in sample}
            records.append(
                {
                    "task": task,
                    "question": sample["doc_id"],
                    "target": sample["target"],
                    "requests": sample["arguments"],
                    "answers": sample["filtered_resps"],
                    **_before_filter(sample),
                    **metrics,
                }
            )
    return records


def _before_filter(sample: Mapping[str, Any]) -> dict[str, Any]:
    """The name of the filter that the answers went through, if any, and the answers as the model gave them."""
    if sample["filter"] == "none":
        return {}
    return {"filter": sample["filter"], "unfiltered": sample["resps"]}
