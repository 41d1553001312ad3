"""Results as pictures; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats.atomic import new_file
from . import compare
from .leaderboard import Entry
from .results import Result


def draw_leaderboard(entries: Sequence[Entry], path: Path, title: str) -> None:
    """The averages against parameters, bytes, and measured speed where results have one."""
    axes = [("parameters", "Parameters (millions)", 1e6), ("bytes", "Size (GB)", 1e9)]
    if any(entry.speed is not None for entry in entries):
        axes.append(("speed", "Requests per second", 1.0))
    figure = _figure(4.5 * len(axes), 4.2)
    for number, (name, label, unit) in enumerate(axes, 1):
        plot = figure.add_subplot(1, len(axes), number)
        shown = [entry for entry in entries if getattr(entry, name) is not None]
        for entry in shown:
            x, y = getattr(entry, name) / unit, 100 * entry.average
            error = None if entry.error is None else 100 * entry.error
            color = "tab:gray" if entry.published else "tab:blue"
            plot.errorbar(x, y, yerr=error, fmt="s" if entry.published else "o", color=color, capsize=3)
            plot.annotate(entry.name, (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7)
        plot.set_xscale("log")
        values = [getattr(entry, name) for entry in shown]
        plot.xaxis.set_major_formatter(_plain)
        plot.xaxis.set_minor_formatter(_plain if max(values) < 5 * min(values) else lambda *_: "")
        plot.set_xlabel(label)
        plot.margins(x=0.25)
        if number == 1:
            plot.set_ylabel("Average (%)")
    _save(figure, path, title)


def draw_comparison(result: Result, path: Path) -> None:
    """A result's tasks beside what was published."""
    rows, columns = compare.rows(result), list(compare.published(result))
    figure = _figure(max(5.0, 1.2 * len(rows)), 4.2)
    plot = figure.add_subplot()
    width = 0.8 / (1 + len(columns))
    for number, name in enumerate([result.name, *columns]):
        values = [100 * (row.ours if not number else row.published.get(name, float("nan"))) for row in rows]
        errors = [100 * (row.error or 0.0) for row in rows] if not number else None
        places = [place + number * width for place in range(len(rows))]
        plot.bar(places, values, width, yerr=errors, label=name, capsize=3)
    plot.set_xticks([place + width * len(columns) / 2 for place in range(len(rows))])
    plot.set_xticklabels([row.task for row in rows], rotation=30, ha="right")
    plot.set_ylabel("Score (%)")
    plot.legend(fontsize=7)
    _save(figure, path, result.name)


def draw_course(scores: Mapping[str, Mapping[int, float]], path: Path, title: str) -> None:
    """Scores of tasks, from 0 to 1, over training iterations."""
    figure = _figure(6.4, 4.2)
    plot = figure.add_subplot()
    for task, course in scores.items():
        steps = sorted(course)
        plot.plot(steps, [100 * course[step] for step in steps], marker="o", markersize=3, label=task)
    plot.set_xlabel("Iteration")
    plot.set_ylabel("Score (%)")
    plot.legend(fontsize=7)
    _save(figure, path, title)


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=150)
