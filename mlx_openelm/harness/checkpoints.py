"""Apple's intermediate checkpoints on tasks: scores over the iterations of pretraining."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RequestError
from ..formats.atomic import new_file
from ..hub import catalog
from ..inputs import read_json, to_path
from . import compare
from .evaluating import Progress, evaluate
from .options import EvaluateOptions
from .results import PROGRAM, Result
from .tables import percent

KIND = "evaluation of checkpoints"


def evaluate_checkpoints(
    name: str,
    options: EvaluateOptions,
    *,
    dtype: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    progress: Progress | bool | None = True,
) -> dict[int, Result]:
    """Measure the published checkpoints of `corenet:SIZE`; the results by iteration.

    Each result is beside `options.output`, with the iteration in its name, so that a stopped run goes on.

    Raises:
        RequestError, OpenELMError: as `evaluate`.
    """
    output = None if options.output is None else to_path(options.output)
    if output is not None and not overwrite:
        _check_output(output)
    results = {}
    for step, model in catalog.corenet_checkpoints(name).items():
        own = None if output is None else str(output.with_name(f"{output.stem}-{step}{output.suffix}"))
        settings: dict[str, Any] = {"dtype": dtype, "tokenizer": tokenizer, "overwrite": overwrite}
        results[step] = evaluate(model, replace(options, output=own), **settings, progress=progress)
    if output is not None:
        save(results, output)
    return results


def _check_output(output: Path) -> None:
    """Refuse an output that holds something else, before anything is computed."""
    if not output.exists():
        return
    values: dict[str, Any] = {}
    with contextlib.suppress(RequestError):
        values = read_json(output)
    if (values.get("program"), values.get("kind")) == (PROGRAM, KIND):
        return
    raise RequestError(f"{output} exists, and is no evaluation of checkpoints; give another --output, or --overwrite.")


def save(results: dict[int, Result], path: Path) -> None:
    """Write the metrics of all checkpoints; the file appears complete or not at all."""
    values = {"program": PROGRAM, "kind": KIND, "results": to_json(results)}
    with new_file(path) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def to_json(results: dict[int, Result]) -> dict[str, Any]:
    return {str(step): result.results for step, result in results.items()}


def courses(results: dict[int, Result]) -> dict[str, dict[int, float]]:
    """For each task its score by iteration, and their average where nothing is missing."""
    found: dict[str, dict[int, float]] = {}
    for step, result in results.items():
        for row in compare.rows(result):
            found.setdefault(row.task, {})[step] = row.ours
    return found


def table(results: dict[int, Result]) -> list[list[str]]:
    """A line for each checkpoint, in percent."""
    scores = courses(results)
    lines = [["iteration", *scores]]
    for step in results:
        lines.append([f"{step:,}", *(percent(course.get(step)) for course in scores.values())])
    return lines
